"""The step `project` on the session's Ray: scikit-learn's components, one layout of UMAP however it came about, and neighbours by brute force."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.decomposition import PCA

import clipray
from clipray import tables
from clipray.errors import ClipRayError
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
ROWS, WIDTH, GROUPS = 700, 12, 5


def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (5 * rng.normal(size=(GROUPS, WIDTH))[np.arange(ROWS) % GROUPS] + rng.normal(size=(ROWS, WIDTH))).astype(
        "f4"
    )


X = vectors()
IDS = [f"v{row:04d}" for row in range(ROWS)]


def column(home: Path, x: np.ndarray = X) -> dict[str, str]:
    """A column of somebody's own Parquet, in row groups of 100."""
    path = home / "v.parquet"
    values = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"key": IDS[: len(x)], "vector": values}), path, row_group_size=100)
    return {"path": str(path), "column": "vector", "id": "key"}


def write_job(home: Path, *steps: dict[str, Any]) -> str:
    home.mkdir(exist_ok=True)
    (home / "j.yaml").write_text(yaml.safe_dump({"output": str(home / "out"), "steps": list(steps)}))
    return str(home / "j.yaml")


def places(home: Path) -> np.ndarray:
    table = tables.read_table(str(home / "out/map"))
    assert table["key"].to_pylist() == IDS
    return np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)


def test_principal_components_and_the_nearest_rows(tmp_path: Path) -> None:
    source = column(tmp_path)
    index = {"index": {"input": source, "metric": "l2"}}
    project = {"project": {"input": source, "index": "index", "neighbours": 4, "rows_per_file": 250}}
    clipray.run(write_job(tmp_path, index, project))
    xy = places(tmp_path)
    oracle = PCA(2, svd_solver="full")
    expected = oracle.fit_transform(X.astype(float))
    expected *= np.sign((expected * xy).sum(0))
    assert np.abs(xy - expected).max() < 1e-4
    neighbors = tables.read_table(str(tmp_path / "out/map"))["neighbors"].to_pylist()
    distances = np.sqrt(np.square(X[:, None].astype(float) - X[None]).sum(2))
    np.fill_diagonal(distances, np.inf)
    assert [row["ids"] for row in neighbors] == [[IDS[n] for n in row[:4]] for row in distances.argsort(1)]
    assert np.allclose([row["distances"] for row in neighbors], np.sort(distances, 1)[:, :4], rtol=1e-4)
    record = tables.read_record(Folder(str(tmp_path / "out/map")))
    assert record is not None
    assert len(record.files) == 4
    assert 0.9 < record.summary["trustworthiness@15"] <= 1
    assert record.summary["first_variance_ratios"] == pytest.approx(oracle.explained_variance_ratio_, abs=1e-5)
    assert {row["metric"] for row in tables.read_table(str(tmp_path / "out/metrics")).to_pylist()} >= {
        "trustworthiness@15",
        "explained_variance_ratio",
    }


def test_a_umap_is_the_same_after_a_kill_and_in_any_number_of_files(tmp_path: Path) -> None:
    settings = {"input": column(tmp_path), "method": "umap", "sample_rows": 300, "n_neighbors": 8, "random_state": 3}
    job = write_job(tmp_path, {"project": {**settings, "rows_per_file": 400}})
    clipray.run(job)
    before, table = places(tmp_path), Folder(str(tmp_path / "out/map"))
    names = tables.shard_names(table)
    assert len(names) == 2
    # What a kill leaves, on another processor even, which rounded the layout of a shard in another way.
    table.remove("_table.json")
    metadata = tables.provenance_of(tables.shard_footer(table, names[1])[2])
    rows = tables.read_shard(table, names[1])
    moved = rows.set_column(1, rows.field("x"), pa.array(rows["x"].to_numpy() + 1))
    tables.write_shard(table, names[1], "map", moved, {**metadata, "layout": "sha256:of another"})
    kept = (tmp_path / "out/map" / names[0]).stat().st_mtime_ns
    clipray.run(job)
    assert np.array_equal(places(tmp_path), before)
    assert (tmp_path / "out/map" / names[0]).stat().st_mtime_ns == kept
    write_job(tmp_path, {"project": settings})
    clipray.run(job, fresh=["map"])
    assert len(tables.shard_names(table)) == 1
    assert np.array_equal(places(tmp_path), before)
    assert tables.read_table(table.url)["neighbors"].null_count == ROWS
    centres = np.stack([before[group::GROUPS].mean(0) for group in range(GROUPS)])
    nearest = np.square(before[:, None] - centres[None]).sum(2).argmin(1)
    assert (nearest == np.arange(ROWS) % GROUPS).mean() > 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_dist": 0.5}, "`min_dist` goes with `method: umap`, found `method: pca`"),
        ({"neighbours": 5}, "`neighbours` goes with `index`"),
        ({"method": "umap", "sample_rows": 10}, "`sample_rows` is 10, expected more than `n_neighbors`, 15"),
        ({"method": "umap", "n_neighbors": ROWS}, f"n_samples={ROWS} of .* should be >= {ROWS + 1}: UMAP"),
        ({"method": "tsne"}, "expected 'pca' or 'umap', found 'tsne'"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ClipRayError, match=message):
        clipray.run(write_job(tmp_path, {"project": {"input": column(tmp_path), **settings}}))


def test_an_index_of_another_column_is_refused(tmp_path: Path) -> None:
    source, other = column(tmp_path), tmp_path / "other"
    other.mkdir()
    job = write_job(tmp_path, {"index": {"input": column(other)}}, {"project": {"input": source, "index": "index"}})
    with pytest.raises(ClipRayError, match=r"map: index index is of .*other.*, expected one of"):
        clipray.run(job)


def test_equal_vectors_have_no_components(tmp_path: Path) -> None:
    source = column(tmp_path, np.ones((50, WIDTH), np.float32))
    with pytest.raises(ClipRayError, match=r"map: .*all 50 vectors are equal"):
        clipray.run(write_job(tmp_path, {"project": {"input": source}}))


def test_umap_wants_ids_that_tell_rows_apart(tmp_path: Path) -> None:
    source = column(tmp_path)
    table = pq.read_table(source["path"])
    pq.write_table(table.set_column(0, "key", pa.array(["same"] * ROWS)), source["path"])
    project = {"project": {"input": source, "method": "umap", "sample_rows": 20}}
    with pytest.raises(ClipRayError, match="a sample of 0 rows, expected more than n_neighbors=15: the ids repeat"):
        clipray.run(write_job(tmp_path, project))


def test_without_umap_learn_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "umap" else find(name))
    job = write_job(tmp_path, {"project": {"input": column(tmp_path), "method": "umap"}})
    with pytest.raises(ClipRayError, match=r'needs umap-learn: pip install "clipray\[umap\]"'):
        clipray.run(job)
