"""Garbage collection against the bare system calls that it cannot do without.

    python bench/gc.py [--shape reference|large] [--scale 1.0] [--rounds 3] [--folder DIR] [--output json]

Shapes:

    reference   270 GiB of logical data in 30 indexes of 2301 entries, 6477 chunks; once with nothing to delete, once
                with everything. One second of it waits for the access-time test.
    large       1.5 million chunks in 6875 indexes of 4600 entries, times `--scale`. Snapshots of a group share most of
                their chunks, as they do in life.

Chunk files hold a few bytes: neither collection nor the bare calls look inside. The bare run, in the same process and
by turns, reads each index once, lists every folder once, touches each chunk once and looks at each once, in one thread
without any bookkeeping; with everything to delete it also unlinks each. Prints seconds (median of the rounds), the
peak of memory of a collection in a process of its own, and the goals.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datastore.files import Owner, create_file, make_folder, touch_in  # noqa: E402
from datastore.fixed_index import FixedHeader  # noqa: E402
from datastore.gc import collect_garbage  # noqa: E402
from datastore.local_chunks import CHUNK_FOLDER_MODE, fill_chunk_folder  # noqa: E402
from datastore.store import Datastore  # noqa: E402

CHUNK = 4 << 20
DAY = 86_400
#: Seconds for the reference shape, and what the large one may take of the bare calls.
GOALS = {"nothing to delete": 1.2, "everything to delete": 1.5, "large": 2.0}
#: MB of memory of the large shape.
GOAL_MEMORY = 200


def make_store(base: Path, chunks: int, indexes: int, entries: int, groups: int) -> None:
    """A store of `chunks` chunks; every index names `entries` of them, a group's most of the same."""
    base.mkdir()
    owner = Owner.of(base)
    create_file(base / ".lock", b"", owner)
    make_folder(base / ".chunks", owner, CHUNK_FOLDER_MODE)
    fill_chunk_folder(base / ".chunks", owner)
    dice = random.Random(1)
    digests = [dice.randbytes(32) for _ in range(chunks)]
    for digest in digests:
        name = digest.hex()
        Path(f"{base}/.chunks/{name[:4]}/{name}").write_bytes(b"chunk")
    unused = iter(digests)
    image: list[bytes] = []
    per_group = indexes // groups
    for number in range(indexes):
        if number % per_group == 0:
            image = [next(unused, digests[0]) for _ in range(min(entries, chunks // groups))]
            image += dice.choices(digests, k=entries - len(image))
        else:
            changed = max(0, (chunks - groups * min(entries, chunks // groups)) // max(1, indexes - groups))
            for place in dice.sample(range(entries), k=min(entries, changed)):
                image[place] = next(unused, image[place])
        folder = base / f"vm/{number // per_group}" / time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(10**9 + number))
        folder.mkdir(parents=True)
        header = FixedHeader(bytes(16), 1, bytes(32), entries * CHUNK, CHUNK)
        (folder / "drive-scsi0.img.fidx").write_bytes(header.pack() + b"".join(image))


def age(base: Path) -> None:
    """Let two days pass."""
    then = time.time() - 2 * DAY
    for folder in os.scandir(base / ".chunks"):
        for entry in os.scandir(folder.path):
            os.utime(entry.path, (then, then))


def bare(base: Path, *, delete: bool = False) -> float:
    """Seconds of the system calls alone."""
    begun = time.perf_counter()
    for path in base.glob("vm/*/*/*.fidx"):
        path.read_bytes()
    root = str(base / ".chunks")
    names: list[bytes] = []
    for number in range(1 << 16):
        folder = f"{number:04x}"
        for entry in os.scandir(f"{root}/{folder}"):
            names.append(f"{folder}/{entry.name}".encode())
    descriptor = os.open(root, os.O_PATH)
    for name in names:
        touch_in(descriptor, name)
    for name in names:
        os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    if delete:
        for name in names:
            os.unlink(name, dir_fd=descriptor)
    os.close(descriptor)
    return time.perf_counter() - begun


async def _collect(base: Path) -> float:
    store = await Datastore.open(base)
    try:
        begun = time.perf_counter()
        await collect_garbage(store)
        return time.perf_counter() - begun
    finally:
        store.close()


def collect(base: Path) -> tuple[float, float]:
    """Seconds and peak MB of a collection in a process of its own, without its start."""
    command = [sys.executable, __file__, "--collect", str(base)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(answer.stdout)
    return found["seconds"], found["megabytes"]


def drop_indexes(base: Path) -> None:
    shutil.rmtree(base / "vm")
    (base / "vm").mkdir()


def reference(folder: Path, rounds: int) -> list[dict[str, object]]:
    rows = []
    for delete in (False, True):
        ours, limits, memory = [], [], 0.0
        for number in range(rounds):
            base = folder / f"reference-{delete}-{number}"
            make_store(base, 6477, 30, 2301, 3)
            age(base)
            if delete:
                drop_indexes(base)
            if not delete:
                limits.append(bare(base))
                age(base)
            seconds, megabytes = collect(base)
            ours.append(seconds)
            memory = max(memory, megabytes)
            shutil.rmtree(base)
        name = "everything to delete" if delete else "nothing to delete"
        rows.append(
            {
                "name": name,
                "seconds": round(statistics.median(ours), 2),
                "bare": round(statistics.median(limits), 2) if limits else None,
                "MB": round(memory),
                "goal": GOALS[name],
            }
        )
    return rows


def large(folder: Path, rounds: int, scale: float) -> list[dict[str, object]]:
    base = folder / "large"
    make_store(base, int(1_500_000 * scale), max(10, int(6875 * scale)), 4600, max(1, int(230 * scale)))
    ours, limits, memory = [], [], 0.0
    for _ in range(rounds):
        limits.append(bare(base))
        seconds, megabytes = collect(base)
        ours.append(seconds)
        memory = max(memory, megabytes)
    shutil.rmtree(base)
    seconds, limit = statistics.median(ours), statistics.median(limits)
    return [
        {
            "name": f"large, times {scale}",
            "seconds": round(seconds, 2),
            "bare": round(limit, 2),
            "ratio": round(seconds / limit, 2),
            "MB": round(memory),
            "goal": f"ratio {GOALS['large']}, {GOAL_MEMORY} MB",
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["reference", "large"])
    parser.add_argument("--scale", type=float, default=1.0, help="of the large shape")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make the stores (default: in memory, /dev/shm)")
    parser.add_argument("--output", choices=["text", "json"], default="text")
    parser.add_argument("--collect", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.collect:
        seconds = trio.run(_collect, options.collect)
        # Not ru_maxrss: that begins with what the process had that started this one.
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
        print(json.dumps({"seconds": seconds, "megabytes": peak}))
        return
    parent = options.folder or Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fleece-bench-gc-", dir=parent if parent.is_dir() else None))
    rows: list[dict[str, object]] = []
    try:
        if options.shape in (None, "reference"):
            rows += reference(folder, options.rounds)
        if options.shape in (None, "large"):
            rows += large(folder, options.rounds, options.scale)
    finally:
        shutil.rmtree(folder)
    if options.output == "json":
        print(json.dumps(rows))
        return
    for row in rows:
        print(", ".join(f"{key} {value}" if key != "name" else f"{value}:" for key, value in row.items()))


if __name__ == "__main__":
    main()
