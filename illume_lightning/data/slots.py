"""Shared memory in which worker processes hand pictures over, used again and again.

A DataLoader gives every batch fresh shared memory, and the kernel clears it page by page at first touch; that
costs half as much as decoding the pictures. Here a slot goes back to the workers as soon as nothing in the
process that trains refers to the batch any more.
"""

import itertools
import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor


class SharedSlots:
    """Slots of shared memory, each for the pictures of one batch.

    Made in the process that trains, which takes slots and names them to the workers; the workers write.

    Args:
        count: number of slots.
        num_bytes: bytes of a slot.
    """

    def __init__(self, count: int, num_bytes: int) -> None:
        # Not share_memory_(), which copies, and so touches every page before it is needed.
        storage = torch.UntypedStorage._new_shared(count * num_bytes)
        self._memory = torch.empty(0, dtype=torch.uint8).set_(storage).view(count, num_bytes)
        self._free = list(range(count))
        self._key = next(_keys)
        _all_slots[self._key] = self

    def take(self, num_bytes: int) -> int | None:
        """Number of a free slot, from now on taken; ``None`` if all are, or ``num_bytes`` are more than one has."""
        if not self._free or num_bytes > self._memory.shape[1]:
            return None
        return self._free.pop()  # the one last used: it may still be in the cache

    def tensor(self, slot: int, shape: Sequence[int]) -> Tensor:
        """A taken slot as a uint8 tensor, for the worker to write to."""
        return self._memory[slot, : math.prod(shape)].view(*shape)

    def hand_over(self, slot: int, shape: Sequence[int]) -> "SlotTensor":
        """What the worker returns in place of that tensor."""
        return SlotTensor(self._key, slot, tuple(shape))

    def _receive(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        # The tensor's storage, and so every view of it, keeps this array alive; with the last the slot is free.
        array = self._memory[slot, : math.prod(shape)].numpy().reshape(shape)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array)


class SlotTensor:
    """A tensor on its way from a worker. Unpickled in the process that trains, it is a tensor."""

    def __init__(self, key: int, slot: int, shape: tuple[int, ...]) -> None:
        self._arguments = (key, slot, shape)

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return _receive, self._arguments


class InlineTensor:
    """A small tensor on its way from a worker, sent as its bytes: torch opens a connection to send a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._array = tensor.numpy()

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return torch.from_numpy, (self._array,)


_keys = itertools.count()
_all_slots: weakref.WeakValueDictionary[int, SharedSlots] = weakref.WeakValueDictionary()


def _receive(key: int, slot: int, shape: tuple[int, ...]) -> Tensor:
    return _all_slots[key]._receive(slot, shape)
