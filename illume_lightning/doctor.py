"""What this installation has, what it lacks, and how to get it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from illume_lightning.releases import is_compromised

PACKAGES = (
    "illume-lightning",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "transformers",
    "diffusers",
    "litdata",
    "omegaconf",
    "jsonargparse",
    "lpips",
    "numpy",
    "pillow",
)
OPTIONAL = {
    "skimage": ("sample photographs", "pip install scikit-image"),
    "sklearn": ("sample photographs", "pip install scikit-learn"),
    "pyarrow": ("importing Hugging Face parquet", "pip install pyarrow"),
    "torch_fidelity": ("rFID with the Inception network", "pip install 'illume-lightning[eval]'"),
    "matplotlib": ("curves in illume report", "pip install 'illume-lightning[report]'"),
    "gradio": ("the web page", "pip install 'illume-lightning[app]'"),
    "torch_npu": ("Ascend NPUs", "install CANN, then pip install 'illume-lightning[npu]'"),
}


def report() -> str:
    """Versions, devices, caches and missing parts, as text of a few dozen lines."""
    try:
        import torch  # noqa: F401
    except (ImportError, RuntimeError) as error:
        return "\n".join([*_versions(), "", *_broken_torch(error), "", *_missing()]) + "\n"
    return "\n".join([*_versions(), "", *_devices(), "", *_weights_and_caches(), "", *_missing()]) + "\n"


def _broken_torch(error: BaseException) -> list[str]:
    cause = "" if error.__cause__ is None else f" ({error.__cause__})"
    lines = ["Devices", f"  torch can't be imported: {error}{cause}"]
    if importlib.util.find_spec("torch_npu") is not None:
        lines.append(
            "  torch imports torch_npu, which needs CANN: install it, and `source set_env.sh` in its folder, or pip "
            "uninstall torch_npu (TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from it, but not transformers)"
        )
    return lines


def versions() -> dict[str, str | None]:
    """Version of every package that this one is built on; none of one that is missing."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _versions() -> list[str]:
    lines = [f"Python {platform.python_version()} on {platform.platform()}"]
    for package, version in versions().items():
        if version is None:
            lines.append(f"  {package:18} MISSING: make setup")
            continue
        bad = is_compromised(package, version)
        lines.append(f"  {package:18} {version}{'  COMPROMISED RELEASE: upgrade at once' if bad else ''}")
    return lines


def _devices() -> list[str]:
    import torch

    memory = ""
    if hasattr(os, "sysconf"):
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [
        f"Devices\n  cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {capability}{memory}"
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"  cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("  cuda: none visible to torch (driver, or CUDA_VISIBLE_DEVICES)")
    return [*lines, *_npus()]


def _npus() -> list[str]:
    try:
        from illume_lightning.lit import npu

        module, number = npu.load(), npu.count()
    except (ImportError, ValueError) as error:
        return [f"  npu: none; {error}"]
    found = [module.get_device_properties(index) for index in range(number)]
    return [
        f"  npu:{i}: {device.name}, {device.total_memory / 2**30:.0f} GiB" for i, device in enumerate(found)
    ]


def _weights_and_caches() -> list[str]:
    import torch

    vgg = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    lpips = (
        str(vgg)
        if vgg.is_file()
        else (
            f"not at {vgg}: torchvision downloads it; or give Perceptual.backbone_weights, or train with "
            "--model.loss.perceptual_weight 0 --model.perceptual null"
        )
    )
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return [
        "Weights and disk",
        f"  LPIPS backbone (VGG16): {lpips}",
        f"  Hugging Face cache: {os.environ.get('HF_HOME', '~/.cache/huggingface')}",
        f"  free disk here: {free:.0f} GiB",
    ]


def _missing() -> list[str]:
    lines = ["Optional parts"]
    for module, (purpose, remedy) in OPTIONAL.items():
        present = importlib.util.find_spec(module) is not None
        lines.append(f"  {module:18} {'present' if present else f'missing ({purpose}): {remedy}'}")
    for tool, purpose in (("npm", "illume prepare emoji"), ("gcc", "torch.compile")):
        lines.append(f"  {tool:18} {'present' if shutil.which(tool) else f'missing ({purpose})'}")
    return lines
