"""How a stream is laid out over CPUs and GPUs; refused when it would hang. Pure arithmetic, no Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clipray.engine.cluster import ClusterResources, Node, selected
from clipray.errors import PlanError
from clipray.job import Encoding

READ_CPUS = 0.25
DECODE_CPUS = 1.0
CORES_PER_CPU_ACTOR = 8  # an image tower hardly gets faster with more threads
GPU_ACTOR_CPUS = 0.9  # of the cores beside a GPU; the rest decodes


@dataclass(frozen=True)
class Plan:
    """Who does what.

    Attributes:
        min_actors, max_actors: size of the pool of encoders.
        gpus_per_actor, cpus_per_actor: what each asks of Ray.
        threads: of each encoder process, for its network and for decoding.
        nodes: that there are, or may be. local: Ray was started for this run, on this machine.
        decode_in: `actors` (threads beside the network), `tasks` (CPU tasks, on any node), or `none`.
        encode_on, decode_on: labels of the nodes for encoders and for decoding tasks; empty: any node.
        device: of the network; `cpu` also where an encoder holds a GPU that it does not use.
    """

    min_actors: int
    max_actors: int
    gpus_per_actor: float
    cpus_per_actor: float
    threads: int
    decode_in: str
    cpus: float
    gpus: float
    nodes: int = 1
    encode_on: Mapping[str, str] = field(default_factory=dict)
    decode_on: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    local: bool = False

    def sentence(self) -> str:
        """The plan in one line, for people."""
        low, high = self.min_actors, self.max_actors
        count = str(high) if low == high else f"{low} to {high}"
        gpu = f" and {self.gpus_per_actor:g} GPU" if self.gpus_per_actor else ""
        decoding = {
            "actors": "decoding in threads beside each encoder; ",
            "tasks": f"decoding in CPU tasks of {DECODE_CPUS:g} CPU{_on(self.decode_on)}; ",
        }.get(self.decode_in, "")
        return (
            f"{count} encoder{'s' if count != '1' else ''} with {self.threads} thread{'s' if self.threads != 1 else ''}, {self.cpus_per_actor:g} CPU{gpu} each{_on(self.encode_on)}; "
            f"{decoding}{self.cpus:g} CPUs and {self.gpus:g} GPUs in all"
        )


@dataclass(frozen=True)
class _Hosts:
    """The nodes on which encoders can lie, and how many on each."""

    members: Sequence[Node]
    places: Sequence[int]

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.members)

    @property
    def fit(self) -> int:
        return sum(self.places)


def make_plan(settings: Encoding, cluster: ClusterResources) -> Plan:
    """Lay the encoders out so that reading and decoding always find room.

    Args:
        settings: `actors`, `gpus_per_actor`, `cpus_per_actor`, `encode_on` and where it decodes are used.
        cluster: unless it is this machine alone, the largest size of a pool `[min, max]` may be more than it holds now:
            the pool grows with it.

    Raises:
        PlanError: the actors would leave no room to read, or ask for GPUs or nodes that are not there; with the numbers.
    """
    named = cluster.where(settings.encode_on)
    asked_gpus = settings.gpus_per_actor
    gpus_each = float(asked_gpus) if asked_gpus != "auto" else float(any(node.gpus >= 1 for node in named.members))
    on_gpu = gpus_each > 0
    decode_in = settings.decoding
    if decode_in == "auto":
        decode_in = "tasks" if on_gpu or cluster.nodes > 1 or settings.decoding_on else "actors"
    now = _hosts(named.members, gpus_each)
    hosts = now if now.members else _hosts(cluster.growth, gpus_each)
    if not hosts.members:
        raise PlanError(_nowhere(settings, cluster, gpus_each))
    low, high = _pool(settings, cluster, hosts, now, gpus_each)
    grows = low < high and not cluster.local
    placed = min(high, hosts.fit) if on_gpu else min(high, max(low, hosts.fit)) if grows else high
    rest = _rest_on(hosts, cluster, settings, decode_in)
    spread = max(placed, len(hosts.members))
    each = _gpu_share(hosts, placed, rest) if on_gpu else _share(hosts.cpus, rest, spread)
    if settings.cpus_per_actor != "auto":
        each = float(settings.cpus_per_actor)
        each = _unlike_decoding(each) if decode_in == "tasks" else each
        placed = min(low, placed) if grows else placed  # Ray Data makes more of them as far as others leave room
    needed = placed * each + rest
    if needed > hosts.cpus or each <= 0:
        raise PlanError(
            f"{placed} actors x {each:g} CPU{f' + {rest:g} to read and decode' if rest else ''} = {needed:g} CPUs, but there are {hosts.cpus:g}: "
            "the encoders would wait for ever for something to read; lower `actors` or `cpus_per_actor`"
        )
    threads = 1 if on_gpu and decode_in == "tasks" else max(1, math.floor(hosts.cpus / spread))
    decode_on = settings.decoding_on if decode_in == "tasks" else {}
    return Plan(
        low, high, gpus_each, each, threads, decode_in, cluster.cpus, cluster.gpus, cluster.nodes + len(cluster.growth),
        settings.encode_on, decode_on, _device(settings, on_gpu), cluster.local,
    )  # fmt: skip


def _device(settings: Encoding, on_gpu: bool) -> str:
    if settings.device == "cuda" and not on_gpu:
        raise PlanError("device=cuda, but gpus_per_actor is 0: no encoder would have a GPU; set `gpus_per_actor`")
    return settings.device if settings.device != "auto" else ("cuda" if on_gpu else "cpu")


def _hosts(nodes: tuple[Node, ...], gpus_each: float) -> _Hosts:
    """The nodes with room for an encoder: with so many GPUs, or with a CPU."""
    if gpus_each > 1 and gpus_each != int(gpus_each):
        raise PlanError(f"gpus_per_actor={gpus_each:g}; expected a fraction of one GPU or a whole number of them")
    places = [_places(node, gpus_each) for node in nodes]
    members = [node for node, count in zip(nodes, places, strict=True) if count]
    return _Hosts(members, [count for count in places if count])


def _places(node: Node, gpus_each: float) -> int:
    """How many encoders a node holds; of GPUs several on one, or one on several whole ones."""
    if not gpus_each:
        return max(1, round(node.cpus / CORES_PER_CPU_ACTOR)) if node.cpus >= 1 else 0
    if gpus_each < 1:
        return math.floor(node.gpus) * math.floor(1 / gpus_each)
    return math.floor(node.gpus / gpus_each)


def _pool(
    settings: Encoding, cluster: ClusterResources, hosts: _Hosts, now: _Hosts, gpus_each: float
) -> tuple[int, int]:
    """Smallest and largest number of encoders."""
    asked = settings.actors
    if asked == "auto":
        return (hosts.fit if now.members else 1), hosts.fit
    low, high = asked if isinstance(asked, tuple) else (asked, asked)
    needed = high if cluster.local else low
    if not gpus_each and needed > hosts.cpus:
        raise PlanError(
            f"actors={needed}, but there are {hosts.cpus:g} CPUs to encode on{_on(settings.encode_on)}; expected at most one a CPU"
        )
    if gpus_each and needed > (most := now.fit + _hosts(cluster.growth, gpus_each).fit):
        raise PlanError(
            f"actors={needed} with gpus_per_actor={gpus_each:g}, but only {most} fit on the GPUs that are there{_on(settings.encode_on)}: "
            f"{cluster}; lower `actors`"
        )
    return low, high


def _nowhere(settings: Encoding, cluster: ClusterResources, gpus_each: float) -> str:
    if not cluster.where(settings.encode_on).members:
        return f"encode_on: no node has {selected(settings.encode_on)}; the cluster has {cluster}"
    if gpus_each:
        return (
            f"gpus_per_actor={gpus_each:g}, but no node{_with(settings.encode_on)} has so much: the cluster has {cluster}; "
            "set it to 0 to encode on CPUs, or use a cluster with GPUs"
        )
    return f"no node{_with(settings.encode_on)} has a CPU to encode on; the cluster has {cluster}"


def _rest_on(hosts: _Hosts, cluster: ClusterResources, settings: Encoding, decode_in: str) -> float:
    """CPUs that reading and decoding need on the encoders' own nodes, as far as no other node has them."""
    rest = READ_CPUS + (DECODE_CPUS if decode_in == "tasks" else 0)
    named = (cluster.where(settings.decoding_on) if decode_in == "tasks" else cluster).members
    decoders = (*named, *cluster.growth)
    if decode_in == "tasks" and not any(node.cpus >= DECODE_CPUS for node in decoders):
        raise PlanError(
            f"no node{_with(settings.decoding_on)} has {DECODE_CPUS:g} CPU to decode on; the cluster has {cluster}"
        )
    elsewhere = sum(node.cpus for node in decoders if not any(node is host for host in hosts.members))
    return max(0.0, rest - elsewhere)


def _gpu_share(hosts: _Hosts, placed: int, rest: float) -> float:
    """CPUs an encoder asks for: at most half of those of its node go to encoders."""
    shares = [node.cpus / 2 / min(count, placed) for node, count in zip(hosts.members, hosts.places, strict=True)]
    share = min(GPU_ACTOR_CPUS, (hosts.cpus - rest) / placed, *shares)
    return _unlike_decoding(math.floor(share * 100) / 100)


def _share(cpus: float, rest: float, actors: int) -> float:
    """CPUs an encoder asks for: half of all for the pool, so that Ray spreads it over nodes, and room for the rest."""
    return _unlike_decoding(math.floor(min(cpus / 2, cpus - rest) / actors * 100) / 100)


def _unlike_decoding(share: float) -> float:
    """Ray Data fuses a task into the actor behind it when both ask for the same; then they would take turns."""
    return share if share != DECODE_CPUS else share - 0.01


def _on(selector: Mapping[str, str]) -> str:
    return f" on nodes with {selected(selector)}" if selector else ""


def _with(selector: Mapping[str, str]) -> str:
    return f" with {selected(selector)}" if selector else ""
