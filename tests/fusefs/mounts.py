"""Mounts in processes of their own, and the datastores they show."""

import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from datastore.codec import ChunkCodec, CryptKey
from datastore.crypt_mode import CryptMode
from datastore.manifest import Manifest, ManifestFile
from datastore.names import ROOT, Group, Namespace, Snapshot
from repository.interface import BackupSession, Repository
from tests.pxar.archives import archived, item
from tests.support.cache import ROOT as CHECKOUT

MIB = 1 << 20
CHUNK = 4 * MIB
#: Seconds after which a mount that a test hangs on is killed; what hung then fails.
WATCHDOG_S = 120.0
KEY = CryptKey.from_raw(bytes(range(32)))


def random_bytes(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


#: 6 chunks: data, zeros, data, zeros, data, and a short one.
IMAGE = b"".join(
    [
        random_bytes(CHUNK, 1),
        bytes(CHUNK),
        random_bytes(CHUNK, 2),
        bytes(CHUNK),
        random_bytes(CHUNK, 3),
        random_bytes(MIB, 4) + b"the end",
    ]
)
#: 512-byte blocks of its chunks that are not zeros.
IMAGE_BLOCKS = -(-(len(IMAGE) - 2 * CHUNK) // 512)
#: 2026-01-01T00:00:00Z and a day later.
FIRST, SECOND = 1_767_225_600, 1_767_312_000
#: A self-contained file archive: a folder with a file in it.
ARCHIVE = archived(
    item(0o40755, children={b"etc": item(0o40700, children={b"hosts": item(0o100644, content=b"::1 localhost\n")})}),
    split=False,
)[0]
CONF = b"name: guest\nmemory: 512\n" * 40


async def put(session: BackupSession, codec: ChunkCodec, name: str, data: bytes) -> ManifestFile:
    """Store one file of a snapshot: an image, a stream of one chunk, or a small file."""
    if name.endswith(".blob"):
        blob = codec.encode_blob(data)
        await session.put_blob(name, blob)
        return ManifestFile(name, codec.mode, len(blob), sha256(bytes(blob)).digest())
    fixed = name.endswith(".fidx")
    pieces = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    digests = codec.digest_many(pieces)
    writer = await session.open_index(name, size=len(data)) if fixed else await session.open_index(name)
    entries, ends = [], b""
    for number, (piece, digest) in enumerate(zip(pieces, digests, strict=True)):
        if not session.knows(digest):
            await session.put_chunk(writer, digest, len(piece), codec.encode(piece))
        entries.append((number * CHUNK, digest))
        ends += (number * CHUNK + len(piece)).to_bytes(8, "little") + digest
    await session.append(writer, entries)
    csum = sha256(b"".join(digests) if fixed else ends).digest()
    await session.close_index(writer, len(digests), len(data), csum)
    return ManifestFile(name, codec.mode, len(data), csum)


async def write(
    repo: Repository,
    group: str,
    ctime: int,
    files: Mapping[str, bytes],
    *,
    ns: Namespace = ROOT,
    key: CryptKey | None = None,
) -> Snapshot:
    """One finished snapshot; with `key` an encrypted one."""
    codec = ChunkCodec(key, CryptMode.ENCRYPT) if key is not None else ChunkCodec()
    snapshot = Group.parse(group, ns).at(ctime)
    async with repo.backup(snapshot) as session:
        manifest = Manifest.new(snapshot)
        for name, data in files.items():
            manifest.add(await put(session, codec, name, data))
        await session.put_blob("index.json.blob", manifest.encode(codec))
        await session.finish()
    return snapshot


def chunk_path(store: Path, data: bytes) -> Path:
    """Where the datastore keeps the plain chunk `data`."""
    name = ChunkCodec().digest(data).hex()
    return store / ".chunks" / name[:4] / name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_direct(path: Path, offset: int, length: int) -> bytes:
    """Read past the kernel's cache, so that the mount is asked."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)


@dataclass
class Mounted:
    """A mount that is usable."""

    path: Path
    process: subprocess.Popen[bytes]
    log_path: Path
    killed: list[str] = field(default_factory=list)

    def log(self) -> list[str]:
        return self.log_path.read_text().splitlines()

    def errors(self) -> list[str]:
        return [line for line in self.log() if not line.startswith("INFO ")]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


def is_mounted(path: Path) -> bool:
    return any(line.split(" ")[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def command(store: Path, mountpoint: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "tests.fusefs.serving", str(store), str(mountpoint), *options]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHECKOUT)}


def run(store: Path, mountpoint: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(store, mountpoint, *options), capture_output=True, timeout=60, cwd=CHECKOUT, env=ENVIRONMENT, text=True
    )


def error_of(call: Callable[[], object]) -> int | None:
    """The number of the error that `call` ends with, None if it has none."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None


@contextmanager
def mounted(store: Path, mountpoint: Path, *options: str) -> Iterator[Mounted]:
    """Mount `store` while the block runs; whatever happens, nothing stays mounted and no process stays."""
    mountpoint.mkdir(exist_ok=True)
    log_path = mountpoint.with_name(mountpoint.name + ".log")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command(store, mountpoint, *options), stdout=subprocess.PIPE, stderr=log, cwd=CHECKOUT, env=ENVIRONMENT
        )
    mount = Mounted(mountpoint, process, log_path)

    def kill() -> None:
        mount.killed.append("the mount hung and was killed")
        process.kill()

    watchdog = threading.Timer(WATCHDOG_S, kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], 30)
        assert ready, "the mount does not get ready"
        assert process.stdout.readline() == b"ready\n", log_path.read_text()
        yield mount
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            mount.killed.append("the mount did not end")
            process.kill()
            process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
        if is_mounted(mountpoint):
            mount.killed.append("the mount stayed")
            subprocess.run(["umount", "-l", str(mountpoint)], check=True, timeout=60)
    assert mount.killed == []
