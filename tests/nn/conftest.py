"""A DualViTok small enough to run in milliseconds."""

import pytest
import torch
from tiny import build_tiny

from illume_lightning.nn.dualvitok import DualViTok


@pytest.fixture
def tiny() -> DualViTok:
    """The tiny tokenizer, seeded."""
    torch.manual_seed(0)
    return build_tiny()
