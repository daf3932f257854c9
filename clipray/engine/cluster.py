"""The nodes of a cluster, and which of them a label selector means. No Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Node:
    """What one machine offers to Ray. `memory_bytes`: what Ray's workers may take, 0 if not known."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """`8 CPUs, 1 GPU, tier=gpu`."""
        labels = [f"{key}={value}" for key, value in sorted(self.labels.items()) if key != "ray.io/node-id"]
        words = [_count(self.cpus, "CPU"), *([_count(self.gpus, "GPU")] if self.gpus else []), *labels]
        return ", ".join(words)


@dataclass(frozen=True)
class ClusterResources:
    """What a run can use.

    Attributes:
        members: the living nodes. local: they are this machine alone.
        growth: nodes that an autoscaler may add, each as often as it may be added.
    """

    members: tuple[Node, ...]
    local: bool = False
    growth: tuple[Node, ...] = ()

    @property
    def nodes(self) -> int:
        return len(self.members)

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.members)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.members)

    @property
    def memory_bytes(self) -> float:
        return sum(node.memory_bytes for node in self.members)

    def where(self, selector: Mapping[str, str]) -> ClusterResources:
        """The part of the cluster whose nodes have these labels. Of nodes to come the labels are not known."""
        return replace(self, members=tuple(node for node in self.members if matches(node.labels, selector)))

    def __str__(self) -> str:
        """`3 nodes: 1 x (4 CPUs), 2 x (8 CPUs, 1 GPU, tier=gpu)`."""
        growth = f"; its autoscaler may add {_listed(self.growth)}" if self.growth else ""
        return f"{_count(self.nodes, 'node')}: {_listed(self.members)}{growth}"


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node is meant, as Ray decides it: `value`, `!value`, `in(a, b)` or `!in(a, b)` for each key; a node
    without the key is one that has another value."""
    return all(_fits(labels.get(key), wanted) for key, wanted in selector.items())


def _fits(value: str | None, wanted: str) -> bool:
    refused, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    named = wanted.removeprefix("in").strip("()").split(",") if wanted.endswith(")") else [wanted]
    return (value in [name.strip() for name in named]) != refused


def selected(selector: Mapping[str, str]) -> str:
    """A selector for people: `tier=gpu, zone=!a`."""
    return ", ".join(f"{key}={value}" for key, value in selector.items())


def _listed(nodes: Iterable[Node]) -> str:
    return ", ".join(f"{count} x ({node})" for node, count in sorted(Counter(map(str, nodes)).items()))


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
