"""All tasks and splits of the shapes world at once."""

from collections.abc import Sequence
from pathlib import Path

from illume_lightning.data.store import Manifest
from illume_lightning.data.worlds.conversations import WorldTask, check_task
from illume_lightning.data.worlds.shapes import SPLITS
from illume_lightning.data.worlds.shapes_conversations import prepare_shapes_conversations
from illume_lightning.resolution import Size


def prepare_shapes_tasks(
    output: str | Path,
    *,
    tokenizer: str,
    train: dict[WorldTask, int],
    held_out: int = 256,
    seed: int = 0,
    sizes: Sequence[Size] | None = None,
    ratios: int | None = None,
    min_objects: int = 1,
    max_objects: int = 4,
    one_object_share: float = 0.0,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write stores of conversations about shapes, `<output>/<task>/<split>` for every task and all four splits.

    Args:
        output: The folder to make.
        tokenizer: Folder of the text tokenizer, see `illume prepare shapes-tokenizer`; decides lengths.
        train: Number of training conversations of every task, such as {generation: 6000, editing: 6000}.
        held_out: Number of conversations of every other split of every task.
        seed: As all that follows, see `illume prepare shapes-conversations`.
        sizes: See there.
        ratios: See there.
        min_objects: See there.
        max_objects: See there.
        one_object_share: See there; in the other splits all numbers of objects are equally likely.
        num_workers: See there.
        overwrite: See there.

    Returns:
        The manifests, under "<task>/<split>".

    Raises:
        FileNotFoundError: If the folder has no tokenizer.
        ValueError: If there is no task, an option is out of range, or a folder holds something else.
    """
    if not train:
        raise ValueError(
            "train names no task; give the number of conversations of each, such as {generation: 6000}"
        )
    for task in train:
        check_task(task)
    made: dict[str, Manifest] = {}
    for task, count in train.items():
        for split in SPLITS:
            is_train = split == "train"
            stores = prepare_shapes_conversations(
                Path(output) / task / split,
                tokenizer=tokenizer,
                task=task,
                count=count if is_train else held_out,
                seed=seed,
                split=split,
                sizes=sizes,
                ratios=ratios,
                min_objects=min_objects,
                max_objects=max_objects,
                one_object_share=one_object_share if is_train else 0.0,
                num_workers=num_workers,
                overwrite=overwrite,
            )
            made |= {f"{task}/{split}": manifest for manifest in stores.values()}
    return made
