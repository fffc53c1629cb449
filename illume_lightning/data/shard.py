"""Shards: one preparation divided among jobs, which may run on many machines and in any order."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """One of `count` jobs; it writes the parts whose number leaves the rest `index` when divided by `count`.

    Args:
        index: Number of the job, from 0.
        count: Number of jobs.

    Raises:
        ValueError: If there is no such job.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard {self} does not exist: jobs count from 0, as in 0/8, 1/8 to 7/8 for 8 jobs"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has(self, number: int) -> bool:
        """Whether a part is this job's."""
        return number % self.count == self.index

    @staticmethod
    def parse(text: str) -> "Shard":
        """The shard of a text such as "0/8".

        Raises:
            ValueError: If it is none.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None:
            raise ValueError(f"shard '{text}' is not I/N, such as 0/8 for the first of 8 jobs")
        return Shard(int(found[1]), int(found[2]))


@dataclass
class _Division:
    shard: Shard
    is_used: bool = False


_division: ContextVar[_Division | None] = ContextVar("division", default=None)


@contextmanager
def divided(shard: Shard) -> Iterator[None]:
    """Within this, every store that is written is divided, and only this shard of it is written.

    Args:
        shard: This job's.

    Raises:
        ValueError: If no store was written.
    """
    division = _Division(shard)
    token = _division.set(division)
    try:
        yield
    finally:
        _division.reset(token)
    if not division.is_used:
        raise ValueError(f"this command writes no store that could be divided; leave out --shard {shard}")


def current_shard() -> Shard | None:
    """The shard that is to be written; none for all parts."""
    division = _division.get()
    if division is None:
        return None
    division.is_used = True
    return division.shard
