"""Keys and values of sequences that grow beside one another, each at its own length, in memory taken once."""

import torch
from torch import Tensor
from transformers import Qwen2Config

_STRIDE = 64
"""What attention reads grows in steps of so many tokens, so that shapes repeat."""


class KeyValueCache:
    """Keys and values of up to ``slots`` sequences, each of up to ``context`` tokens.

    The trunk calls ``update`` in every block; ``at`` says before each pass which sequences and places it is for.
    Memory is taken at the first pass, in the dtype of its keys.

    Args:
        config: of the trunk.
        slots: number of sequences.
        context: most tokens of a sequence.
    """

    def __init__(self, config: Qwen2Config, slots: int, context: int) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_heads = config.num_key_value_heads or config.num_attention_heads
        # One place more, where the padding of a pass writes.
        self._shape = (config.num_hidden_layers, slots, num_heads, context + 1, head_dim)
        self.slots, self.context = slots, context
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._slots = self._positions = torch.empty(0)
        self._read: int | None = None

    @property
    def padding(self) -> int:
        """Position of padding: no token attends to it."""
        return self.context

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Memory of keys and values."""
        layers, slots, heads, length, width = self._shape
        return 2 * layers * slots * heads * length * width * dtype.itemsize

    def begin(self, slots: Tensor, positions: Tensor) -> None:
        """The next pass fills empty slots (n,) at positions (n, T); its tokens see one another only."""
        self._slots, self._positions, self._read = slots, positions, None

    def at(self, positions: Tensor, longest: int) -> Tensor:
        """The next pass continues the first n slots at positions (n, T).

        Args:
            positions: of its tokens; ``padding`` for those that are none.
            longest: tokens of the longest of these sequences, with the pass.

        Returns:
            Attention mask (n, 1, T, L), true where a token sees another.
        """
        read = min(-(-longest // _STRIDE) * _STRIDE, self.context)
        self._slots = torch.arange(len(positions), device=positions.device)
        self._positions, self._read = positions, read
        return (torch.arange(read, device=positions.device) <= positions[..., None])[:, None]

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store what a block made, (n, heads, T, width), and return what it attends to."""
        if self._keys is None or self._values is None:
            self._keys, self._values = (
                torch.zeros(self._shape, dtype=keys.dtype, device=keys.device) for _ in "kv"
            )
        places = self._slots[:, None], slice(None), self._positions
        self._keys[layer][places] = keys.transpose(1, 2)
        self._values[layer][places] = values.transpose(1, 2)
        if self._read is None:
            return keys, values
        count = len(self._slots)
        return self._keys[layer][:count, :, : self._read], self._values[layer][:count, :, : self._read]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a sequence of some length from one slot to another."""
        for store in (self._keys, self._values):
            if store is not None:
                store[:, target, :, :length] = store[:, source, :, :length]
