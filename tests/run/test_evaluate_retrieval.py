"""The evaluate_retrieval step on the session's Ray: rankings sorted in full, whatever the files; lists; what does not fit."""

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
from clipray.analysis import retrieval as rt
from clipray.demo.world import write_world
from clipray.errors import ClipRayError
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")
ROWS, WIDTH, QUERIES = 3_000, 12, 9
Relations = dict[str, dict[str, str]]


def vectors_of(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """Some of them equal, some zero, of lengths that make cosine and Euclidean distance disagree."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(rows, WIDTH)) * rng.uniform(0.2, 3, (rows, 1))).astype(np.float32)
    same = min(40, rows // 2)
    x[rows // 2 : rows // 2 + same] = x[:same]
    x[60:64] = 0
    return x


def write_vectors(folder: Path, x: np.ndarray, prefix: str = "v", files: int = 3, group: int = 700) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for n, rows in enumerate(np.array_split(np.arange(len(x)), files)):
        data = pa.table({"key": [f"{prefix}{row}" for row in rows], "vector": [x[row] for row in rows]})
        pq.write_table(data, folder / f"{n}.parquet", row_group_size=group)
    return {"path": str(folder), "column": "vector", "id": "key"}


def relations_of(seed: int = 1) -> Relations:
    """Of queries v0, v1, …: named rows near and far, some of them equal to others, queries among them."""
    rng = np.random.default_rng(seed)
    truth: Relations = {}
    for q in range(QUERIES):
        named = [*rng.choice(ROWS, 30, replace=False).tolist(), ROWS // 2 + q, (q + 1) % QUERIES]
        kinds = ["easy", "hard", "junk"] if q else ["hard", "junk"]  # the first has nothing easy
        truth[f"v{q}"] = {f"v{row}": kinds[i % len(kinds)] for i, row in enumerate(named) if row != q}
    return truth


def write_truth(path: Path, truth: Relations, **columns: str) -> str:
    """columns: other names of them; an empty one is left out."""
    rows = [(q, a, r) for q, answers in truth.items() for a, r in answers.items()]
    names = {"query_id": "query_id", "image_id": "image_id", "relation": "relation", **columns}
    data = {names[key]: list(values) for key, values in zip(names, zip(*rows, strict=True), strict=True) if names[key]}
    pq.write_table(pa.table(data), path)
    return str(path)


def sorted_in_full(
    scores: np.ndarray, ids: list[str], relations: dict[str, str], wanted: set[str]
) -> list[bool] | None:
    """Whether each of the ranked is positive, equal scores with negatives first, junk left out."""
    kept = [(i, relations.get(name) in wanted) for i, name in enumerate(ids) if relations.get(name) in (None, *wanted)]
    if not any(positive for _, positive in kept):
        return None
    rounded = np.round(scores, 9)
    return [positive for _, positive in sorted(kept, key=lambda item: (-rounded[item[0]], item[1]))]


def oracle(
    queries: dict[str, np.ndarray], x: np.ndarray, ids: list[str], truth: Relations, distance: str
) -> dict[Any, Any]:
    """By query and protocol: average precision by a walk down the whole ranking, precision at 10, rank of the first."""
    found, x = {}, x.astype(np.float64)
    for query, relations in truth.items():
        q = queries[query].astype(np.float64)
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(q)
        cosines = np.divide(x @ q, norms, where=norms > 0, out=np.zeros(len(x)))
        scores = cosines if distance == "cosine" else -np.linalg.norm(x - q, axis=1)
        for protocol, wanted in {"easy": {"easy"}, "medium": {"easy", "hard"}, "hard": {"hard"}}.items():
            hits = sorted_in_full(scores, ids, relations, wanted)
            if hits is not None:
                at = np.flatnonzero(hits)
                precision = (np.arange(len(at)) + 1) / (at + 1)
                earlier = np.where(at == 0, 1, np.arange(len(at)) / np.maximum(at, 1))
                shown = min(10, at[-1] + 1)
                found[query, protocol] = (np.mean((precision + earlier) / 2), np.sum(at < shown) / shown, at[0] + 1)
    return found


def evaluate(tmp_path: Path, **settings: Any) -> str:
    path = tmp_path / "j.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "steps": [{"evaluate_retrieval": settings}]}))
    return str(path)


def rows_of(tmp_path: Path, name: str = "retrieval") -> dict[Any, Any]:
    return {
        (row["distance"], row["query_id"], row["protocol"]): row
        for row in tables.read_table(str(tmp_path / "out" / name)).to_pylist()
    }


def same_as(rows: dict[Any, Any], expected: dict[Any, Any], distance: str) -> bool:
    assert {key[1:] for key in rows if key[0] == distance} == expected.keys()
    for key, (ap, precision, first) in expected.items():
        row = rows[distance, *key]
        assert row["ap"] == pytest.approx(ap, abs=1e-12), key
        assert (row["p_at_10"], row["first_rank"]) == (pytest.approx(precision), first), key
    return True


def test_the_same_as_full_rankings_by_both_distances(tmp_path: Path) -> None:
    x, truth = vectors_of(), relations_of()
    ids = [f"v{row}" for row in range(ROWS)]
    settings = {"input": write_vectors(tmp_path / "v", x), "ground_truth": write_truth(tmp_path / "t.parquet", truth)}
    (own,) = clipray.run(evaluate(tmp_path, **settings))
    rows = rows_of(tmp_path)
    assert (own.total, own.rows) == (ROWS, len(rows)) == (ROWS, 2 * (3 * QUERIES - 1))
    expected = {}
    for distance in ("cosine", "l2"):
        for q in range(QUERIES):  # a query is not among its own answers
            others = [row for row in range(ROWS) if row != q]
            alone = {f"v{q}": truth[f"v{q}"]}
            expected |= {
                (distance, *key): value
                for key, value in oracle({f"v{q}": x[q]}, x[others], [ids[o] for o in others], alone, distance).items()
            }
        assert same_as(rows, {key[1:]: v for key, v in expected.items() if key[0] == distance}, distance)
    metrics = {(m["metric"], m["group"]): m for m in tables.read_table(str(tmp_path / "out/metrics")).to_pylist()}
    easy = [value for (distance, _, protocol), value in expected.items() if (distance, protocol) == ("l2", "easy")]
    found = metrics["mAP", "easy/l2"]
    assert (found["value"], found["n"]) == (pytest.approx(np.mean([ap for ap, _, _ in easy])), QUERIES - 1)
    assert metrics["recall@5", "easy/l2"]["value"] == pytest.approx(np.mean([first <= 5 for _, _, first in easy]))
    record = tables.read_record(Folder(str(tmp_path / "out/retrieval")))
    assert record is not None
    assert record.summary["queries_without_positives"] == {"easy": 1, "medium": 0, "hard": 0}
    assert [r.note for r in clipray.run(evaluate(tmp_path, **settings))] == ["was finished already"]
    truth["v0"]["v9"] = "easy"  # the ground truth changes, and the table with it
    write_truth(tmp_path / "t.parquet", truth)
    clipray.run(evaluate(tmp_path, **settings))
    assert ("l2", "v0", "easy") in rows_of(tmp_path)


def test_queries_of_another_column_in_any_files(tmp_path: Path) -> None:
    """A query of the same name as a row is not that row."""
    x, asked, truth = vectors_of(), vectors_of(QUERIES, seed=5), relations_of(2)
    truth["v3"]["v3"] = "easy"
    rows = []
    for n, (files, group) in enumerate([(1, ROWS), (7, 100)]):
        (tmp_path / f"{n}").mkdir()
        clipray.run(
            evaluate(
                tmp_path / f"{n}",
                input=write_vectors(tmp_path / f"v{n}", x, files=files, group=group),
                queries=write_vectors(tmp_path / "q", asked, files=1),
                ground_truth=write_truth(tmp_path / "t.parquet", truth, query_id="text_id"),
                distances=["l2"],
            )
        )
        rows.append(rows_of(tmp_path / f"{n}"))
    named = {f"v{row}": asked[row] for row in range(QUERIES)}
    assert same_as(rows[0], oracle(named, x, [f"v{row}" for row in range(ROWS)], truth, "l2"), "l2")
    assert rows[0] == rows[1]


def test_recall_of_pairs_without_relations(tmp_path: Path) -> None:
    """Texts that find their picture, and pictures that find their text."""
    pictures = vectors_of(200, seed=7)
    texts = pictures[:50] + np.random.default_rng(0).normal(size=(50, WIDTH)).astype(np.float32) * 0.4
    truth = {f"t{n}": {f"v{n}": ""} for n in range(50)}
    known = write_truth(tmp_path / "t.parquet", truth, query_id="text_id", relation="")
    images, captions = write_vectors(tmp_path / "v", pictures), write_vectors(tmp_path / "t", texts, "t")
    clipray.run(evaluate(tmp_path, input=images, queries=captions, ground_truth=known))
    back = {"query_id": "image_id", "answer_id": "text_id"}
    clipray.run(evaluate(tmp_path, name="back", input=captions, queries=images, ground_truth=known, **back))
    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (pictures, texts)]
    cosines = unit[1].astype(np.float64) @ unit[0].T  # (texts, pictures)
    cosines[:, 100:140] += 1e-6  # equal pictures stand before the right one
    metrics = tables.read_table(str(tmp_path / "out/metrics")).to_pylist()
    for name, scores in {"retrieval": cosines, "back": cosines[:, :50].T}.items():
        better = (scores > np.diagonal(cosines)[:, None]).sum(1)
        for k in rt.TOPS:
            (found,) = [
                m["value"] for m in metrics
                if (m["step"], m["metric"], m["group"]) == (name, f"recall@{k}", "all/cosine")
            ]  # fmt: skip
            assert found == pytest.approx((better < k).mean()), (name, k)
    assert 0.2 < (better < 1).mean() < 1


def write_lists(folder: Path, lists: dict[str, list[str]]) -> str:
    """A finished table of ranked lists in two files, its rows in no order."""
    rows = [(q, rank, a, 1.0 / (rank + 1)) for q, answers in lists.items() for rank, a in enumerate(answers)]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"query_id": pa.string(), "rank": pa.int32(), "image_id": pa.string(), "score": pa.float32()}
    files = []
    for n, part in enumerate((rows[::2], rows[1::2])):
        data = pa.table(
            [pa.array(c, kind) for c, kind in zip(zip(*part, strict=True), kinds.values(), strict=True)], list(kinds)
        )
        path = folder / f"part-{n}.parquet"
        pq.write_table(data.replace_schema_metadata({"clipray": json.dumps({"fingerprint": "x"})}), path)
        files.append({"name": path.name, "rows": len(part), "bytes": path.stat().st_size})
    columns = {name: str(kind) for name, kind in kinds.items()}
    tables.write_record(
        Folder(str(folder)), tables.Record("neighbours", 1, columns, len(rows), 0, files, "x", {}, {}, {})
    )
    return str(folder)


def test_ranked_lists(tmp_path: Path) -> None:
    """The whole ranking as a list is worth what the vectors are worth; of a short one, what it misses counts as missed."""
    x, truth = vectors_of(), relations_of()
    for query in truth.values():  # no ties: a list has an order
        for answer in [a for a in query if int(a[1:]) < 64 or ROWS // 2 <= int(a[1:]) < ROWS // 2 + 40]:
            del query[answer]
    known, ids = write_truth(tmp_path / "t.parquet", truth), [f"v{row}" for row in range(ROWS)]
    order = {q: np.argsort(np.linalg.norm(x.astype(float) - x[int(q[1:])], axis=1), kind="stable") for q in truth}
    whole = {q: [ids[i] for i in rows] for q, rows in order.items()}
    clipray.run(evaluate(tmp_path, input=write_vectors(tmp_path / "v", x), ground_truth=known, distances=["l2"]))
    write_lists(tmp_path / "out/neighbours", whole)
    clipray.run(evaluate(tmp_path, name="listed", neighbours="neighbours", ground_truth=known))
    vectors, lists = rows_of(tmp_path), rows_of(tmp_path, "listed")
    assert len(lists) == len(vectors)
    for (_, *key), row in vectors.items():
        assert {**lists["given", *key], "distance": "l2"} == row
    short = write_lists(tmp_path / "other/short", {q: answers[:200] for q, answers in whole.items()})
    clipray.run(evaluate(tmp_path, name="short", neighbours=short, ground_truth=known))
    for (_, query, protocol), row in rows_of(tmp_path, "short").items():
        wanted = {"easy": ["easy"], "medium": ["easy", "hard"], "hard": ["hard"]}[protocol]
        kept = [
            truth[query].get(a) for a in whole[query][:200] if a != query and truth[query].get(a) in (None, *wanted)
        ]
        at = np.flatnonzero([kind is not None for kind in kept])
        assert (row["found"], row["first_rank"]) == (len(at), at[0] + 1 if len(at) else None)
        assert row["found"] < row["positives"] == sum(kind in wanted for kind in truth[query].values())
        assert row["p_at_10"] == (at < 10).sum() / 10


TRUTH = {"v0": {"v1": "easy", "v2": "junk"}}


@pytest.mark.parametrize(
    ("settings", "truth", "message"),
    [
        ({}, {"v0": {"v1": "easy", "x1": "hard", "x2": "junk"}}, "images that are not in .*: 'x1', 'x2'; drop"),
        ({}, {f"q{n}": {"v1": "easy"} for n in range(7)}, "queries that are not in .*: 'q0', .*'q4' and 2 more"),
        ({}, {"v0": {"v1": "good"}}, "relation 'good': expected one of easy, hard, junk"),
        ({}, {"v0": {"v1": "junk"}}, "no query has a positive"),
        ({}, {"v0": {"v0": "easy"}}, "no query has a positive"),
        ({"query_id": "query"}, TRUTH, "for the ground truth: no column 'query'; found: query_id, image_id, relation"),
        ({"ground_truth": "nowhere.parquet"}, TRUTH, "nowhere.parquet: no ground truth there"),
        ({"neighbours": "lists"}, TRUTH, "expected one of `input` and `neighbours`, found both"),
        ({"input": None}, TRUTH, "expected one of `input` and `neighbours`, found none"),
        ({"input": None, "neighbours": "lists"}, TRUTH, "neighbours lists: .*is no finished table"),
        ({"distances": ["dot"]}, TRUTH, "distances"),
        ({"queries": "narrow"}, TRUTH, f"queries .*narrow are vectors of 5, .* has {WIDTH}"),
        ({"input": "twice"}, TRUTH, "key 'v1' stands in 2 rows"),
        ({"input": "nan"}, TRUTH, "vectors that are not finite, key: 'v2'"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, settings: dict[str, Any], truth: Relations, message: str) -> None:
    x = vectors_of(40)
    write_vectors(tmp_path / "narrow", x[:, :5], files=1)
    write_vectors(tmp_path / "twice", x, files=1)
    write_vectors(tmp_path / "twice/more", x[:2], files=1)
    x[2, 3] = np.nan
    write_vectors(tmp_path / "nan", x, files=1)
    given = {"input": write_vectors(tmp_path / "v", vectors_of(40), files=1)}
    given |= {"ground_truth": write_truth(tmp_path / "t.parquet", truth)} | settings
    for key in ("input", "queries"):
        if given.get(key) in ("narrow", "twice", "nan"):
            given[key] = {"path": str(tmp_path / str(given[key])), "column": "vector", "id": "key"}
    with pytest.raises(ClipRayError, match=message) as caught:
        clipray.run(evaluate(tmp_path, **given))
    assert "\n" not in str(caught.value)


def test_two_relations_of_a_pair_and_lists_with_gaps_and_repeats(tmp_path: Path) -> None:
    source = write_vectors(tmp_path / "v", vectors_of(40), files=1)
    pairs = {"query_id": ["v0"] * 3, "image_id": ["v1"] * 3, "relation": ["easy", "easy", "junk"]}
    pq.write_table(pa.table(pairs), tmp_path / "t.parquet")
    with pytest.raises(ClipRayError, match="'v1' is both easy and junk for 'v0'"):
        clipray.run(evaluate(tmp_path, input=source, ground_truth=str(tmp_path / "t.parquet")))
    known = write_truth(tmp_path / "t.parquet", TRUTH)
    lists = write_lists(tmp_path / "lists", {"v5": ["v3", "v4"]})
    with pytest.raises(ClipRayError, match=r"queries that are not in .*: 'v0'"):
        clipray.run(evaluate(tmp_path, name="listed", neighbours=lists, ground_truth=known))
    # of a picture that is listed twice the first counts: v3 v4 v1 is worth 1/6 as the only positive
    lists = write_lists(tmp_path / "regions", {"v0": ["v3", "v0", "v4", "v3", "v2", "v4", "v1", "v1"]})
    clipray.run(evaluate(tmp_path, name="listed", neighbours=lists, ground_truth=known))
    (row,) = [row for key, row in rows_of(tmp_path, "listed").items() if key[2] == "easy"]
    assert (row["first_rank"], row["found"], row["ap"]) == (3, 1, pytest.approx(1 / 6))


def test_texts_find_their_pictures_and_other_spaces_are_refused(tmp_path: Path) -> None:
    """As docs/retrieval.md has it, on the demo world; and the trained model finds nearly all."""
    world = write_world(tmp_path / "world", seed=6, n_scenes=48, n_groups=0, n_words=0, n_places=0, side_px=96)
    images = pq.read_table(world.images).to_pylist()
    texts = [{"text_id": f"t{n}", "text": row["caption"], "image_id": row["image_id"]} for n, row in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "texts.parquet")
    truth = {"ground_truth": str(tmp_path / "texts.parquet"), "distances": ["cosine"]}
    back = {"input": "texts.embedding", "queries": "images.clip", "query_id": "image_id", "answer_id": "text_id"}
    steps: list[dict[str, Any]] = [
        {"embed_images": {"manifest": str(world.images), "batch_size": 16}},
        {"embed_texts": {"manifest": str(tmp_path / "texts.parquet"), "batch_size": 16}},
        {"reduce": {"input": "images.clip", "components": 32}},
        {"evaluate_retrieval": {"input": "images.clip", "queries": "texts.embedding", **truth}},
        {"evaluate_retrieval": {"name": "back", **back, **truth}},
    ]
    job = {"output": str(tmp_path / "out"), "model": {"name": "demo", "precision": "fp32"}, "steps": steps}
    (tmp_path / "j.yaml").write_text(yaml.safe_dump(job))
    clipray.run(str(tmp_path / "j.yaml"))
    metrics = tables.read_table(str(tmp_path / "out/metrics")).to_pylist()
    for step in ("retrieval", "back"):
        (recall,) = [m["value"] for m in metrics if (m["step"], m["metric"]) == (step, "recall@5")]
        assert recall > 0.9, step
    narrow = {
        "queries texts.embedding are vectors of 128, reduced.clip has 32": {
            "input": "reduced.clip",
            "queries": "texts.embedding",
        }
    }
    alike = {"cannot be compared: one of them is a reduction": {"input": "reduced.clip", "queries": "other.embedding"}}
    steps.insert(3, {"reduce": {"name": "other", "input": "texts.embedding", "components": 32}})
    for message, columns in (narrow | alike).items():
        steps[-1] = {"evaluate_retrieval": {"name": "wrong", **columns, **truth}}
        (tmp_path / "j.yaml").write_text(yaml.safe_dump(job))
        with pytest.raises(ClipRayError, match=message):
            clipray.run(str(tmp_path / "j.yaml"))
