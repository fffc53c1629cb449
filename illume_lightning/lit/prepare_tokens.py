"""Codes of conversations' target images, made once for all passes."""

from pathlib import Path

from illume_lightning.data.schedule import SizeMode
from illume_lightning.data.store import Manifest


def prepare_tokens(
    store: str,
    output: str | Path,
    tokenizer: str,
    *,
    side: int = 256,
    mode: SizeMode = "fixed",
    size_step: int = 16,
    device: str = "cpu",
    batch_size: int = 32,
    part_items: int = 1024,
    num_workers: int = 0,
    chunk_megabytes: int = 64,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write the codes of the images that conversations ask to generate.

    The command can be killed and given again: it continues. Training takes them instead of tokenising, and gets
    the same batches.

    Args:
        store: Folder of a store of conversations.
        output: The folder to make.
        tokenizer: Folder of a DualViTok run, one of its checkpoints, or a published file.
        side: As in the curriculum's phase: the side of squares, or the square root of the ratios' area.
        mode: As in the curriculum's phase; any_resolution generates at the ratios, so give multi_ratio for it.
        size_step: As in the curriculum's phase.
        device: Torch device to compute on.
        batch_size: Images encoded at once.
        part_items: Conversations that are finished together; a kill loses at most these, for each worker.
        num_workers: Processes, each with a tokenizer of its own; 0 works in this one. The codes are the same.
        chunk_megabytes: Size of a chunk file in MB.
        overwrite: Replace codes that were made from other inputs or with other options.

    Returns:
        The manifest under the key "".

    Raises:
        FileNotFoundError: If the store or the tokenizer is missing.
        ValueError: If an option is out of range, or no conversation generates an image.
    """
    if batch_size < 1 or part_items < 1:
        raise ValueError(f"batch_size={batch_size} and part_items={part_items} must be at least 1")
    # Only now: `--help` shall not wait for torch and lightning.
    from illume_lightning.data.conversation_store import ConversationStore
    from illume_lightning.data.schedule import Phase, Schedule
    from illume_lightning.data.token_cache import KIND
    from illume_lightning.data.writer import write_stores
    from illume_lightning.host_memory import keep_freed_memory
    from illume_lightning.lit.token_encoder import TokenEncoder, TokenPart

    (phase,) = Schedule([Phase(1, mode, side, 1, 1, size_step)]).phases
    phase = phase.generating
    conversations = ConversationStore(store)
    if not conversations.images[:, 0].any():
        raise ValueError(f"no conversation of {store} generates an image; there is nothing to tokenise")
    if device == "cpu":
        keep_freed_memory()
    encoder = TokenEncoder(tokenizer, device)
    identity = {
        "kind": KIND, "source": conversations.manifest.fingerprint, "mode": phase.mode, "side": phase.side,
        "size_step": phase.size_step, "tokenizer": encoder.fingerprint, "codebooks": encoder.codebooks,
        "part_items": part_items,
    }  # fmt: skip
    starts = range(0, len(conversations), part_items)
    return write_stores(
        output,
        identity,
        lambda: [
            TokenPart(
                conversations,
                range(start, min(start + part_items, len(conversations))),
                phase,
                encoder,
                batch_size,
            )
            for start in starts
        ],
        num_workers=num_workers,
        chunk_megabytes=chunk_megabytes,
        overwrite=overwrite,
    )
