"""How a stream is laid out over CPUs and GPUs; refused when it would hang. Pure arithmetic, no Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipray.errors import PlanError
from clipray.settings import Encoding

READ_CPUS = 0.25
DECODE_CPUS = 1.0
CORES_PER_CPU_ACTOR = 8  # an image tower hardly gets faster with more threads


@dataclass(frozen=True)
class Plan:
    """Who does what.

    Attributes:
        min_actors, max_actors: size of the pool of encoders.
        gpus_per_actor, cpus_per_actor: what each asks of Ray.
        threads: of each encoder process, for its network and for decoding.
        decode_in: `actors` (threads beside the network), `tasks` (CPU tasks, on any node), or `none`.
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

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_actor else "cpu"

    def sentence(self) -> str:
        """The plan in one line, for people."""
        count = (
            str(self.max_actors) if self.min_actors == self.max_actors else f"{self.min_actors} to {self.max_actors}"
        )
        gpu = f" and {self.gpus_per_actor:g} GPU" if self.gpus_per_actor else ""
        decoding = {
            "actors": "decoding in threads beside each encoder; ",
            "tasks": f"decoding in CPU tasks of {DECODE_CPUS:g} CPU; ",
        }.get(self.decode_in, "")
        return (
            f"{count} encoder{'s' if count != '1' else ''} with {self.threads} thread{'s' if self.threads != 1 else ''}, {self.cpus_per_actor:g} CPU{gpu} each; "
            f"{decoding}{self.cpus:g} CPUs and {self.gpus:g} GPUs in all"
        )


def make_plan(settings: Encoding, cpus: float, gpus: float, nodes: int = 1) -> Plan:
    """Lay the encoders out so that reading and decoding always find room.

    Args:
        settings: `actors`, `gpus_per_actor`, `cpus_per_actor` and `decoding` are used.
        cpus, gpus: logical resources of the whole cluster.
        nodes: number of nodes they lie on.

    Raises:
        PlanError: the actors would leave no room to read, or ask for GPUs that are not there; with the numbers.
    """
    gpus_each = (1.0 if gpus >= 1 else 0.0) if settings.gpus_per_actor == "auto" else float(settings.gpus_per_actor)
    on_gpu = gpus_each > 0
    decode_in = settings.decoding if settings.decoding != "auto" else ("tasks" if on_gpu or nodes > 1 else "actors")
    fit = _gpu_actors(gpus_each, gpus) if on_gpu else nodes * max(1, round(cpus / nodes / CORES_PER_CPU_ACTOR))
    asked = settings.actors
    low, high = (fit, fit) if asked == "auto" else asked if isinstance(asked, tuple) else (asked, asked)
    if on_gpu and high > fit:
        raise PlanError(
            f"actors={high} with gpus_per_actor={gpus_each:g}, but only {fit} fit on {gpus:g} GPUs; lower `actors`"
        )
    if not on_gpu and high > cpus:
        raise PlanError(f"actors={high}, but there are {cpus:g} CPUs to encode on; expected at most one a CPU")
    rest = READ_CPUS + (DECODE_CPUS if decode_in == "tasks" else 0)
    each = _share(cpus, rest, max(high, nodes), on_gpu)
    if settings.cpus_per_actor != "auto":
        each = float(settings.cpus_per_actor)
        each = _unlike_decoding(each) if decode_in == "tasks" else each
    needed = high * each + rest
    if needed > cpus or each <= 0:
        raise PlanError(
            f"{high} actors x {each:g} CPU + {READ_CPUS:g} to read"
            f"{f' + {DECODE_CPUS:g} to decode' if decode_in == 'tasks' else ''} = {needed:g} CPUs, but there are {cpus:g}: "
            "the encoders would wait for ever for something to read; lower `actors` or `cpus_per_actor`"
        )
    threads = 1 if on_gpu and decode_in == "tasks" else max(1, math.floor(cpus / max(high, nodes)))
    return Plan(low, high, gpus_each, each, threads, decode_in, cpus, gpus, nodes)


def _gpu_actors(gpus_each: float, gpus: float) -> int:
    """How many encoders fit: several on one GPU, or one on several whole ones."""
    if gpus_each > gpus:
        raise PlanError(
            f"gpus_per_actor={gpus_each:g}, but there are {gpus:g} GPUs; "
            "set it to 0 to encode on CPUs, or use a cluster with GPUs"
        )
    if gpus_each > 1 and gpus_each != int(gpus_each):
        raise PlanError(f"gpus_per_actor={gpus_each:g}; expected a fraction of one GPU or a whole number of them")
    return math.floor(gpus) * math.floor(1 / gpus_each) if gpus_each < 1 else math.floor(gpus / gpus_each)


def _share(cpus: float, rest: float, actors: int, on_gpu: bool) -> float:
    """CPUs an encoder asks for: half of all for the pool, so that Ray spreads it over nodes, and room for the rest."""
    share = min(cpus / 2, cpus - rest) / actors
    if on_gpu:
        share = min(share, 0.9)
    return _unlike_decoding(math.floor(share * 100) / 100)


def _unlike_decoding(share: float) -> float:
    """Ray Data fuses a task into the actor behind it when both ask for the same; then they would take turns."""
    return share if share != DECODE_CPUS else share - 0.01
