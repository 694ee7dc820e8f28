"""Plug-ins: a person's own listeners, named `module.Class`, with EveryDream 2's hook names.

A plug-in is any class with some of these methods; it need not derive from anything:

    on_training_start(run)          on_training_end(run)
    on_epoch_start(run, epoch)      on_epoch_end(run, epoch)
    on_step_start(run, step)        on_step_end(run, report)
    transform_caption(caption) -> caption
    transform_pil_image(image) -> image

EveryDream 2's signature works as well: a hook that takes keyword arguments (`**kwargs`) gets `epoch`, `global_step`,
`local_step`, `epoch_length`, `project_name`, `log_folder`, `data_root`, `batch`, `ed_state`, `arg_update_callback`
where it had them there, `max_epochs` and `run`. What differs is in docs/differences.md.

A plug-in that transforms images switches the latent cache off, since what it makes cannot be known in advance. A hook
that does nothing, such as one inherited from EveryDream 2's `BasePlugin`, is not a hook.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from everydream_kit.errors import ConfigError, KitError
from everydream_kit.training.reports import Listener, ObservedRun, StepReport

if TYPE_CHECKING:
    from PIL import Image

    from everydream_kit.data.records import Batch, StepBatches
    from everydream_kit.training.step import Learner


HOOKS = frozenset(
    {
        *("on_training_start", "on_training_end", "on_epoch_start", "on_epoch_end", "on_step_start", "on_step_end"),
        *("transform_caption", "transform_pil_image"),
    }
)


NOT_CALLED = frozenset(
    {"on_model_load", "on_model_save", "on_backpropagation", "on_will_step_optimizer", "modify_sample_prompt"}
)
"""Hooks of EveryDream 2 and its fork that the kit does not have."""

logger = logging.getLogger(__name__)

_BASE_HINT = " EveryDream 2's BasePlugin is not needed: remove its import, and derive from nothing."


def load_plugins(names: Sequence[str]) -> list[Any]:
    """Make one object of each named class.

    Raises:
        ConfigError: a module or class is not there, or is not a plug-in. Nothing of it is called then.
    """
    plugins = []
    for name in names:
        module_name, _, class_name = name.rpartition(".")
        if not module_name or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"plugins: {name!r} is not a module.Class; for instance my_plugins.Greeter")
        try:
            plugin_class = getattr(importlib.import_module(module_name), class_name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"plugins: {name}: there is no module {error.name}. Put its folder on PYTHONPATH, or install it."
                + (
                    _BASE_HINT
                    if error.name in ("plugins", "plugins.plugins") and not name.startswith("plugins.")
                    else ""
                )
            ) from error
        except AttributeError as error:
            raise ConfigError(f"plugins: the module {module_name} has no class {class_name}.") from error
        if not (isinstance(plugin_class, type) and any(has_hook(plugin_class, hook) for hook in HOOKS)):
            raise ConfigError(
                f"plugins: {name} is not a plug-in: a class with at least one of {', '.join(sorted(HOOKS))}."
            )
        for hook in sorted(NOT_CALLED):
            if has_hook(plugin_class, hook):
                logger.warning("plugins: %s.%s is never called here (docs/differences.md).", name, hook)
        plugins.append(plugin_class())
    return plugins


def name_of(plugin: Any) -> str:
    """`module.Class` of a plug-in."""
    return f"{type(plugin).__module__}.{type(plugin).__qualname__}"


def has_hook(plugin: Any, hook: str) -> bool:
    """Whether a plug-in does something at a hook."""
    method = getattr(plugin, hook, None)
    return callable(method) and not _does_nothing(method, returns_argument=hook.startswith(("transform_", "modify_")))


def _does_nothing(method: Any, *, returns_argument: bool) -> bool:
    """Whether a method's whole body is `pass`, or `return` of its argument."""
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    if code is None:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("RESUME", "NOP", "CACHE")]
    if len(steps) > 2 or steps[-1].opname not in ("RETURN_VALUE", "RETURN_CONST"):
        return False
    if returns_argument:
        return steps[0].opname.startswith("LOAD_FAST") and steps[0].argval == code.co_varnames[code.co_argcount - 1]
    return steps[0].opname in ("LOAD_CONST", "RETURN_CONST") and steps[0].argval is None


def call_hook(plugin: Any, hook: str, arguments: Sequence[Any], facts: Mapping[str, Any] | None = None) -> Any:
    """Call one hook: by position, or by keyword where it takes `**kwargs` or keyword-only arguments.

    Args:
        plugin: whose hook it is.
        hook: its name.
        arguments: by position.
        facts: by keyword; None: this hook has one signature.

    Raises:
        ConfigError: the plug-in raised something; its name and the hook are in the message.
    """
    method = getattr(plugin, hook)
    try:
        if facts is None or not _takes_keywords(method):
            return method(*arguments)
        accepted = inspect.signature(method).parameters
        if any(one.kind is one.VAR_KEYWORD for one in accepted.values()):
            return method(**facts)
        return method(**{name: value for name, value in facts.items() if name in accepted})
    except KitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"plugins: {name_of(plugin)}.{hook} raised {type(error).__name__}: {error}. Fix the plug-in or remove it"
            f"{_KEYWORDS_HINT if isinstance(error, KeyError) else ''}."
        ) from error


_KEYWORDS_HINT = "; docs/differences.md lists what a hook of EveryDream 2 gets here"


def _takes_keywords(method: Any) -> bool:
    kinds = {one.kind for one in inspect.signature(method).parameters.values()}
    return bool(kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY})


def _refuse_update(name: str, value: Any) -> None:
    raise ConfigError(f"{name}: a plug-in cannot set it to {value!r} while a run continues; set it before the run.")


class PluginListener(Listener):
    """Calls the plug-ins' hooks."""

    def __init__(self, plugins: Sequence[Any], learner: Learner) -> None:
        self.plugins = plugins
        self.learner = learner

    def on_start(self, run: ObservedRun) -> None:
        self._call("on_training_start", run, facts=_run_facts(run, self.learner))
        if run.position.step_in_epoch == 0:
            self._start_epoch(run, run.position.epoch)

    def before_step(self, run: ObservedRun, work: StepBatches) -> None:
        if self._is_wanted("on_step_start"):
            position = run.position
            facts = _step_facts(run, self.learner, position.epoch, position.step, position.step_in_epoch)
            facts |= _batch_facts(self.learner, work.batches)
            self._call("on_step_start", run, position.step, facts=facts)

    def __call__(self, run: ObservedRun, report: StepReport) -> None:
        if self._is_wanted("on_step_end"):
            facts = _step_facts(run, self.learner, report.epoch, report.step - 1, report.step_in_epoch)
            facts |= {**_batch_facts(self.learner, report.batches), "report": report}
            self._call("on_step_end", run, report, facts=facts)
        if report.epoch_ended:
            end = _step_facts(run, self.learner, report.epoch, report.step, report.step_in_epoch)
            self._call("on_epoch_end", run, report.epoch, facts={**end, "arg_update_callback": _refuse_update})
            if not run.is_complete():
                self._start_epoch(run, report.epoch + 1)

    def on_finish(self, run: ObservedRun) -> None:
        self._call("on_training_end", run, facts=_run_facts(run, self.learner))

    def _start_epoch(self, run: ObservedRun, epoch: int) -> None:
        facts = _step_facts(run, self.learner, epoch, run.position.step, 0)
        facts |= {"epoch_length": _epoch_length(run), "arg_update_callback": _refuse_update}
        self._call("on_epoch_start", run, epoch, facts=facts)

    def _is_wanted(self, hook: str) -> bool:
        return any(has_hook(plugin, hook) for plugin in self.plugins)

    def _call(self, hook: str, *arguments: Any, facts: Mapping[str, Any]) -> None:
        for plugin in self.plugins:
            if has_hook(plugin, hook):
                call_hook(plugin, hook, arguments, facts)


def _run_facts(run: ObservedRun, learner: Learner) -> dict[str, Any]:
    return {
        "run": run,
        "log_folder": str(run.folder.folder),
        "project_name": run.config.project_name,
        "max_epochs": run.config.max_epochs,
        "ed_state": _state(learner),
    }


def _step_facts(run: ObservedRun, learner: Learner, epoch: int, step: int, step_in_epoch: int) -> dict[str, Any]:
    """What EveryDream 2's hooks were given, under its names. Steps are optimizer steps, from 0."""
    return {
        **_run_facts(run, learner),
        "epoch": epoch,
        "global_step": step,
        "local_step": step_in_epoch,
        "data_root": run.config.data_root,
    }


def _state(learner: Learner) -> SimpleNamespace:
    """The parts of a run under the names of EveryDream 2's training state."""
    model = learner.model
    return SimpleNamespace(
        unet=model.denoiser,
        vae=model.vae,
        text_encoder=model.text_encoders[0],
        tokenizer=model.tokenizers[0],
        scheduler=model.noise_scheduler,
        noise_scheduler=model.noise_scheduler,
        optimizer=learner.optimizer,
    )


def _epoch_length(run: ObservedRun) -> int:
    """Optimizer steps of an epoch, on average."""
    return max(1, round(run.num_steps / run.config.max_epochs))


def _batch_facts(learner: Learner, batches: Sequence[Batch]) -> dict[str, Any]:
    """A window of accumulated micro-batches is one step here; its last one is the batch."""
    found = [_as_dict(learner, batch) for batch in batches]
    return {"batch": found[-1] if found else {}, "batches": found}


def _as_dict(learner: Learner, batch: Batch) -> dict[str, Any]:
    """A micro-batch under EveryDream 2's names; `tokens` (B, 77) are those of the first text encoder."""
    tokenizer = learner.model.tokenizers[0]
    how = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return {
        "image": batch.pixels,
        "captions": batch.captions,
        "tokens": torch.tensor(tokenizer(list(batch.captions), **how)["input_ids"]),
        "loss_scale": batch.loss_scale,
        "runt_size": 0,
    }


def caption_transform(plugins: Sequence[Any]) -> Callable[[str], str] | None:
    """The plug-ins' changes to a caption, one after the other, or None if they make none."""
    return _chain(plugins, "transform_caption")


def image_transform(plugins: Sequence[Any]) -> Callable[[Image.Image], Image.Image] | None:
    """The plug-ins' changes to an image, one after the other, or None if they make none."""
    return _chain(plugins, "transform_pil_image")


def _chain(plugins: Sequence[Any], hook: str) -> Callable[[Any], Any] | None:
    steps = [plugin for plugin in plugins if has_hook(plugin, hook)]
    return _Chain(steps, hook) if steps else None


class _Chain:
    """One hook of several plug-ins, one after the other; an object, so that it can travel to a loader process."""

    def __init__(self, plugins: Sequence[Any], hook: str) -> None:
        self.plugins = plugins
        self.hook = hook

    def __call__(self, value: Any) -> Any:
        check = _as_text if self.hook == "transform_caption" else _as_image
        for plugin in self.plugins:
            value = check(call_hook(plugin, self.hook, [value]), f"plugins: {name_of(plugin)}.{self.hook}")
        return value


def _as_text(value: Any, source: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{source} returned a {type(value).__name__}; it must return the caption, a text.")
    return value


def _as_image(value: Any, source: str) -> Image.Image:
    """An image, also where an array came back, as EveryDream 2's plug-ins return."""
    from PIL import Image

    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3:
        return Image.fromarray(value)
    if not isinstance(value, Image.Image):
        what = (
            f"n array of {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f" {type(value).__name__}"
        )
        raise ConfigError(f"{source} returned a{what}; it must return an RGB image, or a uint8 array (H, W, 3).")
    return value
