"""A backup to a server, a restore from it and syncs with it, over TLS on the loopback interface, against their limits.

    python bench/wire.py [--size 1GiB] [--rounds 3] [--chunks 10000] [--clients 32] [--phases NAME,...] [--output FORM]

Server and client are processes of their own, so that both cores have work, as have two hosts of one core. Phases:

    backup   new data; the same again without a dirty bitmap, which reads and hashes everything and stores nothing
    restore  to a file, with every check
    delay    upload and download through a proxy with a line of 1 Gbit/s and 20 and 150 ms of round trip
    clients  32 backups at a time (--clients) over connections of their own, against one with all of it, and what memory
             the server takes
    sync     push of 10 000 chunks of 64 KiB (--chunks), all new, and again with 1 % new; pull of the same

Everything is measured by turns with its limits, and the medians of the pairs' ratios count: the same work on the local
datastore; a bare loop of the same primitives and TLS (client: read, SHA-256 in lanes, zstd, CRC, send; server: receive,
the way back, CRC, write a file; a connection for each core); and TLS alone, as many bytes as the client sends. With
delay the limit is the line, or window by round trip if that is less; syncs are held against a plain copy of all chunk
files. CPU seconds are of both processes.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.limits import cpu_count  # noqa: E402
from core.units import format_size, parse_size  # noqa: E402

CHUNK: Final = 4 << 20
STORE: Final = "main"
ARCHIVE: Final = "drive-scsi0.img"
USER: Final = "root@pam!bench"
#: Bytes a second of the simulated line, each way, and its round trips in seconds.
LINE: Final = 125e6
DELAYS_S: Final = (0.0, 0.02, 0.15)
#: Bytes that a server lets a client send before it has to answer.
WINDOW: Final = 32 << 20
SMALL_CHUNK: Final = 64 << 10
_TICKS: Final = os.sysconf("SC_CLK_TCK")


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """One measurement."""

    seconds: float
    cpu_s: float = 0.0
    rss_mib: int = 0


@dataclass
class Row:
    """One piece of work, and what it is held against, by name."""

    name: str
    amount: float  #: bytes
    goal: float | None = None
    against: str = ""  #: the limit that the goal is of
    samples: list[Sample] = field(default_factory=list)
    limits: dict[str, list[Sample]] = field(default_factory=dict)

    def rate(self, samples: Sequence[Sample]) -> float:
        return self.amount / statistics.median(sample.seconds for sample in samples) / 1e6

    def ratio(self, limit: str) -> float:
        pairs = zip(self.limits[limit], self.samples, strict=False)
        return statistics.median(one.seconds / other.seconds for one, other in pairs)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "mb-per-s": round(self.rate(self.samples), 1),
            "seconds": [round(sample.seconds, 3) for sample in self.samples],
            "cpu-s": round(statistics.median(sample.cpu_s for sample in self.samples), 2),
            "rss-mib": max(sample.rss_mib for sample in self.samples),
            "limits": {
                name: {"mb-per-s": round(self.rate(found), 1), "ratio": round(self.ratio(name), 3)}
                for name, found in self.limits.items()
            },
            "goal": None if self.goal is None else {"ratio": self.goal, "of": self.against},
        }


class Process:
    """A worker of this program that says something once it is ready, and ends with its input."""

    def __init__(self, *arguments: object) -> None:
        line = [sys.executable, __file__, "--worker", *map(str, arguments)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert self.process.stdout is not None
        self.said: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def peak_mib(self) -> int:
        """The most memory it has had."""
        return int(Path(f"/proc/{self.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def process(*arguments: object) -> Iterator[Process]:
    started = Process(*arguments)
    try:
        yield started
    finally:
        started.end()


def run(*arguments: object, beside: Process | None = None) -> Sample:
    """A worker that measures itself; `beside` is the server that has its part of the work."""
    before = 0.0 if beside is None else beside.cpu_s()
    line = [sys.executable, __file__, "--worker", *map(str, arguments)]
    found = subprocess.run(line, stdout=subprocess.PIPE, cwd=ROOT, check=True)
    told = json.loads(found.stdout)
    more = 0.0 if beside is None else beside.cpu_s() - before
    return Sample(told["seconds"], told["cpu"] + more, told["rss-mib"])


# --- the bench -------------------------------------------------------------------------------------------------------


class Bench:
    """The folder with everything in it, and the results."""

    def __init__(
        self, folder: Path, size: int, rounds: int, chunks: int, clients: int, say: Callable[[str], None]
    ) -> None:
        self.folder, self.size, self.rounds, self.chunks, self.say = folder, size, rounds, chunks, say
        self.clients = clients
        self.image = folder / "disk.raw"
        self.local, self.served = folder / "local", folder / "served"
        self.rows: dict[str, Row] = {}

    def row(self, name: str, amount: float, goal: float | None = None, against: str = "") -> Row:
        return self.rows.setdefault(name, Row(name, amount, goal, against))

    def note(self, row: Row, sample: Sample, limit: str = "") -> None:
        (row.limits.setdefault(limit, []) if limit else row.samples).append(sample)
        what = f"{row.name} ({limit})" if limit else row.name
        rate = f"{row.amount / sample.seconds / 1e6:8.0f} MB/s"
        self.say(f"  {what:<36}{rate}  {sample.seconds:7.3f} s  {sample.cpu_s:6.2f} s CPU")

    def prepare(self) -> None:
        from datastore.primitives import half_random

        with self.image.open("wb") as file:
            for _ in range(self.size // CHUNK):
                file.write(half_random(CHUNK))
        for store in (self.local, self.served):
            run("create", store)
        tls(self.folder)  # makes the certificate

    def empty(self, store: Path) -> None:
        shutil.rmtree(store)
        run("create", store)

    def backup(self) -> None:
        new = self.row("backup, new", self.size, 0.7, "bare loop")
        again = self.row("backup, unchanged", self.size)
        plain = self.row("TLS alone", self.size / 2)
        for number in range(self.rounds):
            for store in (self.local, self.served):
                self.empty(store)
            with process("serve", self.served, self.folder) as server:
                url = server.said["url"]
                self.note(new, run("backup", url, self.image, "0", beside=server))
                self.note(again, run("backup", url, self.image, "0", beside=server))
            self.note(new, run("backup", self.local, self.image, "0"), "local")
            self.note(again, run("backup", self.local, self.image, "0"), "local")
            with process("bare-receive", self.folder, self.folder / f"bare{number}") as bare:
                self.note(new, run("bare-send", self.image, bare.said["port"], beside=bare), "bare loop")
            shutil.rmtree(self.folder / f"bare{number}")
            with process("tls-receive", self.folder) as bare:
                self.note(plain, run("tls-send", self.size // 2, bare.said["port"], beside=bare))

    def restore(self) -> None:
        row = self.row("restore", self.size)
        target = self.folder / "restored"
        for store in (self.local, self.served):
            self.empty(store)
        run("backup", self.local, self.image, "0")
        with process("serve", self.served, self.folder) as server:
            url = server.said["url"]
            run("backup", url, self.image, "0")
            for _ in range(self.rounds):
                self.note(row, run("restore", url, target, "0", beside=server))
                target.unlink()
                self.note(row, run("restore", self.local, target, "0"), "local")
                target.unlink()

    def delay(self) -> None:
        for delay_s in DELAYS_S[1:]:
            for what in ("backup", "restore"):
                limit = min(LINE, WINDOW / delay_s)
                stored = self.size / 2  # half of every chunk compresses to nothing
                row = self.row(f"{what}, {1000 * delay_s:.0f} ms", stored, 0.8, "window")
                for _ in range(self.rounds):
                    target = self.image if what == "backup" else self.folder / "restored"
                    if what == "backup":
                        self.empty(self.served)
                    with (
                        process("serve", self.served, self.folder) as server,
                        process("proxy", server.said["port"], delay_s) as proxy,
                    ):
                        url = json.dumps({**json.loads(server.said["url"]), "port": proxy.said["port"]})
                        self.note(row, run(what, url, target, "0", beside=server))
                    self.note(row, Sample(stored / limit), "window")
                    if what == "restore":
                        target.unlink()

    def many(self) -> None:
        """Many clients at a time."""
        part = max(CHUNK, self.size // self.clients // CHUNK * CHUNK)
        row = self.row(f"backup, {self.clients} clients", part * self.clients)
        images = [self.folder / f"part{number}.raw" for number in range(self.clients)]
        with self.image.open("rb") as whole:
            for image in images:
                image.write_bytes(whole.read(part))
        together = self.folder / "together.raw"
        with together.open("wb") as file:
            for image in images:
                file.write(image.read_bytes())
        for _ in range(self.rounds):
            self.empty(self.served)
            with process("serve", self.served, self.folder) as server:
                self.note(row, run("clients", server.said["url"], self.folder, self.clients, beside=server))
                row.samples[-1].rss_mib = server.peak_mib()
            self.empty(self.served)
            with process("serve", self.served, self.folder) as server:
                self.note(row, run("backup", server.said["url"], together, "0", beside=server), "one client")
        for image in (*images, together):
            image.unlink()

    def sync(self) -> None:
        amount = self.chunks * SMALL_CHUNK
        names = ("push, all new", "push, 1 % new", "pull, all new", "pull, 1 % new")
        rows = [self.row(name, amount) for name in names]
        for _ in range(self.rounds):
            for store in (self.local, self.served, self.folder / "pulled"):
                shutil.rmtree(store, ignore_errors=True)
                run("create", store)
            run("fill", self.local, 1, self.chunks)
            with process("serve", self.served, self.folder) as server:
                url = server.said["url"]
                copied = run("copy", self.local, self.folder / "copy")
                shutil.rmtree(self.folder / "copy")
                for count, (push, pull) in enumerate(((rows[0], rows[2]), (rows[1], rows[3]))):
                    if count:
                        run("fill", self.local, 2, self.chunks)
                    self.note(push, run("push", self.local, url, beside=server))
                    self.note(pull, run("pull", url, self.folder / "pulled", beside=server))
                    for row in (push, pull):
                        self.note(row, copied, "copy of all files")


# --- workers ---------------------------------------------------------------------------------------------------------


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


async def proxy(port: str, delay_s: str) -> None:
    """Every byte comes half a round trip later, and no faster than the line."""
    import math

    import trio

    async def carry(source: trio.SocketStream, target: trio.SocketStream) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes | bytearray]](math.inf)

        async def take() -> None:
            free_at = trio.current_time()
            async with send:
                while data := await source.receive_some(1 << 20):
                    free_at = max(free_at, trio.current_time()) + len(data) / LINE
                    await send.send((free_at + float(delay_s) / 2, data))
                    # Sleeps are whole milliseconds: many short ones would be a slower line.
                    if free_at > trio.current_time() + 0.02:
                        await trio.sleep_until(free_at - 0.01)

        async def give() -> None:
            async for due, data in receive:
                await trio.sleep_until(due)
                await target.send_all(data)
            await target.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            nursery.start_soon(give)

    async def connection(client: trio.SocketStream) -> None:
        try:
            server = await trio.open_tcp_stream("127.0.0.1", int(port))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(carry, client, server)
                nursery.start_soon(carry, server, client)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(json.dumps({"port": listeners[0].socket.getsockname()[1]}), flush=True)
    await trio.serve_listeners(connection, listeners)


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
        "serve": serve, "proxy": proxy, "create": create, "fill": fill, "backup": back_up, "restore": restore,
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
    if what not in ("serve", "proxy"):
        print(json.dumps({"seconds": seconds, "cpu": time.process_time() - cpu, "rss-mib": rss}))


# --- output ----------------------------------------------------------------------------------------------------------


def markdown(document: dict[str, Any]) -> str:
    lines = [
        f"{document['cores']} cores, image of {format_size(document['size'])}, medians of {document['rounds']} rounds,"
        f" load {document['load']} at the end.",
        "",
        "| work | MB/s | CPU, both sides | limit: MB/s, ratio | goal | client's memory (clients: server's) |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        limits = "; ".join(f"{name}: {one['mb-per-s']}, {one['ratio']}" for name, one in row["limits"].items())
        goal = "-" if row["goal"] is None else f"{row['goal']['ratio']} of {row['goal']['of']}"
        memory = f"{row['rss-mib']} MiB"
        lines.append(f"| {row['name']} | {row['mb-per-s']} | {row['cpu-s']} s | {limits or '-'} | {goal} | {memory} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1GiB", help="of the image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=10_000, help="of 64 KiB, that are synced")
    parser.add_argument("--clients", type=int, default=32, help="at a time")
    parser.add_argument("--phases", default="backup,restore,delay,clients,sync", help="some of these, in this order")
    parser.add_argument("--output", choices=["text", "markdown", "json"], default="text")
    arguments = parser.parse_args()
    size = max(CHUNK, parse_size(arguments.size) // CHUNK * CHUNK)

    def say(text: str) -> None:
        print(text, file=sys.stdout if arguments.output == "text" else sys.stderr, flush=True)

    memory = Path("/dev/shm")
    fits = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 6 * size + (4 << 30)
    with tempfile.TemporaryDirectory(prefix="fleece-bench-", dir=memory if fits else None) as folder:
        clients = max(1, arguments.clients)
        bench = Bench(Path(folder), size, max(1, arguments.rounds), max(100, arguments.chunks), clients, say)
        bench.prepare()
        work = {
            "backup": bench.backup,
            "restore": bench.restore,
            "delay": bench.delay,
            "clients": bench.many,
            "sync": bench.sync,
        }
        for phase in arguments.phases.split(","):
            say(phase)
            work[phase]()
        document = {
            "cores": cpu_count(),
            "size": size,
            "rounds": bench.rounds,
            "load": round(os.getloadavg()[0], 2),
            "rows": [row.to_json() for row in bench.rows.values()],
        }
    print(json.dumps(document, indent=2) if arguments.output == "json" else f"\n{markdown(document)}")
    return None


if __name__ == "__main__":
    main()
