"""Makes `notebooks/*.ipynb` from their sources `notebooks/src/*.py`.

    python scripts/build_notebooks.py           write them, and the badge in README.md that opens the first one in Colab
    python scripts/build_notebooks.py --check   exit with 1 if a notebook is not what its source says

A source is Python with cells: `# %%` begins a code cell (`tags=["parameters"]` and `form` may follow), `# %% [markdown]`
one of text, whose lines are comments. Lines that begin with `# !` become shell lines. `# %% [setup]` stands for the set-up
cell, which is the same in all notebooks (`src/setup.txt`). It holds the address that the kit is published at: `url` in
setup.cfg, the one place where a publisher sets it. Without it the cell takes EVERYDREAM_KIT_REPOSITORY from the
environment, or asks. Cell ids are hashes of their content, so that an unchanged cell is an unchanged line in the repository.
"""

import argparse
import configparser
import hashlib
import json
import re
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
METADATA = {
    "accelerator": "GPU",
    "colab": {"provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def build(source: Path) -> str:
    """The notebook of a source, as the text of its file."""
    setup = (source.parent / "setup.txt").read_text("utf-8").strip().replace("@REPOSITORY@", published_address())
    cells = []
    for head, body in split_cells(source.read_text("utf-8")):
        text = setup if "[setup]" in head else body
        kind = "markdown" if "[markdown]" in head else "code"
        if kind == "markdown":
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines())
        text = re.sub(r"^# !", "!", text, flags=re.MULTILINE)
        cells.append(make_cell(kind, head, text, taken={cell["id"] for cell in cells}))
    notebook = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def published_address(setup: Path = NOTEBOOKS.parent / "setup.cfg") -> str:
    """Where the kit is published, or an empty text."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(setup, encoding="utf-8")
    return parser["metadata"].get("url", "").strip()


BADGE = re.compile(r"(<!-- colab badge: [^\n]*-->\n)(.*?)(<!-- /colab badge -->)", re.DOTALL)


def with_badge(readme: str, address: str) -> str:
    """The README with Colab's badge, which exists for GitHub addresses; without one the place stays empty."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", address)
    link = (
        f"https://colab.research.google.com/github/{found[1]}/blob/main/notebooks/00_quickstart.ipynb" if found else ""
    )
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    badge = f"\n[![Open In Colab]({image})]({link})\n" if link else ""
    return BADGE.sub(lambda match: match[1] + badge + match[3], readme)


def split_cells(text: str) -> list[tuple[str, str]]:
    """(head line, body) of each cell."""
    pieces = re.split(r"^(# %%.*)$", text, flags=re.MULTILINE)[1:]
    return [(head, body.strip()) for head, body in zip(pieces[::2], pieces[1::2], strict=True)]


def make_cell(kind: str, head: str, text: str, taken: set[str]) -> dict:
    """One cell as nbformat writes it."""
    metadata: dict = {}
    if tags := re.search(r"tags=(\[.*?\])", head):
        metadata["tags"] = json.loads(tags[1])
    if "[setup]" in head or " form" in head:
        metadata["cellView"] = "form"
        metadata["jupyter"] = {"source_hidden": True}
    number = 0
    while (name := hashlib.blake2b(f"{kind}{number}{text}".encode(), digest_size=6).hexdigest()) in taken:
        number += 1
    cell = {"cell_type": kind, "id": name, "metadata": metadata, "source": text.splitlines(keepends=True)}
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}


def main() -> int:
    """Write or check all notebooks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for source in sorted((NOTEBOOKS / "src").glob("*.py")):
        target = NOTEBOOKS / f"{source.stem}.ipynb"
        text = build(source)
        if target.is_file() and target.read_text("utf-8") == text:
            continue
        stale.append(target.name)
        if not options.check:
            target.write_text(text, "utf-8")
            print(f"wrote {target.name}")
    readme = NOTEBOOKS.parent / "README.md"
    text = with_badge(readme.read_text("utf-8"), published_address())
    if text != readme.read_text("utf-8"):
        stale.append(readme.name)
        if not options.check:
            readme.write_text(text, "utf-8")
            print(f"wrote {readme.name}")
    if options.check and stale:
        print(f"not what their sources say: {', '.join(stale)}. Run python scripts/build_notebooks.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
