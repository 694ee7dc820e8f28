"""Plug-ins: a person's own listeners, named `module.Class`, with EveryDream 2's hook names.

A plug-in is any class with some of these methods; it need not derive from anything:

    on_training_start(run)          on_training_end(run)
    on_epoch_start(run, epoch)      on_epoch_end(run, epoch)
    on_step_start(run, step)        on_step_end(run, report)
    transform_caption(caption) -> caption
    transform_pil_image(picture) -> picture

Where EveryDream 2 passed keyword arguments of its own, the run itself is passed: everything is reachable from it. A plug-in
that transforms pictures switches the latent cache off, since what it makes cannot be known in advance.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from everydream_kit.errors import ConfigError
from everydream_kit.training.reports import Listener, StepReport

if TYPE_CHECKING:
    from PIL import Image

    from everydream_kit.training.run import Run


HOOKS = frozenset(
    {
        *("on_training_start", "on_training_end", "on_epoch_start", "on_epoch_end", "on_step_start", "on_step_end"),
        *("transform_caption", "transform_pil_image"),
    }
)


def load_plugins(names: Sequence[str]) -> list[Any]:
    """Make one object of each named class.

    Raises:
        ConfigError: a module or class is not there, or is no plug-in. Nothing of it is called then.
    """
    plugins = []
    for name in names:
        module_name, _, class_name = name.rpartition(".")
        if not module_name or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"plugins: {name!r} is no module.Class; for instance my_plugins.Greeter")
        try:
            plugin_class = getattr(importlib.import_module(module_name), class_name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"plugins: {name}: there is no module {error.name}. Put its folder on PYTHONPATH, or install it."
            ) from error
        except AttributeError as error:
            raise ConfigError(f"plugins: the module {module_name} has no class {class_name}.") from error
        if not (isinstance(plugin_class, type) and any(hasattr(plugin_class, hook) for hook in HOOKS)):
            raise ConfigError(
                f"plugins: {name} is no plug-in: a class with at least one of {', '.join(sorted(HOOKS))}."
            )
        plugins.append(plugin_class())
    return plugins


class PluginListener(Listener):
    """Calls the plug-ins' hooks."""

    def __init__(self, plugins: Sequence[Any]) -> None:
        self.plugins = plugins

    def on_start(self, run: Run) -> None:
        self._call("on_training_start", run)
        if run.position.step_in_epoch == 0:
            self._call("on_epoch_start", run, run.position.epoch)
        self._call("on_step_start", run, run.position.step)

    def __call__(self, run: Run, report: StepReport) -> None:
        self._call("on_step_end", run, report)
        if report.epoch_ended:
            self._call("on_epoch_end", run, report.epoch)
        if not run.is_complete():
            if report.epoch_ended:
                self._call("on_epoch_start", run, run.position.epoch)
            self._call("on_step_start", run, report.step)

    def on_finish(self, run: Run) -> None:
        self._call("on_training_end", run)

    def _call(self, hook: str, *arguments: Any) -> None:
        for plugin in self.plugins:
            method = getattr(plugin, hook, None)
            if method is not None:
                method(*arguments)


def caption_transform(plugins: Sequence[Any]) -> Callable[[str], str] | None:
    """The plug-ins' changes to a caption, one after the other, or None if they make none."""
    steps = [plugin.transform_caption for plugin in plugins if hasattr(plugin, "transform_caption")]
    return _Chain(steps) if steps else None


def picture_transform(plugins: Sequence[Any]) -> Callable[[Image.Image], Image.Image] | None:
    """The plug-ins' changes to a picture, one after the other, or None if they make none."""
    steps = [plugin.transform_pil_image for plugin in plugins if hasattr(plugin, "transform_pil_image")]
    return _Chain(steps) if steps else None


class _Chain:
    """Functions one after the other; an object, so that it can travel to a loader process."""

    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            value = step(value)
        return value
