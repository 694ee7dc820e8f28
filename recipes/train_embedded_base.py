"""Train the embedded base model from scratch, on two cores, in about two hours of background time.

The kit must be importable (`pip install -e .`).

    python recipes/make_emoji_dataset.py DATA
    pip download --no-deps -d WHEELS clip-anytorch
    python recipes/train_embedded_base.py tokenizer DATA WORK --merges WHEELS/clip_anytorch-*.whl
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 recipes/train_embedded_base.py vae DATA WORK --minutes 47
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 recipes/train_embedded_base.py unet DATA WORK --minutes 55
    python recipes/train_embedded_base.py package DATA WORK
    python recipes/train_embedded_base.py features DATA WORK
    python recipes/train_embedded_base.py grids DATA WORK

Each training stage saves every four minutes and continues from there when started again. `package` writes the averaged
weights into everydream_kit/demo/base; `features` trains the network behind the demo's score; `grids` draws
docs/images/base-*.jpg from what is packaged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from embedded_base import architecture, autoencoder, denoiser, features, grids, vocabulary
from embedded_base.folder import write_model_folder
from embedded_base.peers import Peers
from PIL import Image

from everydream_kit.demo.score import score

REPOSITORY = Path(__file__).resolve().parent.parent
BASE = REPOSITORY / "everydream_kit" / "demo" / "base"


def write_tokenizer(data: Path, merges: Path) -> None:
    texts = [path.read_text("utf-8") for path in (data / "base").glob("*.txt")]
    size = vocabulary.write_tokenizer(BASE / "tokenizer", merges, texts, architecture.MAX_TOKENS)
    print("tokens:", size)


def package(work: Path, folder: Path) -> None:
    write_model_folder(folder, BASE / "tokenizer", *denoiser.load_trained(work, BASE / "tokenizer"))
    print("bytes:", sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def draw_grids(data: Path, work: Path, folder: Path, images: Path) -> None:
    images.mkdir(parents=True, exist_ok=True)
    paths = sorted((data / "base").glob("*.webp"))[::5][:18] + sorted((data / "demo").glob("*.webp"))[:6]
    save(grids.reconstructions(denoiser.load_vae(work), paths), images / "base-reconstructions.jpg")
    save(grids.curves({"autoencoder": work / "vae.jsonl", "U-Net": work / "unet.jsonl"}), images / "base-curves.jpg")
    for name, subjects in (("base-samples", grids.PROMPTS), ("base-more-samples", grids.MORE_PROMPTS)):
        drawn = grids.samples(folder, [f"{subject}, 3d" for subject in subjects])
        save(grids.draw_grid([drawn], subjects, columns=8), images / f"{name}.jpg")
        print(name, score(drawn, subjects))


def save(image: Image.Image, path: Path) -> None:
    image.convert("RGB").save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tokenizer", "vae", "unet", "package", "features", "grids"])
    parser.add_argument("data", type=Path, help="what make_emoji_dataset.py wrote")
    parser.add_argument("work", type=Path, help="folder for checkpoints and logs")
    parser.add_argument("--minutes", type=float, default=50, help="budget of a training stage")
    parser.add_argument("--merges", type=Path, help="wheel or .txt.gz with CLIP's merges (tokenizer)")
    parser.add_argument("--folder", type=Path, default=BASE, help="where the packaged model is (package, grids)")
    parser.add_argument("--images", type=Path, default=REPOSITORY / "docs" / "images", help="where grids go")
    options = parser.parse_args()
    if options.stage == "tokenizer":
        write_tokenizer(options.data, options.merges)
    elif options.stage == "vae":
        autoencoder.train(options.data, options.work, options.minutes, Peers())
    elif options.stage == "unet":
        denoiser.train(options.data / "base", options.work, BASE / "tokenizer", options.minutes, Peers())
    elif options.stage == "package":
        package(options.work, options.folder)
    elif options.stage == "features":
        features.train(options.data)
    else:
        torch.set_num_threads(2)
        draw_grids(options.data, options.work, options.folder, options.images)


if __name__ == "__main__":
    main()
