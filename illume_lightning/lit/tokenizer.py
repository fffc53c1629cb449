"""A trained DualViTok, from wherever it lies."""

from pathlib import Path

from torch import nn

from illume_lightning.lit.saved_run import SavedRun
from illume_lightning.nn.checkpoints import build_official, load_dualvitok
from illume_lightning.nn.digests import weights_digest
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.sharded_checkpoint import read_rest

PUBLISHED = "pytorch_model.bin"


def load_tokenizer(path: str | Path) -> DualViTok:
    """Build and fill a tokenizer, frozen and in evaluation mode.

    Args:
        path: folder of a DualViTok run, one of its checkpoints, a published ``pytorch_model.bin``, or a folder of
            ``illume export``.

    Raises:
        FileNotFoundError: if there is no such run or file.
        ValueError: if the file does not fit the model.
    """
    path = Path(path)
    if (path / PUBLISHED).is_file():
        path = path / PUBLISHED
    if path.is_file() and not SavedRun.has_config(path):
        model, checkpoint = build_official(), path
    else:
        try:
            run = SavedRun(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no tokenizer at {path}: train one (`illume fit -c experiments/shapes/dualvitok.yaml`), or give the "
                "folder of a run, a checkpoint, or a published pytorch_model.bin"
            ) from error
        model, checkpoint = run.build(DualViTok, "model", "init_args", "model"), run.checkpoint
    load_dualvitok(model, checkpoint)
    return model.requires_grad_(False).eval()


def fingerprint(network: nn.Module) -> str:
    """Hash of all weights and buffers (sha256, hexadecimal)."""
    return weights_digest(network.state_dict())


def check_cached_codes(maker: str, own: str, path: str | None, command: str) -> None:
    """Refuse codes of another tokenizer.

    Args:
        maker: fingerprint of the tokenizer that made the codes.
        own: fingerprint of the tokenizer in use.
        path: where that one is from.
        command: makes the codes.

    Raises:
        ValueError: names both tokenizers.
    """
    if maker != own:
        raise ValueError(
            f"the cached codes were made by another tokenizer (fingerprint {maker[:12]}) than {path} "
            f"({own[:12]}): prepare them again with `{command}`"
        )


def check_maker(checkpoint: Path, tokenizer: nn.Module) -> None:
    """Refuse a checkpoint that was trained on the codes of another tokenizer.

    Raises:
        ValueError: names both.
    """
    saved = read_rest(checkpoint)
    maker, own = saved.get("tokenizer_fingerprint"), fingerprint(tokenizer)
    if maker not in (None, own):
        raise ValueError(
            f"{checkpoint} was trained on codes of another tokenizer (fingerprint {maker[:12]}) than the one given "
            f"({own[:12]}): the same codes mean different things; give the one it was trained with"
        )
