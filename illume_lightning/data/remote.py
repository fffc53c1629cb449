"""Stores in S3, in Google Cloud Storage or on any server that speaks S3's protocol.

The small files of a store are fetched when it is opened, its chunks when one of their records is read or soon
will be. They lie in a folder of this machine that all its processes share, so that every chunk is fetched once
for all of them; those that were used least recently make room for others. A chunk counts once its sha256 is the
manifest's.
"""

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import SystemRandom
from tempfile import NamedTemporaryFile
from typing import IO, Any

log = logging.getLogger(__name__)

_GOOGLE = "https://storage.googleapis.com"
_ENDPOINTS = {"s3": None, "gs": _GOOGLE}  # the first one: AWS, or what AWS_ENDPOINT_URL says
_BLOCK_BYTES = 2**20
_TIMEOUT = 60  # seconds without a byte
_WAIT = 1.0  # seconds before the second try; twice as many before each further one
_BUSY = 60  # seconds; a chunk that was used so recently is still in use
_SCRATCH = ".part"
_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to credentials that may read the bucket "
    "(for gs:// an HMAC key)"
)


class _Again(Exception):
    """A failure that may be over soon."""


@dataclass(frozen=True)
class Remote:
    """How stores that are not on this machine are read."""

    cache_folder: str | None = None
    """Folder on a local disk for what is fetched; by default the environment's ILLUME_CACHE, or ~/.cache/illume."""

    cache_gigabytes: float = 50.0
    """Most GB (10^9 bytes) of chunks in it, of all stores and processes together; more only while that many are
    being read at once."""

    tries: int = 5
    """How often a file is asked for until the run ends with an error."""

    def __post_init__(self) -> None:
        if not self.cache_gigabytes > 0:
            raise ValueError(f"remote.cache_gigabytes is {self.cache_gigabytes}; it must be positive")
        if self.tries < 1:
            raise ValueError(f"remote.tries is {self.tries}; it must be at least 1")

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        default = os.environ.get("ILLUME_CACHE", "~/.cache/illume")
        return Path(self.cache_folder or default).expanduser()

    @property
    def num_bytes(self) -> int:
        """Most bytes of chunks."""
        return int(self.cache_gigabytes * 10**9)


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address.

    Raises:
        ValueError: If it is one that cannot be read.
    """
    scheme, separator, rest = str(path).partition("://")
    if not separator:
        return False
    if scheme not in _ENDPOINTS or not rest.partition("/")[0]:
        known = " or ".join(f"{name}://BUCKET/FOLDER" for name in _ENDPOINTS)
        raise ValueError(
            f"{path} cannot be read; give {known}, or a folder of this machine (mounted or copied)"
        )
    return True


@dataclass(frozen=True)
class RemoteFile:
    """A file far away and the place of its copy; picklable, so that any process can fetch it.

    Args:
        url: Where it is, such as "s3://bucket/store/index.json".
        path: Where the copy belongs.
        remote: How it is read.
        num_bytes: Its size; 0 if it is not known, for a small file that stays.
        sha256: Of its content; "" if it is not known.
    """

    url: str
    path: Path
    remote: Remote
    num_bytes: int = 0
    sha256: str = ""

    def fetch(self, *, ahead: bool = False) -> None:
        """Make the copy, unless it is there; one process does it, others wait for it.

        Args:
            ahead: It is not needed yet: leave it if the cache has no room for it and for another one.

        Raises:
            FileNotFoundError: If there is no such bucket or file.
            PermissionError: If credentials are missing or refused.
            ConnectionError: If all tries failed.
            ValueError: If the content is not what the manifest says.
        """
        scratch = self.path.with_name(self.path.name + _SCRATCH)
        while not self.path.exists():
            scratch.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT, 0o644)
            # The unfinished copy is its own lock.
            with os.fdopen(descriptor, "r+b") as file, _locked(file, fcntl.LOCK_EX):
                if not _is_at(file, scratch):
                    continue
                try:
                    if self.path.exists():
                        return
                    if not self._make_room(file, spare=self.num_bytes if ahead else 0) and ahead:
                        return
                    _download(self.url, file, self.remote.tries, self.num_bytes, self.sha256)
                    os.replace(scratch, self.path)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    raise OSError(
                        error.errno,
                        f"no space left in {self.remote.folder} for {self.url}; set remote.cache_folder to a larger "
                        "disk, or remote.cache_gigabytes lower",
                    ) from error
                finally:
                    scratch.unlink(missing_ok=True)  # nobody else's: whoever finds the copy writes none

    @contextmanager
    def held(self) -> Iterator[None]:
        """Fetch the file and keep it from being removed while it is read."""
        while True:
            with self._open() as file, _locked(file, fcntl.LOCK_SH):
                if _is_at(file, self.path):
                    os.utime(file.fileno())
                    yield
                    return

    def _open(self) -> IO[bytes]:
        while True:
            self.fetch()
            with suppress(FileNotFoundError):
                return self.path.open("r+b")

    def _make_room(self, file: IO[bytes], spare: int) -> bool:
        """Reserve the bytes of this file, removing what was used least recently.

        Returns:
            Whether they and the spare ones fit; they may not where all else is being read.
        """
        if not self.num_bytes:
            return True
        with (self.remote.folder / "lock").open("w") as lock, _locked(lock, fcntl.LOCK_EX):
            file.truncate(self.num_bytes)
            stored = list(_cached_chunks(self.remote.folder))
            room = self.remote.num_bytes - sum(size for _, size, _ in stored)
            for used, size, path in sorted(stored):
                if room < spare and _remove(path):
                    room += size
                    if time.time() - used < _BUSY:
                        _warn_of_small_cache(self.remote)
        return room >= spare


def _cached_chunks(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of last use, size and path of all chunks, those that are being fetched included."""
    for path in folder.glob("*/chunk-*"):
        with suppress(FileNotFoundError):
            status = path.stat()
            yield status.st_mtime, status.st_size, path


def _remove(path: Path) -> bool:
    """Remove a chunk unless a process reads or fetches it."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
    return True


@contextmanager
def _locked(file: IO[Any], kind: int) -> Iterator[None]:
    """Hold a lock on a file; let go of it even if a process that was forked meanwhile has the file open too."""
    fcntl.flock(file, kind)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether a file that was opened at a path is still there."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@lru_cache
def _warn_of_small_cache(remote: Remote) -> None:
    log.warning(
        "the cache %s of %g GB is too small for what is read at once: chunks are fetched again and again; set "
        "remote.cache_gigabytes higher or shuffle_window lower",
        remote.folder,
        remote.cache_gigabytes,
    )


def copy_manifest(url: str, name: str, remote: Remote) -> Path:
    """Fetch a store's manifest, always anew; returns the folder for copies of the store, with the manifest in it.

    Args:
        url: Of the store.
        name: Of the manifest.
        remote: How it is read.

    Raises:
        FileNotFoundError: If there is no store.
        PermissionError: If credentials are missing or refused.
        ConnectionError: If all tries failed.
    """
    remote.folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=remote.folder, prefix=name, delete=False) as file:
        scratch = Path(file.name)
        try:
            _download(f"{url}/{name}", file, remote.tries)
            # Another manifest is another store: what was copied of the one before is not mixed with it.
            digest = hashlib.sha256(url.encode() + b"\n" + scratch.read_bytes()).hexdigest()
            folder = remote.folder / digest[:24]
            folder.mkdir(exist_ok=True)
            os.replace(scratch, folder / name)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"there is no store at {url} ({error}); name the folder that has {name}, or upload it"
            ) from error
        finally:
            scratch.unlink(missing_ok=True)
    return folder


def _download(url: str, file: IO[bytes], tries: int, num_bytes: int = 0, sha256: str = "") -> None:
    """Write the content of a URL to a file; failures that may be over soon are tried again."""
    for count in range(1, tries + 1):
        try:
            file.seek(0)
            _download_once(url, file, num_bytes, sha256)
            return
        except _Again as error:
            if count == tries:
                raise ConnectionError(
                    f"{url} could not be read in {tries} tries (remote.tries): {error}; check the network and the "
                    "endpoint, or name a copy of the store on this machine"
                ) from error
            wait = _WAIT * 2 ** (count - 1) * SystemRandom().uniform(0.5, 1)
            log.warning("%s could not be read (%s); trying again in %.1f s", url, error, wait)
            time.sleep(wait)


def _download_once(url: str, file: IO[bytes], num_bytes: int, sha256: str) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    digest, count = hashlib.sha256(), 0
    try:
        answer = _client(scheme, os.getpid()).get_object(Bucket=bucket, Key=key)
        with closing(answer["Body"]) as body:
            for block in body.iter_chunks(_BLOCK_BYTES):
                file.write(block)
                digest.update(block)
                count += len(block)
    except ClientError as error:
        raise _explained(url, error.response) from error
    except BotoCoreError as error:
        raise _of_botocore(url, error) from error
    if count != answer["ContentLength"]:
        raise _Again(f"{count} of {answer['ContentLength']} bytes came")
    if sha256 and (count, digest.hexdigest()) != (num_bytes, sha256):
        raise ValueError(f"{url} is not the chunk of the manifest (sha256); upload the store again")
    file.truncate(count)
    file.flush()


@lru_cache(maxsize=4)
def _client(scheme: str, process: int) -> Any:
    """A client of this process: a forked one must not share its parent's connections."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=10,
        read_timeout=_TIMEOUT,
        retries={"total_max_attempts": 1},  # we try again ourselves, and say so
        max_pool_connections=16,
        # Other servers than AWS often have no checksums of this kind; chunks have a sha256.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.Session().client("s3", endpoint_url=_ENDPOINTS[scheme], config=config)


def _explained(url: str, response: dict[str, Any]) -> Exception:
    """The error for an answer that is no success."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if status >= 500 or status in (408, 429) or code in ("SlowDown", "RequestTimeout"):
        return _Again(f"{status} {code}")
    if status == 404:
        what = "the bucket does not exist" if code == "NoSuchBucket" else "the file does not exist"
        return FileNotFoundError(f"{url}: {what}")
    if status in (401, 403) or "Token" in code:
        return PermissionError(f"{url} is not there or may not be read ({status} {code}): {_CREDENTIALS}")
    return OSError(
        f"{url} could not be read ({status} {code}); check the address, the endpoint and the region"
    )


def _of_botocore(url: str, error: Exception) -> Exception:
    """The error for a request that got no complete answer."""
    from botocore import exceptions

    if isinstance(
        error, (exceptions.HTTPClientError, exceptions.IncompleteReadError, exceptions.ConnectionError)
    ):
        return _Again(f"{error}")
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return PermissionError(f"{url} cannot be read without credentials: {_CREDENTIALS}")
    return OSError(f"{url} could not be read ({error}); check the address, the credentials and the endpoint")
