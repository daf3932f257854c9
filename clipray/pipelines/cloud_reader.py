"""Point clouds from files: NumPy's `.npy`, Stanford's `.ply` (text and binary), Geomview's `.off`, whose faces are sampled.

The format is told by the first bytes, not by the name. Nothing here raises for a bad cloud but `Rejected`.
"""

from __future__ import annotations

import io
from itertools import islice, pairwise

import numpy as np

from clipray.errors import one_line
from clipray.tables.reasons import Rejected

LEAST_POINTS = 8
PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
PLY_ORDER = {"binary_little_endian": "<", "binary_big_endian": ">"}


def read_cloud(data: bytes, sampled: int) -> np.ndarray:
    """A file's points, (n, 3) float64 with n >= 8.

    Args:
        sampled: how many points are drawn from the surface of a mesh.

    Raises:
        Rejected: not_a_point_cloud, not_finite or too_few_points.
    """
    try:
        points = _points(data, sampled)
    except Rejected:
        raise
    except Exception as error:  # a broken file can break a parser anywhere
        raise _no_cloud(f"{type(error).__name__}: {one_line(error)}") from error
    bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(bad):
        where = f"{len(bad)} of {len(points)} points have a coordinate that is no finite number, the first is point {bad[0]}"
        raise Rejected("decode", "not_finite", where)
    if len(points) < LEAST_POINTS:
        raise Rejected("decode", "too_few_points", f"{len(points)} points, fewer than {LEAST_POINTS}")
    return points


def _no_cloud(why: str) -> Rejected:
    return Rejected("decode", "not_a_point_cloud", f"{why}; expected .npy of (n, 3) numbers, .ply, or .off")


def _points(data: bytes, sampled: int) -> np.ndarray:
    if data.startswith(b"\x93NUMPY"):
        points = np.load(io.BytesIO(data))
        if points.ndim != 2 or points.shape[1] < 3 or points.dtype.kind not in "fiu":
            raise _no_cloud(f"an array of shape {points.shape} and type {points.dtype}")
        return points[:, :3].astype(np.float64)
    if data.startswith((b"ply\n", b"ply\r")):
        return _ply(data)
    if data.lstrip()[:3] == b"OFF":
        return _off(data, sampled)
    raise _no_cloud(f"{len(data)} bytes starting {data[:8]!r}")


def _ply(data: bytes) -> np.ndarray:
    """x, y, z of the element `vertex`, which every PLY of points has first."""
    end = data.index(b"end_header")
    body = data[data.index(b"\n", end) + 1 :]
    lines = [line.split() for line in data[:end].decode("ascii").splitlines()]
    encoding = next(words[1] for words in lines if words[:1] == ["format"])
    elements = [words for words in lines if words[:1] == ["element"]]
    if elements[0][1] != "vertex":
        raise _no_cloud(f"a .ply whose first element is {elements[0][1]!r}, not `vertex`")
    count, start = int(elements[0][2]), lines.index(elements[0]) + 1
    stop = lines.index(elements[1]) if len(elements) > 1 else len(lines)
    properties = [words for words in lines[start:stop] if words[0] == "property"]
    if any(words[1] == "list" for words in properties) or not {"x", "y", "z"} <= {words[2] for words in properties}:
        raise _no_cloud("a .ply whose vertices have no x, y and z, or have lists")
    names = [words[2] for words in properties]
    if encoding == "ascii":
        rows = [line.split() for line in islice(filter(bytes.strip, body.splitlines()), count)]
        columns = dict(zip(names, np.array(rows, np.float64).reshape(-1, len(names)).T, strict=True))
    else:
        order = PLY_ORDER[encoding]
        record = np.dtype([(name, order + PLY_TYPES[words[1]]) for name, words in zip(names, properties, strict=True)])
        table = np.frombuffer(body, record, count)
        columns = {name: table[name] for name in names}
    if len(columns["x"]) != count:
        raise Rejected("decode", "truncated", f"{len(columns['x'])} of the {count} vertices that its header names")
    return np.stack([columns[axis].astype(np.float64) for axis in "xyz"], axis=1)


def _off(data: bytes, sampled: int) -> np.ndarray:
    """Points of a mesh, drawn evenly over its faces, the same at every reading; its vertices where it has no faces."""
    lines = (
        line.split(b"#")[0] for line in data.lstrip()[3:].splitlines()
    )  # some write OFF and the counts in one line
    words = [line.split() for line in lines if line.strip()]
    n, faces = int(words[0][0]), int(words[0][1])
    vertices = np.array([row[:3] for row in words[1 : 1 + n]], np.float64).reshape(-1, 3)
    polygons = [list(map(int, row[1 : 1 + int(row[0])])) for row in words[1 + n : 1 + n + faces]]
    if len(vertices) != n or len(polygons) != faces:
        raise Rejected("decode", "truncated", f"{len(vertices)} of {n} vertices and {len(polygons)} of {faces} faces")
    triangles = np.array([(p[0], a, b) for p in polygons for a, b in pairwise(p[1:])], np.int64).reshape(-1, 3)
    if not len(triangles) or not np.isfinite(vertices).all():
        return vertices
    return sample_surface(vertices[triangles], sampled)


def sample_surface(triangles: np.ndarray, count: int) -> np.ndarray:
    """`count` points, evenly over the area of triangles (t, 3, 3), by a fixed seed; (count, 3)."""
    sides = triangles[:, 1:] - triangles[:, :1]
    area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(triangles), count, p=area / area.sum() if area.sum() else None)
    u, v = rng.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    result: np.ndarray = triangles[chosen, 0] + u * sides[chosen, 0] + v * sides[chosen, 1]
    return result
