"""Stores in a bucket: the batches of the local store, each chunk fetched once, and errors that say what to do."""

import fcntl
import logging
import os
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from illume_lightning.data import remote
from illume_lightning.data.ahead import look_ahead
from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.loader import (
    BatchLoader,
    ImageBatch,
    PlanBatches,
    PlanLoader,
    PlannedImages,
    TargetSize,
    deal_batches,
    evaluation_items,
)
from illume_lightning.data.plan import DatasetSource, Phase, Plan
from illume_lightning.data.remote import Remote
from illume_lightning.data.store import ImageStore
from illume_lightning.data.text_tokenizer import train_tokenizer
from illume_lightning.data.worlds import prepare_shapes, shapes_conversations
from illume_lightning.lit.datamodule import ImageDataModule

server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
boto3 = pytest.importorskip("boto3")
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app  # noqa: E402
from werkzeug.serving import WSGIRequestHandler, make_server  # noqa: E402

BUCKET = "pictures"
NUM_CHUNKS = 12


class Bucket:
    """A server that speaks S3's protocol, notes what is asked for, and fails as it is told to."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self.asked: list[str] = []
        self.fault: Callable[[str], str | None] = lambda path: None
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "GET":
            self.asked.append(path.rsplit("/", 1)[-1])
        fault = self.fault(path)
        if fault == "busy":
            start_response("503 Slow Down", [("Content-Type", "text/xml")])
            return [b"<Error><Code>SlowDown</Code></Error>"]
        if fault == "denied":
            start_response("403 Forbidden", [("Content-Type", "text/xml")])
            return [b"<Error><Code>AccessDenied</Code></Error>"]
        answer = self._app(environ, start_response)
        if fault == "cut":
            body = b"".join(answer)
            return [body[: len(body) // 2]]
        if fault == "changed":
            body = bytearray(b"".join(answer))
            body[len(body) // 2] ^= 1
            return [bytes(body)]
        return answer

    def upload(self, folder: Path, name: str) -> str:
        """Put a store into the bucket; returns its address."""
        client = boto3.Session().client("s3", endpoint_url=self.url)
        for path in folder.iterdir():
            client.put_object(Bucket=BUCKET, Key=f"{name}/{path.name}", Body=path.read_bytes())
        return f"s3://{BUCKET}/{name}"

    @property
    def chunks(self) -> Counter[str]:
        """How often each chunk was asked for."""
        return Counter(name for name in self.asked if name.startswith("chunk-"))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    bucket = Bucket()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.Session().client("s3", endpoint_url=bucket.url).create_bucket(Bucket=BUCKET)
        yield bucket
    bucket.close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 48 pictures in 12 chunks."""
    folder = tmp_path_factory.mktemp("local") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_shapes, "_PART_ITEMS", 4)
        prepare_shapes.prepare_shapes(folder, count=48, sizes=((64, 64), (48, 96)))
    return folder


@pytest.fixture(scope="module")
def address(server: Bucket, local: Path) -> str:
    return server.upload(local, "deep/store")


@pytest.fixture
def bucket(server: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The server as this process's only one, with nothing asked for yet."""
    server.asked.clear()
    server.fault = lambda path: None
    settings = {
        "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_EC2_METADATA_DISABLED": "true",
        "ILLUME_CACHE": str(tmp_path / "default-cache"), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setattr(remote, "_WAIT", 0.01)
    remote._client.cache_clear()
    remote._warn_of_small_cache.cache_clear()
    return server


@pytest.fixture
def cache(tmp_path: Path) -> Remote:
    return Remote(str(tmp_path / "cache"))


def training_batches(
    store: ImageStore, rank: int = 0, world_size: int = 1, num_workers: int = 0, first_step: int = 0
) -> list[ImageBatch]:
    """All batches of a device; the run is one pass over squares, then two over all shapes."""
    phases = [Phase(6, "fixed", 64, 8, 4), Phase(18, "multi_ratio", 64, 8, 4)]
    plan = Plan(phases, [DatasetSource("shapes", store.sizes, store.chunk_ids)], shuffle_window=16)
    loader = PlanLoader(
        PlannedImages([store], horizontal_flip=0.5),
        PlanBatches(plan, rank, world_size),
        lambda: 0,
        store.manifest.fingerprint,
        num_workers=num_workers,
    )
    loader.load_state_dict({"step": first_step})
    return [copied(batch) for batch in loader]


def assert_nothing_is_left(cache: Path) -> None:
    """Threads that fetch ahead may still be at it: they end, and leave no unfinished copy."""
    end = time.monotonic() + 20
    while unfinished := list(cache.glob("*/*.part")):
        assert time.monotonic() < end, unfinished
        time.sleep(0.01)


def copied(batch: ImageBatch) -> ImageBatch:
    """Its pictures lie in a slot that is written again."""
    return batch._replace(images=batch.images.clone())


def assert_equal(some: list[ImageBatch], others: list[ImageBatch]) -> None:
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        for value, expected in zip(one, other, strict=True):
            assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_are_the_local_ones(
    num_workers: int, bucket: Bucket, address: str, local: Path, cache: Remote
) -> None:
    store = ImageStore(address, cache)
    assert sorted(bucket.asked) == ["checks.npy", "index.json", "manifest.json", "sizes.npy"]
    assert_equal(training_batches(store, num_workers=num_workers), training_batches(ImageStore(local)))
    assert bucket.chunks == {chunk.filename: 1 for chunk in store.manifest.chunks}
    # Another run finds all but the manifest on this machine, wherever it begins.
    bucket.asked.clear()
    again = ImageStore(address, cache)
    expected = training_batches(ImageStore(local), first_step=7)
    assert_equal(training_batches(again, num_workers=num_workers, first_step=7), expected)
    assert bucket.asked == ["manifest.json"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_devices_share_what_is_fetched(
    num_workers: int, bucket: Bucket, address: str, local: Path, cache: Remote
) -> None:
    for rank in range(2):
        store = ImageStore(address, cache)
        batches = training_batches(store, rank, 2, num_workers)
        assert_equal(batches, training_batches(ImageStore(local), rank, 2))
    assert set(bucket.chunks.values()) == {1} and len(bucket.chunks) == NUM_CHUNKS


def test_evaluation_batches_are_the_local_ones(bucket: Bucket, address: str, local: Path) -> None:
    batches = []
    for path in (address, str(local)):
        data = ImageDataModule(val={"shapes": path}, val_sizes=[64], val_any_resolution=64, num_workers=0)
        data.setup("validate")
        batches.append([batch for loader in data.val_dataloader() for batch in loader])
    assert_equal(*batches)
    assert set(bucket.chunks.values()) == {1} and len(bucket.chunks) == NUM_CHUNKS
    assert list(Path(os.environ["ILLUME_CACHE"]).glob("*/chunk-*"))


def test_any_cache_gives_the_same_batches_within_its_bound(
    bucket: Bucket, address: str, local: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    largest = max(path.stat().st_size for path in local.glob("chunk-*"))
    small = Remote(str(tmp_path / "small"), cache_gigabytes=2.5 * largest / 10**9)
    store, expected = ImageStore(address, small), training_batches(ImageStore(local))
    sizes = []
    fetch = remote._download

    def measured(*arguments: Any) -> None:
        fetch(*arguments)
        # Room is made under this lock; without it chunks would come and go, by other threads, while they are counted.
        with (small.folder / "lock").open("w") as lock, remote._locked(lock, fcntl.LOCK_EX):
            chunks = {
                path.stem.partition(".")[0]: size for _, size, path in remote._cached_chunks(small.folder)
            }
        sizes.append(sum(chunks.values()))

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(remote, "_download", measured)
        assert_equal(training_batches(store), expected)
    assert len(sizes) > NUM_CHUNKS
    assert max(sizes) <= small.num_bytes
    assert caplog.text.count("remote.cache_gigabytes higher") == 1
    assert_nothing_is_left(small.folder)
    assert_equal(training_batches(store, num_workers=2), expected)
    with pytest.raises(ValueError, match=r"remote.cache_gigabytes is 1e-06, .* at least two"):
        ImageStore(address, Remote(str(tmp_path / "small"), cache_gigabytes=1e-6))


def test_what_was_used_last_stays(bucket: Bucket, address: str, local: Path, tmp_path: Path) -> None:
    sizes = [chunk.num_bytes for chunk in ImageStore(local).manifest.chunks]
    store = ImageStore(address, Remote(str(tmp_path / "c"), cache_gigabytes=3.2 * max(sizes) / 10**9))
    for number, age in ((0, 300), (1, 200), (2, 100)):
        store.read(4 * number)
        path = store.remote_chunk(4 * number).path
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    store.read(1)  # of chunk 0
    for number in (3, 0, 2):
        store.read(4 * number)
    names = [chunk.filename for chunk in store.manifest.chunks]
    assert bucket.chunks == {names[number]: 1 for number in range(4)}
    assert not store.remote_chunk(4).path.exists()  # chunk 1 had to go


def test_chunks_are_asked_for_before_they_are_read(
    bucket: Bucket, address: str, local: Path, cache: Remote
) -> None:
    store = ImageStore(address, cache)
    items = evaluation_items(store.sizes, TargetSize("fixed", 64))
    batches = deal_batches(items, 4, 0, 1)
    ahead = list(look_ahead(PlannedImages([store]), batches))
    assert [items for items, _ in ahead] == batches
    order = [file.path.name for _, files in ahead for file in files]
    assert order == [chunk.filename for chunk in store.manifest.chunks]  # as they are read
    assert len(ahead[0][1]) == NUM_CHUNKS  # the cache has room for all
    small = Remote(
        cache.cache_folder, cache_gigabytes=6 * max(c.num_bytes for c in store.manifest.chunks) / 10**9
    )
    ahead = list(look_ahead(PlannedImages([ImageStore(address, small)]), batches))
    counts = [len(files) for _, files in ahead]
    assert 3 <= counts[0] <= 5 and sum(counts) == NUM_CHUNKS
    seen = np.cumsum(counts)
    assert all(seen[number] > number for number in range(NUM_CHUNKS))
    assert [files for _, files in look_ahead(PlannedImages([ImageStore(local)]), batches)] == [
        ()
    ] * NUM_CHUNKS
    assert not bucket.chunks


@pytest.mark.parametrize("num_workers", [0, 1])
def test_chunks_come_while_others_are_read(
    num_workers: int, bucket: Bucket, address: str, cache: Remote
) -> None:
    store = ImageStore(address, cache)
    batches = deal_batches(evaluation_items(store.sizes, TargetSize("fixed", 64)), 4, 0, 1)
    loader = iter(BatchLoader(PlannedImages([store]), batches, 3 * 4 * 64**2, num_workers, prefetch=1))
    next(loader)
    deadline = time.monotonic() + 20
    while len(list(store.path.glob("chunk-*.bin"))) < NUM_CHUNKS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(list(loader)) == NUM_CHUNKS - 1
    assert set(bucket.chunks.values()) == {1}


def test_processes_that_need_a_chunk_at_once_fetch_it_once(
    bucket: Bucket, address: str, cache: Remote
) -> None:
    store = ImageStore(address, cache)
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            try:
                records = [store.read(index) for index in range(number, 24, 4)]
                os._exit(len(records) != 6)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert set(bucket.chunks.values()) == {1} and len(bucket.chunks) == 6


@pytest.mark.parametrize("fault", ["busy", "cut"])
def test_a_short_failure_is_tried_again(
    fault: str, bucket: Bucket, address: str, local: Path, cache: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    store = ImageStore(address, cache)
    name = store.manifest.chunks[5].filename
    bucket.fault = lambda path: fault if path.endswith(name) and bucket.chunks[name] < 3 else None
    with caplog.at_level(logging.WARNING):
        assert store.read(21) == ImageStore(local).read(21)
    assert bucket.chunks == {name: 3}
    assert caplog.text.count(f"{address}/{name} could not be read") == caplog.text.count("trying again") == 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_long_failure_ends_the_run(num_workers: int, bucket: Bucket, address: str, tmp_path: Path) -> None:
    store = ImageStore(address, Remote(str(tmp_path / "cache"), tries=3))
    name = store.manifest.chunks[5].filename
    bucket.fault = lambda path: "cut" if path.endswith(name) else None
    message = rf"^{address}/{name} could not be read in 3 tries \(remote.tries\): .*; check the"
    with pytest.raises(ConnectionError, match=message) as caught:
        training_batches(store, num_workers=num_workers)
    assert "\n" not in str(caught.value)
    bucket.fault = lambda path: None
    assert len(training_batches(store, num_workers=num_workers)) == 36
    if (
        num_workers == 0
    ):  # a worker that was killed leaves its unfinished copy to whoever reads that chunk next
        assert_nothing_is_left(tmp_path / "cache")


def test_no_network(bucket: Bucket, address: str, cache: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")  # nobody listens
    remote._client.cache_clear()
    with pytest.raises(
        ConnectionError, match=rf"{address}/manifest.json could not be read in 5 tries.*endpoint"
    ):
        ImageStore(address, cache)


def test_a_damaged_chunk_is_refused(bucket: Bucket, address: str, cache: Remote) -> None:
    store = ImageStore(address, cache)
    bucket.fault = lambda path: "changed" if "chunk-" in path else None
    with pytest.raises(
        ValueError, match=r"chunk-000000-000.bin is not the chunk of the manifest \(sha256\); upload"
    ):
        store.read(0)
    bucket.fault = lambda path: None
    store.read(0)
    store.verify()
    assert len(bucket.chunks) == NUM_CHUNKS


def test_missing_things_are_named_in_one_line(
    bucket: Bucket, address: str, cache: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(url: str, kind: type[Exception]) -> str:
        with pytest.raises(kind) as caught:
            ImageStore(url, cache)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nowhere/x (s3://nowhere/x/manifest.json: the bucket does not exist)" in message(
        "s3://nowhere/x", FileNotFoundError
    )
    line = message(f"s3://{BUCKET}/deep", FileNotFoundError)
    assert "there is no store at s3://pictures/deep" in line and "the file does not exist" in line
    for url in ("az://pictures/store", "s3://", "https://host/store"):
        assert "s3://BUCKET/FOLDER or gs://BUCKET/FOLDER" in message(url, ValueError)
    bucket.fault = lambda path: "denied"
    assert "403 AccessDenied" in message(address, PermissionError)
    bucket.asked.clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    remote._client.cache_clear()
    line = message(address, PermissionError)
    assert f"{address}/manifest.json cannot be read without credentials: set AWS_ACCESS_KEY_ID" in line
    assert not bucket.asked
    for options in ({"cache_gigabytes": 0}, {"cache_gigabytes": float("nan")}, {"tries": 0}):
        with pytest.raises(ValueError, match=rf"remote.{next(iter(options))} is"):
            Remote(**options)
    assert not [path for path in Path(cache.folder).rglob("*") if path.is_file()]


def test_google_cloud_storage(
    bucket: Bucket, address: str, local: Path, cache: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert remote._ENDPOINTS["gs"] == "https://storage.googleapis.com"
    monkeypatch.setitem(remote._ENDPOINTS, "gs", bucket.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # is S3's alone
    remote._client.cache_clear()
    store = ImageStore(address.replace("s3://", "gs://"), cache)
    assert store.read(9) == ImageStore(local).read(9)


def test_another_store_at_the_same_address(
    bucket: Bucket, local: Path, cache: Remote, tmp_path: Path
) -> None:
    address = bucket.upload(local, "moving")
    first = ImageStore(address, cache)
    first.read(0)
    prepare_shapes.prepare_shapes(tmp_path / "new", count=6, seed=1, sizes=((48, 48),))
    bucket.upload(tmp_path / "new", "moving")
    second = ImageStore(f"{address}/", cache)
    assert (len(second), second.sizes.tolist()) == (6, [[48, 48]] * 6)
    assert second.read(0) == ImageStore(tmp_path / "new").read(0) != first.read(0)
    shutil.rmtree(first.path)
    with pytest.raises(ValueError, match="is not the chunk of the manifest"):
        first.read(0)


def test_conversations(bucket: Bucket, cache: Remote, tmp_path: Path) -> None:
    train_tokenizer(["a cat"], tmp_path / "text", 270)
    shapes_conversations.prepare_shapes_conversations(
        tmp_path / "talks", tokenizer=str(tmp_path / "text"), task="generation", count=5, sizes=((32, 32),)
    )
    local, far = (
        ConversationStore(tmp_path / "talks"),
        ConversationStore(bucket.upload(tmp_path / "talks", "talks")),
    )
    assert [far.read(number) for number in range(5)] == [local.read(number) for number in range(5)]
    for name in ("images", "num_text", "num_supervised", "first_image", "sizes", "chunk_ids"):
        assert np.array_equal(getattr(far, name), getattr(local, name))
    with pytest.raises(ValueError, match="s3://pictures/talks holds conversations where pictures"):
        ImageStore("s3://pictures/talks")
