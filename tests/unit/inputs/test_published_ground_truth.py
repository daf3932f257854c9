"""Published ground truth becomes Parquet; pickles of plain values are read, and nothing of theirs is ever run."""

from __future__ import annotations

import ast
import builtins
import contextlib
import copyreg
import os
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from clipray.cli import main
from clipray.errors import ClipRayError, ManifestError
from clipray.inputs.plain_pickle import read_plain_pickle
from clipray.inputs.published_ground_truth import convert_ground_truth

GND = {
    "imlist": ["all_souls_000013", "all_souls_000026", "oxford_002985", "radcliffe_camera_000031"],
    "qimlist": ["all_souls_000051", "radcliffe_camera_000095"],
    "gnd": [
        {"bbx": [136.5, 34.1, 648.5, 955.7], "easy": np.array([1, 0]), "hard": np.array([], np.int64), "junk": [3]},
        {"bbx": np.array([1.0, 2, 3, 4]), "easy": [], "hard": [np.int32(3)], "junk": np.array([0, 1], np.uint16)},
    ],
}
ROWS = [
    ("all_souls_000051.jpg", "all_souls_000013.jpg", "easy"),
    ("all_souls_000051.jpg", "all_souls_000026.jpg", "easy"),
    ("all_souls_000051.jpg", "radcliffe_camera_000031.jpg", "junk"),
    ("radcliffe_camera_000095.jpg", "radcliffe_camera_000031.jpg", "hard"),
    ("radcliffe_camera_000095.jpg", "all_souls_000013.jpg", "junk"),
    ("radcliffe_camera_000095.jpg", "all_souls_000026.jpg", "junk"),
]


def rows_of(path: Path) -> list[tuple[str, str, str]]:
    return [(r["query_id"], r["image_id"], r["relation"]) for r in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_revisited_sets_in_any_protocol(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(GND, protocol))
    assert convert_ground_truth(str(tmp_path / "gnd.pkl"), str(tmp_path / "t.parquet")) == (2, 6)
    assert rows_of(tmp_path / "t.parquet") == ROWS
    boxes = pq.read_table(tmp_path / "t.parquet")["query_box_xyxy"].to_pylist()
    assert boxes[0] == pytest.approx([136.5, 34.1, 648.5, 955.7], abs=1e-3)
    assert boxes[5] == [1, 2, 3, 4]


def test_plain_values_are_what_they_were() -> None:
    values = {
        "numbers": [0, 1, -1, 255, 65_536, 2**40, -(2**70), 1.5, float("inf"), True, False, None],
        "strings": ["", "a", "päö\n", "x" * 300, b"", b"\x00\xff", b"y" * 300],
        "nested": {1: ({}, [], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "twice": [[7]] * 3},
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert read_plain_pickle(pickle.dumps(values, protocol), "x") == values
        for kind in ("<i8", ">i4", "u1", "<f4", ">f8", "?"):
            array = np.arange(12).reshape(3, 4).astype(kind)
            for given in (array, array.T, np.asfortranarray(array), array[:0], array[1, 2]):
                found = read_plain_pickle(pickle.dumps([given], protocol), "x")[0]
                assert np.array_equal(found, given), (protocol, kind)
    shared: list[Any] = []
    for _ in range(200):
        shared = [shared, shared]
    assert len(read_plain_pickle(pickle.dumps(shared, 2), "x")) == 2  # and in no time


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Plain:
    pass


def test_whatever_else_is_refused_and_never_run(tmp_path: Path) -> None:
    evil = Evil(tmp_path / "ran")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in (evil, {"gnd": [evil]}, Plain(), Plain, {1, 2} - {1}, np.array([evil, None]), 1j, range(3)):
            with pytest.raises(ClipRayError, match="refused, since it holds") as caught:
                read_plain_pickle(pickle.dumps(value, protocol), "x.pkl")
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil))  # it would have
    assert (tmp_path / "ran").exists()


HOSTILE = {
    "GLOBAL": b"cimported_by_pickle\nthing\n.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x12imported_by_pickle\x8c\x05thing\x93.",
    "INST": b"(iimported_by_pickle\nthing\n.",
    "extension": b"\x80\x02\x82\xf0.",
    "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
    "import": b"\x80\x04\x8c\x08builtins\x8c\x0a__import__\x93\x8c\x12imported_by_pickle\x85R.",
    "persistent": b"Pimported_by_pickle\n.",
    "state of a function": b"cnumpy\ndtype\n}(U\x08functionU\x01xub.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_is_ever_imported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_by_pickle.py").write_text("thing = 1")
    monkeypatch.syspath_prepend(tmp_path)
    copyreg.add_extension("imported_by_pickle", "thing", 0xF0)
    modules = set(sys.modules)
    try:
        with pytest.raises(ClipRayError, match="refused, since it holds"):
            read_plain_pickle(HOSTILE[name], "x.pkl")
        assert "imported_by_pickle" not in sys.modules
        pickle.loads(HOSTILE["extension"])  # it would have been
        assert set(sys.modules) - modules == {"imported_by_pickle"}
    finally:
        copyreg.remove_extension("imported_by_pickle", "thing", 0xF0)
        copyreg.clear_extension_cache()  # type: ignore[attr-defined] # not in its stubs
        sys.modules.pop("imported_by_pickle", None)


def test_numpy_names_are_not_imported_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any protocol and by either of NumPy's spellings."""
    names: list[str] = []
    original = builtins.__import__
    pickles = [pickle.dumps(GND, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    pickles += [pickles[2].replace(b"numpy._core", b"numpy.core"), pickles[2].replace(b"numpy.core", b"numpy._core")]
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: names.append(name) or original(name, *rest))
    for data in pickles:
        assert read_plain_pickle(data, "x.pkl")["imlist"] == GND["imlist"]
    monkeypatch.undo()
    assert not [name for name in names if name.startswith(("numpy", "_codecs"))]


def array_pickle(shape: str, kind: str = "'f8'") -> bytes:
    """An array of 8 bytes that claims a shape and a type, as code for a pickle by hand."""
    numbers = b"".join(f"I{n}\n".encode() for n in ast.literal_eval(shape))
    return (
        b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(" + numbers + b"t"
        b"cnumpy\ndtype\n(S" + kind.encode() + b"\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'12345678'\ntb."
    )


@pytest.mark.parametrize(
    "data",
    [
        array_pickle(f"({2**40},)"),
        array_pickle(f"({2**32}, {2**32})"),
        array_pickle(f"({2**70},)"),
        array_pickle("(" + "1, " * 100 + ")"),
        array_pickle("(1,)", "'O8'"),
        array_pickle("(1,)", "'(1000000000,)f8'"),
        array_pickle("(1,)", "'f8,O'"),
        b"c__builtin__\nbytes\n(I1099511627776\ntR.",
        b"cnumpy\nndarray\n(I1099511627776\ntR.",
        b"Nr\xff\xff\xff\x7f.",  # a memo of 2**31 entries
        b"\x8e" + (2**40).to_bytes(8, "little") + b"x.",  # bytes as long
        b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b".",  # a frame
    ],
)
def test_claimed_sizes_are_held_to_the_size_of_the_file(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ClipRayError, match=r"^x\.pkl: (not a whole pickle|refused)[^\n]*$"):
            read_plain_pickle(data, "x.pkl")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_shape_that_fits_is_read() -> None:
    assert read_plain_pickle(array_pickle("(1, 1)"), "x.pkl").shape == (1, 1)


def test_torn_pickles_are_one_line() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(GND, protocol)
        rng = np.random.default_rng(protocol)
        for end in range(0, len(data), 7):
            with pytest.raises(ClipRayError, match=r"x\.pkl: "):
                read_plain_pickle(data[:end], "x.pkl")
        for _ in range(500):  # bytes changed at random: read, or refused
            changed = bytearray(data)
            for at in rng.integers(0, len(data), 3):
                changed[at] = rng.integers(0, 256)
            with contextlib.suppress(ClipRayError):
                read_plain_pickle(bytes(changed), "x.pkl")


def write_oxford(folder: Path) -> str:
    files = {
        "all_souls_1_query": "oxc1_all_souls_000013 136.5 34.1 648.5 955.7",
        "all_souls_1_good": "all_souls_000013\nall_souls_000026\n",
        "all_souls_1_ok": "all_souls_000051\n",
        "all_souls_1_junk": "",
        "defense_1_query": "paris_defense_000605 0 0 1 1\n",
        "defense_1_good": "paris_defense_000000",
        "defense_1_ok": "",
        "defense_1_junk": "paris_defense_000009\n",
    }
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def test_oxfords_text_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """good is easy and ok is hard, so that medium is Oxford's own protocol; the query itself is no answer."""
    out = tmp_path / "t.parquet"
    arguments = ["ground-truth", write_oxford(tmp_path / "gt"), str(out), "--prefix", "jpg/", "--suffix", ".png"]
    monkeypatch.setattr(sys, "argv", ["clipray", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("2 queries, 4 rows in ")
    assert rows_of(out) == [
        ("jpg/all_souls_000013.png", "jpg/all_souls_000026.png", "easy"),
        ("jpg/all_souls_000013.png", "jpg/all_souls_000051.png", "hard"),
        ("jpg/paris_defense_000605.png", "jpg/paris_defense_000000.png", "easy"),
        ("jpg/paris_defense_000605.png", "jpg/paris_defense_000009.png", "junk"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"all_souls_1_ok": None}, "all_souls_1_ok.txt: is missing"),
        ({"all_souls_1_query": ""}, "all_souls_1_query.txt: is empty"),
        ({"all_souls_1_query": "a 1 2 x 4"}, "expected an image and x1 y1 x2 y2, found '1 2 x 4'"),
        ({"all_souls_1_junk": "all_souls_000026"}, "'all_souls_000026' has two relations to 'all_souls_000013'"),
        ({"all_souls_1_query": None, "defense_1_query": None}, r"no \*_query.txt there"),
    ],
)
def test_text_files_that_are_none(tmp_path: Path, change: dict[str, str | None], message: str) -> None:
    folder = write_oxford(tmp_path / "gt")
    for name, text in change.items():
        path = tmp_path / "gt" / f"{name}.txt"
        path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ManifestError, match=message):
        convert_ground_truth(folder, str(tmp_path / "t.parquet"))
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "expected a dict with gnd, imlist and qimlist, found list"),
        ({"gnd": []}, "found gnd"),
        ({**GND, "qimlist": ["a"]}, "zip"),
        ({**GND, "imlist": ["a"]}, "names image 1 of 1"),
        ({**GND, "gnd": [1, 2]}, "not the ground truth of images"),
        ({**GND, "gnd": 3}, "not the ground truth of images"),
    ],
)
def test_pickles_of_something_else(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "g.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(ManifestError, match=message) as caught:
        convert_ground_truth(str(tmp_path / "g.pkl"), str(tmp_path / "t.parquet"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ManifestError, match="nothing there"):
        convert_ground_truth(str(tmp_path / "no.pkl"), str(tmp_path / "t.parquet"))
