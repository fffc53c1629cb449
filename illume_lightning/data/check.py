"""Looking for damage in stores, and giving those of older versions what later reading is checked by."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from illume_lightning.data.manifest import MANIFEST
from illume_lightning.data.part import SCRATCH_SUFFIX, write_text
from illume_lightning.data.remote import is_remote
from illume_lightning.data.store import CHECKS, INDEX, ROWS, SIZES, Store, find_stores, record_check, sha256

log = logging.getLogger(__name__)


def check_stores(store: str) -> None:
    """Read every byte of a store, or of the stores in a folder, and compare it with what was written.

    A store of an older version also gets a check for each of its records (`checks.npy`), so that from then on damage
    is noticed whenever a record is read.

    Args:
        store: Folder of a store, or of stores (`train`, `val`); or the address of a store, which gets no checks.

    Raises:
        FileNotFoundError: If there is no store.
        ValueError: If files are damaged; names them.
        OSError: If the checks cannot be written.
    """
    is_far = is_remote(store)
    places = [] if is_far else [str(folder) for folder in find_stores(Path(store))]
    for place in places or [store]:  # a folder without stores says what is wrong with it
        opened = Store(place)
        opened.verify()
        if not opened.has_checks and not is_far:
            _add_checks(opened)
        log.info("%s is whole: %d records in %d chunks", place, len(opened), len(opened.manifest.chunks))


def _add_checks(store: Store) -> None:
    """Write the checks of a store whose chunks are known to be whole; the manifest last."""
    folder = store.path
    checks = [record_check(*store.fields(index)) for index in range(len(store))]
    scratch = folder / (CHECKS + SCRATCH_SUFFIX)
    with scratch.open("wb") as file:
        np.save(file, np.array(checks, np.uint32))
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, folder / CHECKS)
    beside = [name for name in (CHECKS, INDEX, ROWS, SIZES) if (folder / name).is_file()]
    files = {name: sha256(folder / name) for name in beside}
    write_text(folder / MANIFEST, replace(store.manifest, files=files).to_json())
    log.info("%s has checks for its records now", folder)
