"""`fleece find --all-snapshots` with its index, against reading the archives, bare SQLite, and grep of a plain list.

    python bench/find.py [--paths N] [--snapshots N] [--changed N] [--work FOLDER] [--rounds N]

Makes a datastore in FOLDER (default /dev/shm) with a split archive of N paths (default a million, 100 to a folder, one
in 5000 a `.docx`) in several snapshots (default 3) of which each has changed N files (default 1000) against the one
before. Prints JSON, medians of several rounds (default 5), `cpu` in seconds of processor time:

first_build_s       indexing the first snapshot, and paths a second of that
next_build_s        indexing all others together
build_rss_mib       memory of the process that did it, at its highest
index_mib           bytes on the disk
query_s             finding `*.docx` in all snapshots, all but listing them: opening the index, search, paths, snapshots
queries             the same for other patterns, with what they find
command_s           the whole command, with the start of Python, listing snapshots and printing
direct_s            the whole command with --no-index, once

`limit` has what others need for the same list of paths: a GLOB in SQLite over a bare table of the names (`sqlite_s`),
and `grep` of a file with all paths (`grep_s`). Goal: 0.2 s for query_s.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sqlite3
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from repository.stream_backup import StreamBackup

GROUP = "host/million"
CTIME = 1_767_225_600
FILES = 100  # in a folder
ENDINGS = (b".txt", b".py", b".html", b".jpg", b".log", b"")


def tree(paths: int) -> list[tuple[bytes, list[bytes]]]:
    """Folders with the names in them, sorted; the same each time."""
    chance = random.Random(1)
    folders = []
    for folder in range(max(1, paths // (FILES + 1))):
        names: set[bytes] = set()
        while len(names) < FILES:
            word = chance.choice((b"report", b"index", b"image", b"mail"))
            ending = b".docx" if chance.randrange(5000) == 0 else chance.choice(ENDINGS)
            names.add(b"%b-%d%b" % (word, chance.randrange(10**9), ending))
        folders.append((b"folder-%06d" % folder, sorted(names)))
    return folders


def make(store: Path, folders: list[tuple[bytes, list[bytes]]], snapshots: int, changed: int) -> None:
    """A datastore with `snapshots` of the folders; in each one `changed` files are newer than in the one before."""
    from datastore.codec import ChunkCodec
    from datastore.names import Group
    from datastore.store import Datastore
    from pxar.encoder import ArchiveEncoder
    from pxar.metadata import Metadata, Stat, encode_metadata
    from repository.backup import SnapshotWriter
    from repository.local import open_local
    from repository.stream_backup import StreamSpec

    def meta(mode: int, mtime: int) -> bytes:
        return encode_metadata(Metadata(Stat(mode, 0, 1000, 100, mtime, 0)))

    total = len(folders) * FILES
    newer: dict[int, int] = {}

    def write(streams: "Sequence[StreamBackup]") -> None:
        encoder = ArchiveEncoder(*reversed(streams))
        encoder.begin(meta(stat.S_IFDIR | 0o755, CTIME))
        number = 0
        for folder, names in folders:
            encoder.directory(folder, meta(stat.S_IFDIR | 0o755, CTIME))
            for name in names:
                encoder.begin_file(name, meta(stat.S_IFREG | 0o644, newer.get(number, CTIME - number)), 1)
                encoder.content.write(b"x")
                encoder.end_file()
                number += 1
            encoder.end_directory()
        encoder.finish()

    async def run() -> None:
        await Datastore.create(store)
        repo = await open_local(store)
        specs = [StreamSpec("root.ppxar.didx", 4 << 20), StreamSpec("root.mpxar.didx", 4 << 20)]
        chance = random.Random(2)
        for day in range(snapshots):
            async with repo.backup(Group.parse(GROUP).at(CTIME + day * 86400)) as session:
                writer = SnapshotWriter(session, ChunkCodec())
                await writer.add_streams("root", specs, write)
                await writer.finish()
            newer.update({chance.randrange(total): CTIME + day for _ in range(changed)})
        repo.close()

    trio.run(run)


def build(store: Path, snapshots: int) -> dict[str, Any]:
    """Bring the index up to date with the first `snapshots`; run in a process of its own, for its memory."""
    from agent.find_index.answering import update_index
    from agent.find_index.files import IndexFile, repository_key
    from core.progress import Progress
    from datastore.codec import ChunkCodec
    from datastore.names import ROOT as TOP
    from repository.local import open_local

    async def run() -> dict[str, Any]:
        repo = await open_local(store)
        file = IndexFile(await repository_key(repo))
        infos = (await repo.snapshots())[:snapshots]
        begin, cpu = time.perf_counter(), time.process_time()
        done = await update_index(file, repo, infos, [TOP], ChunkCodec(), Progress(), recursive=True)
        assert done is not None
        taken, cpu = time.perf_counter() - begin, time.process_time() - cpu
        repo.close()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"s": taken, "cpu_s": cpu, "entries": done.entries, "rss_mib": peak, "index_mib": file.size / (1 << 20)}

    return trio.run(run)


def query(store: Path, patterns: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds, and what is found, of each pattern in all snapshots; listing them is not measured."""
    from agent.find_index.answering import answers
    from core.progress import Progress
    from datastore.codec import ChunkCodec
    from pxar.patterns import MatchPattern
    from repository.local import open_local

    async def run() -> dict[str, dict[str, float]]:
        repo = await open_local(store)
        infos = {info.snapshot: info for info in await repo.snapshots()}
        result = {}
        for pattern in patterns:
            times, cpus = [], []
            for _ in range(rounds + 1):
                found: list[object] = []
                begin, cpu = time.perf_counter(), time.process_time()
                async with answers(
                    repo, infos, MatchPattern.parse(pattern.encode()), frozenset("dflhbcps"), ChunkCodec(),
                    Progress(), namespaces=None, recursive=True,
                ) as known:  # fmt: skip
                    assert len(known.parts) == len(infos)
                    for snapshot, parts in known.parts.items():
                        for archive, state in parts:
                            await known.found(snapshot, archive, state, found.append)
                times.append(time.perf_counter() - begin)
                cpus.append(time.process_time() - cpu)
            result[pattern] = {
                "s": statistics.median(times[1:]), "cpu_s": statistics.median(cpus[1:]), "found": len(found),
            }  # fmt: skip
        repo.close()
        return result

    return trio.run(run)


def limits(work: Path, folders: list[tuple[bytes, list[bytes]]], rounds: int) -> dict[str, float]:
    """The same search without anything else: GLOB over a table of names, grep over a file of paths."""
    path = work / "paths"
    with path.open("wb") as out:
        for folder, names in folders:
            out.writelines(b"/%b/%b\n" % (folder, name) for name in names)
    connection = sqlite3.connect(work / "names.sqlite")
    connection.execute("CREATE TABLE name(name TEXT PRIMARY KEY, path INTEGER) WITHOUT ROWID")
    rows = ((b"%b %d" % (name, at), at) for at, (_, names) in enumerate(folders) for name in names)
    connection.executemany("INSERT INTO name VALUES(CAST(? AS TEXT), ?)", rows)
    connection.commit()
    globbed = median(lambda: connection.execute("SELECT path FROM name WHERE name GLOB '*.docx *'").fetchall(), rounds)
    connection.close()
    grepped = median(
        lambda: subprocess.run(["grep", "-c", r"\.docx$", path], env={"LC_ALL": "C"}, stdout=subprocess.DEVNULL),
        rounds,
    )
    return {"sqlite_s": globbed, "grep_s": grepped}


def median(work: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def in_process(function: str, *arguments: object) -> Any:
    """The result of a function of this module in a process of its own."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; import bench.find as b; "
        f"print(json.dumps(b.{function}(*eval(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, repr(arguments).replace("PosixPath", "Path")], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


def measure(work: Path, paths: int, snapshots: int, changed: int, rounds: int) -> dict[str, Any]:
    os.environ |= {
        "FLEECE_STATE_DIR": str(work / "state"), "FLEECE_RUN_DIR": str(work / "run"),
        "FLEECE_CONFIG": str(work / "fleece.toml"), "FLEECE_REPOSITORY": str(work / "store"),
    }  # fmt: skip
    (work / "fleece.toml").touch()
    folders = tree(paths)
    make(work / "store", folders, snapshots, changed)
    first = in_process("build", Path(work / "store"), 1)
    others = in_process("build", Path(work / "store"), snapshots)
    name = os.fsdecode(folders[len(folders) // 2][1][50])
    queries = query(work / "store", ["*.docx", "report-12*", name, "folder-0000[0-4]*/**"], rounds)

    def command(*more: str) -> None:
        line = [sys.executable, "-m", "agent.main", "find", "*.docx", "--all-snapshots", "-q", *more]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)

    figures = {
        "paths": sum(len(names) + 1 for _, names in folders),
        "snapshots": snapshots,
        "first_build_s": first["s"],
        "first_build_cpu_s": first["cpu_s"],
        "first_build_per_s": first["entries"] / first["s"],
        "first_build_per_cpu_s": first["entries"] / first["cpu_s"],
        "next_build_s": others["s"],
        "next_build_cpu_s": others["cpu_s"],
        "build_rss_mib": max(first["rss_mib"], others["rss_mib"]),
        "index_mib": others["index_mib"],
        "query_s": queries["*.docx"]["s"],
        "queries": queries,
        "command_s": median(command, rounds),
        "limit": limits(work, folders, rounds),
    }
    begin = time.perf_counter()
    command("--no-index")
    figures["direct_s"] = time.perf_counter() - begin
    figures["ratio_to_sqlite"] = figures["query_s"] / figures["limit"]["sqlite_s"]
    figures["ratio_to_direct"] = figures["direct_s"] / figures["command_s"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=int, default=1_000_000)
    parser.add_argument("--snapshots", type=int, default=3)
    parser.add_argument("--changed", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fleece-find-", dir=given.work))
    try:
        figures = measure(work, given.paths, given.snapshots, given.changed, given.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
