"""Solids of the demo world: the shapes with a thickness, as point clouds in the three formats that `render_depth` reads.

A disc becomes a ball and a square a cube; the others stand upright, their outline in the plane of x and z, and are as thick
as a seed says. What they show from the front (or from all sides) is one of the demo's shapes, so that its small model knows
them as white things on a black ground.

``python -m clipray.demo.solids runs/solids`` writes 64 of them, a manifest and a class file.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipray.demo.prompts import SHAPES, TEMPLATE
from clipray.demo.shapes import FIELDS

COLOUR = "white"
NEAR_EDGE = 0.02
CORNERS = {"square": 4, "triangle": 3}
"""Shapes that are written as meshes, and their corners."""


def sample_solid(shape: str, rng: np.random.Generator, points: int = 2_048) -> np.ndarray:
    """Points on the surface of a solid, (points, 3) float32, a little turned about the upright axis and uneven."""
    thickness = float(rng.uniform(0.1, 0.3))
    surface = _ball(rng, points) if shape == "circle" else _prism(shape, rng, points, thickness)
    return (_turned(surface, rng) + rng.normal(0, 0.005, surface.shape)).astype(np.float32)


def _ball(rng: np.random.Generator, points: int) -> np.ndarray:
    directions = rng.normal(size=(points, 3))
    return 0.88 * directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _prism(shape: str, rng: np.random.Generator, points: int, thickness: float) -> np.ndarray:
    """Points on the two faces and on the rim: half and half, of a cube one third and two."""
    half = points // (3 if shape == "square" else 2)
    thickness = 0.76 if shape == "square" else thickness
    x, z = rng.uniform(-1.1, 1.1, (2, 400 * points)).astype(np.float32)
    distance = FIELDS[shape](x, z)
    face, rim = np.flatnonzero(distance < 0)[:half], np.flatnonzero(np.abs(distance) < NEAR_EDGE)[: points - half]
    y_face = thickness * rng.choice([-1.0, 1.0], len(face))
    y_rim = rng.uniform(-thickness, thickness, len(rim))
    chosen = np.concatenate([face, rim])
    return np.stack([x[chosen], np.concatenate([y_face, y_rim]), z[chosen]], axis=1)


def _turned(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle = float(rng.uniform(-0.15, 0.15))
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    stretch = rng.uniform(0.9, 1.1, 3)
    turned: np.ndarray = points @ turn.T * stretch
    return turned


def ply(points: np.ndarray, *, text: bool) -> bytes:
    """A Stanford .ply of points (n, 3)."""
    encoding = "ascii" if text else "binary_little_endian"
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat {encoding} 1.0\ncomment of the demo world\nelement vertex {len(points)}\n{axes}end_header\n"
    body = "".join("{:.6f} {:.6f} {:.6f}\n".format(*row) for row in points.tolist()).encode()
    return header.encode() + (body if text else points.astype("<f4").tobytes())


def off(shape: str, rng: np.random.Generator) -> bytes:
    """A Geomview .off of a prism with straight sides: its two ends and a quadrangle for each side."""
    n = CORNERS[shape]
    thickness = 0.76 if shape == "square" else float(rng.uniform(0.1, 0.3))
    angles = np.pi / 2 + (np.pi / 4 if shape == "square" else 0) + 2 * np.pi * np.arange(n) / n
    outline = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ends = [np.stack([outline[:, 0], np.full(n, y), outline[:, 1]], axis=1) for y in (-thickness, thickness)]
    vertices = _turned(np.concatenate(ends), rng)
    faces = [[*range(n)], [*range(n, 2 * n)], *([a, (a + 1) % n, n + (a + 1) % n, n + a] for a in range(n))]
    lines = [f"OFF\n{2 * n} {len(faces)} 0"]
    lines += ["{:.6f} {:.6f} {:.6f}".format(*row) for row in vertices.tolist()]
    lines += [" ".join(map(str, [len(face), *face])) for face in faces]
    return "\n".join(lines).encode() + b"\n"


def solid_file(shape: str, index: int, seed: int) -> tuple[str, bytes]:
    """Suffix and bytes of a solid's file; the formats take turns."""
    rng = np.random.default_rng([seed, index, 7])
    if shape in CORNERS and index % 2:
        return "off", off(shape, rng)
    points = sample_solid(shape, rng)
    if index % 3:
        return "ply", ply(points, text=index % 3 == 1)
    file = io.BytesIO()
    np.save(file, points)
    return "npy", file.getvalue()


def write_solids(out_dir: str | Path, *, count: int = 64, seed: int = 0) -> Path:
    """Write `count` solids, all shapes in turn, with `clouds.parquet` and `classes.yaml`. Returns the manifest's path."""
    folder = Path(out_dir)
    (folder / "clouds").mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(count):
        shape = SHAPES[n % len(SHAPES)]
        suffix, data = solid_file(shape, n // len(SHAPES), seed * 1_000 + n % len(SHAPES))
        name = f"{shape}-{n:04d}"
        (folder / "clouds" / f"{name}.{suffix}").write_bytes(data)
        rows.append({"cloud_id": name, "uri": f"clouds/{name}.{suffix}", "label": f"{COLOUR} {shape}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "clouds.parquet", compression="zstd")
    names = "".join(f"  - {COLOUR} {shape}\n" for shape in SHAPES)
    (folder / "classes.yaml").write_text(f'names:\n{names}templates: "{TEMPLATE}"\n', encoding="utf-8")
    return folder / "clouds.parquet"


if __name__ == "__main__":
    print(write_solids(sys.argv[1] if len(sys.argv) > 1 else "runs/solids"))
