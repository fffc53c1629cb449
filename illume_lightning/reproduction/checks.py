"""What a recorded run was made from and by, held against what is here, before anything is trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from illume_lightning.data.manifest import MANIFEST, Manifest
from illume_lightning.data.remote import Remote, copy_manifest, is_remote
from illume_lightning.data.store import sha256
from illume_lightning.doctor import versions
from illume_lightning.lit.device import choose_device
from illume_lightning.lit.lineage import hash_input
from illume_lightning.lit.same_arithmetic import facts
from illume_lightning.metric_values import Values, hash_values
from illume_lightning.provenance import code, commit_name, machine
from illume_lightning.run_json import RUN_JSON


@dataclass(frozen=True)
class Check:
    """One thing that is the same here, or not.

    Args:
        what: it is.
        difference: empty if it is the same.
        is_needed: whether the run can't be done again without it.
    """

    what: str
    difference: str = ""
    is_needed: bool = False

    @property
    def line(self) -> str:
        """For people."""
        if not self.difference:
            return f"same     {self.what}"
        return f"{'WRONG  ' if self.is_needed else 'differs'}  {self.what}: {self.difference}"


def check(record: dict[str, Any]) -> list[Check]:
    """Look at everything that decides how a run ends, in the order of the record."""
    config = record["config"]["resolved"]
    remote = Remote(**(config.get("data", {}).get("init_args", {}).get("remote") or {}))
    return [
        *(_check_store(store, remote) for store in record["stores"]),
        *(_check_input(made_from) for made_from in record["inputs"]),
        _check_code(record["code"]),
        Check("package versions", "; ".join(_differences(record["packages"], versions()))),
        Check("hardware", "; ".join(_hardware(record["hardware"]))),
    ]


def check_series(record: dict[str, Any], values: Values) -> Check:
    """Whether the metrics beside a record are those that it names; of a run that did not end it names none."""
    what, series = "metrics.csv", record["series"]
    found = hash_values(values)
    if series is None or series["sha256"] == found:
        return Check(what)
    return Check(
        what, f"sha256 {series['sha256'][:12]} in {RUN_JSON}, {found[:12]} in the file: it was changed"
    )


def _check_store(recorded: dict[str, Any], remote: Remote) -> Check:
    path, what = recorded["path"], f"store {recorded['path']}"
    try:
        manifest = (copy_manifest(path, MANIFEST, remote) if is_remote(path) else Path(path)) / MANIFEST
        if sha256(manifest) == recorded["manifest_sha256"]:
            return Check(what)
        found = Manifest.read(manifest).fingerprint
    except FileNotFoundError:
        return Check(what, "it is not here; `illume prepare` makes it", is_needed=True)
    if found == recorded["content_sha256"]:
        return Check(what, f"another {MANIFEST}, of the same records; it was prepared again")
    digests = f"{recorded['content_sha256'][:12]} recorded, {found[:12]} here"
    return Check(what, f"its {MANIFEST} is of other records ({digests}); prepare it as it was", True)


def _check_input(recorded: dict[str, Any]) -> Check:
    what = f"{recorded['key']} {recorded['path']}"
    if recorded["sha256"] is None:
        return Check(what, "it was fetched by its name, so that nothing can be compared")
    try:
        found = hash_input(recorded["path"])
    except FileNotFoundError:
        return Check(what, "it is not here; make it first", is_needed=True)
    if found == recorded["sha256"]:
        return Check(what)
    return Check(what, f"sha256 {recorded['sha256'][:12]} recorded, {found[:12]} here", is_needed=True)


def _check_code(recorded: dict[str, Any]) -> Check:
    here = code()
    if here["source_sha256"] == recorded["source_sha256"]:
        return Check("code")
    names = [
        commit_name(made_by) or f"source {made_by['source_sha256'][:12]}" for made_by in (recorded, here)
    ]
    return Check("code", f"{names[0]} recorded, {names[1]} here")


def _hardware(recorded: dict[str, Any]) -> Iterator[str]:
    """The kind of processor, and what else the last bits of results depend on."""
    if recorded["accelerator"] == "cpu":
        yield from _differences({"cpu": recorded["cpu"]}, machine())
    device = choose_device(recorded["accelerator"])
    if device.type != "cpu" and not torch.get_device_module(device.type).is_available():
        yield f"{recorded['devices'][0]} recorded, no {device.type} here"
        return
    # The configuration asks for deterministic kernels, once training begins.
    names = [name for name in recorded["arithmetic"] if name not in ("torch", "deterministic kernels")]
    yield from _differences({name: recorded["arithmetic"][name] for name in names}, facts(device))


def _differences(recorded: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    for name, value in recorded.items():
        if here.get(name) != value:
            yield f"{name} {value} recorded, {here.get(name)} here"
