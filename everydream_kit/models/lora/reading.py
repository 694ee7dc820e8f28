"""Reading LoRA files of any tool: every tensor is applied, or the file is refused and its kind named."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from everydream_kit.errors import ModelError
from everydream_kit.models.families import family_in_header
from everydream_kit.models.family import Layout, ModelFiles
from everydream_kit.models.lora.layer_names import (
    OTHER_KINDS,
    fused_spellings,
    is_of_text_encoder,
    spellings,
    split_name,
)
from everydream_kit.models.lora.weight_changes import Change, LoraFile, base_key
from everydream_kit.models.tensors import LazyTensor, Tensors, halves_swapped, row_shares
from everydream_kit.models.weight_files import WEIGHT_SUFFIXES, open_weights
from everydream_kit.runs.layout import LORA_FILE
from everydream_kit.strict_json import parse_json, read_json

DIFFUSERS_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps rank and alpha (JSON in the header)."""
PEFT_CONFIG = "adapter_config.json"
"""peft's settings, next to its `adapter_model.safetensors`."""

_EMBEDDING = re.compile(r"^bundle_emb\.(.+?)\.(string_to_param\.\*|emb_params|clip_l|clip_g)$")
_KINDS = {"down": "LoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "diff": "difference"}
_BY_ROW = ("up", "dora_scale", "magnitude")
"""Parts of LoRA and DoRA that have the rows of the layer."""
_NEEDED = {
    "LoRA": [{"down", "up"}],
    "LoHa": [{"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}],
    "LoKr": [{"lokr_w1", "lokr_w1_a"}, {"lokr_w2", "lokr_w2_a"}],
    "difference": [{"diff"}],
}


def lora_file(path: Path) -> Path:
    """The file of a LoRA checkpoint's folder, ours or peft's, or the file that was given."""
    if not path.is_dir():
        return path
    peft = path / "adapter_model.safetensors"
    return peft if peft.is_file() and not (path / LORA_FILE).is_file() else path / LORA_FILE


def is_lora(path: Path) -> bool:
    """Whether a file or folder holds a LoRA of any kind. A damaged file does not."""
    from everydream_kit.models.file_kinds import LORA_NAME

    file = lora_file(path)
    if not file.is_file() or file.suffix.lower() not in WEIGHT_SUFFIXES:
        return False
    try:
        names = list(open_weights(file)[0])
    except ModelError:
        return False
    is_model = any(name.startswith(("model.diffusion_model.input_blocks.0.0.", "first_stage_model.")) for name in names)
    parts = [split[1] for name in names if (split := split_name(name)) is not None]
    return not is_model and (any(map(LORA_NAME.search, names)) or "diff" in parts)


def read_lora_file(path: Path, base: ModelFiles) -> LoraFile:
    """Read a LoRA file.

    Args:
        path: the file, or a LoRA checkpoint's folder.
        base: the model that it belongs to; its layers' names say what the file's names mean.

    Raises:
        ModelError: damaged, no LoRA, of a kind that is not read, or made for a model of another shape.
    """
    path = lora_file(path)
    tensors, metadata = open_weights(path)
    table = spellings(base)
    together = fused_spellings(base)
    layers, embeddings = _grouped(path, tensors, {*table, *together})
    layers = _split_fused(path, layers, together, base.family.layout)
    unknown = [stem for stem in layers if stem not in table]
    if unknown:
        made_for = metadata.get("modelspec.architecture")
        cause = "It was made for another model family" + (f": its header says {made_for[:60]}." if made_for else ".")
        if all(map(is_of_text_encoder, unknown)):  # and the denoiser's fit
            cause = f"{cause[:-1]}, or changes text encoders that LoRAs of {base.family.title} do not change."
        raise ModelError(
            f"{path}: does not fit {base.source} ({base.family.title}): {len(unknown)} of its {len(layers)} layers are "
            f"not in it, such as {unknown[0][:100]!r}. {cause}"
        )
    values = _settings(path, metadata)
    found = LoraFile(embeddings=_embeddings(path, embeddings, base))
    for stem, parts in layers.items():
        component, name = table[stem]
        for parameter, change in _changes(path, stem, parts, _alpha(parts, values, component, name)).items():
            key = f"{name}.{parameter}"
            if key in found.changes.get(component, {}):
                raise ModelError(f"{path}: names the layer {component}.{name} twice, the second time as {stem!r}.")
            _check_fits(path, component, key, change, base, cause=_made_for_another(metadata, base))
            found.changes.setdefault(component, {})[key] = change
    return found


def _split_fused(
    path: Path, layers: dict[str, Tensors], together: Mapping[str, tuple[str, list[str]]], layout: Layout
) -> dict[str, Tensors]:
    """A layer that is several of the base's (q, k and v in one) as theirs: each has its share of the rows.

    Raises:
        ModelError: it is of a kind whose rows are not apart.
    """
    found: dict[str, Tensors] = {}
    for stem, parts in layers.items():
        layer, names = together.get(stem, ("", [stem]))
        ordered = parts
        shares = layout.shares_of(layer) or (1,) * len(names)
        others = parts.keys() - {"down", "up", "alpha", "dora_scale", "magnitude"}
        if len(names) > 1 and others:
            raise ModelError(
                f"{path}: its layer {stem!r} is {len(names)} layers of the model in one, with {', '.join(sorted(others))}; "
                "of such layers only LoRA and DoRA are read."
            )
        if layer in layout.swapped_layers and others:
            raise ModelError(
                f"{path}: of its layer {stem!r}, whose rows are in another order, only LoRA and DoRA are read."
            )
        if layer in layout.swapped_layers:
            ordered = {part: halves_swapped(value) if part in _BY_ROW else value for part, value in parts.items()}
        for place, name in enumerate(names):
            if name in found:
                raise ModelError(f"{path}: names the layer {name} twice, the second time as {stem!r}.")
            found[name] = {part: _share(value, part, place, shares) for part, value in ordered.items()}
    return found


def _share(value: LazyTensor, part: str, place: int, shares: Sequence[int]) -> LazyTensor:
    if len(shares) == 1 or part not in _BY_ROW:
        return value
    return value.rows(*row_shares(value.shape[0], shares)[place])


def _grouped(path: Path, tensors: Tensors, known: Collection[str]) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """The tensors by layer and part, and those of bundled words by word.

    Args:
        known: layers of the base, which are never another kind of file.
    """
    layers: dict[str, Tensors] = {}
    embeddings: dict[str, Tensors] = {}
    unknown = []
    for name, tensor in tensors.items():
        split = split_name(name)
        if found := _EMBEDDING.match(name):
            embeddings.setdefault(found[1], {})[found[2]] = tensor
        elif split is None:
            unknown.append(name)
        elif split[1] in layers.setdefault(split[0], {}):
            raise ModelError(f"{path}: holds the layer {split[0][:100]!r} in two spellings.")
        else:
            layers[split[0]][split[1]] = tensor
    for expression, kind in OTHER_KINDS.items():
        if any(re.search(expression, name) for name in (*unknown, *(stem for stem in layers if stem not in known))):
            raise ModelError(f"{path}: this is a file of the kind {kind}, which this version does not read.")
    if not any(part in _KINDS for parts in layers.values() for part in parts):
        raise ModelError(f"{path}: not a LoRA; its first tensor is named {next(iter(tensors), None)!r}.")
    if unknown:
        raise ModelError(
            f"{path}: {len(unknown)} of its tensors are of no kind of LoRA that this version reads, such as "
            f"{unknown[0][:100]!r}. Nothing of it is used."
        )
    return layers, embeddings


def _changes(path: Path, stem: str, parts: Tensors, alpha: float | None) -> dict[str, Change]:
    """What one layer's tensors do, to its weight and its bias."""
    where = f"{path}: layer {stem[:100]!r}"
    bias = parts.get("bias_diff")
    changes = {} if bias is None else {"bias": Change("difference", {"diff": bias})}
    own = {
        name: tensor for name, tensor in parts.items() if name not in ("alpha", "bias_diff", "magnitude", "dora_scale")
    }
    if not own:
        if bias is None or len(parts.keys() - {"alpha"}) > 1:
            raise ModelError(f"{where} has {', '.join(sorted(parts))}, and no weights.")
        return changes
    kinds = sorted({_KINDS[name] for name in own if name in _KINDS})
    if len(kinds) != 1 or not all(needed & own.keys() for needed in _NEEDED[kinds[0]]):
        raise ModelError(f"{where} is incomplete: it has {', '.join(sorted(own))}.")
    kind = kinds[0]
    rank = _check_parts(where, kind, own)
    magnitude, on_input = _lengths(where, parts)
    if alpha == 0 or (kind == "LoKr" and "lokr_w1" in own and "lokr_w2" in own):
        alpha = None  # trainers read 0 as "the rank", and a LoKr of two whole factors has no rank
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    changes["weight"] = Change(kind, own, scale, magnitude, on_input, alpha)
    return changes


def _check_parts(where: str, kind: str, own: Tensors) -> int | None:
    """The rank; None where there is none. Refuses a layer that lacks a half, or has parts of another kind."""
    wanted = {
        "LoRA": {"down", "up", "mid"},
        "LoHa": {name for name in own if name.startswith("hada_")},
        "LoKr": {name for name in own if name.startswith("lokr_")},
        "difference": {"diff"},
    }[kind]
    pairs = [("down", "up"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")]
    pairs += [(f"lokr_w{half}_a", f"lokr_w{half}_b") for half in "12"]
    missing = [pair for pair in pairs if (pair[0] in own) != (pair[1] in own)]
    lokr_twice = any(f"lokr_w{half}" in own and f"lokr_w{half}_a" in own for half in "12")
    if missing or own.keys() - wanted or lokr_twice:
        raise ModelError(f"{where} is incomplete, or mixes kinds: it has {', '.join(sorted(own))}.")
    for name in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b", "down"):
        if name in own:
            return own[name].shape[0]
    return None


def _lengths(where: str, parts: Tensors) -> tuple[LazyTensor | None, bool]:
    """DoRA's lengths, and whether they are the input's: LyCORIS and kohya write (out, 1) or (1, in), peft (out,)."""
    if "magnitude" in parts and "dora_scale" in parts:
        raise ModelError(f"{where} has DoRA's lengths twice.")
    scale = parts.get("dora_scale")
    if scale is None:
        return parts.get("magnitude"), False
    shape = scale.shape
    on_input = len(shape) > 1 and shape[0] == 1 and shape[1] > 1
    return scale, on_input


def _check_fits(path: Path, component: str, name: str, change: Change, base: ModelFiles, *, cause: str) -> None:
    """Compare a change's shape with the base's weight, from the headers alone.

    Raises:
        ModelError: they differ.
    """
    key = base_key(base, component, name)
    weight = None if key is None else base.tensors[component][key].shape
    size = _size(change)
    if weight is None or not _fits(size, weight):
        shape = "is not there" if weight is None else f"has the shape {weight}"
        raise ModelError(
            f"{path}: does not fit {base.source}: its layer {component}.{name} expects a weight of "
            f"{' x '.join(map(str, size))}, and that {shape}.{cause}"
        )
    if change.magnitude is not None:
        wanted = weight[1] if change.on_input else weight[0]
        if math.prod(change.magnitude.shape) != wanted:
            raise ModelError(
                f"{path}: DoRA's lengths of {component}.{name} are {math.prod(change.magnitude.shape)}, not {wanted}."
            )


def _made_for_another(metadata: Mapping[str, str], base: ModelFiles) -> str:
    """The cause, where the header names another family than the base's."""
    if family_in_header(metadata) in (None, base.family):
        return ""
    return f" It was made for another model family: its header says {metadata['modelspec.architecture']}."


def _fits(size: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a change of this size changes a weight of that shape: a kernel may be written into the second axis."""
    return size[0] == weight[0] and math.prod(size) == math.prod(weight) and (len(size) == 2 or size == weight)


def _size(change: Change) -> tuple[int, ...]:
    """The shape of the weight that a change is for, its kernel as far as the file says."""
    shapes = {name: tensor.shape for name, tensor in change.parts.items()}
    if change.kind == "LoRA":
        kernel = shapes["mid"][2:] if "mid" in shapes else shapes["down"][2:]
        return (shapes["up"][0], shapes["down"][1], *kernel)
    if change.kind == "LoHa":
        core = shapes.get("hada_t1")
        out = shapes["hada_w1_a"][0 if core is None else 1]
        inputs = shapes["hada_w1_b"][1:2]
        return (out, *inputs, *(shapes["hada_w1_b"][2:] if core is None else core[2:]))
    if change.kind == "LoKr":
        one, other = _factor_size(shapes, "1"), _factor_size(shapes, "2")
        return (one[0] * other[0], one[1] * other[1], *(other[2:] or one[2:]))
    return shapes["diff"]


def _factor_size(shapes: Mapping[str, tuple[int, ...]], half: str) -> tuple[int, ...]:
    if f"lokr_w{half}" in shapes:
        return shapes[f"lokr_w{half}"]
    a, b, core = shapes[f"lokr_w{half}_a"], shapes[f"lokr_w{half}_b"], shapes.get(f"lokr_t{half}")
    return (a[0], *b[1:]) if core is None else (a[1], b[1], *core[2:])


def _embeddings(path: Path, bundled: Mapping[str, Tensors], base: ModelFiles) -> dict[str, list[LazyTensor]]:
    """Bundled words: one tensor for each text encoder of the base."""
    if not bundled:
        return {}
    learned = [slot.folder for slot in base.family.text_encoders if "textual_inversion" in slot.trains]
    widths = [int(base.configs[folder]["hidden_size"]) for folder in learned]
    found = {}
    for word, parts in bundled.items():
        single = parts.get("string_to_param.*") or parts.get("emb_params")
        vectors = [single] if single is not None else [parts.get("clip_l"), parts.get("clip_g")][: len(widths)]
        own = [tensor for tensor in vectors if tensor is not None]
        if [tensor.shape[-1] for tensor in own] != widths or len(parts) != len(own):
            raise ModelError(
                f"{path}: its bundled embedding {word!r} does not fit {base.source} ({base.family.title})."
            )
        found[word] = own
    return found


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the header or peft's file next to it says of alphas."""
    values: dict[str, Any] = parse_json(
        metadata.get(DIFFUSERS_METADATA, "{}"), f"{path}: metadata {DIFFUSERS_METADATA}", error=ModelError
    )
    peft = path.with_name(PEFT_CONFIG)
    if path.name.startswith("adapter_model") and peft.is_file():
        own = read_json(peft, error=ModelError)
        values |= {f"peft.{name}": value for name, value in own.items()}
    return values


def _alpha(parts: Tensors, values: Mapping[str, Any], component: str, name: str) -> float | None:
    """A layer's alpha: its own tensor, or what the settings say of it; None: the rank."""
    if "alpha" in parts:
        if math.prod(parts["alpha"].shape) != 1:
            raise ModelError(f"LoRA: the alpha of {component}.{name} is not one number.")
        return float(parts["alpha"].read().float().item())
    for prefix, plain in ((component, "lora_alpha"), ("peft", "lora_alpha"), ("peft", "alpha")):
        own = _by_pattern(values.get(f"{prefix}.alpha_pattern"), name)
        own = values.get(f"{prefix}.{plain}") if own is None else own
        if own is None:
            continue
        if isinstance(own, bool) or not isinstance(own, (int, float)):
            raise ModelError(f"LoRA: the alpha of {component}.{name} must be a number (got {own!r:.60}).")
        rank = next((parts[key].shape[0] for key in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in parts), 1)
        return float(own) * math.sqrt(rank) if values.get(f"{prefix}.use_rslora") is True else float(own)
    return None


def _by_pattern(patterns: Any, name: str) -> Any:
    """A layer's own alpha, where the file names it: peft's patterns match the ends of names."""
    if not isinstance(patterns, dict):
        return None
    return next((patterns[end] for end in patterns if f".{name}".endswith("." + end.removeprefix("^"))), None)
