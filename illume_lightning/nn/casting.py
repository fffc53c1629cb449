"""What keeps its type when the model that it is part of is cast to another one, as for weights in bfloat16."""

from collections.abc import Callable

from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
"""What ``nn.Module.to`` does to every tensor."""


class KeepsType(nn.Module):
    """Goes to devices with the model around it, and keeps its own type."""

    def _apply(self, fn: Change, recurse: bool = True) -> nn.Module:
        def moved(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        return super()._apply(moved, recurse)


class KeepsBuffers(nn.Module):
    """Keeps its buffers' types when its parameters are cast, above all the angles of rotary embeddings.

    In bfloat16 they would be off by about a turn after 4,000 tokens.
    """

    def _apply(self, fn: Change, recurse: bool = True) -> nn.Module:
        before = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            changed = module.get_buffer(name)
            if changed.dtype != buffer.dtype:
                setattr(module, name, buffer.to(changed.device))
        return self
