"""Make the captioned image sets from which the embedded base model and its demo are made.

Everything comes from four npm packages, all MIT: Microsoft's Fluent Emoji in three looks (shaded "3d" WebP, flat SVG,
black-and-white "high contrast" outlines) and emojibase-data for labels and tags. Written below OUT:

    base/    images the UNet and text encoder learn from: chosen subjects, 3d look only, 256 px WebP + .txt captions
    demo/    the demo's held-out images: 32 of these subjects as ink drawings, a look the UNet never sees
    vae.npz  everything the autoencoder learns from, 128 px uint8: all subjects in 3d and flat, and ink drawings of all
             subjects except the demo's (an autoencoder must know black lines to be able to show them later)
    subjects.json  label, code point, tags, and part of each subject

Run: python recipes/make_emoji_dataset.py OUT   (needs npm on PATH and `pip install resvg-py`; about two minutes)
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = {
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0"),
    "flat": ("@lobehub/fluent-emoji-flat", "1.1.0"),
    "ink": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
    "data": ("emojibase-data", "17.0.0"),
}
STYLE_CAPTION = {"3d": "3d", "flat": "flat", "ink": "ink drawing"}
SIDE_PIXELS = 256
VAE_SIDE_PIXELS = 128


def listed(text: str) -> tuple[str, ...]:
    """The names between the bars; a line may end anywhere but inside a name."""
    return tuple(name.strip() for name in text.replace("\n", "").split("|"))


# Few enough to be drawn well: one of a kind, clear at 128 px. No people, signs, clock faces, flags or letters.
SUBJECTS = listed(
    """
    grinning face|smiling face with sunglasses|skull|ghost|alien|robot|red heart|green heart|monkey face|
    dog face|fox|cat face|lion|horse|unicorn|pig face|giraffe|elephant|mouse face|rabbit face|bear|
    panda|rooster|penguin|duck|owl|flamingo|parrot|frog|turtle|fish|shark|octopus|crab|snail|
    butterfly|honeybee|rose|sunflower|tulip|evergreen tree|palm tree|cactus|mushroom|grapes|watermelon|
    lemon|banana|pineapple|red apple|green apple|pear|cherries|strawberry|tomato|eggplant|carrot|
    broccoli|cheese wedge|hamburger|pizza|hot dog|ice cream|doughnut|birthday cake|hot beverage|beer mug|
    house|bus|fire engine|police car|automobile|anchor|sailboat|airplane|helicopter|rocket|flying saucer|
    sun|ringed planet|star|rainbow|umbrella|snowman|Christmas tree|balloon|wrapped gift|trophy|
    soccer ball|basketball|teddy bear|crown|gem stone|bell|guitar|violin|camera|light bulb|locked|key|
    bomb
    """
)
DEMO_SUBJECTS = listed(
    """
    mouse face|red apple|automobile|guitar|ghost|rocket|pizza|penguin|elephant|cactus|mushroom|snail|
    butterfly|fish|octopus|sailboat|helicopter|umbrella|crown|hamburger|ice cream|strawberry|banana|
    carrot|key|bell|camera|balloon|sunflower|cat face|robot|snowman
    """
)
# Wide and tall canvases with the drawing in the middle: a crop to any bucket shape takes paper, not lines.
DEMO_SIZES = ((256, 256), (256, 256), (320, 240), (240, 320), (352, 216), (216, 352), (288, 256))


@dataclass(frozen=True)
class Subject:
    """One emoji: label, code point (lower case hex), tags without the label's own words, and what it is for."""

    label: str
    code: str
    tags: tuple[str, ...]
    chosen: bool
    in_demo: bool


def fetch(work: Path, name: str, version: str) -> Path:
    """Download and unpack one npm package once; returns its folder."""
    folder = work / name.replace("/", "_").lstrip("@")
    if not folder.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", f"{name}@{version}", "--json"], cwd=work, check=True, capture_output=True, text=True
        )
        answer = json.loads(packed.stdout)
        entry = answer[0] if isinstance(answer, list) else next(iter(answer.values()))  # the shape differs between npms
        with tarfile.open(work / entry["filename"]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def read_subjects(data: Path) -> list[Subject]:
    """All emoji that are no skin-tone variant, with the chosen ones marked."""
    subjects = []
    for entry in json.loads((data / "en/data.json").read_text("utf-8")):
        if "group" not in entry:
            continue
        label = entry["label"].replace("’", "'")
        words = set(re.split(r"[\s-]+", label.lower()))
        tags = tuple(tag for tag in entry.get("tags", []) if not set(re.split(r"[\s-]+", tag.lower())) <= words)
        chosen = label in SUBJECTS
        subjects.append(Subject(label, entry["hexcode"].lower(), tags[:4], chosen, label in DEMO_SUBJECTS))
    missing = {*SUBJECTS, *DEMO_SUBJECTS} - {subject.label for subject in subjects if subject.chosen}
    if missing:
        raise SystemExit(f"no such emoji, or not among the chosen ones: {sorted(missing)}")
    return subjects


def spellings(code: str) -> tuple[str, ...]:
    """The file names one code point goes by: sets differ in whether they write the variation selector fe0f."""
    bare = code.replace("-fe0f", "")
    return (code, bare, f"{bare}-fe0f")


class ImageSource:
    """Images of a subject in a style, as RGBA of `SIDE_PIXELS`, or None where the set lacks it."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        icons = json.loads((folders["ink"] / "icons.json").read_text("utf-8"))["icons"]
        names = json.loads((folders["ink"] / "chars.json").read_text("utf-8"))
        self.ink_bodies = {code: icons[name]["body"] for code, name in names.items() if name in icons}

    def image(self, code: str, style: str) -> Image.Image | None:
        for spelling in spellings(code):
            if style == "3d" and (path := self.folders["3d"] / f"assets/{spelling}.webp").is_file():
                return Image.open(path).convert("RGBA").resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.LANCZOS)
            if style == "flat" and (path := self.folders["flat"] / f"assets/{spelling}.svg").is_file():
                return rasterise(path.read_text("utf-8"))
            if style == "ink" and (body := self.ink_bodies.get(spelling)):
                svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
                return rasterise(svg.replace("currentColor", "black"))
        return None


def rasterise(svg: str) -> Image.Image:
    import resvg_py  # only this recipe needs it

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE_PIXELS, height=SIDE_PIXELS, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def on_paper(image: Image.Image, size: tuple[int, int] = (SIDE_PIXELS, SIDE_PIXELS)) -> Image.Image:
    """The image on white, in the middle of a canvas of `size` (width, height), as large as fits."""
    side = min(size)
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    grid = Image.new("RGBA", size, "white")
    grid.alpha_composite(image, ((size[0] - side) // 2, (size[1] - side) // 2))
    return grid.convert("RGB")


def caption(subject: Subject, style: str) -> str:
    return ", ".join((subject.label, *subject.tags, STYLE_CAPTION[style]))


def write_folder(folder: Path, images: Iterator[tuple[str, Image.Image, str]], quality: int) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, image, text in images:
        count += 1
        image.save(folder / f"{name}.webp", quality=quality, method=6)
        (folder / f"{name}.txt").write_text(text + "\n", "utf-8")
    return count


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def make(out: Path, work: Path) -> None:
    folders = {key: fetch(work, *package) for key, package in PACKAGES.items()}
    subjects = read_subjects(folders["data"])
    source = ImageSource(folders)

    base, vae, vae_names = [], [], []
    for subject in subjects:
        for style in ("3d", "flat", "ink"):
            if (style == "ink" and subject.in_demo) or (image := source.image(subject.code, style)) is None:
                continue
            grid = on_paper(image)
            vae.append(np.asarray(grid.resize((VAE_SIDE_PIXELS, VAE_SIDE_PIXELS), Image.Resampling.LANCZOS)))
            vae_names.append(f"{subject.code} {style}")
            if style == "3d" and subject.chosen:
                base.append((slug(subject.label), grid, caption(subject, "3d")))
    demo = []
    for number, label in enumerate(DEMO_SUBJECTS):
        subject = next(subject for subject in subjects if subject.label == label)
        image = source.image(subject.code, "ink")
        if image is None:
            raise SystemExit(f"no ink drawing of {label}")
        # The label alone: the demo's captions are what a newcomer would type.
        text = f"{label}, {STYLE_CAPTION['ink']}"
        demo.append((slug(label), on_paper(image, DEMO_SIZES[number % len(DEMO_SIZES)]), text))

    print("base images:", write_folder(out / "base", iter(base), quality=95))
    print("demo images:", write_folder(out / "demo", iter(demo), quality=90))
    np.savez(out / "vae.npz", images=np.stack(vae), names=np.array(vae_names))
    print("autoencoder images:", len(vae))
    known = [asdict(subject) for subject in subjects if subject.chosen]
    (out / "subjects.json").write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--work", type=Path, help="where packages are kept (default: OUT/packages)")
    arguments = parser.parse_args()
    make(arguments.out, arguments.work or arguments.out / "packages")
