"""The deduplicate step on the session's Ray: the groups of all pairs within a cluster, whatever the blocks and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import clipray
from clipray import tables
from clipray.analysis.normalize import l2_normalize
from clipray.errors import ClipRayError, StaleTableError
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
ROWS, WIDTH = 1_500, 8


def planted(rows: int = ROWS) -> np.ndarray:
    """A third of the rows near others, in chains too; some the same in another length."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, WIDTH))
    for row in range(rows // 2, 5 * rows // 6):
        x[row] = (x[rng.integers(0, row)] + rng.normal(size=WIDTH) * rng.choice([0, 0.01, 0.1])) * rng.uniform(0.5, 2)
    return x[rng.permutation(rows)].astype(np.float32)


def write_vectors(folder: Path, x: np.ndarray, files: int = 3, group: int = 200) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for n, rows in enumerate(np.array_split(np.arange(len(x)), files)):
        data = pa.table({"key": [f"v{row:05d}" for row in rows], "vector": [x[row] for row in rows]})
        pq.write_table(data, folder / f"{n}.parquet", row_group_size=group)
    return {"path": str(folder), "column": "vector", "id": "key"}


def write_steps(path: Path, *steps: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump({"output": str(path.parent / "out"), "steps": list(steps)}))
    return str(path)


def groups_of(x: np.ndarray, cluster: np.ndarray, similarity: float) -> tuple[list[set[int]], np.ndarray]:
    """Groups by a walk over all pairs, and all cosines; pairs of two clusters have none."""
    x = l2_normalize(x).astype(np.float64)
    cosines = np.where(cluster[:, None] == cluster, x @ x.T, -1.0)
    np.fill_diagonal(cosines, -1)
    near, left, found = cosines >= similarity, set(range(len(x))), []
    while left:
        group, edge = set(), {left.pop()}
        while edge:
            row = edge.pop()
            group.add(row)
            edge |= set(np.flatnonzero(near[row]).tolist()) - group
        left -= group
        if len(group) > 1:
            found.append(group)
    return sorted(found, key=min), cosines


@pytest.fixture(scope="module")
def clustered(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path, np.ndarray, np.ndarray, np.ndarray]:
    """Input, folder of the clusters, vectors, cluster and distance of each row."""
    home, x = tmp_path_factory.mktemp("clustered"), planted()
    source = write_vectors(home / "v", x)
    clipray.run(write_steps(home / "j.yaml", {"cluster": {"input": source, "clusters": 7, "max_iterations": 5}}))
    table = tables.read_table(str(home / "out/clusters")).sort_by("key")
    return source, home / "out/clusters", x, table["cluster_id"].to_numpy(), table["distance"].to_numpy()


@pytest.mark.parametrize(
    ("rows", "keep", "similarity"), [(32_768, "farthest", 0.99), (60, "nearest", 0.99), (150, "first", 0.999_999)]
)
def test_groups_and_keepers_are_those_of_all_pairs(
    tmp_path: Path, clustered: Any, rows: int, keep: str, similarity: float
) -> None:
    """In one block, in clusters cut into blocks, and in buckets of several clusters."""
    source, clusters, x, cluster, distance = clustered
    settings = {"input": source, "clusters": str(clusters), "keep": keep, "similarity": similarity}
    job = write_steps(tmp_path / "j.yaml", {"deduplicate": {**settings, "rows_per_block": rows}})
    (own,) = clipray.run(job)
    found = tables.read_table(str(tmp_path / "out/duplicates")).to_pandas()
    expected, cosines = groups_of(x, cluster, similarity)
    number = found["key"].str[1:].astype(int).to_numpy()
    assert len(expected) > 50
    assert sorted(map(set, found.assign(row=number).groupby("group_id")["row"].agg(set)), key=min) == expected
    assert sorted(found["group_id"].unique()) == list(range(len(expected)))
    assert (found["cluster_id"].to_numpy() == cluster[number]).all()
    assert found["nearest"].to_numpy() == pytest.approx(cosines.max(1)[number], abs=1e-6)
    order = {"farthest": lambda r: (-distance[r], r), "nearest": lambda r: (distance[r], r), "first": lambda r: r}[keep]
    keepers = {row: min(group, key=order) for group in expected for row in group}
    assert [f"v{keepers[row]:05d}" for row in number] == found["keeper_id"].tolist()
    assert (found["kept"] == (found["key"] == found["keeper_id"])).all()
    np.fill_diagonal(cosines, 1)
    assert found["similarity"].to_numpy() == pytest.approx(cosines[number, [keepers[r] for r in number]], abs=1e-6)
    figures = tables.read_record(Folder(str(tmp_path / "out/duplicates"))).summary  # type: ignore[union-attr]
    assert (own.rows, own.total, figures["groups"]) == (len(found), ROWS, len(expected))
    assert figures["duplicates"] == len(found) - len(expected) == (~found["kept"]).sum()
    assert figures["largest_group"] == max(map(len, expected))
    assert [p.name for p in (tmp_path / "out/duplicates").iterdir() if p.is_dir()] == []
    if rows == 60:
        write_steps(tmp_path / "j.yaml", {"deduplicate": settings})
        assert [r.note for r in clipray.run(job)] == ["was finished already"]  # blocks decide nothing


def test_nothing_alike_is_a_table_without_rows(tmp_path: Path) -> None:
    x = np.eye(WIDTH, dtype=np.float32)
    source = write_vectors(tmp_path / "v", x, files=1)
    steps = {"cluster": {"input": source, "clusters": 2}}, {"deduplicate": {"input": source, "clusters": "clusters"}}
    *_, own = clipray.run(write_steps(tmp_path / "j.yaml", *steps))
    assert (own.rows, own.total) == (0, WIDTH)
    assert tables.read_table(str(tmp_path / "out/duplicates")).num_rows == 0


def test_a_grown_input_takes_it_along_and_a_kill_leaves_no_trace(tmp_path: Path) -> None:
    x = planted(400)
    source = write_vectors(tmp_path / "v", x[:300], files=1)
    steps = {"cluster": {"input": source, "clusters": 3}}, {"deduplicate": {"input": source, "clusters": "clusters"}}
    job = write_steps(tmp_path / "j.yaml", *steps)
    clipray.run(job)
    before = tables.read_table(str(tmp_path / "out/duplicates"))
    table = tmp_path / "out/duplicates"
    (table / "_table.json").unlink()  # what a kill leaves
    (table / "part-000009.parquet").write_bytes(b"torn")
    (table / "_by_cluster").mkdir()
    (table / "_by_cluster/part-000007.parquet").write_bytes(b"torn")
    clipray.run(job)
    assert tables.read_table(str(table)).equals(before)
    assert sorted(p.name for p in table.iterdir()) == ["_started.json", "_table.json", "part-000000.parquet"]
    write_vectors(tmp_path / "v", x, files=2)
    *_, own = clipray.run(job)
    assert own.total == 400
    assert own.rows > before.num_rows
    write_steps(tmp_path / "j.yaml", steps[0], {"deduplicate": {**steps[1]["deduplicate"], "similarity": 0.9}})
    with pytest.raises(StaleTableError, match=r"similarity was 0\.95, is 0\.9"):
        clipray.run(job)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": "clusters"}, "clusters clusters: .* is no finished table"),
        ({"clusters": "{clusters}_centroids"}, "expected a table of clusters, found one of centroids"),
        ({"similarity": 1.5}, "similarity: expected less than or equal to 1"),
        ({"input": "longer"}, r"rows that are not in .*clusters, key: 'v01500', .*; cluster this very table"),
        ({"input": "named"}, "no column 'name', by which rows of .* are known; there are: key, cluster_id"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, clustered: Any, settings: dict[str, Any], message: str) -> None:
    source, clusters, x, *_ = clustered
    longer = write_vectors(tmp_path / "longer", np.vstack([x, x[:9]]), files=1)
    pq.write_table(pa.table({"name": ["a"], "vector": [x[0]]}), tmp_path / "named.parquet")
    inputs = {"longer": longer, "named": {"path": str(tmp_path / "named.parquet"), "column": "vector", "id": "name"}}
    given = {"input": source, "clusters": str(clusters)} | settings
    given["clusters"] = str(given["clusters"]).replace("{clusters}", str(clusters))
    given["input"] = inputs.get(given["input"] if isinstance(given["input"], str) else "", given["input"])
    with pytest.raises(ClipRayError, match=message) as caught:
        clipray.run(write_steps(tmp_path / "j.yaml", {"deduplicate": given}))
    assert "\n" not in str(caught.value)
