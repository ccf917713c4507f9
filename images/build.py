"""Rewrite every picture of the course: `python -m images.build`."""

import importlib
from collections.abc import Callable
from pathlib import Path

from images.draw import Drawing

FOLDER = Path(__file__).parent


def pictures() -> dict[str, Callable[[], Drawing]]:
    """Collect the pictures of all chapters: name of the file, without .svg, to the function that draws it."""
    chapters = sorted(
        path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "build", "draw")
    )
    return {
        name: draw
        for stem in chapters
        for name, draw in importlib.import_module(f"images.{stem}").PICTURES.items()
    }


def main() -> None:
    for name, draw in pictures().items():
        beside = FOLDER / f"{name}.svg.new"
        beside.write_text(draw().svg(), encoding="utf-8", newline="\n")
        beside.replace(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
