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
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.line import line  # noqa: E402
from bench.wire_workers import CHUNK, SMALL_CHUNK, tls  # noqa: E402
from core.limits import cpu_count  # noqa: E402
from core.units import format_size, parse_size  # noqa: E402

DELAYS_S: Final = (0.0, 0.02, 0.15)
#: Bytes a second of the simulated line, each way.
LINE: Final = 125e6
#: Bytes that a server lets a client send before it has to answer.
WINDOW: Final = 32 << 20
WORKERS: Final = ROOT / "bench/wire_workers.py"
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
        line = [sys.executable, str(WORKERS), *map(str, arguments)]
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
    line = [sys.executable, str(WORKERS), *map(str, arguments)]
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
                        line(server.said["port"], round_trip_s=delay_s, rate=LINE) as port,
                    ):
                        url = json.dumps({**json.loads(server.said["url"]), "port": port})
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


if __name__ == "__main__":
    main()
