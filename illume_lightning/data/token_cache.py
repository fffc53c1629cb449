"""Codes of conversations' target images, made before training."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.remote import Remote
from illume_lightning.data.schedule import Phase
from illume_lightning.data.store import Store
from illume_lightning.resolution import grids

KIND = "tokens"
"""The manifest's ``kind`` of such a store."""


def pack_codes(semantic: np.ndarray, pixel: np.ndarray) -> bytes:
    """One image's record: both grids (h1, w1) and (h2, w2), row by row, in little-endian int32."""
    return b"".join(np.ascontiguousarray(codes, dtype="<i4").tobytes() for codes in (semantic, pixel))


class TokenCache(Store):
    """Codes of the target images of a store of conversations, for phases of one size mode.

    Args:
        path: folder that `illume prepare tokens` wrote.
        conversations: the store that it was made from.
        remote: how codes far away are read.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it was made from other conversations, or is no token cache.
    """

    def __init__(self, path: str | Path, conversations: ConversationStore, remote: Remote = Remote()) -> None:
        super().__init__(path, remote)
        identity = self.manifest.identity
        if identity["kind"] != KIND:
            raise ValueError(
                f"{path} holds {identity['kind']}, no codes; make them with `illume prepare tokens`"
            )
        if identity["source"] != conversations.manifest.fingerprint:
            raise ValueError(
                f"the codes in {path} were made from other conversations than {conversations.location}; prepare them "
                "again with `illume prepare tokens`"
            )
        self.tokenizer_fingerprint: str = identity["tokenizer"]
        """Of the tokenizer that made the codes."""
        self.codebooks: dict[str, int] = identity["codebooks"]
        """Codes of each of its branches."""
        self._phase = Phase(1, identity["mode"], identity["side"], 1, 1, identity["size_step"])
        self._is_target = conversations.images[:, 0].astype(bool)
        self._number = np.cumsum(self._is_target) - 1
        self._first_image = conversations.first_image

    def fits(self, phase: Phase) -> bool:
        """Whether the pictures that a phase generates have these sizes."""
        return phase.generating == self._phase

    def numbers(self, record: int) -> range:
        """Numbers of the records that hold a conversation's codes."""
        first, last = self._first_image[[record, record + 1]]
        count = int(self._is_target[first:last].sum())
        start = int(self._number[first]) + (not self._is_target[first]) if count else 0
        return range(start, start + count)

    def codes(self, record: int, image: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Semantic and pixel codes, row by row; none for an image that is only input.

        Args:
            record: number of the conversation.
            image: number of the image in it.

        Raises:
            DamagedRecord: if the codes are not what was written.
        """
        place = int(self._first_image[record]) + image
        if not self._is_target[place]:
            return None
        number = int(self._number[place])
        height, width = self.sizes[number].tolist()
        data = self._record(number).image
        counts = [math.prod(grid) for grid in (grids(height, width).semantic, grids(height, width).pixel)]
        if len(data) != 4 * sum(counts):
            raise self.damaged(number, f"{len(data)} bytes are not {sum(counts)} codes")
        flat = np.frombuffer(data, dtype="<i4").astype(np.int64)
        semantic, pixel = flat[: counts[0]], flat[counts[0] :]
        for name, codes in (("semantic", semantic), ("pixel", pixel)):
            if codes.min() < 0 or codes.max() >= self.codebooks[name]:
                raise self.damaged(number, f"{name} codes are outside 0 to {self.codebooks[name] - 1:,}")
        return semantic, pixel


def check_caches(caches: Sequence[TokenCache], codebooks: dict[str, int]) -> str | None:
    """Fingerprint of the tokenizer that made all caches; none where there are none.

    Args:
        caches: of a run.
        codebooks: codes of each branch that the model has tokens for.

    Raises:
        ValueError: if they come from several tokenizers, or from one with other codebooks.
    """
    for cache in caches:
        if cache.codebooks != codebooks:
            raise ValueError(
                f"the codes in {cache.location} come from codebooks of {_text(cache.codebooks)} codes, the "
                f"vocabulary has {_text(codebooks)}: set semantic_codes and pixel_codes to the tokenizer's, or prepare "
                "the codes with the right one"
            )
    found = {cache.tokenizer_fingerprint for cache in caches}
    if len(found) > 1:
        names = ", ".join(f"{cache.location}: {cache.tokenizer_fingerprint[:12]}" for cache in caches)
        raise ValueError(f"the caches were made by several tokenizers ({names}); prepare them with one")
    return found.pop() if found else None


def _text(codebooks: dict[str, int]) -> str:
    return " and ".join(f"{count:,} {name}" for name, count in sorted(codebooks.items()))
