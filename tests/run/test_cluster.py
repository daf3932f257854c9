"""The cluster step on the session's Ray: as good as scikit-learn, the same bits on any number of actors, resumable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import clipray
from clipray import tables
from clipray.engine import vector_actors
from clipray.errors import ClipRayError, RunError, StaleTableError
from clipray.inputs.vector_column import open_vectors
from clipray.job import Column
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
ROWS, WIDTH, GROUPS = 6_000, 16, 12


def grouped(rows: int = ROWS, spread: float = 0.35, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, GROUPS, rows)
    x = rng.normal(size=(GROUPS, WIDTH))[labels] + spread * rng.normal(size=(rows, WIDTH))
    return x.astype(np.float32), labels


def write_table(path: Path, x: np.ndarray, labels: np.ndarray | None = None, group: int = 500) -> dict[str, Any]:
    ids = [f"v{row:06d}" for row in range(len(x))]
    data = {"image_id": ids, "vector": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])}
    if labels is not None:
        data["label"] = [f"class {label}" for label in labels]
    pq.write_table(pa.table(data), path, row_group_size=group)
    return {"path": str(path), "column": "vector"}


def write_job(home: Path, **settings: Any) -> str:
    home.mkdir(exist_ok=True)
    (home / "j.yaml").write_text(yaml.safe_dump({"output": str(home / "out"), "steps": [{"cluster": settings}]}))
    return str(home / "j.yaml")


def centroids(home: Path) -> np.ndarray:
    table = tables.read_table(str(home / "out/clusters_centroids"))
    assert table["cluster_id"].to_pylist() == list(range(len(table)))
    return np.stack(table["vector"].to_numpy())


def figures(home: Path) -> dict[str, Any]:
    return json.loads((home / "out/clusters/_table.json").read_text())["figures"]


def test_clusters_are_as_good_as_scikit_learns_and_belong_to_their_rows(tmp_path: Path) -> None:
    x, labels = grouped()
    source = write_table(tmp_path / "v.parquet", x, labels)
    own, beside = clipray.run(write_job(tmp_path / "a", input=source, clusters=GROUPS, n_init=5, rows_per_file=1_000))
    assert (own.rows, own.total, beside.name, beside.rows) == (ROWS, ROWS, "clusters_centroids", GROUPS)
    table = tables.read_table(str(tmp_path / "a/out/clusters"))
    assert table["image_id"].to_pylist() == [f"v{row:06d}" for row in range(ROWS)]
    c, found = centroids(tmp_path / "a"), table["cluster_id"].to_numpy()
    distances = np.linalg.norm(x[:, None] - c[None], axis=2)
    assert np.allclose(table["distance"].to_numpy(), distances.min(1), atol=1e-4)
    assert np.allclose(distances[np.arange(ROWS), found], distances.min(1), atol=1e-4)
    best = min(KMeans(GROUPS, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(5))
    assert figures(tmp_path / "a")["inertia"] <= 1.02 * best
    assert adjusted_rand_score(labels, found) > 0.9
    about = tables.read_table(str(tmp_path / "a/out/clusters_centroids"))
    assert about["size"].to_pylist() == np.bincount(found, minlength=GROUPS).tolist()
    nearest = [f"v{row:06d}" for row in np.where(found[:, None] == np.arange(GROUPS), distances, np.inf).argmin(0)]
    assert about["nearest_id"].to_pylist() == nearest
    assert len(list((tmp_path / "a/out/clusters").glob("*.parquet"))) == 6


def test_the_same_bits_on_any_number_of_actors_and_wherever_vectors_lie(tmp_path: Path) -> None:
    x = grouped()[0]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    source = write_table(tmp_path / "v.parquet", x)
    settings = {"input": source, "clusters": 40, "max_iterations": 6, "tolerance": 0}
    found = []
    for actors, hold in ((1, "auto"), (3, "none")):
        home = tmp_path / hold
        clipray.run(write_job(home, actors=actors, hold=hold, **settings))
        assert figures(home)["held"] == (hold != "none")
        found.append((centroids(home), tables.read_table(str(home / "out/clusters"))["cluster_id"].to_numpy()))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


def test_vectors_read_part_by_part_are_as_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_actors, "PART_ROWS", 1_200)
    x = grouped()[0]
    source = open_vectors(Column(**write_table(tmp_path / "v.parquet", x)), Folder(str(tmp_path)))
    held, read = (
        vector_actors.VectorActor(source, source.row_groups, vector_actors.Holding(hold=hold), "cpu", 1)
        for hold in ("float32", "none")
    )
    assert (held.facts()["held"], read.facts()["held"]) == (True, False)
    c = x[:30]
    for mine, theirs in zip(vars(held.assign(c)).values(), vars(read.assign(c)).values(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)
    for around in (None, c):
        one, other = held.draw(700, 3, around), read.draw(700, 3, around)
        assert one.rows.tolist() == other.rows.tolist()
        np.testing.assert_array_equal(held.rows(one.rows), read.rows(other.rows))
        np.testing.assert_array_equal(read.rows(other.rows), x[other.rows])
    written: list[list[Any]] = []
    for holder in (held, read):
        written.append(
            holder.finish(
                c, lambda ids, *rest: (ids["image_id"].to_pylist(), *map(np.ndarray.tolist, rest[:2]), rest[2]), 1_700
            )
        )
    assert written[0] == written[1]
    assert [(len(part[0]), part[3]) for part in written[0]] == [(1_500, start) for start in range(0, ROWS, 1_500)]


def test_vectors_that_do_not_fit_are_read_again_or_refused(tmp_path: Path) -> None:
    source = open_vectors(Column(**write_table(tmp_path / "v.parquet", grouped()[0])), Folder(str(tmp_path)))
    holding = vector_actors.Holding(budget_bytes=500_000)
    assert not vector_actors.VectorActor(source, source.row_groups, holding, "cpu", 1).facts()["held"]
    small = replace(holding, hold="float16")  # 6,000 rows of 2 x 16 + 12 bytes
    assert vector_actors.VectorActor(source, source.row_groups, small, "cpu", 1).facts()["held"]
    with pytest.raises(ClipRayError, match=r"6000 vectors of 16 take .* GiB as float32 on cpu, where .*`hold: auto`"):
        vector_actors.VectorActor(source, source.row_groups, replace(holding, hold="float32"), "cpu", 1).facts()


def test_mini_batches_come_near_and_go_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = grouped()[0]
    source = write_table(tmp_path / "v.parquet", x)
    settings = {
        "input": source, "clusters": GROUPS, "n_init": 3, "max_iterations": 6, "tolerance": 0, "mini_batch": 1_000
    }  # fmt: skip
    clipray.run(write_job(tmp_path / "whole", **settings))
    table = tables.read_table(str(tmp_path / "whole/out/clusters"))
    assert not figures(tmp_path / "whole")["held"]
    assert (
        np.square(table["distance"].to_numpy()).sum() < 1.02 * KMeans(GROUPS, n_init=3, random_state=0).fit(x).inertia_
    )
    kept = stop_after(4, monkeypatch)
    job = write_job(tmp_path / "stopped", actors=2, **settings)
    with pytest.raises(RunError, match="the machine is gone"):
        clipray.run(job)
    clipray.run(job)
    assert kept == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(centroids(tmp_path / "stopped"), centroids(tmp_path / "whole"))


def stop_after(iterations: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The iterations whose checkpoints are kept; after so many the run breaks off, once."""
    from clipray.steps.vectors import cluster

    kept, save = [], cluster._save

    def stop(folder: Any, state: Any) -> None:
        save(folder, state)
        kept.append(state.n_iterations)
        if kept == list(range(1, iterations + 1)):
            raise ConnectionError("the machine is gone")

    monkeypatch.setattr(cluster, "_save", stop)
    return kept


def test_a_run_that_ends_at_iteration_five_of_twenty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = grouped(20_000, spread=3.0)[0]
    source = write_table(tmp_path / "v.parquet", x)
    settings = {"input": source, "clusters": 300, "max_iterations": 20, "tolerance": 0, "spherical": True}
    clipray.run(write_job(tmp_path / "whole", **settings))
    job, checkpoint = write_job(tmp_path / "ended", **settings), tmp_path / "ended/out/clusters/_checkpoint.npz"
    stop_after(5, monkeypatch)
    with pytest.raises(RunError, match="the machine is gone"):
        clipray.run(job)
    assert len(np.load(checkpoint)["inertia"]) == 5
    assert clipray.plan(job)[0][0].state == "partial"
    said: list[str] = []
    clipray.run(job, notice=said.append)
    assert "clusters: goes on after iteration 5" in said
    assert np.array_equal(centroids(tmp_path / "ended"), centroids(tmp_path / "whole"))
    assert np.allclose(np.linalg.norm(centroids(tmp_path / "whole"), axis=1), 1, atol=1e-6)
    inertia = [
        m for m in tables.read_table(str(tmp_path / "ended/out/metrics")).to_pylist() if m["metric"] == "inertia"
    ]
    assert [m["group"] for m in inertia] == [f"iteration {n}" for n in range(1, 21)] + [None]
    assert not checkpoint.exists()


def test_labels_say_how_pure_the_clusters_are(tmp_path: Path) -> None:
    """Labels come from another table of the same run, by image_id."""
    x, labels = grouped()
    source = write_table(tmp_path / "v.parquet", x)
    schema = pa.schema([pa.field("image_id", pa.string(), False), pa.field("label", pa.string())])
    data = pa.table(
        [[f"v{row:06d}" for row in range(ROWS)], [f"class {n}" if n else None for n in labels]], schema=schema
    )
    folder = Folder(str(tmp_path / "a/out/known"))
    folder.write("part-0.parquet", b"")
    (tmp_path / "a/out/known/part-0.parquet").unlink()
    pq.write_table(
        data.replace_schema_metadata({"clipray": '{"fingerprint": "f"}'}), tmp_path / "a/out/known/part-0.parquet"
    )
    size = (tmp_path / "a/out/known/part-0.parquet").stat().st_size
    tables.write_record(
        folder,
        tables.Record("images", 1, {f.name: str(f.type) for f in schema}, ROWS, 0, [{"name": "part-0.parquet", "rows": ROWS, "bytes": size}], "f", {}, {}, {}),
    )  # fmt: skip
    clipray.run(write_job(tmp_path / "a", input=source, clusters=GROUPS, labels="known.label"))
    found = figures(tmp_path / "a")
    table = tables.read_table(str(tmp_path / "a/out/clusters"))
    known = labels > 0
    assert found["ari"] == pytest.approx(
        adjusted_rand_score(labels[known], table["cluster_id"].to_numpy()[known]), abs=1e-6
    )
    assert 0.9 < found["purity"] <= 1
    assert 0.9 < found["nmi"] <= 1
    assert 0 < found["silhouette"] < 1
    metric = next(m for m in tables.read_table(str(tmp_path / "a/out/metrics")).to_pylist() if m["metric"] == "purity")
    assert metric["n"] == int(known.sum())


def test_other_settings_are_refused_and_a_finished_table_is_kept(tmp_path: Path) -> None:
    source = write_table(tmp_path / "v.parquet", grouped(800)[0])
    job = write_job(tmp_path / "a", input=source, clusters=5)
    clipray.run(job)
    assert clipray.run(job)[0].note == "was finished already"
    clipray.run(write_job(tmp_path / "a", input=source, clusters=5, actors=2))
    with pytest.raises(StaleTableError, match="clusters was 5, is 6"):
        clipray.run(write_job(tmp_path / "a", input=source, clusters=6))
    assert clipray.run(job, fresh=["clusters"])[0].rows == 800


def nan_in(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[123, 4] = np.nan
    return x


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"clusters": 900}, None, "n_samples=800 .* should be >= clusters=900"),
        ({"clusters": 4}, nan_in, "image_id: 'v000123'; repair or drop these rows"),
        ({"clusters": 4}, np.ones_like, "clusters: .*distinct"),
        ({"clusters": 4, "spherical": True}, np.zeros_like, "clusters: .*"),
        ({"clusters": 4, "labels": "known.label"}, None, "known: no _table.json"),
    ],
)
def test_what_cannot_be_clustered(tmp_path: Path, settings: dict[str, Any], change: Any, message: str) -> None:
    x = grouped(800)[0]
    source = write_table(tmp_path / "v.parquet", change(x) if change else x)
    with pytest.raises(ClipRayError, match=message) as caught:
        clipray.run(write_job(tmp_path / "a", input=source, **settings))
    assert "\n" not in str(caught.value)
