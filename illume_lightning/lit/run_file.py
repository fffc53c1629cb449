"""Writing ``run.json``, and what it says of a run's final weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from illume_lightning.data.part import write_text
from illume_lightning.data.store import sha256
from illume_lightning.lit.saved_run import LAST
from illume_lightning.nn.digests import tensor_digests, weights_digest
from illume_lightning.nn.sharded_checkpoint import is_sharded, read_rest
from illume_lightning.run_json import RUN_JSON

_MODEL = "model."


def write_run_json(root: Path, record: dict[str, Any]) -> None:
    """Write the record to a run's folder, in full or not at all.

    Raises:
        OSError: if it can't be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / RUN_JSON, json.dumps(record, indent=1, default=str) + "\n")


def hash_text(text: str) -> str:
    """The sha256 of a text, as of its file in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def last_weights(root: Path) -> dict[str, Tensor] | None:
    """All weights of a run's last checkpoint, as they are named there; none without one, or of a sharded one."""
    return read_rest(root / LAST)["state_dict"] if (root / LAST).is_file() else None


def weights_record(root: Path) -> dict[str, Any] | None:
    """What a run's record says of its final weights; none without a checkpoint.

    Of a sharded checkpoint, which may be larger than one machine's memory, only where it is.
    """
    checkpoint = root / LAST
    if not checkpoint.exists():
        return None
    content = read_rest(checkpoint)
    found = {"checkpoint": str(LAST), "global_step": content["global_step"]}
    if is_sharded(checkpoint):
        return found | {"sha256": None, "digest": None, "fingerprint": None, "tensors": {}}
    state = content["state_dict"]
    model = {name.removeprefix(_MODEL): value for name, value in state.items() if name.startswith(_MODEL)}
    return found | {
        "sha256": sha256(checkpoint),
        "digest": weights_digest(state),
        "fingerprint": weights_digest(model),
        "tensors": tensor_digests(state),
    }
