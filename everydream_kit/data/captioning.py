"""Captions written by an image-to-text model: BLIP by default, or any that transformers knows, by id or folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from everydream_kit.data.changes import Changes, PrepReport
from everydream_kit.data.dataset import Dataset
from everydream_kit.data.folders import FolderFiles
from everydream_kit.data.image_files import IMAGE_ERRORS, open_image
from everydream_kit.data.tagging import caption_source, start_step
from everydream_kit.data.tidying import Progress
from everydream_kit.errors import ModelError

DEFAULT_MODEL = "Salesforce/blip-image-captioning-base"
"""About 1 GB; a caption a second on two cores, dozens on a T4."""

_LARGEST_SIDE = 1024
"""Images are shown to the model at this size at most; captioning models take 224 to 980 px."""


def auto_caption(
    folder: str | Path,
    *,
    model: str | Path = DEFAULT_MODEL,
    batch_size: int = 4,
    prompt: str | None = None,
    prefix: str = "",
    suffix: str = "",
    overwrite: bool = False,
    max_new_tokens: int = 60,
    device: str | None = None,
    journal: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PrepReport:
    """Caption the images of a folder into `.txt` files next to them.

    Images that have a caption are left alone, so an interrupted step continues where it was. The decoding is greedy:
    the same image gets the same caption.

    Args:
        folder: dataset folder.
        model: Hub id or folder of an image-to-text model.
        batch_size: images that go through the model together.
        prompt: start of the caption for models such as BLIP ("a painting of"), or a question for those that chat.
        prefix, suffix: put before and after each caption, for instance a trigger word: "ohwx man, ".
        overwrite: replace captions that are there; the former ones go into the journal.
        max_new_tokens: longest caption.
        device: "cuda", "mps" or "cpu"; by default the first that is there.
        journal: where former captions are kept; by default `<folder>-captions-undo.jsonl` next to it.
        dry_run: only report which images would be captioned; the model is not loaded.
        progress: called with images done and in all.

    Raises:
        ModelError: the model cannot be loaded, or is not an image-to-text model.
    """
    _, changes, dataset = start_step(f"Caption images with {model}", folder, journal, "captions", dry_run)
    wanted = _files_to_write(dataset, overwrite, changes)
    captioner = None
    if not dry_run and wanted:
        captioner = Captioner(model, device=device, max_new_tokens=max_new_tokens)
    images = list(wanted)
    for start in range(0, len(images), batch_size):
        paths = images[start : start + batch_size]
        texts = dict.fromkeys(paths, "") if captioner is None else _caption(captioner, paths, prompt, changes)
        for path, text in texts.items():
            changes.write(wanted[path], f"{prefix}{text}{suffix}".strip().encode(), "captions written", path)
        if progress is not None:
            progress(start + len(paths), len(images))
    return changes.report


def suggest_captions(
    paths: Sequence[Path],
    *,
    model: str | Path = DEFAULT_MODEL,
    batch_size: int = 4,
    prompt: str | None = None,
    max_new_tokens: int = 60,
    device: str | None = None,
) -> Iterator[tuple[Path, str | None]]:
    """Caption images without writing anything: each with its caption as soon as there is one, for somebody's review.

    Args: as `auto_caption`.

    Yields:
        The image and its caption; None where the image cannot be decoded.

    Raises:
        ModelError: the model cannot be loaded, or is not an image-to-text model.
    """
    captioner = Captioner(model, device=device, max_new_tokens=max_new_tokens)
    changes = Changes("Suggest captions", dry_run=True)
    for start in range(0, len(paths), batch_size):
        some = list(paths[start : start + batch_size])
        texts = _caption(captioner, some, prompt, changes)
        yield from ((path, texts.get(path)) for path in some)


def _files_to_write(dataset: Dataset, overwrite: bool, changes: Changes) -> dict[Path, Path]:
    """Images that are to be captioned, each with the file that its caption goes to."""
    files, wanted = FolderFiles(), {}
    for index in range(len(dataset)):
        path, source = Path(dataset.path(index)), caption_source(dataset, index, files)
        if source.locked:
            changes.leave(path, f"{source.locked}.", "Edit that file, or save it as UTF-8 text.")
        elif overwrite or not source.is_own:
            wanted[path] = source.file
    return wanted


def _caption(captioner: Captioner, paths: list[Path], prompt: str | None, changes: Changes) -> dict[Path, str]:
    """Captions of those images that can be decoded."""
    shown = {path: image for path in paths if (image := _open(path, changes)) is not None}
    return dict(zip(shown, captioner(list(shown.values()), prompt), strict=True))


def _open(path: Path, changes: Changes) -> Image.Image | None:
    try:
        with open_image(path) as image:
            image.draft("RGB", (_LARGEST_SIDE, _LARGEST_SIDE))
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except IMAGE_ERRORS as error:
        changes.leave(path, f"cannot be decoded ({error}).", "Replace it with an intact copy, or delete it.")
        return None
    upright.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    return upright


class Captioner:
    """An image-to-text model: images to texts."""

    def __init__(self, model: str | Path, *, device: str | None = None, max_new_tokens: int = 60) -> None:
        """Load a model.

        Args:
            model: Hub id or folder.
            device: by default CUDA, then MPS, then the CPU; float16 on CUDA.
            max_new_tokens: longest caption.

        Raises:
            ModelError: it cannot be found or loaded, or is not an image-to-text model.
        """
        import torch
        import transformers

        auto: Any = transformers  # whose own annotations do not fit its classes

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        try:
            self._processor: Any = auto.AutoProcessor.from_pretrained(str(model))
            loaded: Any = auto.AutoModelForImageTextToText.from_pretrained(str(model), dtype=dtype)
        except (OSError, ValueError, KeyError, ImportError) as error:
            cause = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(
                f"{model}: cannot be loaded as an image-to-text model ({cause}). Give the id or folder of one that "
                f"transformers knows, such as {DEFAULT_MODEL}."
            ) from error
        self._model: Any = loaded.to(device).eval()
        self._max_new_tokens = max_new_tokens

    def __call__(self, images: list[Image.Image], prompt: str | None = None) -> list[str]:
        """One caption for each image, on one line. A prompt that starts the caption is part of it."""
        import torch

        if not images:
            return []
        inputs = self._prepare(images, prompt).to(self._model.device, self._model.dtype)
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, do_sample=False)
        if self._chats and "input_ids" in inputs:  # the answer comes after the question
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    @property
    def _chats(self) -> bool:
        return bool(getattr(self._processor, "chat_template", None))

    def _prepare(self, images: list[Image.Image], prompt: str | None) -> Any:
        if not self._chats:
            text = {} if prompt is None else {"text": [prompt] * len(images)}
            return self._processor(images=images, return_tensors="pt", **text)
        question = prompt or "Describe this image in one sentence."
        talks = [
            [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": question}]}]
            for p in images
        ]
        self._processor.tokenizer.padding_side = "left"  # answers of a batch then begin at the same place
        return self._processor.apply_chat_template(
            talks, add_generation_prompt=True, tokenize=True, return_dict=True, padding=True, return_tensors="pt"
        )
