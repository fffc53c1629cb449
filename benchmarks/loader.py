"""The training loader against raw decoding of the same JPEG bytes.

    python benchmarks/loader.py [--images 4000] [--passes 8] [--size 256] [--repeats 3]

Ours: pictures a second that the ImageDataModule's loader hands to the training process with 2 workers, batches of
16, no resizing. Raw: two processes that decode the same bytes with PIL in a loop and keep nothing. Both are timed
from a running start, in turns, in one run.
"""

import argparse
import io
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from illume_lightning.data.plan import Phase
from illume_lightning.data.prepare import prepare_images
from illume_lightning.lit.datamodule import ImageDataModule, Source

BATCH = 16


def write_jpegs(folder: Path, count: int, size: int) -> None:
    """Photograph-like pictures: crops of scikit-image's photographs, JPEG quality 90."""
    from skimage import data

    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    random = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        top, left = (int(random.integers(0, max(1, side - size))) for side in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + size, left : left + size]).resize((size, size))
        crop.save(folder / f"{number:05d}.jpg", quality=90)


def ours(store: Path, count: int, size: int) -> float:
    """Images a second over ``count`` of them, between batches; the first eighth only warms up."""
    steps = count // BATCH
    data = ImageDataModule(train=[Source(str(store))], val_sizes=[], num_workers=2, horizontal_flip=0.0)
    data.set_curriculum([Phase(steps, "fixed", size, BATCH, BATCH)])
    data.trainer = _NoTrainer()
    warm_up = steps // 8
    arrivals = []
    for batch in data.train_dataloader():
        assert batch.images.shape == (BATCH, 3, size, size)
        arrivals.append(time.perf_counter())
    return (steps - warm_up - 1) * BATCH / (arrivals[-1] - arrivals[warm_up])


class _NoTrainer:
    """One device, at the start of a run."""

    global_step = 0
    is_global_zero = False
    distributed_sampler_kwargs = None

    class strategy:
        root_device = torch.device("cpu")


def _decode(contents: list[bytes], passes: int, ready: multiprocessing.Barrier) -> None:
    ready.wait()
    for _ in range(passes):
        for content in contents:
            np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def raw(contents: list[bytes], passes: int) -> float:
    """Images a second of two processes together."""
    ready = multiprocessing.Barrier(3)
    halves = [contents[::2], contents[1::2]]
    workers = [multiprocessing.Process(target=_decode, args=(half, passes, ready)) for half in halves]
    for worker in workers:
        worker.start()
    ready.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return passes * len(contents) / (time.perf_counter() - start)


def main() -> None:
    """Measure in turns and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--passes", type=int, default=8, help="over the pictures, in each measurement")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    started_on = record.hardware()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pictures, store = Path(folder) / "pictures", Path(folder) / "store"
        pictures.mkdir()
        write_jpegs(pictures, args.images, args.size)
        prepare_images([str(pictures)], store)
        contents = [path.read_bytes() for path in sorted(pictures.iterdir())]
        rates: dict[str, list[float]] = {"ours": [], "raw decode": []}
        for _ in range(args.repeats):
            rates["raw decode"].append(raw(contents, args.passes))
            rates["ours"].append(ours(store, args.passes * args.images, args.size))
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    share = medians["ours"] / medians["raw decode"]
    rows = [["", "images/s"], *([name, f"{value:.0f}"] for name, value in medians.items())]
    print(record.table(rows))
    print(f"share of raw decoding: {share:.0%}")
    settings = {"images": args.images, "passes": args.passes, "size": args.size, "batch": BATCH, "workers": 2}
    results = {"settings": settings, "images_per_s": rates, "share_of_raw_decode": round(share, 3)}
    print(record.write("loader", results, started_on))


if __name__ == "__main__":
    main()
