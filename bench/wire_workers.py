"""The processes of `bench/wire.py`: servers, clients, and the bare loops of their limits.

    python bench/wire_workers.py WHAT ARGUMENT...

Servers print one line of JSON once they are ready, and end with SIGTERM; anything else prints seconds, CPU seconds and
memory when it is done.
"""

import json
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.limits import cpu_count  # noqa: E402

CHUNK: Final = 4 << 20
STORE: Final = "main"
ARCHIVE: Final = "drive-scsi0.img"
USER: Final = "root@pam!bench"
SMALL_CHUNK: Final = 64 << 10


def tls(folder: Path | None) -> ssl.SSLContext:
    if folder is not None:
        from server.certificate import own_certificate

        return own_certificate(folder).context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@asynccontextmanager
async def opened(where: str) -> AsyncIterator[Any]:
    """A local datastore by its folder, or one on a server by what `serve` says."""
    if not where.startswith("{"):
        from repository.local import open_local

        repository = await open_local(where)
        try:
            yield repository
        finally:
            repository.close()
        return
    from core.dial import TlsPin
    from repository.remote.address import RemoteAddress
    from repository.remote.opening import RemoteOptions, open_remote

    told = json.loads(where)

    class Secret:
        async def password(self, address: RemoteAddress) -> str | None:
            return str(told["secret"])

        async def second_factor(self, address: RemoteAddress) -> str | None:
            return None

    address = RemoteAddress.parse(f"{USER}@127.0.0.1:{told['port']}:{STORE}")
    async with open_remote(address, RemoteOptions(TlsPin.parse(told["fingerprint"]), secrets=Secret())) as remote:
        yield remote


async def serve(store: str, folder: str) -> None:
    import trio

    from repository.local import open_local
    from server.access.acl import AclEntry
    from server.access.auth_ids import AuthId
    from server.certificate import own_certificate
    from server.service import Service, Settings, listen
    from server.state import ServerState

    repository = await open_local(store, name=STORE)

    class Stores:
        def names(self) -> Sequence[str]:
            return [STORE]

        def place(self, name: str) -> object:
            return name

        @asynccontextmanager
        async def open(self, name: str) -> AsyncIterator[Any]:
            yield repository

    with tempfile.TemporaryDirectory(dir=folder) as state_folder:
        state = ServerState(Path(state_folder), Stores())
        secret = state.access.add_token(AuthId.parse(USER))
        state.access.set_right(AclEntry("/", USER, "Admin", True))
        found = own_certificate(Path(folder))
        service = Service(state, Settings(found, drain_s=0))
        listeners = await listen("127.0.0.1", 0)
        port = listeners[0].socket.getsockname()[1]
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run, listeners)
                url = json.dumps({"port": port, "fingerprint": found.fingerprint, "secret": secret})
                print(json.dumps({"url": url, "port": port}), flush=True)
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()


def bare_receive(folder: str, target: str) -> None:
    """Take chunks on a connection for each core: as the server does, without protocol, locks and indexes."""
    import zstandard
    from isal import isal_zlib

    from datastore import sha256

    Path(target).mkdir()
    context = tls(Path(folder))
    listener = socket.create_server(("127.0.0.1", 0))

    def fill(connection: ssl.SSLSocket, view: memoryview) -> bool:
        while view:
            got = connection.recv_into(view)
            if not got:
                return False
            view = view[got:]
        return True

    def work(accepted: socket.socket, name: int) -> None:
        connection = context.wrap_socket(accepted, server_side=True)
        decompressor = zstandard.ZstdDecompressor()
        rooms = [memoryview(bytearray(CHUNK + 4096)) for _ in range(16)]
        plain = [memoryview(bytearray(CHUNK)) for _ in range(16)]
        head = bytearray(4)
        number, more = 0, True
        while more:
            frames = []
            for room in rooms:
                if not (more := fill(connection, memoryview(head)) and any(head)):
                    break
                frame = room[: int.from_bytes(head, "little")]
                fill(connection, frame)
                frames.append(frame)
            chunks = []
            for frame, room in zip(frames, plain, strict=False):
                chunks.append(room[: decompressor.stream_reader(frame).readinto(room)])
            for frame, digest in zip(frames, sha256.digest_many(chunks), strict=True):
                out = os.open(f"{target}/{name}-{number}-{digest.hex()}", os.O_WRONLY | os.O_CREAT, 0o644)
                os.writev(out, [isal_zlib.crc32(frame).to_bytes(12, "little"), frame])
                os.close(out)
                number += 1
        connection.sendall(b"done")
        connection.close()

    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    for name in range(cpu_count()):
        threading.Thread(target=work, args=(listener.accept()[0], name), daemon=True).start()
    signal.pause()


def bare_send(image: str, port: str) -> None:
    import zstandard
    from isal import isal_zlib

    from bench.bare import Counter, buffers, in_threads
    from datastore import sha256

    size = Path(image).stat().st_size
    counter = Counter(-(-size // CHUNK), 16)

    def work() -> None:
        connection = tls(None).wrap_socket(socket.create_connection(("127.0.0.1", int(port))))
        fd = os.open(image, os.O_RDONLY)
        compressor = zstandard.ZstdCompressor(level=1)
        mine = buffers(16)
        while numbers := counter.take():
            chunks = mine[: len(numbers)]
            for number, chunk in zip(numbers, chunks, strict=True):
                os.preadv(fd, [chunk], number * CHUNK)
            sha256.digest_many(chunks)
            for chunk in chunks:
                frame = compressor.compress(chunk)
                isal_zlib.crc32(frame)
                connection.sendall(len(frame).to_bytes(4, "little"))
                connection.sendall(frame)
        os.close(fd)
        connection.sendall(bytes(4))
        connection.recv(4)

    in_threads(work)


def tls_receive(folder: str) -> None:
    context = tls(Path(folder))
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    connection = context.wrap_socket(listener.accept()[0], server_side=True)
    room = bytearray(256 << 10)
    while connection.recv_into(room):
        pass
    signal.pause()


def tls_send(size: str, port: str) -> None:
    connection = tls(None).wrap_socket(socket.create_connection(("127.0.0.1", int(port))))
    piece = os.urandom(1 << 20)
    for _ in range(int(size) >> 20):
        connection.sendall(piece)
    connection.close()


async def back_up(where: str, image: str, backup_id: str) -> float:
    import trio

    from datastore.codec import ChunkCodec
    from datastore.names import BackupType, Group
    from hypervisor.files import open_source
    from repository.backup import SnapshotWriter

    group = Group(BackupType.HOST, backup_id)
    async with opened(where) as repository, open_source(image, ARCHIVE) as source:
        latest = await repository.latest(group)
        if latest is not None:
            await trio.sleep(max(0.0, latest.ctime + 1 - time.time()))
        started = time.perf_counter()
        async with repository.backup(group.at(int(time.time()))) as session:
            writer = SnapshotWriter(session, ChunkCodec())
            await writer.add_disk(source)
            await writer.finish()
        return time.perf_counter() - started


async def clients(url: str, folder: str, count: str) -> float:
    """Backups of that many images at a time, each over a connection and in a session of its own."""
    import trio

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(int(count)):
            nursery.start_soon(back_up, url, f"{folder}/part{number}.raw", str(number))
    return time.perf_counter() - started


async def restore(where: str, target: str, backup_id: str) -> float:
    from datastore.codec import ChunkCodec
    from datastore.names import BackupType, Group
    from hypervisor.targets import open_target
    from repository.restore import load_manifest, restore_disk

    codec = ChunkCodec()
    async with opened(where) as repository:
        snapshot = await repository.latest(Group(BackupType.HOST, backup_id))
        started = time.perf_counter()
        async with repository.reader(snapshot) as reader:
            manifest = await load_manifest(reader, codec)
            name = f"{ARCHIVE}.fidx"
            async with open_target(target, manifest.file(name).size) as opened_target:
                await restore_disk(reader, codec, manifest, name, opened_target)
        return time.perf_counter() - started


async def sync(source: str, target: str, direction: str) -> float:
    from core.progress import Progress
    from repository.sync import Direction, SyncOptions
    from repository.sync import sync as run_sync

    async with opened(source) as here, opened(target) as there:
        started = time.perf_counter()
        report = await run_sync(here, there, SyncOptions(Direction(direction), "root@pam"), Progress())
        if report.failed or len(report.snapshots) != 1:
            raise SystemExit(f"the sync failed: {report.failed}")
        return time.perf_counter() - started


async def fill(store: str, ctime: str, chunks: str) -> float:
    """A snapshot of chunks that do not compress; from the second on, each hundredth is new."""
    import hashlib
    import random

    from datastore.codec import ChunkCodec
    from datastore.crypt_mode import CryptMode
    from datastore.manifest import Manifest, ManifestFile
    from datastore.names import BackupType, Group

    snapshot = Group(BackupType.HOST, "many").at(int(ctime) * 1000)
    codec = ChunkCodec()
    async with opened(store) as repository, repository.backup(snapshot) as session:
        writer = await session.open_index("root.pxar.didx")
        csum, end = hashlib.sha256(), 0
        for number in range(int(chunks)):
            seed = number if number % 100 else f"{number}-{ctime}"
            data = random.Random(seed).randbytes(SMALL_CHUNK)
            (digest,) = codec.digest_many([data])
            await session.put_chunk(writer, digest, len(data), codec.encode(data))
            await session.append(writer, [(end, digest)])
            end += len(data)
            csum.update(end.to_bytes(8, "little") + digest)
        await session.close_index(writer, int(chunks), end, csum.digest())
        manifest = Manifest.new(snapshot)
        manifest.add(ManifestFile("root.pxar.didx", CryptMode.NONE, end, csum.digest()))
        await session.put_blob("index.json.blob", manifest.encode(codec))
        await session.finish()
    return 0.0


def copy(store: str, target: str) -> float:
    """Every chunk's file, read and written by a copy; finding them is no part of it."""
    paths = [path for folder in (Path(store) / ".chunks").iterdir() if folder.is_dir() for path in folder.iterdir()]
    Path(target).mkdir()
    started = time.perf_counter()
    for path in paths:
        shutil.copyfile(path, f"{target}/{path.name}")
    return time.perf_counter() - started


async def create(store: str) -> float:
    from datastore.store import Datastore

    (await Datastore.create(Path(store))).close()
    return 0.0


def worker(what: str, arguments: Sequence[str]) -> None:
    import resource
    from functools import partial

    import trio

    blocking: dict[str, Callable[..., Any]] = {
        "bare-receive": bare_receive, "bare-send": bare_send, "tls-receive": tls_receive, "tls-send": tls_send,
        "copy": copy,
    }  # fmt: skip
    running: dict[str, Callable[..., Any]] = {
        "serve": serve, "create": create, "fill": fill, "backup": back_up, "restore": restore,
        "push": partial(sync, direction="push"), "pull": partial(sync, direction="pull"), "clients": clients,
    }  # fmt: skip
    if what in ("bare-send", "backup", "clients", "restore"):
        from datastore import sha256

        sha256.digest_many([b"", b""])  # the choice of an implementation is no part of the work
    started, cpu = time.perf_counter(), time.process_time()
    seconds = blocking[what](*arguments) if what in blocking else trio.run(partial(running[what], *arguments))
    if seconds is None:
        seconds = time.perf_counter() - started
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    if what != "serve":
        print(json.dumps({"seconds": seconds, "cpu": time.process_time() - cpu, "rss-mib": rss}))


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2:])
