"""The pictures of docs/regions.md, drawn from tables that clipray wrote: a picture's grid, and neighbours of places.

python benchmarks/places_pictures.py docs    # regions-grid.jpg and regions-neighbours.jpg
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

import clipray
from clipray.demo.places import draw_view, sample_place, sample_view
from clipray.demo.world import DemoWorld, write_world

PAPER, INK, FAINT = (250, 249, 246), (40, 40, 44), (120, 120, 126)
RIGHT, WRONG, JUNK = (24, 150, 70), (214, 52, 44), (150, 150, 156)
LINES = ((255, 196, 0), (0, 214, 255), (255, 92, 168), (120, 255, 90), (255, 130, 40), (176, 148, 255))
SEED, PLACE, TOP = 100, 15, 6  # the first world of places.py
POOLINGS = {
    "mac": {"layer": "stem", "pooling": "mac"},
    "rmac": {"layer": "stem", "pooling": "rmac", "levels": 2},
    "output": {"layer": "output"},
}
Row = dict[str, Any]


def run(home: Path, model: str, *steps: Row) -> Path:
    """A job of its own in `home`; returns its output folder."""
    job = {
        "output": str(home / "out"),
        "model": {"name": model, "precision": "fp32"},
        "steps": [{"embed_images": step} for step in steps],
    }
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    clipray.run(str(home / "job.yaml"))
    return home / "out"


def sheet(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def grid_picture(path: Path) -> None:
    """Boxes of the regions table: a square picture, and a wide one as the model crops it and with its aspect kept."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        place = sample_place(SEED, PLACE)
        square = draw_view(place, sample_view(place, 0, relation="easy"), 288)
        (home / "pictures").mkdir()
        Image.fromarray(square).resize((192, 192), Image.Resampling.LANCZOS).save(home / "pictures/square.png")
        Image.fromarray(square[48:240]).save(home / "pictures/wide.png")
        clipray.make_manifest(str(home / "pictures"), str(home / "manifest.parquet"))
        feature = {"rmac": {"layer": "tokens", "pooling": "rmac", "levels": 2, "regions": "grid"}}
        step = {"manifest": str(home / "manifest.parquet"), "features": feature}
        whole = {"name": "whole", "regions_name": "whole_regions", "preprocess": "keep_aspect", "long_side_px": 96}
        out = run(home, "demo", step, step | whole)
        wide = Image.open(home / "pictures/wide.png").convert("RGB")
        shown = [
            ("square.png", "regions", "a square picture", Image.open(home / "pictures/square.png").convert("RGB")),
            ("wide.png", "regions", "a wide one: the model's crop", wide),
            ("wide.png", "whole_regions", "preprocess: keep_aspect", wide),
        ]
        edge, gap, title = 192, 14, 30
        image, pen = sheet(gap + sum(p.width + gap for *_, p in shown), 2 * (title + edge) + gap)
        left = gap
        for name, table, caption, picture in shown:
            rows = clipray.read_table(str(out / table), ["image_id", "region_id", "box_xyxy", "scale"]).to_pylist()
            for n, scale in enumerate((1, 2)):
                own = [row for row in rows if row["image_id"] == name and row["scale"] == scale]
                top = n * (title + edge)
                words = f"{caption}: scale 1" if scale == 1 else "scale 2"
                pen.text((left, top + 8), words, fill=INK, font=ImageFont.load_default(15))
                image.paste(with_boxes(picture, own), (left, top + title))
            left += picture.width + gap
        image.save(path, quality=78, optimize=True)


def with_boxes(picture: Image.Image, rows: list[Row]) -> Image.Image:
    """The picture, dimmed outside all boxes; each box named as its region, drawn a little inside its neighbours' lines."""
    dim = ImageEnhance.Brightness(picture).enhance(0.3)
    seen = Image.new("L", picture.size, 0)
    for x1, y1, x2, y2 in (row["box_xyxy"] for row in rows):
        ImageDraw.Draw(seen).rectangle([x1, y1, x2 - 1, y2 - 1], fill=255)
    dim.paste(picture, mask=seen)
    pen = ImageDraw.Draw(dim)
    for n, row in enumerate(rows):
        x1, y1, x2, y2 = row["box_xyxy"]
        colour, inset = LINES[n % len(LINES)], 4 * (n % 2)
        pen.rectangle([x1 + inset, y1 + inset, x2 - 1 - inset, y2 - 1 - inset], outline=colour, width=3)
        name, font = row["region_id"].split("#")[1], ImageFont.load_default(13)
        pen.rectangle([x1 + inset, y1 + inset, x1 + inset + 22, y1 + inset + 17], fill=colour)
        pen.text((x1 + inset + 4, y1 + inset + 1), name, fill=(20, 20, 24), font=font)
    return dim


def neighbours_picture(path: Path, n_places: int = 60) -> None:
    """For three queries, the nearest views under each feature. Which three is decided by a rule, not by looks: ordered by
    how many more of the first six are right under rmac than under mac, those at the tenth, half and nine tenths."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        world = write_world(home / "world", seed=SEED, n_scenes=0, n_groups=0, n_words=0, n_places=n_places)
        out = run(home, "demo-rn", {"manifest": str(world.images), "features": POOLINGS, "keep": ["split", "place_id"]})
        rows = clipray.read_table(str(out / "images")).sort_by("image_id").to_pylist()
        queries, gallery = ([r for r in rows if (r["split"] == "query") == is_query] for is_query in (True, False))
        nearest = {name: neighbours(queries, gallery, name) for name in POOLINGS}
        relation = relations(world)
        hits = {
            name: np.array([sum(is_right(relation, q, found) for found in row[:TOP]) for q, row in zip(queries, table)])
            for name, table in nearest.items()
        }
        for name, counts in hits.items():
            print(f"{name}: {counts.mean():.2f} of the first {TOP} are right, of at most 5")
        order = np.argsort(hits["rmac"] - hits["mac"], kind="stable")
        chosen = [int(order[int(share * len(order))]) for share in (0.1, 0.5, 0.9)]
        draw_neighbours(
            path, world, [(queries[n], {name: nearest[name][n] for name in POOLINGS}) for n in chosen], relation
        )


def neighbours(queries: list[Row], gallery: list[Row], column: str) -> list[list[Row]]:
    """For each query the gallery, nearest first; the vectors are L2-normalised, so a dot product is a cosine."""
    ours, theirs = (np.array([row[column] for row in rows], np.float32) for rows in (queries, gallery))
    return [[gallery[i] for i in line] for line in np.argsort(-(ours @ theirs.T), axis=1, kind="stable")]


def relations(world: DemoWorld) -> dict[tuple[str, str], str]:
    return {(r["query_id"], r["image_id"]): r["relation"] for r in pq.read_table(world.queries).to_pylist()}


def is_right(relation: dict[tuple[str, str], str], query: Row, found: Row) -> bool:
    return relation.get((query["image_id"], found["image_id"])) in ("easy", "hard")


def draw_neighbours(
    path: Path, world: DemoWorld, shown: list[tuple[Row, dict[str, list[Row]]]], relation: dict[tuple[str, str], str]
) -> None:
    side, gap, label = 76, 6, 62

    def thumbnail(row: Row, edge: int) -> Image.Image:
        return Image.open(world.folder / "pictures" / f"{row['image_id']}.jpg").resize(
            (edge, edge), Image.Resampling.LANCZOS
        )

    big, step = 2 * side + gap, side + gap
    block = len(POOLINGS) * step + 14
    image, pen = sheet(gap + big + label + 16 + TOP * step, len(shown) * block)
    for n, (query, nearest) in enumerate(shown):
        top = 8 + n * block
        image.paste(thumbnail(query, big), (gap, top + 18))
        pen.text((gap, top), "query", fill=INK, font=ImageFont.load_default(14))
        for line, (name, found) in enumerate(nearest.items()):
            y = top + line * step
            pen.text((gap + big + 14, y + side // 2 - 16), name, fill=INK, font=ImageFont.load_default(15))
            right = sum(is_right(relation, query, row) for row in found[:TOP])
            pen.text((gap + big + 14, y + side // 2 + 2), f"{right} right", fill=FAINT, font=ImageFont.load_default(12))
            for column, row in enumerate(found[:TOP]):
                x = gap + big + label + 16 + column * step
                same = row["place_id"] == query["place_id"]
                colour = RIGHT if is_right(relation, query, row) else JUNK if same else WRONG
                pen.rectangle([x, y, x + side - 1, y + side - 1], fill=colour)
                image.paste(thumbnail(row, side - 8), (x + 4, y + 4))
    image.save(path, quality=78, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the two pictures")
    options = parser.parse_args()
    drawings: dict[str, Callable[[Path], None]] = {"grid": grid_picture, "neighbours": neighbours_picture}
    for name, drawing in drawings.items():
        drawing(options.folder / f"regions-{name}.jpg")


if __name__ == "__main__":
    main()
