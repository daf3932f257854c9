"""Plans: whatever is asked, an accepted plan leaves room to read and decode, and a refused one says the numbers."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from clipray.engine.cluster import ClusterResources, Node, matches
from clipray.engine.plan import DECODE_CPUS, READ_CPUS, Plan, make_plan
from clipray.errors import PlanError
from clipray.job import EmbedImages

CPUS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GPUS = (0, 1, 2, 3, 4, 8)
NODES = (1, 2, 4)
ACTORS = ("auto", 1, 2, 3, 4, 7, 8, 16, 64, (1, 2), (1, 4), (2, 8), (1, 64))
DECODE_IN = ("auto", "tasks", "actors")


def settings(**given: Any) -> EmbedImages:
    return EmbedImages(manifest="m.parquet", **given)


def planned(cpus: float, gpus: float, nodes: int = 1, **given: Any) -> Plan | str:
    """The plan for so many nodes alike (GPUs as evenly as they go), or the words of its refusal."""
    shares = [gpus // nodes + (n < gpus % nodes) for n in range(nodes)]
    return planned_on(ClusterResources(tuple(Node(cpus / nodes, share) for share in shares), nodes == 1), **given)


def planned_on(cluster: ClusterResources, **given: Any) -> Plan | str:
    try:
        return make_plan(settings(**given), cluster)
    except PlanError as error:
        return str(error)


def grid() -> list[tuple[int, int, int, Any, str]]:
    return [g for g in itertools.product(CPUS, GPUS, NODES, ACTORS, DECODE_IN) if g[0] >= 2 * g[2]]


def room(plan: Plan) -> float:
    """CPUs left when all encoders are up and everybody else works too."""
    high = plan.max_actors if plan.nodes == 1 else plan.min_actors
    placed = min(high, int(plan.gpus / plan.gpus_per_actor)) if plan.gpus_per_actor else high
    return plan.cpus - placed * plan.cpus_per_actor - READ_CPUS - DECODE_CPUS * (plan.decode_in == "tasks")


def test_every_accepted_plan_leaves_room() -> None:
    accepted = refused = 0
    for cpus, gpus, nodes, actors, decode_in in grid():
        plan = planned(cpus, gpus, nodes, actors=actors, decode_in=decode_in)
        if isinstance(plan, str):
            refused += 1
            assert {str(cpus), str(gpus)} & set(re.findall(r"\d+", plan)), plan  # the numbers, not just a no
            continue
        accepted += 1
        assert room(plan) >= -1e-9, plan
        assert plan.cpus_per_actor > 0
        assert 1 <= plan.min_actors <= plan.max_actors
        assert plan.min_actors * plan.gpus_per_actor <= gpus
        assert plan.threads >= 1
        high = plan.max_actors if nodes == 1 else plan.min_actors
        placed = min(high, gpus or high)
        assert placed * plan.threads <= max(cpus, placed)
        assert (plan.cpus, plan.gpus) == (cpus, gpus)
        assert plan.device == ("cuda" if gpus else "cpu")
        if isinstance(actors, int):
            assert plan.min_actors == plan.max_actors == actors
        elif isinstance(actors, tuple):
            assert (plan.min_actors, plan.max_actors) == actors
        elif gpus:
            assert plan.max_actors == gpus
        if decode_in != "auto":
            assert plan.decode_in == decode_in
    assert accepted > 2_000
    assert refused > 500


def test_what_asks_for_nothing_special_always_runs() -> None:
    """Two cores and no GPU are enough, and so is any larger machine whose GPUs do not outnumber its cores."""
    for cpus, gpus, nodes, _, decode_in in grid():
        if decode_in == "auto" and gpus <= cpus:
            assert isinstance(planned(cpus, gpus, nodes), Plan), (cpus, gpus, nodes)
    for decode_in in DECODE_IN:
        assert isinstance(planned(2, 0, decode_in=decode_in), Plan)


def test_an_encoder_never_asks_for_as_much_as_a_decoder() -> None:
    """Ray Data would fuse the two, and they would take turns."""
    for cpus, gpus, nodes, actors, decode_in in grid():
        plan = planned(cpus, gpus, nodes, actors=actors, decode_in=decode_in)
        assert isinstance(plan, str) or plan.cpus_per_actor != DECODE_CPUS
    shares = {planned(2 * n, 0, actors=n, decode_in="actors").cpus_per_actor for n in (1, 2, 4, 8)}
    assert shares == {0.99}  # half of the machine for the pool would be 1 each


@pytest.mark.parametrize(
    ("cpus", "gpus", "nodes", "actors", "each", "gpus_each", "threads", "decode_in"),
    [
        (2, 0, 1, 1, 0.99, 0, 2, "actors"),  # a laptop: half of 2 CPUs, less a little
        (8, 0, 1, 1, 4.0, 0, 8, "actors"),
        (16, 0, 1, 2, 4.0, 0, 8, "actors"),  # an encoder for 8 cores
        (64, 0, 1, 8, 4.0, 0, 8, "actors"),
        (64, 0, 8, 8, 4.0, 0, 8, "tasks"),  # decoding on any node
        (16, 1, 1, 1, 0.9, 1, 1, "tasks"),
        (64, 8, 1, 8, 0.9, 1, 1, "tasks"),
        (8, 8, 1, 8, 0.5, 1, 1, "tasks"),  # half of 8 CPUs for 8 actors
    ],
)
def test_plans_computed_by_hand(
    cpus: int, gpus: int, nodes: int, actors: int, each: float, gpus_each: float, threads: int, decode_in: str
) -> None:
    plan = planned(cpus, gpus, nodes)
    assert plan == Plan(
        actors, actors, gpus_each, each, threads, decode_in, cpus, gpus, nodes,
        device="cuda" if gpus else "cpu", local=nodes == 1,
    )  # fmt: skip


def test_several_encoders_on_a_gpu() -> None:
    plan = planned(16, 2, gpus_per_actor=0.5)
    assert (plan.max_actors, plan.gpus_per_actor) == (4, 0.5)


def test_encoding_on_cpus_beside_gpus() -> None:
    plan = planned(16, 4, gpus_per_actor=0)
    assert (plan.device, plan.max_actors, plan.decode_in) == ("cpu", 2, "actors")


@pytest.mark.parametrize(
    ("cpus", "gpus", "given", "words"),
    [
        (8, 0, {"gpus_per_actor": 1}, ["gpus_per_actor=1", "1 node: 1 x (8 CPUs)", "set it to 0"]),
        (8, 1, {"gpus_per_actor": 2}, ["gpus_per_actor=2", "1 node: 1 x (8 CPUs, 1 GPU)"]),
        (8, 2, {"actors": 3}, ["actors=3", "gpus_per_actor=1", "only 2 fit", "(8 CPUs, 2 GPUs)"]),
        (4, 0, {"actors": 5}, ["actors=5", "4 CPUs"]),
        (4, 0, {"actors": 4, "cpus_per_actor": 1}, ["4 actors x 1 CPU", "0.25 to read and decode", "4.25 CPUs", "there are 4"]),
        (4, 0, {"cpus_per_actor": 3, "decode_in": "tasks"}, ["1 actors x 3 CPU", "1.25 to read and decode", "4.25 CPUs", "there are 4"]),
        (2, 0, {"actors": (1, 2), "cpus_per_actor": 0.9}, ["2 actors x 0.9 CPU", "2.05 CPUs", "there are 2", "lower `actors`"]),
        (1, 1, {}, ["1 actors x", "1.25 to read and decode", "there are 1"]),
    ],
)  # fmt: skip
def test_a_refusal_says_the_numbers(cpus: int, gpus: int, given: dict[str, Any], words: list[str]) -> None:
    message = planned(cpus, gpus, **given)
    assert isinstance(message, str)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_plan_is_a_sentence() -> None:
    assert planned(2, 0).sentence() == (
        "1 encoder with 2 threads, 0.99 CPU each; decoding in threads beside each encoder; 2 CPUs and 0 GPUs in all"
    )
    assert planned(16, 2, actors=(1, 2)).sentence() == (
        "1 to 2 encoders with 1 thread, 0.9 CPU and 1 GPU each; decoding in CPU tasks of 1 CPU; 16 CPUs and 2 GPUs in all"
    )


# --- what a plan should refuse or avoid and does not


def test_an_encoder_fits_on_a_node() -> None:
    for cpus, gpus, nodes, _, decode_in in grid():
        plan = planned(cpus, gpus, nodes, decode_in=decode_in)
        assert isinstance(plan, str) or plan.cpus_per_actor <= cpus / nodes


def test_a_range_of_encoders_ends_at_the_gpus() -> None:
    plan = planned(16, 2, actors=(1, 4))
    assert isinstance(plan, str) or plan.max_actors * plan.gpus_per_actor <= 2


def test_a_part_of_a_gpu_lies_on_one_gpu() -> None:
    assert planned(16, 3, gpus_per_actor=0.6).max_actors == 3


def test_an_encoder_told_to_ask_for_as_much_as_a_decoder() -> None:
    plan = planned(8, 0, cpus_per_actor=DECODE_CPUS, decode_in="tasks")
    assert isinstance(plan, str) or plan.cpus_per_actor != DECODE_CPUS


# --- nodes of several kinds

MIXED = ClusterResources((Node(4), Node(16, labels={"tier": "cpu"}), Node(8, 2, labels={"tier": "gpu"}), Node(8, 2, labels={"tier": "gpu"})))  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "selector", "meant"),
    [
        ({"tier": "gpu"}, {}, True),
        ({"tier": "gpu"}, {"tier": "gpu"}, True),
        ({"tier": "gpu"}, {"tier": "cpu"}, False),
        ({"tier": "gpu", "zone": "a"}, {"tier": "gpu", "zone": "b"}, False),
        ({"tier": "gpu"}, {"tier": "!gpu"}, False),
        ({}, {"tier": "!gpu"}, True),
        ({}, {"tier": "gpu"}, False),
        ({"tier": "b"}, {"tier": "in(a, b)"}, True),
        ({"tier": "c"}, {"tier": "in(a,b)"}, False),
        ({"tier": "c"}, {"tier": "!in(a, b)"}, True),
        ({"tier": "inner"}, {"tier": "inner"}, True),
    ],
)
def test_which_nodes_a_selector_means(labels: dict[str, str], selector: dict[str, str], meant: bool) -> None:
    assert matches(labels, selector) is meant


def test_encoders_and_decoding_on_nodes_of_their_own() -> None:
    plan = planned_on(MIXED, encode_on={"tier": "gpu"}, decode_on={"tier": "!gpu"}, gpus_per_actor=0.5)
    assert isinstance(plan, Plan)
    assert (plan.min_actors, plan.max_actors, plan.cpus_per_actor, plan.decode_in) == (8, 8, 0.9, "tasks")
    assert plan.sentence() == (
        "8 encoders with 1 thread, 0.9 CPU and 0.5 GPU each on nodes with tier=gpu; "
        "decoding in CPU tasks of 1 CPU on nodes with tier=!gpu; 36 CPUs and 4 GPUs in all"
    )


def test_encoders_on_the_cpus_of_some_nodes() -> None:
    plan = planned_on(MIXED, encode_on={"tier": "cpu"}, decode_on={"tier": "gpu"})
    assert isinstance(plan, Plan)  # 2 encoders share the half of 16 CPUs that is theirs
    assert (plan.device, plan.max_actors, plan.cpus_per_actor, plan.threads) == ("cpu", 2, 4.0, 8)


def test_few_cores_beside_many_gpus_are_shared() -> None:
    """Half of the GPU node's own two cores, however many there are elsewhere."""
    plan = planned_on(ClusterResources((Node(2, 4), Node(64))))
    assert isinstance(plan, Plan)
    assert (plan.max_actors, plan.cpus_per_actor) == (4, 0.25)


def test_whole_gpus_lie_on_one_node() -> None:
    assert planned_on(ClusterResources((Node(8, 3), Node(8, 3))), gpus_per_actor=2).max_actors == 2


def test_a_pool_on_a_cluster_may_grow_beyond_its_gpus() -> None:
    plan = planned_on(MIXED, actors=(2, 16))
    assert isinstance(plan, Plan)
    assert (plan.min_actors, plan.max_actors) == (2, 16)
    assert "actors=8 with gpus_per_actor=1, but only 4 fit" in str(planned_on(MIXED, actors=(8, 16)))


def test_a_pool_on_cpus_may_grow_too() -> None:
    """An encoder for 8 cores now; Ray Data makes more of the same when there are more cores."""
    cluster = ClusterResources((Node(16), Node(16)))
    plan = planned_on(cluster, actors=(2, 64))
    assert isinstance(plan, Plan)
    assert (plan.min_actors, plan.max_actors, plan.cpus_per_actor, plan.threads) == (2, 64, 4.0, 8)
    assert "actors=64, but there are 16 CPUs" in str(planned(16, 0, actors=(2, 64)))
    assert "actors=33, but there are 32 CPUs" in str(planned_on(cluster, actors=(33, 64)))


def test_nodes_that_an_autoscaler_adds() -> None:
    cluster = ClusterResources((Node(4),), growth=(Node(8, 1), Node(8, 1)))
    plan = planned_on(cluster, gpus_per_actor=1)
    assert isinstance(plan, Plan)
    assert (plan.min_actors, plan.max_actors, plan.cpus_per_actor) == (1, 2, 0.9)
    assert planned_on(cluster).device == "cpu"  # unless they are asked for, no GPUs are added
    head = planned_on(ClusterResources((Node(0),), growth=(Node(8),) * 3))
    assert isinstance(head, Plan)
    assert (head.min_actors, head.max_actors) == (1, 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"encode_on": {"tier": "tpu"}}, ["encode_on: no node has tier=tpu", "4 nodes: 1 x (16 CPUs, tier=cpu), 1 x (4 CPUs), 2 x (8 CPUs, 2 GPUs, tier=gpu)"]),
        ({"decode_on": {"tier": "tpu"}}, ["no node with tier=tpu has 1 CPU to decode on", "4 nodes"]),
        ({"encode_on": {"tier": "cpu"}, "gpus_per_actor": 1}, ["gpus_per_actor=1, but no node with tier=cpu has so much", "2 x (8 CPUs, 2 GPUs, tier=gpu)"]),
    ],
)  # fmt: skip
def test_nodes_that_are_not_there(given: dict[str, Any], words: list[str]) -> None:
    message = planned_on(MIXED, **given)
    assert isinstance(message, str)
    for word in words:
        assert word in message


@pytest.mark.parametrize("labels", [{"tier": ""}, {"tier": "in()"}, {"tier": "a b"}, {"-x": "a"}, {"tier": 1}])
def test_labels_that_ray_would_refuse(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"tier|-x"):
        settings(encode_on=labels)


def test_decoding_beside_the_encoders_has_no_nodes_of_its_own() -> None:
    with pytest.raises(ValueError, match="decode_on"):
        settings(decode_on={"tier": "cpu"}, decode_in="actors")
