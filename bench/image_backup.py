"""Backup, restore and mount of a disk image: Fleece against its limits, and against restic and borg.

    python bench/image_backup.py [--size 2GiB] [--rounds 5] [--folder DIR] [--phases NAME,...] [--output FORM]

Every figure is measured in the same run, by turns with its limit, so that other work on the machine hits both; medians
count. The limits are loops without any datastore (`bare.py`), a FUSE file system that serves a file from memory
(`fuse_memory.py`), and for a virtual machine the same image read as a file. Phases:

    backup   new data; the same again without a dirty bitmap (read and hashed, nothing stored); by bitmap, 100 GiB
    restore  to a file, with every check
    mount    sequential from a cold cache, sequential and random 4 KiB from a warm one
    vm       the image read from QEMU over NBD, against `nbdcopy` to null; as the disk of a QEMU, live, against the
             same image as a file; and again by its dirty bitmap
    peers    restic (repository version 2) and borg (zstd 1, no encryption), where they are installed

Programs are timed as whole commands in `peers` and `vm`, else without their start. Everything lies in memory
(/dev/shm) if there is room for five times the image, else in the folder for temporary files.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core.disks import DiskSource
from core.limits import cpu_count
from core.units import format_size, parse_size

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 4 << 20
MIB = 1 << 20
#: Figures of PBS 4.1.1 over loopback TLS on a machine whose SHA-256 rate is known. Scaled by that rate they are an
#: upper bound for other machines: TLS and zstd grow less than SHA-256 does where it has instructions of its own.
PBS_SHA256 = 370e6
PBS = {"new": 126 * MIB, "unchanged": 197 * MIB, "restore": 89 * MIB}
#: Bytes of the image that fit into the mount's cache beside what it reads ahead.
WARM = 64 * MIB
RANDOM_READS = 20_000
#: What each row must reach of its limit: (goal, floor).
GOALS = {
    "new": (0.8, 0.65),
    "restore": (0.8, 0.65),
    "mount warm": (0.7, 0.7),
    "mount cold": (0.5, 0.5),
    "mount random": (0.7, 0.7),
    "vm new": (0.8, 0.8),
}


@dataclass
class Sample:
    """One measurement."""

    seconds: float
    amount: float  #: bytes, or requests
    rss_mib: int = 0

    @property
    def rate(self) -> float:
        return self.amount / self.seconds


@dataclass
class Row:
    """One line of the result: a piece of work and what limits it."""

    name: str
    unit: str = "MB/s"
    samples: list[Sample] = field(default_factory=list)
    limit: list[Sample] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(sample.rate for sample in self.samples)

    @property
    def limit_rate(self) -> float | None:
        return statistics.median(sample.rate for sample in self.limit) if self.limit else None

    @property
    def ratio(self) -> float | None:
        # Of pairs: the two were measured one after the other.
        pairs = [sample.rate / limit.rate for sample, limit in zip(self.samples, self.limit, strict=False)]
        return statistics.median(pairs) if pairs else None

    @property
    def rss_mib(self) -> int:
        return max(sample.rss_mib for sample in self.samples)

    def to_json(self) -> dict[str, Any]:
        goal, floor = GOALS.get(self.name, (None, None))
        return {
            "name": self.name,
            "unit": self.unit,
            "rate": self._shown(self.rate),
            "limit": None if self.limit_rate is None else self._shown(self.limit_rate),
            "ratio": None if self.ratio is None else round(self.ratio, 3),
            "goal": goal,
            "floor": floor,
            "seconds": [round(sample.seconds, 4) for sample in self.samples],
            "rss-mib": self.rss_mib,
        }

    def _shown(self, rate: float) -> float:
        return round(rate / 1e6, 1) if self.unit == "MB/s" else round(rate, 1)


class Bench:
    """The folder with everything in it, and the results."""

    def __init__(self, folder: Path, size: int, rounds: int, say: Callable[[str], None]) -> None:
        self.folder, self.size, self.rounds, self.say = folder, size, rounds, say
        self.image = folder / "disk.raw"
        self.store = folder / "store"
        self.rows: dict[str, Row] = {}
        self._number = 0

    def row(self, name: str, unit: str = "MB/s") -> Row:
        return self.rows.setdefault(name, Row(name, unit))

    def note(self, row: Row, sample: Sample, *, limit: bool = False) -> None:
        (row.limit if limit else row.samples).append(sample)
        shown = f"{sample.rate / 1e6:8.0f} MB/s" if row.unit == "MB/s" else f"{sample.rate:8.0f} {row.unit}"
        memory = f"  {sample.rss_mib} MiB" if sample.rss_mib else ""
        self.say(f"  {row.name + (' (limit)' if limit else ''):<28}{shown}  {sample.seconds:7.3f} s{memory}")

    def prepare(self) -> None:
        from datastore.primitives import half_random

        self.say(f"image of {format_size(self.size)}, half of it incompressible, in {self.folder}")
        with self.image.open("wb") as file:
            for start in range(0, self.size, CHUNK):
                file.write(half_random(min(CHUNK, self.size - start)))
        # Not by the command, which would enter the store into this host's list.
        self.worker("create", self.store, self.image, "-")

    def new_id(self) -> str:
        self._number += 1
        return f"bench{self._number}"

    def empty_store(self) -> None:
        """Forget all snapshots and chunks."""
        shutil.rmtree(self.store / "host", ignore_errors=True)
        shutil.rmtree(self.store / "vm", ignore_errors=True)
        for folder in os.scandir(self.store / ".chunks"):
            for chunk in os.scandir(folder.path):
                Path(chunk.path).unlink()

    def worker(self, *arguments: object) -> Sample:
        """One run of this file as a worker: its own seconds, without its start."""
        run = measured([sys.executable, __file__, "--worker", *map(str, arguments)])
        result = json.loads(run.output)
        return Sample(result["seconds"], result.get("amount", self.size), run.rss_mib)

    def bare(self, *arguments: object) -> Sample:
        run = measured([sys.executable, str(ROOT / "bench/bare.py"), *map(str, arguments)])
        return Sample(json.loads(run.output)["seconds"], self.size, run.rss_mib)

    # --- phases ------------------------------------------------------------------------------------------------------

    def backup(self) -> None:
        bare = self.folder / "bare"
        for _ in range(self.rounds):
            self.empty_store()
            shutil.rmtree(bare, ignore_errors=True)
            backup_id = self.new_id()
            self.note(self.row("new"), self.bare("backup", self.image, bare), limit=True)
            self.note(self.row("new"), self.worker("backup", self.store, self.image, backup_id))
            self.note(self.row("unchanged"), self.bare("hash", self.image), limit=True)
            self.note(self.row("unchanged"), self.worker("backup", self.store, self.image, backup_id))
            shutil.rmtree(bare)
            sparse = self.folder / "sparse.raw"
            with sparse.open("wb") as file:
                file.truncate(100 << 30)
            backup_id = self.new_id()
            self.worker("backup", self.store, sparse, backup_id)
            by_bitmap = self.worker("backup-by-bitmap", self.store, sparse, backup_id)
            self.note(self.row("by bitmap, 100 GiB", "runs/s"), Sample(by_bitmap.seconds, 1, by_bitmap.rss_mib))
            sparse.unlink()

    def restore(self) -> None:
        bare, out = self.folder / "bare", self.folder / "out.raw"
        backup_id = self._stored()
        shutil.rmtree(bare, ignore_errors=True)
        self.bare("backup", self.image, bare)
        for _ in range(self.rounds):
            self.note(self.row("restore"), self.bare("restore", bare, out), limit=True)
            out.unlink()
            self.note(self.row("restore"), self.worker("restore", self.store, out, backup_id))
            if subprocess.run(["cmp", self.image, out], check=False).returncode:
                raise SystemExit("the restored image differs")
            out.unlink()
        shutil.rmtree(bare)

    def mount(self) -> None:
        backup_id = self._stored()
        point = self.folder / "mnt"
        point.mkdir(exist_ok=True)
        memory = [sys.executable, str(ROOT / "bench/fuse_memory.py"), str(self.image), str(point), "--map"]
        ours = [FLEECE, "--repo", str(self.store), "mount", "--foreground"]
        ours += [f"host/{backup_id}/latest", "drive-scsi0.img", str(point)]
        for _ in range(self.rounds):
            with mounted(memory, point) as (path, _process):
                self._read_warm(path, limit=True)
            with mounted(ours, point) as (path, process):
                started = time.perf_counter()
                read_through(path, 0, self.size)
                sample = Sample(time.perf_counter() - started, self.size, peak_rss_mib(process.pid))
                self.note(self.row("mount cold"), sample)
                if self.rows.get("restore"):
                    self.row("mount cold").limit.append(self.rows["restore"].samples[-1])
                self._read_warm(path, limit=False)

    def _read_warm(self, path: Path, *, limit: bool) -> None:
        # What the kernel still has would not reach the mount, and leave its cache cold.
        forget(path)
        read_through(path, 0, WARM)
        started = time.perf_counter()
        for _ in range(8):
            forget(path)
            read_through(path, 0, WARM)
        self.note(self.row("mount warm"), Sample(time.perf_counter() - started, 8 * WARM), limit=limit)
        forget(path)
        started = time.perf_counter()
        count = read_randomly(path, WARM, RANDOM_READS)
        self.note(self.row("mount random", "reads/s"), Sample(time.perf_counter() - started, count), limit=limit)

    def vm(self) -> None:
        try:
            import trio

            from tests.support.cache import Unavailable
            from tests.support.qemu_binaries import backports_qemu, distribution_qemu
            from tests.support.running import RunningQemu, VmDisk
        except ImportError as missing:
            return self.say(f"vm: left out ({missing})")
        for find in (backports_qemu, distribution_qemu):
            try:
                binary = find()
                break
            except Unavailable as reason:
                self.say(f"vm: {reason}")
        else:
            return None
        self.say(f"vm: {binary.name}")
        if shutil.which("nbdcopy") and shutil.which("qemu-storage-daemon"):
            self._read_from_qemu()

        async def run() -> None:
            with scratch_folder(self.image) as scratch:
                await measure(scratch)

        async def measure(scratch: str) -> None:
            async with RunningQemu.start(binary, [VmDisk(self.image, "scsi0")], lifetime_s=1800) as qemu:

                def back_up(backup_id: str) -> Sample:
                    line = ["vm", "backup", "--qmp", str(qemu.folder / "qmp"), "--id", backup_id]
                    line += ["--scratch", scratch, "--output", "json"]
                    run = measured([FLEECE, "--repo", str(self.store), *line])
                    return Sample(json.loads(run.output)["duration-s"], self.size, run.rss_mib)

                for _ in range(self.rounds):
                    self.empty_store()
                    sample = self.command(self.store, self.image, self.new_id())
                    self.note(self.row("vm new"), sample, limit=True)
                    self.empty_store()
                    backup_id = self.new_id()
                    self.note(self.row("vm new"), await trio.to_thread.run_sync(back_up, backup_id))
                    by_bitmap = await trio.to_thread.run_sync(back_up, backup_id)
                    row = self.row("vm by bitmap", "runs/s")
                    self.note(row, Sample(by_bitmap.seconds, 1, by_bitmap.rss_mib))

        trio.run(run)
        return None

    def _read_from_qemu(self) -> None:
        from bench.disk_sources import nbdcopy, served_by_qemu

        socket = self.folder / "nbd"
        for _ in range(self.rounds):
            with served_by_qemu(self.image, socket) as uri:
                self.note(self.row("vm read"), Sample(nbdcopy(uri), self.size), limit=True)
                self.note(self.row("vm read"), self.worker("read", self.store, uri, self.new_id()))
            socket.unlink(missing_ok=True)

    def command(self, store: Path, image: Path, backup_id: str) -> Sample:
        """`fleece backup` as a command, timed by its own report."""
        line = ["backup", f"drive-scsi0.img:{image}", "--backup-id", backup_id, "--force", "--output", "json"]
        run = measured([FLEECE, "--repo", str(store), *line])
        return Sample(json.loads(run.output)["duration-s"], self.size, run.rss_mib)

    def peers(self) -> None:
        out = self.folder / "out"
        for _ in range(self.rounds):
            self.empty_store()
            backup_id = self.new_id()
            line = [FLEECE, "--quiet", "--repo", str(self.store)]
            back_up = [*line, "backup", f"drive-scsi0.img:{self.image}", "--backup-id", backup_id]
            self._peer("fleece", "new", back_up)
            self._peer("fleece", "unchanged", back_up)
            out.mkdir()
            target = str(out / "disk.raw")
            self._peer("fleece", "restore", [*line, "restore", f"host/{backup_id}/latest", "drive-scsi0.img", target])
            shutil.rmtree(out)
            if shutil.which("restic"):
                self._restic(out)
            if shutil.which("borg"):
                self._borg(out)

    def _restic(self, out: Path) -> None:
        repository = self.folder / "restic"
        environment = {"RESTIC_PASSWORD": "bench", "RESTIC_REPOSITORY": str(repository)}
        environment["RESTIC_CACHE_DIR"] = str(self.folder / "restic-cache")
        measured(["restic", "init", "--repository-version", "2"], environment)
        # --force: without it an unchanged file is known by its time and not read at all.
        for phase in ("new", "unchanged"):
            self._peer("restic", phase, ["restic", "backup", "--force", str(self.image)], environment)
        self._peer("restic", "restore", ["restic", "restore", "latest", "--target", str(out)], environment)
        for folder in (repository, out, self.folder / "restic-cache"):
            shutil.rmtree(folder)

    def _borg(self, out: Path) -> None:
        repository = self.folder / "borg"
        environment = {"BORG_REPO": str(repository), "BORG_BASE_DIR": str(self.folder / "borg-base")}
        environment["BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK"] = "yes"
        measured(["borg", "init", "-e", "none"], environment)
        for phase in ("new", "unchanged"):
            line = ["borg", "create", "-C", "zstd,1", "--files-cache", "disabled", f"::{phase}", str(self.image)]
            self._peer("borg", phase, line, environment)
        out.mkdir()
        self._peer("borg", "restore", ["borg", "extract", "::new"], environment, out)
        for folder in (repository, out, self.folder / "borg-base"):
            shutil.rmtree(folder)

    def _peer(
        self, program: str, phase: str, line: Sequence[str], environment: dict[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        run = measured(line, environment, cwd)
        self.note(self.row(f"{program} {phase}"), Sample(run.seconds, self.size, run.rss_mib))

    def _stored(self) -> str:
        """The id of a group that holds the image."""
        self.empty_store()
        backup_id = self.new_id()
        self.worker("backup", self.store, self.image, backup_id)
        return backup_id


@dataclass
class Run:
    """One command that ended well."""

    seconds: float
    rss_mib: int
    output: str
    cpu_s: float


FLEECE = str(Path(sys.executable).parent / "fleece")


def measured(line: Sequence[str], environment: dict[str, str] | None = None, cwd: Path = ROOT) -> Run:
    """Run a command; its wall-clock time and the most memory it had."""
    # An installed program has its modules compiled; the first run here does that.
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(line, env={**surroundings, **(environment or {})}, cwd=cwd, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{' '.join(line)} ended with {process.returncode}\n{text}")
    return Run(seconds, usage.ru_maxrss >> 10, text, usage.ru_utime + usage.ru_stime)


@contextmanager
def scratch_folder(image: Path) -> Iterator[str]:
    """A folder for fleecing images, which must not lie on the file system of the disk."""
    for parent in (Path(tempfile.gettempdir()), Path("/dev/shm"), Path("/var/tmp")):
        if parent.is_dir() and parent.stat().st_dev != image.stat().st_dev:
            with tempfile.TemporaryDirectory(prefix="fleece-bench-", dir=parent) as folder:
                yield folder
            return
    raise SystemExit("no second file system for the fleecing image")


@contextmanager
def mounted(
    line: Sequence[str], point: Path, stdin: IO[bytes] | None = None
) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """The only file of a file system that a command serves while the block runs."""
    process = subprocess.Popen(line, stdin=stdin, stdout=subprocess.DEVNULL, cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while not os.path.ismount(point):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(line)} does not mount")
            time.sleep(0.05)
        time.sleep(0.2)  # it sets the kernel's read-ahead after the mount is there
        (path,) = point.iterdir()
        yield path, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def peak_rss_mib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    return 0


def forget(path: Path) -> None:
    """Drop the kernel's own pages of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read_through(path: Path, start: int, end: int) -> None:
    buffer = memoryview(bytearray(MIB))
    fd = os.open(path, os.O_RDONLY)
    while start < end:
        start += os.preadv(fd, [buffer[: end - start]], start)
    os.close(fd)


def read_randomly(path: Path, span: int, count: int) -> int:
    choose = random.Random(1)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    # No place twice, or the kernel would answer by itself.
    places = choose.sample(range(span // 4096), min(count, span // 4096))
    for place in places:
        os.pread(fd, 4096, place * 4096)
    os.close(fd)
    return len(places)


# --- workers: what is measured without the start of a process --------------------------------------------------------


def worker(arguments: Sequence[str]) -> None:
    """Back up or restore as the commands do; print the seconds from opening the session to its end."""
    import trio

    from core.disks import Extent, ExtentState, ReadPlan
    from datastore.codec import ChunkCodec
    from datastore.names import BackupType, Group
    from datastore.store import Datastore
    from hypervisor.files import open_source
    from hypervisor.targets import open_target
    from repository.backup import SnapshotWriter
    from repository.local import open_local
    from repository.restore import load_manifest, restore_disk

    what, store, path, backup_id = arguments
    group, name = Group(BackupType.HOST, backup_id), "drive-scsi0.img"

    async def create() -> float:
        started = time.perf_counter()
        (await Datastore.create(Path(store))).close()
        return time.perf_counter() - started

    async def back_up() -> float:
        repository = await open_local(store)
        latest = await repository.latest(group)
        if latest is not None:
            await trio.sleep(max(0.0, latest.ctime + 1 - time.time()))
        codec = ChunkCodec()
        async with open_source(path, name) as opened:
            source: DiskSource = opened
            if what == "backup-by-bitmap":
                assert latest is not None
                source = Unchanged(source, latest.ctime)
            started = time.perf_counter()
            async with repository.backup(group.at(int(time.time()))) as session:
                writer = SnapshotWriter(session, codec)
                await writer.add_disk(source)
                await writer.finish()
            return time.perf_counter() - started

    class Unchanged:
        """A disk whose dirty bitmap is empty."""

        def __init__(self, source: Any, base: int) -> None:
            self.name, self.size, self.plan = source.name, source.size, ReadPlan(base, "")
            self.read_into, self.discard = source.read_into, source.discard

        async def extents(self, *, incremental: bool = True) -> list[Extent]:
            return [Extent(0, self.size, ExtentState.CLEAN if incremental else ExtentState.DATA)]

    async def restore() -> float:
        repository = await open_local(store)
        snapshot = await repository.latest(group)
        assert snapshot is not None
        started = time.perf_counter()
        codec = ChunkCodec()
        async with repository.reader(snapshot) as reader:
            manifest = await load_manifest(reader, codec)
            filename = f"{name}.fidx"
            async with open_target(path, manifest.file(filename).size) as target:
                await restore_disk(reader, codec, manifest, filename, target)
        return time.perf_counter() - started

    async def read() -> float:
        from bench.disk_sources import read_all

        async with open_source(path, name) as source:
            return await read_all(source, 2)

    work = {"create": create, "restore": restore, "read": read}.get(what, back_up)
    print(json.dumps({"seconds": trio.run(work)}))


# --- output ----------------------------------------------------------------------------------------------------------


def result(bench: Bench, primitives: list[Any]) -> dict[str, Any]:
    sha = next((one.rate for one in primitives if one.name.endswith("hashlib")), 0.0)
    peers: dict[str, dict[str, float]] = {}
    for name, row in bench.rows.items():
        program, _, phase = name.partition(" ")
        if program in ("fleece", "restic", "borg"):
            peers.setdefault(phase, {})[program] = round(row.rate / 1e6, 1)
    for phase, rates in peers.items():
        rates["PBS 4.1.1, scaled by SHA-256"] = round(PBS[phase] / PBS_SHA256 * sha / 1e6, 1)
    return {
        "cores": cpu_count(),
        "size": bench.size,
        "rounds": bench.rounds,
        "load": [round(load, 2) for load in os.getloadavg()],
        "primitives": [one.to_json() for one in primitives],
        "rows": [
            row.to_json() for name, row in bench.rows.items() if name.split(" ")[0] not in ("fleece", "restic", "borg")
        ],
        "peers": peers,
        "peers-rss-mib": {
            name: row.rss_mib for name, row in bench.rows.items() if name.split()[0] in ("fleece", "restic", "borg")
        },
    }


def markdown(document: dict[str, Any]) -> str:
    lines = [
        f"{document['cores']} cores, image of {format_size(document['size'])}, medians of {document['rounds']} rounds,"
        f" load {document['load'][0]} at the end.",
        "",
        "| primitive, one thread | MB/s |",
        "|---|---|",
        *(
            f"| {one['text']}{', in use' if one['used'] else ''} | {one['mb-per-s']} |"
            for one in document["primitives"]
        ),
        "",
        "| work | Fleece | limit | ratio | goal (floor) | memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        shown = f"{row['rate']} {row['unit']}"
        if row["unit"] == "runs/s":
            shown = f"{statistics.median(row['seconds']):.2f} s"
        limit = "-" if row["limit"] is None else f"{row['limit']} {row['unit']}"
        goal = "-" if row["goal"] is None else f"{row['goal']} ({row['floor']})"
        lines.append(
            f"| {row['name']} | {shown} | {limit} | {row['ratio'] or '-'} | {goal} | {row['rss-mib'] or '-'} |"
        )
    if document["peers"]:
        programs = list(dict.fromkeys(program for rates in document["peers"].values() for program in rates))
        lines += ["", f"| whole command, MB/s | {' | '.join(programs)} |", f"|---|{'---|' * len(programs)}"]
        for phase, rates in document["peers"].items():
            lines.append(f"| {phase} | {' | '.join(str(rates.get(program, '-')) for program in programs)} |")
    return "\n".join(lines)


def choose_folder(size: int) -> Path:
    memory = Path("/dev/shm")
    fits = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 5 * size
    return Path(tempfile.mkdtemp(prefix="fleece-bench-", dir=memory if fits else None))


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GiB", help="of the image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="an empty folder for everything, kept")
    parser.add_argument("--phases", default="backup,restore,mount,vm,peers", help="some of these, in this order")
    parser.add_argument("--output", choices=["text", "markdown", "json"], default="text")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stdout if arguments.output == "text" else sys.stderr, flush=True)

    from datastore.primitives import measure_each

    primitives = []
    for primitive in measure_each():
        primitives.append(primitive)
        say(f"  {primitive.text:<56}{primitive.rate / 1e6:>8.0f} MB/s{'  in use' if primitive.used else ''}")
    size = parse_size(arguments.size)
    folder = arguments.folder or choose_folder(size)
    try:
        bench = Bench(folder, size, max(1, arguments.rounds), say)
        bench.prepare()
        for phase in arguments.phases.split(","):
            say(phase)
            {
                "backup": bench.backup,
                "restore": bench.restore,
                "mount": bench.mount,
                "vm": bench.vm,
                "peers": bench.peers,
            }[phase]()
        document = result(bench, primitives)
        print(json.dumps(document, indent=2) if arguments.output == "json" else f"\n{markdown(document)}")
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return None


if __name__ == "__main__":
    main()
