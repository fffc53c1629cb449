"""Codes and latents of a store of pictures, made once for all epochs."""

from pathlib import Path
from typing import Literal

from illume_lightning.data.store import ImageStore, Manifest


def prepare_latents(
    store: str,
    output: str | Path,
    tokenizer: str,
    *,
    vae: str | None = None,
    space_to_depth: int | None = None,
    side: int = 512,
    mode: Literal["fixed", "multi_ratio"] = "multi_ratio",
    device: str = "cpu",
    batch_size: int = 16,
    part_items: int = 1024,
    chunk_megabytes: int = 64,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write the codes and latents that train the diffusion decoder into a store of their own.

    Pictures are fitted to the phase's sizes; those that would lose more than 20 % are dropped and counted
    (paper 3.4). Codes are taken at half that size. The command can be killed and given again: it continues.

    Args:
        store: Folder of a store of pictures.
        output: The folder to make.
        tokenizer: Folder of a DualViTok run, one of its checkpoints, or a published file.
        vae: Folder or hub name of SDXL's VAE, or of a pipeline that has it.
        space_to_depth: Pixels a side that make one latent, instead of a VAE.
        side: Square root of the output's area in pixels, as in the curriculum's phase.
        mode: As in the curriculum's phase.
        device: Torch device to compute on.
        batch_size: Pictures encoded at once.
        part_items: Pictures that are finished together; a kill loses at most these.
        chunk_megabytes: Size of a chunk file in MB.
        overwrite: Replace a store that was made from other inputs or with other options.

    Returns:
        The manifest under the key "".

    Raises:
        FileNotFoundError: If the store or the tokenizer is missing.
        ValueError: If an option is out of range, or neither or both of vae and space_to_depth are given.
        FloatingPointError: If latents come out not finite; names the records.
    """
    if (vae is None) == (space_to_depth is None):
        raise ValueError("give either --vae (SDXL's) or --space_to_depth (such as 4)")
    if batch_size < 1 or part_items < 1:
        raise ValueError(f"batch_size={batch_size} and part_items={part_items} must be at least 1")
    # Only now: `--help` shall not wait for torch, lightning and diffusers.
    from illume_lightning.data.latents import KIND
    from illume_lightning.data.schedule import Phase
    from illume_lightning.data.writer import write_stores
    from illume_lightning.host_memory import keep_freed_memory
    from illume_lightning.lit.device import choose_device
    from illume_lightning.lit.latent_cache import LatentEncoder, LatentPart
    from illume_lightning.lit.tokenizer import fingerprint, load_tokenizer
    from illume_lightning.nn.latents import SpaceToDepth, VAELatents
    from illume_lightning.resolution import PIXEL_STRIDE

    if device == "cpu":
        keep_freed_memory()
    pictures = ImageStore(store)
    latents = VAELatents(vae) if vae is not None else SpaceToDepth(space_to_depth or 1)
    place = choose_device(device)
    encoder = LatentEncoder(load_tokenizer(tokenizer).to(place), latents.to(place), device)
    phase = Phase(1, mode, side, 1, 1, size_step=2 * PIXEL_STRIDE)
    identity = {
        "kind": KIND, "source": pictures.manifest.fingerprint, "mode": mode, "side": side,
        "tokenizer": fingerprint(encoder.tokenizer), "part_items": part_items,
        "latents": f"space_to_depth {space_to_depth}" if vae is None else fingerprint(latents),
    }  # fmt: skip
    starts = range(0, len(pictures), part_items)
    return write_stores(
        output,
        identity,
        lambda: [
            LatentPart(
                pictures, range(start, min(start + part_items, len(pictures))), phase, encoder, batch_size
            )
            for start in starts
        ],
        chunk_megabytes=chunk_megabytes,
        overwrite=overwrite,
    )
