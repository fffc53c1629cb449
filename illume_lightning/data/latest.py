"""Remembering what was worked out last: a plan is asked for one step many times over."""

from collections.abc import Callable
from typing import Any


class Latest:
    """A function of integers that remembers its last result."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._key: tuple[int, ...] | None = None
        self._value: Any = None

    def __call__(self, *key: int) -> Any:
        """The result, made anew where the arguments are others than before."""
        if key != self._key:
            self._value, self._key = self._make(*key), key
        return self._value
