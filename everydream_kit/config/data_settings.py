"""Images and captions: what is trained on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from everydream_kit.config.declaration import (
    EVERYTHING,
    MEMORY_AND_RESULT,
    NOTHING,
    RESULT,
    SPEED,
    Facts,
    Group,
    Knob,
    Resolution,
    Share,
)


class DataGroup(Group):
    """Data: which images and how they are cut."""

    data_root: Annotated[
        str | list[str] | dict[str, Any],
        Knob(basic=True, when="always: the folder with your captioned images"),
        Facts(
            RESULT,
            "resume",
            names="folder, archive or Hub dataset with the training images",
            holds_path=True,
            of_project=True,
        ),
    ] = "input"
    """Dataset: a folder, a `.json` index, a `.zip` or `.tar` archive, a Hub dataset id, a list of these, or EveryDream 2's
    `{"resolver": "multi", ...}`."""
    resolution: Annotated[
        Resolution | Annotated[list[Resolution], Field(min_length=1)],
        Knob(
            basic=True,
            unit="pixels",
            memory="activations grow with its square",
            when="match the base: 512 for SD 1.x, 768 for SD 2.x-v, 1024 for SDXL; lower it to save memory",
            step=64,
        ),
        Facts(EVERYTHING, "resume"),
    ] = 512
    """Area class: every bucket holds about resolution² pixels at its own aspect ratio. Several values train each image
    in every class that it is big enough for."""
    batch_size: Annotated[
        Annotated[int, Field(ge=1, le=4096)] | Literal["auto"],
        Knob(
            basic=True,
            unit="images",
            memory="activations grow with it",
            when="as large as the GPU allows, up to about 8; `auto` takes the largest that fits",
            step=1,
        ),
        Facts(EVERYTHING, "resume"),
    ] = 2
    """Images that go through the model together (on each process). `auto` estimates the memory before anything is loaded
    and takes the largest number, up to 16 on a GPU and 4 on a CPU, that leaves 7 % free; the run's `config.json` holds the
    number, so a resumed run takes the same."""
    flip_p: Annotated[
        Share,
        Knob(basic=True, unit="probability", when="0.5 for styles; not for faces or captions with left and right"),
        Facts(RESULT, "resume"),
    ] = 0.0
    """Probability that an image is mirrored left to right. A folder's or image's own `flip_p` wins."""
    crop_jitter: Annotated[
        Annotated[float, Field(ge=0, le=0.25)],
        Knob(unit="fraction of the side", when="0 for images whose borders matter"),
        Facts(RESULT, "resume"),
    ] = 0.02
    """Up to this share of each side is trimmed at random before resizing, where the image is larger than its bucket."""
    background: Annotated[
        str,
        Field(pattern=r"^#[0-9a-fA-F]{6}$"),
        Knob(unit="#rrggbb", when="transparent images should have another color behind them"),
        Facts(RESULT, "resume"),
    ] = "#ffffff"
    """Color put behind transparent images."""
    loss_mask: Annotated[
        Literal["off", "file", "alpha"],
        Knob(when="only a part of each image should be learned"),
        Facts(RESULT, "resume"),
    ] = "off"
    """Weigh the loss by a mask: `file` reads `name.mask.png` next to `name.png` (white counts, black does not), `alpha` takes
    the image's own transparency."""
    num_workers: Annotated[
        Annotated[int, Field(ge=0, le=64)] | None,
        Knob(unit="processes", memory="host memory only", when="the log says that the loader is slower than the model"),
        Facts(SPEED, "resume"),
    ] = None
    """Loader processes. By default as many as help: none with latents in memory, else up to the number of cores less one, at
    most 8. The number changes no result."""
    cache_latents: Annotated[
        Literal["auto", "off", "memory", "disk"],
        Knob(when="`off` for very large datasets that are seen once", memory="saves the VAE's share of each step"),
        Facts(EVERYTHING, "resume"),
    ] = "auto"
    """Encode the images once instead of at every step: in memory when a crop is drawn for the first time, on disk before
    the run, for later runs too. `auto` uses memory if the latents fit in a quarter of it, then disk if they fit in half of what
    is free, else off."""
    cache_variants: Annotated[
        int,
        Field(ge=1, le=64),
        Knob(unit="crops for each image", when="more keeps more of the crop jitter, and takes more room", step=1),
        Facts(RESULT, "resume"),
    ] = 4
    """Crop variants kept for each image in the latent cache (twice as many where it may be flipped)."""
    latent_cache_dir: Annotated[
        str | None,
        Knob(when="the default disk is small or slow"),
        Facts(NOTHING, "resume", names="folder that the latent cache is written to", holds_path=True),
    ] = None
    """Where the disk cache lives; by default `.edk_cache` next to the run folders."""
    rated_dataset: Annotated[
        bool, Knob(when="images carry ratings and the best should be seen more"), Facts(RESULT, "resume")
    ] = False
    """Use fewer of the low-rated images as epochs go by (weighted sampling without replacement)."""
    rated_dataset_target_dropout_percent: Annotated[
        int,
        Field(ge=0, le=100),
        Knob(unit="percent", when="with rated_dataset"),
        Facts(RESULT, "resume", needs=("rated_dataset",)),
    ] = 50
    """Share of images that the last epoch skips, with `rated_dataset`."""
    write_schedule: Annotated[
        bool, Knob(when="to see exactly which images form which batch"), Facts(NOTHING, "resume")
    ] = False
    """Write `ep<N>_batch_schedule.txt` into the run folder for every epoch."""


class CaptionGroup(Group):
    """Captions: what the text encoder reads."""

    cond_dropout: Annotated[
        Share,
        Knob(
            basic=True, unit="share of captions", when="0.1 to 0.15 pushes a style harder; above 0.26 bleeds", step=0.01
        ),
        Facts(RESULT, "resume"),
    ] = 0.04
    """Share of captions that are replaced by the empty prompt, so that guidance keeps working."""
    shuffle_tags: Annotated[
        bool, Knob(basic=True, when="captions are lists of comma-separated tags"), Facts(MEMORY_AND_RESULT, "resume")
    ] = False
    """Shuffle the tags after the first comma, differently for every image and epoch."""
    keep_tags: Annotated[
        int,
        Field(ge=0, le=100),
        Knob(unit="tags", when="the first tags are trigger words", step=1),
        Facts(RESULT, "resume"),
    ] = 0
    """This many tags after the main prompt stay in place when shuffling."""
    caption_variants: Annotated[
        Annotated[int, Field(ge=1, le=1000)] | None,
        Knob(
            unit="texts for each image",
            when="tags are shuffled for a model with a large text encoder: 4 to 8, so that all texts are encoded before the run",
            memory="2,000 texts or fewer: a large text encoder need not stay on the GPU",
        ),
        Facts(MEMORY_AND_RESULT, "resume"),
    ] = None
    """Where captions vary (shuffled tags, or one line of several), cycle through this many fixed forms of each, one per epoch. By
    default every epoch draws a new form."""
    caption_lines: Annotated[
        Literal["join", "choose"],
        Knob(when="each line of a .txt is a separate caption: `choose`"),
        Facts(RESULT, "resume"),
    ] = "join"
    """A caption file with several lines: `join` makes one caption of them, `choose` draws one line per epoch."""
