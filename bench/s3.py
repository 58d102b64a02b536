"""Datastores in buckets: transfer against boto3 and rclone, garbage collection, and the mount with latency.

    python bench/s3.py [--phases transfer,gc,latency,listing,mount] [--rounds 3] [--objects 128] [--output FORM]

A Ceph RADOS gateway from Debian's packages serves on loopback, its objects in memory; it shares the machine with
what is measured. Phases:

    transfer  objects of 4 MiB, 8 requests at once: our client, boto3 in as many threads, and rclone, by turns, with
              and without TLS. Start-up is not counted (rclone's is measured and subtracted).
    gc        the reference shape: 6477 chunks, 30 indexes of 2301 entries; with nothing to delete, then with all.
              One second of it waits for the access-time test. The gateway's objects cannot be made older, so the
              guard for young objects is 0 here.
    latency   the same on a small server of our own with delays: 20 ms for each request and 1.5 ms for each deleted key
              (like S3), 12 ms for each deleted key (like R2)
    listing   a million objects, listed from that server at 100 ms per page, with a marker for each
    mount     an image read through a mount from the bucket, cold, then from the local cache; over a line with 20 and
              100 ms per request. The limit is what 8 requests can bring in a round trip, or what there is without one.

Every figure is printed with its goal. Whatever a phase lacks (boto3, rclone, Ceph, FUSE) is said and left out.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.gc import age, drop_indexes, make_store  # noqa: E402
from bench.image_backup import forget, mounted, read_through  # noqa: E402
from bench.line import line  # noqa: E402
from bench.s3_workers import STORE  # noqa: E402
from datastore.files import Owner  # noqa: E402
from datastore.gc_status import GcStatus, write_status  # noqa: E402
from datastore.primitives import half_random  # noqa: E402
from datastore.s3.endpoint import Endpoint  # noqa: E402
from datastore.s3.keys import StoreKeys  # noqa: E402
from tests.support.cache import Unavailable  # noqa: E402
from tests.support.rgw import running_rgw  # noqa: E402
from tests.support.s3_bucket import StoredObject  # noqa: E402
from tests.support.s3_emulator import S3Emulator  # noqa: E402
from tests.support.s3_service import BUCKET  # noqa: E402

CHUNK = 4 << 20
PARALLEL = 8
CHUNKS, INDEXES, ENTRIES = 6477, 30, 2301
MILLION = 1_000_000
DAY_S = 86_400
#: Seconds: nothing to delete, everything to delete; published figures of the reference in brackets of the table.
GC_GOALS = {"RGW": (2.5, 7.0), "like S3": (2.5, 6.0), "like R2": (4.0, 25.0)}
PUBLISHED = {"RGW": (3.05, 14.08), "like S3": (3.05, 13.06), "like R2": (6.71, 78.21)}
#: Seconds for each request, and for each deleted key.
SERVERS = {"like S3": (0.020, 0.0015), "like R2": (0.020, 0.012)}
LISTING_GOAL_S, LISTING_GOAL_MIB = 60.0, 150
LATENCY_GOAL = 0.8


@dataclass
class Row:
    """One line of the table: a figure, what it is compared with, its goal."""

    name: str
    value: str
    limit: str = "-"
    ratio: float | None = None
    goal: str = "-"
    reached: bool | None = None
    note: str = ""


@dataclass
class Place:
    """An endpoint with a bucket, as workers and peers are told of it."""

    endpoint: Endpoint
    bucket: str
    certificate: Path | None = None

    def job(self, what: str, **more: Any) -> dict[str, Any]:
        values = {name: getattr(self.endpoint, name) for name in self.endpoint.__dataclass_fields__}
        kept = {name: value for name, value in values.items() if isinstance(value, str | int | bool | None)}
        return {"what": what, "endpoint": kept, "bucket": self.bucket, **more}

    def peer_job(self, what: str, keys: list[str]) -> dict[str, Any]:
        return {
            "what": what,
            "url": f"{self.endpoint.scheme}://{self.endpoint.endpoint}:{self.endpoint.port}",
            "access-key": self.endpoint.access_key,
            "secret": self.endpoint.secret,
            "region": self.endpoint.region,
            "bucket": self.bucket,
            "certificate": str(self.certificate) if self.certificate else None,
            "keys": keys,
            "parallel": PARALLEL,
        }


@dataclass
class Bench:
    """The folder with everything in it, and the results."""

    folder: Path
    rounds: int
    objects: int
    image_mib: int
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        verdict = "" if row.reached is None else "  reached" if row.reached else "  MISSED"
        limit = "" if row.limit == "-" else f", beside {row.limit}"
        ratio = "" if row.ratio is None else f", ratio {row.ratio:.2f}"
        self.say(f"  {row.name}: {row.value}{limit}{ratio}, goal {row.goal}{verdict}{row.note and '; ' + row.note}")

    # --- transfer ----------------------------------------------------------------------------------------------------

    def transfer(self) -> None:
        with running_rgw(memory=8 << 30) as gateway:
            bucket = gateway.make_bucket()
            places = {
                "": Place(gateway.endpoint(), bucket),
                ", TLS": Place(gateway.encrypted_endpoint(), bucket, gateway.certificate.path),
            }
            for suffix, place in places.items():
                self._transfer(place, suffix)

    def _transfer(self, place: Place, suffix: str) -> None:
        rates: dict[tuple[str, str], list[float]] = {}
        cpu: dict[tuple[str, str], list[float]] = {}
        peers = self._peers()
        for number in range(self.rounds):
            # Who comes first changes: the gateway grows slower with what it holds.
            order = ["fleece", *peers] if number % 2 else [*peers, "fleece"]
            for what in ("upload", "download"):
                for program in order:
                    megabytes, seconds, used = self._run_transfer(program, what, place)
                    rates.setdefault((what, program), []).append(megabytes / seconds)
                    cpu.setdefault((what, program), []).append(1000 * used / megabytes)
                    self.say(f"    {what} {program}{suffix}: {megabytes / seconds:.0f} MB/s, {used:.2f} s of CPU")
        for what in ("upload", "download"):
            ours = rates[what, "fleece"]
            for peer in peers:
                theirs = rates[what, peer]
                ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
                cost = " and ".join(f"{statistics.median(cpu[what, program]):.2f}" for program in ("fleece", peer))
                row = Row(f"{what} against {peer}{suffix}", f"{statistics.median(ours):.0f} MB/s")
                row.limit, row.goal = f"{statistics.median(theirs):.0f} MB/s", "1.0"
                row.ratio, row.reached, row.note = ratio, ratio >= 1.0, f"CPU {cost} s/GB"
                self.add(row)

    def _peers(self) -> list[str]:
        found = []
        if subprocess.run(["/usr/bin/python3", "-c", "import boto3"], capture_output=True).returncode == 0:
            found.append("boto3")
        if shutil.which("rclone"):
            found.append("rclone")
        for name in {"boto3", "rclone"} - set(found):
            self.say(f"  {name} is not installed and left out ('scripts/setup bench' installs it)")
        return found

    def _run_transfer(self, program: str, what: str, place: Place) -> tuple[float, float, float]:
        """Megabytes, seconds, CPU seconds."""
        keys = [f"{program}/{number:05}" for number in range(self.objects)]
        if what == "download" and program != "rclone":
            keys *= 3  # or it would be over too soon to tell
        if program == "fleece":
            found = work(place.job(what, keys=keys, parallel=PARALLEL))
        elif program == "boto3":
            found = run_json(["/usr/bin/python3", str(ROOT / "bench/s3_boto3.py")], place.peer_job(what, keys))
        else:
            found = self._rclone(what, place)
        return len(keys) * CHUNK / 1e6, found["seconds"], found["cpu"]

    def _rclone(self, what: str, place: Place) -> dict[str, float]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            "RCLONE_CONFIG": "",
            "RCLONE_CONFIG_BENCH_TYPE": "s3",
            "RCLONE_CONFIG_BENCH_PROVIDER": "Ceph",
            "RCLONE_CONFIG_BENCH_ENDPOINT": place.peer_job("", [])["url"],
            "RCLONE_CONFIG_BENCH_ACCESS_KEY_ID": place.endpoint.access_key,
            "RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY": place.endpoint.secret,
        }
        local, remote = self.folder / "rclone-files", f"bench:{place.bucket}/rclone"
        if not local.exists():
            local.mkdir()
            bodies = [os.urandom(CHUNK) for _ in range(16)]
            for number in range(self.objects):
                (local / f"{number:05}").write_bytes(bodies[number % 16])
        target = self.folder / "rclone-out"
        shutil.rmtree(target, ignore_errors=True)
        options = ["--transfers", str(PARALLEL), "--checkers", str(PARALLEL), "--ignore-times"]
        options += ["--ca-cert", str(place.certificate)] if place.certificate else []
        ends = [str(local), remote] if what == "upload" else [remote, str(target)]
        started = _usage(["rclone", "version"], environment)
        whole = _usage(["rclone", "copy", *options, *ends], environment)
        shutil.rmtree(target, ignore_errors=True)
        return {"seconds": whole[0] - started[0], "cpu": whole[1] - started[1]}

    # --- garbage collection ------------------------------------------------------------------------------------------

    def gc(self) -> None:
        with running_rgw() as gateway:
            place = Place(gateway.endpoint(), gateway.make_bucket())

            def fill(cache: Path) -> None:
                work(place.job("fill", cache=str(cache)))
                time.sleep(2)  # the gateway's times have whole seconds

            self._collect_rounds("RGW", place, fill, {"guard-s": 0.0})

    def latency(self) -> None:
        for name, (per_request_s, per_key_s) in SERVERS.items():
            with S3Emulator() as server:
                place = Place(server.endpoint(), BUCKET)

                def fill(
                    cache: Path,
                    server: S3Emulator = server,
                    place: Place = place,
                    delays: tuple[float, float] = (per_request_s, per_key_s),
                ) -> None:
                    server.latency_s = server.latency_per_delete_s = 0.0
                    work(place.job("fill", cache=str(cache), upload=False))
                    put_objects(server, [file.name for file in (cache / ".chunks").glob("*/*")])
                    server.latency_s, server.latency_per_delete_s = delays

                self._collect_rounds(name, place, fill, {})

    def _collect_rounds(self, name: str, place: Place, fill: Callable[[Path], None], more: dict[str, Any]) -> None:
        runs: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for _ in range(self.rounds):
            cache = self.folder / "cache"
            make_store(cache, CHUNKS, INDEXES, ENTRIES, 3)
            fill(cache)
            for delete in (False, True):
                if delete:
                    drop_indexes(cache)
                age(cache)
                found = work(place.job("collect", cache=str(cache), delete=delete, **more))
                if found["removed"] < CHUNKS * delete or found["kept"] < CHUNKS * (not delete):
                    raise SystemExit(f"{name}: not what was due: {found}")
                runs[delete].append(found)
            shutil.rmtree(cache)
        for delete in (False, True):
            found_all = runs[delete]
            seconds = statistics.median(found["seconds"] for found in found_all)
            row = Row(f"gc, {name}, {('nothing', 'everything')[delete]} to delete", f"{seconds:.2f} s")
            row.goal, row.reached = f"{GC_GOALS[name][delete]} s", seconds <= GC_GOALS[name][delete]
            requests = ", ".join(f"{count} {method}" for method, count in sorted(found_all[-1]["requests"].items()))
            spread = " ".join(f"{found['seconds']:.2f}" for found in found_all)
            memory = max(found["mib"] for found in found_all)
            row.note = f"published {PUBLISHED[name][delete]} s; {requests}; {memory} MiB; {spread}"
            self.add(row)

    def listing(self) -> None:
        cache = self.folder / "cache"
        make_store(cache, 1, 1, 1, 1)
        names = []
        for number in range(MILLION):
            # Spread evenly, as digests are.
            name = f"{(number << 44) // MILLION * 0x100003 & (1 << 44) - 1:011x}".ljust(64, "0")
            names.append(name)
            os.close(os.open(f"{cache}/.chunks/{name[:4]}/{name}", os.O_CREAT | os.O_WRONLY, 0o644))
        with S3Emulator() as server:
            place = Place(server.endpoint(), BUCKET)
            put_objects(server, names)
            server.bucket.keys()
            work(place.job("adopt", cache=str(cache)))
            # As the run before left it: so many objects are listed by prefix, side by side.
            write_status(cache, GcStatus(upid=None, disk_chunks=MILLION), Owner.of(cache))
            server.latency_s = 0.1
            found = work(place.job("collect", cache=str(cache), delete=False))
        shutil.rmtree(cache)
        if found["kept"] + found["pending"] < len(set(names)):
            raise SystemExit(f"not all objects were looked at: {found}")
        row = Row("gc, a million objects, 100 ms per page", f"{found['seconds']:.1f} s")
        row.goal, row.reached = f"{LISTING_GOAL_S:.0f} s", found["seconds"] <= LISTING_GOAL_S
        row.note = f"{found['requests'].get('list', 0)} pages, CPU {found['cpu']:.1f} s"
        self.add(row)
        row = Row("memory of it", f"{found['mib']} MiB")
        row.goal, row.reached = f"{LISTING_GOAL_MIB} MiB", found["mib"] <= LISTING_GOAL_MIB
        self.add(row)

    # --- mount -------------------------------------------------------------------------------------------------------

    def mount(self) -> None:
        image = self.folder / "disk.raw"
        with image.open("wb") as file:
            for _ in range(self.image_mib // 4):
                file.write(half_random(CHUNK))
        size = image.stat().st_size
        with running_rgw() as gateway, ExitStack() as lines:
            place = Place(gateway.endpoint(), gateway.make_bucket())
            cache = self.folder / "cache"
            work(place.job("back-up", cache=str(cache), image=str(image)))
            ports = {0: gateway.port}
            for delay_ms in (20, 100):
                ports[delay_ms] = lines.enter_context(line(gateway.port, round_trip_s=delay_ms / 1000))
            cold: dict[int, list[float]] = {delay_ms: [] for delay_ms in ports}
            warm: dict[int, list[float]] = {delay_ms: [] for delay_ms in ports}
            for _ in range(self.rounds):
                for delay_ms, port in ports.items():
                    there = Place(gateway.endpoint(port=port), place.bucket)
                    empty_cache(cache)
                    for rates in (cold, warm):
                        rates[delay_ms].append(size / self._read_mount(there, cache, size) / 1e6)
        without = statistics.median(cold[0])
        for delay_ms in ports:
            rate = statistics.median(cold[delay_ms])
            row = Row(f"mount, cold, {delay_ms} ms", f"{rate:.0f} MB/s")
            if delay_ms:
                window = PARALLEL * CHUNK / (delay_ms / 1000) / 1e6
                limit = min(window, without)
                row.limit, row.goal, row.ratio = f"{limit:.0f} MB/s", str(LATENCY_GOAL), rate / limit
                row.reached = row.ratio >= LATENCY_GOAL
                row.note = f"window / round trip {window:.0f} MB/s"
            self.add(row)
            self.add(
                Row(f"mount, from the local cache, {delay_ms} ms", f"{statistics.median(warm[delay_ms]):.0f} MB/s")
            )

    def _read_mount(self, place: Place, cache: Path, size: int) -> float:
        """Seconds to read the image once through a new mount."""
        point = self.folder / "mnt"
        point.mkdir(exist_ok=True)
        job = place.job("mount", cache=str(cache), mountpoint=str(point))
        with tempfile.TemporaryFile() as told:
            told.write(json.dumps(job).encode() + b"\n")
            told.seek(0)
            with mounted([sys.executable, WORKERS], point, stdin=told) as (path, _process):
                forget(path)
                started = time.perf_counter()
                read_through(path, 0, size)
                return time.perf_counter() - started


WORKERS = str(ROOT / "bench/s3_workers.py")


def run_json(line: list[str], job: dict[str, Any]) -> dict[str, Any]:
    """Run a worker; what it prints."""
    done = subprocess.run(line, input=json.dumps(job) + "\n", stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{job['what']}: {line[-1]} ended with {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def work(job: dict[str, Any]) -> dict[str, Any]:
    return run_json([sys.executable, WORKERS], job)


def _usage(line: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds and CPU seconds of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(line)} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def put_objects(server: S3Emulator, names: list[str]) -> None:
    """An old object for each chunk; they all have one content, which nobody reads."""
    keys = StoreKeys(STORE)
    stored = StoredObject(b"chunk", "0" * 32, time.time() - 3 * DAY_S, size=1024)
    server.bucket.objects.update({f"{keys.chunks}{name[:4]}/{name}": stored for name in names})
    server.bucket._count = -1


def empty_cache(cache: Path) -> None:
    """Leave markers only."""
    for file in (cache / ".chunks").glob("*/*"):
        os.truncate(file, 0)


def markdown(rows: list[Row]) -> str:
    lines = ["| work | Fleece | beside | ratio | goal | remarks |", "|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        missed = " (missed)" if row.reached is False else ""
        lines.append(f"| {row.name} | {row.value} | {row.limit} | {ratio} | {row.goal}{missed} | {row.note} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default="transfer,gc,latency,listing,mount")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--objects", type=int, default=128, help="of 4 MiB, to transfer")
    parser.add_argument("--image", type=int, default=512, metavar="MIB", help="size of the image for the mount")
    parser.add_argument("--output", choices=["text", "markdown", "json"], default="text")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stdout if options.output == "text" else sys.stderr, flush=True)

    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fleece-bench-s3-", dir=memory if memory.is_dir() else None))
    bench = Bench(folder, max(1, options.rounds), options.objects, options.image, say)
    phases = {name: getattr(bench, name) for name in ("transfer", "gc", "latency", "listing", "mount")}
    try:
        for name in options.phases.split(","):
            say(name)
            try:
                phases[name]()
            except Unavailable as reason:
                say(f"  left out: {reason}")
            shutil.rmtree(folder)
            folder.mkdir()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"load {os.getloadavg()[0]:.1f} at the end")
    if options.output == "json":
        print(json.dumps([asdict(row) for row in bench.rows], indent=2))
    elif options.output == "markdown":
        print(markdown(bench.rows))


if __name__ == "__main__":
    main()
