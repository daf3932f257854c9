"""The steps index and search on the session's Ray: measured recall, growth, and answers that are those of brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import clipray
from clipray import tables
from clipray.errors import ClipRayError, RunError, StaleTableError
from clipray.inputs.index_reader import open_index
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
WIDTH = 16


def clustered(rows: int, groups: int = 30, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, WIDTH))[rng.integers(0, groups, rows)] + 0.5 * rng.normal(size=(rows, WIDTH))
    return (3 * x).astype(np.float32)


X = clustered(4_000)


def write_vectors(path: Path, x: np.ndarray, first: int = 0, group: int = 500) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    ids = [f"v{first + row:06d}" for row in range(len(x))]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"image_id": ids, "vector": vectors}), path, row_group_size=group)


def write_job(home: Path, *steps: dict[str, Any]) -> str:
    home.mkdir(exist_ok=True)
    (home / "j.yaml").write_text(yaml.safe_dump({"output": str(home / "out"), "steps": list(steps)}))
    return str(home / "j.yaml")


def column(home: Path, name: str = "v") -> dict[str, str]:
    return {"path": str(home / name), "column": "vector"}


def record(home: Path, name: str = "index") -> dict[str, Any]:
    return json.loads((home / "out" / name / "_table.json").read_text())


def first_answers(home: Path, x: np.ndarray, name: str = "index", **effort: int) -> np.ndarray:
    """Of each vector the row that the index says is nearest, by the row's identity, `v000012` for 12."""
    opened = open_index(name, Folder(str(home / "out" / name)))
    for parameter, value in effort.items():
        setattr(opened.index, parameter, value)
    names = opened.ids["image_id"].to_numpy()
    assert len(set(names)) == len(names) == opened.index.ntotal
    return np.array([int(name[1:]) for name in names[opened.search(x, 1)[1][:, 0]]])


def scored(x: np.ndarray, metric: str) -> np.ndarray:
    """(n, n) float64, the smaller the nearer."""
    x = x.astype(np.float64)
    if metric == "l2":
        return np.square(x[:, None] - x[None]).sum(2)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x
    return -unit @ unit.T


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
def test_flat_answers_are_those_of_brute_force(tmp_path: Path, metric: str) -> None:
    x = X[:900]
    write_vectors(tmp_path / "v" / "a.parquet", x)
    steps = [
        {"index": {"input": column(tmp_path), "metric": metric, "rows_per_task": 400}},
        {"search": {"index": "index", "queries": column(tmp_path), "top": 5, "leave_out_self": metric != "dot"}},
    ]
    reports = clipray.run(write_job(tmp_path, *steps))
    assert [(report.name, report.rows) for report in reports] == [("index", 900), ("neighbours", 4_500)]
    figures = record(tmp_path)["figures"]
    assert (figures["type"], figures["recall@1"], figures["recall@10"], figures["recall@100"]) == ("Flat", 1, 1, 1)
    found = tables.read_table(str(tmp_path / "out/neighbours")).to_pandas()
    distances = scored(x, metric)
    if metric != "dot":
        np.fill_diagonal(distances, np.inf)
    expected = np.sort(distances, axis=1)[:, :5]
    assert found["rank"].tolist() == list(range(1, 6)) * 900
    mine = found["score"].to_numpy().reshape(900, 5) * (1 if metric == "l2" else -1)
    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-4)
    rows, answers = (found[name].str[1:].astype(int).to_numpy() for name in ("query_id", "image_id"))
    np.testing.assert_allclose(distances[rows, answers], expected.ravel(), rtol=1e-4, atol=1e-4)


def test_an_index_reaches_its_recall_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vectors(tmp_path / "v" / "a.parquet", X[:2_500])
    index = {"index": {"input": column(tmp_path), "type": "IVF40,SQ8", "recall": 0.9, "rows_per_task": 600}}
    job = write_job(tmp_path, index)
    clipray.run(job)
    first = record(tmp_path)
    assert first["rows"] == first["figures"]["vectors"] == 2_500
    assert first["figures"]["recall@10"] >= 0.9
    assert first["figures"]["held_out"] == 250
    assert first["figures"]["trained_on"] == 2_250
    assert first["figures"]["parameter"] == "nprobe"
    assert 1 <= first["figures"]["value"] < 40
    assert clipray.run(job)[0].note == "was finished already"
    write_vectors(tmp_path / "v" / "b.parquet", X[2_500:], first=2_500)
    assert clipray.plan(job)[0][0].state == "partial"
    said: list[str] = []
    clipray.run(job, notice=said.append)
    assert "index: 1500 new vectors are added to the 2500 of the index" in said
    second = record(tmp_path)
    assert second["rows"] == 4_000
    assert second["figures"]["held_out"] == 400
    assert second["figures"]["recall@10"] >= 0.9
    assert {f["name"] for f in first["files"]} < {f["name"] for f in second["files"]}
    files = {path.name for path in (tmp_path / "out/index").iterdir()}
    assert sum(name.endswith(".faiss") for name in files) == 1  # the old one went
    assert (first_answers(tmp_path, X, nprobe=40) == np.arange(4_000)).mean() > 0.99
    write_vectors(tmp_path / "v" / "few.parquet", clustered(20, seed=2), first=900_000)
    clipray.run(job)
    assert {**second["figures"], "vectors": 4_020, "index_bytes": 0} == {
        **record(tmp_path)["figures"],
        "index_bytes": 0,
    }
    write_vectors(tmp_path / "v" / "c.parquet", clustered(4_500, seed=1), first=4_000)  # more than twice as many
    said.clear()
    clipray.run(job, notice=said.append)
    assert not any("are added" in line for line in said)
    assert record(tmp_path)["rows"] == 8_520


def test_lists_may_lie_on_disk_and_graphs_are_built_too(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v" / "a.parquet", X)
    on_disk = {
        "name": "disk",
        "input": column(tmp_path),
        "type": "IVF40,Flat",
        "memory_gib": 1e-5,
        "rows_per_task": 900,
    }
    graph = {"name": "graph", "input": column(tmp_path), "type": "HNSW16", "rows_per_task": 900}
    clipray.run(write_job(tmp_path, {"index": on_disk}, {"index": graph}))
    names = {path.name for path in (tmp_path / "out/disk").iterdir()}
    assert any(name.endswith(".lists") for name in names)
    for name in ("disk", "graph"):
        assert record(tmp_path, name)["figures"]["recall@10"] >= 0.95
        assert record(tmp_path, name)["figures"]["held_out"] == 400
        assert (first_answers(tmp_path, X, name) == np.arange(4_000)).mean() > 0.98


def test_recall_is_of_new_rows_and_of_the_queries_that_are_named(tmp_path: Path) -> None:
    """Queries that lie between the rows need more effort; both figures are in the record."""
    write_vectors(tmp_path / "v" / "a.parquet", X)
    write_vectors(tmp_path / "q" / "a.parquet", clustered(1_500, groups=1, seed=5))
    plain = {"input": column(tmp_path), "type": "IVF40,Flat"}
    named = {**plain, "name": "named", "queries": column(tmp_path, "q")}
    clipray.run(write_job(tmp_path, {"index": plain}, {"index": named}))
    new_rows, both = record(tmp_path)["figures"], record(tmp_path, "named")["figures"]
    assert "queries" not in new_rows
    assert set(both["queries"]) == {"input", "n", "recall@1", "recall@10", "recall@100"}
    assert (both["queries"]["n"], both["queries"]["input"]) == (1_000, str(tmp_path / "q"))
    assert both["value"] > new_rows["value"]
    assert both["recall@10"] > new_rows["recall@10"] >= 0.95
    assert both["queries"]["recall@10"] >= 0.95
    assert record(tmp_path, "named")["fingerprint"] != record(tmp_path)["fingerprint"]


def test_a_build_that_dies_leaves_the_index_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipray.steps.vectors import index as step

    write_vectors(tmp_path / "v" / "a.parquet", X[:900])
    job = write_job(tmp_path, {"index": {"input": column(tmp_path)}})
    clipray.run(job)
    write_vectors(tmp_path / "v" / "b.parquet", X[900:1_500], first=900)

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("the machine is gone")

    monkeypatch.setattr(step.tables, "commit", broken)  # all is built, nothing is committed
    with pytest.raises(RunError, match="the machine is gone"):
        clipray.run(job)
    monkeypatch.undo()
    assert len(list((tmp_path / "out/index").glob("*.faiss"))) == 2
    assert first_answers(tmp_path, X[:900]).tolist() == list(range(900))
    clipray.run(job)
    assert record(tmp_path)["rows"] == 1_500
    assert len(list((tmp_path / "out/index").glob("*.faiss"))) == 1
    assert first_answers(tmp_path, X[:1_500]).tolist() == list(range(1_500))


def test_expansion_and_self(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v" / "a.parquet", X[:600])
    source = column(tmp_path)
    steps = [{"index": {"input": source}}]
    steps += [{"search": {"name": f"e{n}", "index": "index", "queries": source, "top": 3, "expand": n}} for n in (0, 5)]
    clipray.run(write_job(tmp_path, *steps))
    plain, expanded = (tables.read_table(str(tmp_path / f"out/e{n}")).to_pandas() for n in (0, 5))
    first = plain[plain["rank"] == 1]
    assert (first["query_id"] == first["image_id"]).all()
    assert (plain["image_id"] != expanded["image_id"]).any()


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_augmented_vectors_are_averages_with_the_nearest_others(tmp_path: Path, metric: str) -> None:
    """Against the formula on all pairs; and again after the table has grown."""
    k, alpha = 4, 2.0
    for n, rows in enumerate((500, 600)):
        write_vectors(tmp_path / "v" / f"{n}.parquet", X[500 * n : rows], first=500 * n, group=250)
        source, x = column(tmp_path), X[:rows].astype(np.float64)
        clipray.run(
            write_job(
                tmp_path,
                {"index": {"input": source, "metric": metric, "type": "Flat"}},
                {"augment": {"input": source, "index": "index", "neighbours": k, "alpha": alpha}},
            )
        )
        distance = scored(X[:rows], metric)
        np.fill_diagonal(distance, np.inf)
        nearest = np.argsort(distance, axis=1)[:, :k]
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        x = unit if metric == "cosine" else x
        weights = np.maximum(np.einsum("nd,nkd->nk", unit, unit[nearest]), 0) ** alpha
        expected = x + np.einsum("nk,nkd->nd", weights, x[nearest])
        length = np.linalg.norm(expected, axis=1) if metric == "cosine" else 1 + weights.sum(1)
        found = tables.read_table(str(tmp_path / "out/augmented"))
        assert found["image_id"].to_pylist() == [f"v{row:06d}" for row in range(rows)]
        vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(rows, WIDTH)
        assert np.abs(vectors - expected / length[:, None]).max() <= 1e-5


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"index": {}}, {"augment": {"index": "index", "input": "narrow"}}], "vectors of 5, index index of 16"),
        ([{"index": {"type": "Foo"}}], "index: .*type 'Foo': faiss cannot make it"),
        ([{"index": {"type": "IVF2000,Flat"}}], "index: .*n_samples=600 should be >= 2000 to train"),
        ([{"search": {"index": "nowhere"}}], "index nowhere: .* holds no finished index"),
        ([{"index": {}}, {"search": {"index": "index", "queries": "narrow"}}], "vectors of 5, index index of 16"),
        ([{"index": {"input": "bad"}}], "index: .*not finite, image_id: 'v000003'"),
        ([{"index": {"queries": "narrow"}}], "index: queries .*narrow are vectors of 5, .* has 16"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, steps: list[dict[str, Any]], message: str) -> None:
    x = X[:600].copy()
    write_vectors(tmp_path / "v" / "a.parquet", x)
    write_vectors(tmp_path / "narrow" / "a.parquet", x[:, :5])
    x[3, 3] = np.nan
    write_vectors(tmp_path / "bad" / "a.parquet", x)
    for step in steps:
        (settings,) = step.values()
        if "queries" in settings or "search" in step:
            settings["queries"] = column(tmp_path, settings.get("queries", "v"))
        if "search" not in step:
            settings["input"] = column(tmp_path, settings.get("input", "v"))
    with pytest.raises(ClipRayError, match=message) as caught:
        clipray.run(write_job(tmp_path, *steps))
    assert "\n" not in str(caught.value)


def test_changed_settings_and_changed_tables_are_refused(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v" / "a.parquet", X[:600])
    reduce, index = {"reduce": {"input": column(tmp_path), "components": 4}}, {"index": {"input": "reduced.vector"}}
    clipray.run(write_job(tmp_path, reduce, index))
    with pytest.raises(StaleTableError, match="metric was 'cosine', is 'l2'"):
        clipray.run(write_job(tmp_path, reduce, {"index": {**index["index"], "metric": "l2"}}))
    search = {"search": {"index": "index", "queries": column(tmp_path)}}
    with pytest.raises(ClipRayError, match="vectors of 16, index index of 4"):
        clipray.run(write_job(tmp_path, reduce, index, search))
    write_vectors(tmp_path / "v" / "b.parquet", X[600:900], first=600)
    clipray.run(write_job(tmp_path, reduce))
    with pytest.raises(
        ClipRayError, match=r"index index: reduced.vector has changed since it was built; `clipray run`"
    ):
        clipray.run(write_job(tmp_path, {"search": {"index": "index", "queries": "reduced.vector"}}))
