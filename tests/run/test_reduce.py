"""The reduce step on the session's Ray: scikit-learn's components, whatever the files; resumed, extended, refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.decomposition import PCA
from support import draw_pictures, write_job

import clipray
from clipray import tables
from clipray.errors import ClipRayError, SchemaError, StaleTableError
from clipray.inputs.make_manifest import make_manifest
from clipray.storage.folder import TEMPORARY, Folder

pytestmark = pytest.mark.usefixtures("ray_here")
ROWS, WIDTH = 5_000, 24


def correlated(rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
    return (rng.normal(size=(rows, WIDTH)) * np.linspace(2, 0.2, WIDTH) @ axes + 3).astype(np.float32)


def write_vectors(folder: Path, x: np.ndarray, files: int = 3, group: int = 700) -> dict[str, Any]:
    """Somebody's own Parquet: plain lists, ids of their own name. Returns the `input` of a step."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, rows in enumerate(np.array_split(np.arange(len(x)), files)):
        data = pa.table({"key": [f"v{row:06d}" for row in rows], "vector": [x[row] for row in rows]})
        pq.write_table(data, folder / f"{n}.parquet", row_group_size=group)
    return {"path": str(folder), "column": "vector", "id": "key"}


def write_steps(path: Path, *steps: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump({"output": str(path.parent / "out"), "steps": list(steps)}))
    return str(path)


def matrix(url: Path, column: str = "vector", key: str = "key") -> tuple[list[str], np.ndarray]:
    table = tables.read_table(str(url))
    return table[key].to_pylist(), np.stack(table[column].to_numpy())


def test_components_and_rows_are_scikit_learns(tmp_path: Path) -> None:
    x = correlated(ROWS)
    source = write_vectors(tmp_path / "v", x)
    job = write_steps(tmp_path / "j.yaml", {"reduce": {"input": source, "components": 7, "rows_per_file": 1500}})
    own, beside = clipray.run(job)
    assert (own.name, own.rows, own.total, beside.name, beside.rows) == ("reduced", ROWS, ROWS, "reduced_components", 8)
    ids, found = matrix(tmp_path / "out/reduced")
    assert ids == [f"v{row:06d}" for row in range(ROWS)]
    oracle = PCA(7, svd_solver="full").fit(x.astype(np.float64))
    expected = oracle.transform(x.astype(np.float64))
    expected *= np.sign((expected * found).sum(0))
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
    components = tables.read_table(str(tmp_path / "out/reduced_components"))
    assert components["component"].to_pylist() == [-1, *range(7)]
    assert np.allclose(components["variance"].to_numpy()[1:], oracle.explained_variance_, rtol=1e-4)
    assert np.allclose(components["variance_ratio"].to_numpy()[1:], oracle.explained_variance_ratio_, rtol=1e-4)
    record = tables.read_record(Folder(str(tmp_path / "out/reduced")))
    assert record is not None
    assert record.summary["explained_variance_ratio"] == pytest.approx(oracle.explained_variance_ratio_.sum(), rel=1e-4)
    assert len(record.files) == 5
    (metric,) = tables.read_table(str(tmp_path / "out/metrics")).to_pylist()
    assert (metric["step"], metric["metric"], metric["n"]) == ("reduced", "explained_variance_ratio", ROWS)
    assert metric["value"] == record.summary["explained_variance_ratio"]


def test_whitening_and_a_share_of_the_variance(tmp_path: Path) -> None:
    x = correlated(ROWS)
    source = write_vectors(tmp_path / "v", x)
    clipray.run(
        write_steps(
            tmp_path / "j.yaml",
            {"reduce": {"input": source, "components": WIDTH, "whiten": True}},
            {"reduce": {"name": "most", "input": source, "explained_variance": 0.9, "normalize": "both"}},
        )
    )
    white = matrix(tmp_path / "out/reduced")[1].astype(np.float64)
    assert np.abs(np.cov(white.T) - np.eye(WIDTH)).max() <= 1e-3
    most = matrix(tmp_path / "out/most")[1]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    shares = PCA(svd_solver="full").fit(unit.astype(np.float64)).explained_variance_ratio_.cumsum()
    assert most.shape[1] == 1 + int((shares < 0.9).sum())
    assert np.abs(np.linalg.norm(most, axis=1) - 1).max() <= 1e-5


def test_files_and_row_groups_do_not_matter(tmp_path: Path) -> None:
    x = correlated(2_000)
    found = []
    for n, (files, group) in enumerate([(1, 2_000), (7, 100)]):
        source = write_vectors(tmp_path / f"v{n}", x, files, group)
        (tmp_path / f"{n}").mkdir()
        step = {"reduce": {"input": source, "components": 5, "whiten": True}}
        clipray.run(write_steps(tmp_path / f"{n}/j.yaml", step))
        found.append(matrix(tmp_path / f"{n}/out/reduced")[1])
    assert np.abs(found[0] - found[1]).max() <= 1e-4


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    source = write_vectors(tmp_path / "v", correlated(ROWS))
    job = write_steps(tmp_path / "j.yaml", {"reduce": {"input": source, "components": 4, "rows_per_file": 1000}})
    clipray.run(job)
    table = tmp_path / "out/reduced"
    before = matrix(table)
    files = sorted(table.glob("part-*.parquet"))
    # What a kill leaves: no record, a shard that is not there, one that is torn, one written aside.
    (table / "_table.json").unlink()
    files[1].unlink()
    files[3].write_bytes(files[3].read_bytes()[:500])
    (table / f"{TEMPORARY}123").write_bytes(b"torn")
    kept = {file: file.stat().st_mtime_ns for file in (files[0], files[2])}
    fitted = (tmp_path / "out/reduced_components/part-000000.parquet").stat().st_mtime_ns
    (planned,), _ = clipray.plan(job)
    assert planned.state == "partial"
    clipray.run(job)
    assert matrix(table)[0] == before[0]
    assert np.array_equal(matrix(table)[1], before[1])
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert (tmp_path / "out/reduced_components/part-000000.parquet").stat().st_mtime_ns == fitted
    assert [p.name for p in sorted(table.iterdir()) if p.name.startswith(".")] == []
    (again, _) = clipray.run(job)
    assert again.note == "was finished already"


def test_a_grown_input_is_fitted_anew_and_other_settings_are_refused(tmp_path: Path) -> None:
    x = correlated(ROWS)
    source = write_vectors(tmp_path / "v", x[:3_000], files=1)
    steps = {"input": source, "components": 4}
    job = write_steps(tmp_path / "j.yaml", {"reduce": steps})
    clipray.run(job)
    write_vectors(tmp_path / "v", x, files=2)
    os.utime(tmp_path / "v" / "0.parquet")
    own, _ = clipray.run(job)
    assert own.rows == ROWS
    expected = PCA(4, svd_solver="full").fit(x.astype(np.float64)).explained_variance_
    components = tables.read_table(str(tmp_path / "out/reduced_components"))
    assert np.allclose(components["variance"].to_numpy()[1:], expected, rtol=1e-4)
    write_steps(tmp_path / "j.yaml", {"reduce": {**steps, "whiten": True}})
    with pytest.raises(StaleTableError, match="whiten was False, is True"):
        clipray.run(job)
    own, _ = clipray.run(job, fresh=["reduced"])
    assert own.rows == ROWS


def test_a_fit_is_applied_to_another_table_in_the_same_space(tmp_path: Path) -> None:
    x = correlated(ROWS)
    database = write_vectors(tmp_path / "v", x[:4_000])
    queries = write_vectors(tmp_path / "q", x[4_000:], files=1)
    clipray.run(write_steps(tmp_path / "j.yaml", {"reduce": {"input": database, "components": 6, "whiten": True}}))
    (tmp_path / "other").mkdir()
    job = write_steps(
        tmp_path / "other/j.yaml",
        {"reduce": {"name": "queries", "input": queries, "fit": str(tmp_path / "out/reduced")}},
    )
    clipray.run(job)
    oracle = PCA(6, svd_solver="full", whiten=True).fit(x[:4_000].astype(np.float64))
    expected = oracle.transform(x[4_000:].astype(np.float64))
    found = matrix(tmp_path / "other/out/queries")[1]
    expected *= np.sign((expected * found).sum(0))
    assert np.abs(found - expected).max() <= 2e-3
    narrow = write_vectors(tmp_path / "n", x[:50, :5], files=1)
    write_steps(
        tmp_path / "other/j.yaml", {"reduce": {"name": "n", "input": narrow, "fit": str(tmp_path / "out/reduced")}}
    )
    with pytest.raises(SchemaError, match=f"was fitted on vectors of {WIDTH}, .* has 5"):
        clipray.run(job)


def test_it_follows_the_pictures(tmp_path: Path, tiny_model: str) -> None:
    """One job: pictures, then their components; new pictures bring the second step with them."""
    draw_pictures(tmp_path / "pictures", 30)
    make_manifest(str(tmp_path / "pictures"), str(tmp_path / "m.parquet"))
    job = write_job(tmp_path / "j.yaml", tmp_path / "m.parquet", tiny_model, batch_size=16)
    text = yaml.safe_load(Path(job).read_text())
    text["steps"].append({"reduce": {"input": "images.clip", "components": 3}})
    Path(job).write_text(yaml.safe_dump(text))
    reports, _ = clipray.plan(job)
    assert [(r.name, r.state, r.note) for r in reports][1] == ("reduced", "absent", "waits for images")
    clipray.run(job)
    assert matrix(tmp_path / "out/reduced", "clip", "image_id")[1].shape == (30, 3)
    draw_pictures(tmp_path / "pictures", 5, start=30)
    make_manifest(str(tmp_path / "pictures"), str(tmp_path / "m.parquet"))
    clipray.run(job)
    assert matrix(tmp_path / "out/reduced", "clip", "image_id")[1].shape == (35, 3)
    # Another model's vectors are of another space, though as wide.
    other = {"reduce": {"name": "odd", "input": "images.clip", "fit": "reduced"}}
    made = tables.read_record(Folder(str(tmp_path / "out/reduced_components")))
    assert made is not None
    text["steps"] = [*text["steps"], other]
    Path(job).write_text(yaml.safe_dump(text))
    clipray.run(job)
    made.provenance["space"]["of"]["model"]["weights"] = "sha256:0"
    tables.write_record(Folder(str(tmp_path / "out/reduced_components")), made)
    with pytest.raises(SchemaError, match=r"another space than images\.clip: model\.weights was 'sha256:0'"):
        clipray.run(job)


def bad_rows(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[17, 3], x[1_234] = np.nan, np.inf
    return x


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"components": 3}, bad_rows, "vectors that are not finite, key: 'v000017'"),
        ({"components": 3}, np.ones_like, "all .* equal"),
        ({"components": 3}, lambda x: x[:1], "n_samples=1 should be >= 2"),
        ({"components": 30}, None, "components=30 should be <= n_features=24"),
        ({"components": 20}, lambda x: x[:10], "n_components=20 should be <= .*9"),
        (
            {"components": 24, "whiten": True},
            lambda x: np.hstack([x[:, :23], x[:, :1]]),
            "n_components=24 should be <= 23",
        ),
    ],
)
def test_what_cannot_be_reduced(tmp_path: Path, settings: dict[str, Any], change: Any, message: str) -> None:
    x = correlated(2_000)
    source = write_vectors(tmp_path / "v", change(x) if change else x, files=1)
    job = write_steps(tmp_path / "j.yaml", {"reduce": {"input": source, **settings}})
    with pytest.raises(SchemaError, match=message) as caught:
        clipray.run(job)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("images", "expected `table.column`"),
        ("images.clip", "is no finished table; finish it with `clipray run`"),
        ({"path": "nowhere/*.parquet", "column": "v"}, "no manifest there"),
        ({"path": "v", "column": "vectors", "id": "key"}, "no column 'vectors'; found: key, vector"),
        ({"path": "v", "column": "vector"}, "no column 'image_id'; found: key, vector"),
        ({"path": "v", "column": "key", "id": "key"}, "is string; expected lists of float16, float32 or float64"),
    ],
)
def test_inputs_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_vectors(tmp_path / "v", correlated(10), files=1)
    with pytest.raises(ClipRayError, match=message) as caught:
        clipray.run(write_steps(tmp_path / "j.yaml", {"reduce": {"input": source, "components": 2}}))
    assert "\n" not in str(caught.value)


def test_vectors_of_several_widths_and_nulls_are_named(tmp_path: Path) -> None:
    for name, rows in {"wide": [[1.0, 2.0], [1.0, 2.0, 3.0]], "null": [[1.0, 2.0], None]}.items():
        (tmp_path / name).mkdir()
        data = pa.table({"image_id": ["a", "b"], "v": pa.array(rows, pa.list_(pa.float32()))})
        pq.write_table(data, tmp_path / name / "0.parquet")
        source = {"path": str(tmp_path / name), "column": "v"}
        with pytest.raises(SchemaError, match="row 1 of row group 0: expected a vector of 2, found"):
            clipray.run(write_steps(tmp_path / "j.yaml", {"reduce": {"name": name, "input": source, "components": 1}}))
