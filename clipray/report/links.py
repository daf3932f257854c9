"""Links from the page of a run into the served page, where it is opened from there."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True)
class Links:
    """Paths of the served page. prefix: of all of them."""

    prefix: str = ""

    def row(self, name: str) -> str:
        return f"{self.prefix}/rows/{quote(name, safe='')}"

    def cluster(self, table: str, number: int) -> str:
        return f"{self.prefix}/clusters/{quote(table, safe='')}/{number}"
