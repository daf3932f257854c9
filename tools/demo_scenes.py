"""One image that shows the demo world: a row for each kind of scene, and places seen several times."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from clipray.demo.places import Relation, draw_view, sample_place, sample_view
from clipray.demo.scenes import Scene, contradicting_word, draw, sample_scene, with_word
from clipray.report.plots import contact_sheet

_VIEWS: tuple[tuple[Relation, range], ...] = (("easy", range(3)), ("hard", range(1, 4)), ("junk", range(1, 3)))


def _with_boxes(scene: Scene, side_px: int) -> Image.Image:
    drawing = draw(scene, side_px)
    image = Image.fromarray(drawing.pixels)
    pen = ImageDraw.Draw(image)
    for left, top, right, bottom in drawing.boxes.tolist():
        pen.rectangle((left - 1, top - 1, right, bottom), outline=(255, 255, 255))
    return image


def _rows(n_columns: int, side_px: int) -> list[tuple[str, list[Image.Image]]]:
    singles = [sample_scene(0, index) for index in range(2 * n_columns)]
    groups = [sample_scene(1, index, kind="group") for index in range(n_columns)]
    words = [sample_scene(2, index, kind="word") for index in range(n_columns)]
    clashes = [with_word(scene, contradicting_word(scene)) for scene in singles[:n_columns]]

    def drawn(scenes: list[Scene]) -> list[Image.Image]:
        return [Image.fromarray(draw(scene, side_px).pixels) for scene in scenes]

    rows = [("one thing: label = colour and shape", drawn(singles[:n_columns])), ("", drawn(singles[n_columns:]))]
    rows.append(("two to four things, with boxes", [_with_boxes(scene, side_px) for scene in groups]))
    rows.append(("a word alone", drawn(words)))
    rows.append(("a word that contradicts the image", drawn(clashes)))
    for index in range(3):
        place = sample_place(0, index)
        looks = [sample_view(place, number, relation=relation) for relation, numbers in _VIEWS for number in numbers]
        title = "" if index else "places: three easy, three hard and two junk views of each"
        rows.append((title, [Image.fromarray(draw_view(place, look, side_px)) for look in looks[:n_columns]]))
    return rows


def write_contact_sheet(path: str | Path, *, n_columns: int = 8, side_px: int = 128) -> Path:
    """Draw the sheet and save it at `path` (PNG or JPEG by its name); returns the path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(_rows(n_columns, side_px), side_px=side_px).save(path, quality=88, optimize=True)
    return Path(path)


if __name__ == "__main__":
    write_contact_sheet(sys.argv[1] if len(sys.argv) > 1 else "docs/demo-scenes.jpg")
