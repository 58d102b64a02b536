"""`fleece mount` of a file archive with a million entries, against the same names served from memory.

    python bench/mount_archive.py [--entries N] [--folders N] [--work FOLDER] [--whole] [--rounds N]

Makes a split archive (with `--whole` a self-contained one) of N entries, most of them files of a few bytes, in a
datastore in FOLDER (default /dev/shm) and mounts it. Prints JSON:

first_ls_s      seconds of the first `ls` after mounting
find_per_s      entries a second of `find`, which only needs names
stat_per_s      entries a second of `find -size`, which needs attributes
peak_rss_mib    memory of the serving process at the end

`limit` has the rates of a file system in the fewest lines that pyfuse3 allows, which serves the same names from
memory: what FUSE, trio and Python allow on this machine. Goals: 0.3 s, 100 000 entries a second, below 300 MiB.
"""

import argparse
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import pyfuse3

    from repository.stream_backup import StreamBackup

GROUP = "host/million"
CTIME = 1_767_225_600


def folder_name(number: int) -> bytes:
    return b"folder-%05d" % number


def file_name(number: int) -> bytes:
    return b"document-%06d.txt" % number


def make(store: Path, folders: int, files: int, whole: bool) -> None:
    """A datastore with one snapshot: `folders` folders of `files` files each."""
    from datastore.codec import ChunkCodec
    from datastore.names import Group
    from datastore.store import Datastore
    from pxar.encoder import ArchiveEncoder
    from pxar.metadata import Metadata, Stat, encode_metadata
    from repository.backup import SnapshotWriter
    from repository.local import open_local
    from repository.stream_backup import StreamSpec

    def meta(mode: int, number: int) -> bytes:
        return encode_metadata(Metadata(Stat(mode, 0, 1000 + number % 7, 100, 1_700_000_000 + number, number * 1001)))

    def write(streams: "Sequence[StreamBackup]") -> None:
        encoder = ArchiveEncoder(*reversed(streams))
        encoder.begin(meta(stat.S_IFDIR | 0o755, 0))
        for folder in range(folders):
            encoder.directory(folder_name(folder), meta(stat.S_IFDIR | 0o755, folder))
            for number in range(files):
                content = b"%d\n" % (folder * files + number)
                encoder.begin_file(file_name(number), meta(stat.S_IFREG | 0o644, number), len(content))
                encoder.content.write(content)
                encoder.end_file()
            encoder.end_directory()
        encoder.finish()

    async def run() -> None:
        await Datastore.create(store)
        repo = await open_local(store)
        specs = [StreamSpec("root.pxar.didx", 4 << 20)]
        if not whole:
            specs = [StreamSpec("root.ppxar.didx", 4 << 20), StreamSpec("root.mpxar.didx", 4 << 20)]
        async with repo.backup(Group.parse(GROUP).at(CTIME)) as session:
            writer = SnapshotWriter(session, ChunkCodec())
            await writer.add_streams("root", specs, write)
            await writer.finish()
        repo.close()

    trio.run(run)


def serve_memory(mountpoint: str, folders: int, files: int) -> None:
    """Serve the names of `make` from memory, in the fewest steps."""
    import pyfuse3

    from bench.fuse_memory import serve
    from fusefs.kernel import mount_options

    inner = [file_name(number) for number in range(files)]
    outer = [folder_name(number) for number in range(folders)]

    class Names(pyfuse3.Operations):
        supports_dot_lookup = False

        def __init__(self) -> None:
            super().__init__()
            self.folder, self.file = pyfuse3.EntryAttributes(), pyfuse3.EntryAttributes()
            self.folder.st_mode, self.file.st_mode = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644
            for entry in (self.folder, self.file):
                entry.st_nlink = 1
                entry.entry_timeout = entry.attr_timeout = 3600

        async def getattr(self, inode: int, ctx: "pyfuse3.RequestContext") -> "pyfuse3.EntryAttributes":
            self.folder.st_ino = inode
            return self.folder

        async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> "pyfuse3.EntryAttributes":
            raise pyfuse3.FUSEError(2)

        async def opendir(self, inode: int, ctx: object) -> int:
            return inode

        async def readdir(self, fh: int, start_id: int, token: "pyfuse3.ReaddirToken") -> None:
            names, entry = (outer, self.folder) if fh == pyfuse3.ROOT_INODE else (inner, self.file)
            base = 2 if fh == pyfuse3.ROOT_INODE else fh << 32
            reply = pyfuse3.readdir_reply
            for number in range(start_id, len(names)):
                entry.st_ino = base + number
                if not reply(token, names[number], entry, number + 1):
                    break

        async def releasedir(self, fh: int) -> None:
            pass

        async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
            pass

    pyfuse3.init(Names(), mountpoint, mount_options("memory"))
    try:
        trio.run(serve, mountpoint)
    finally:
        pyfuse3.close(unmount=True)


def serve_archive(mountpoint: str, store: Path) -> None:
    """Serve the archive that `make` made, as `fleece mount` does."""
    from collections.abc import AsyncIterator
    from contextlib import asynccontextmanager

    from datastore.names import Group
    from fusefs.mount import OneArchive, mount
    from repository.interface import Repository
    from repository.local import open_local

    @asynccontextmanager
    async def open_repository() -> AsyncIterator[Repository]:
        repo = await open_local(store)
        yield repo
        repo.close()

    archive = OneArchive(Group.parse(GROUP), "root.pxar")
    ready = lambda: print("ready", flush=True)  # noqa: E731
    mount(open_repository, Path(mountpoint), archive=archive, store=store, foreground=True, on_ready=ready)


@contextmanager
def served(mountpoint: Path, *words: str) -> Iterator[int]:
    """Mount in another process while the block runs; its id."""
    command = [sys.executable, __file__, "--serve", str(mountpoint), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise SystemExit("the mount did not get ready")
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def measure(pid: int, mountpoint: Path, rounds: int) -> dict[str, float]:
    started = time.perf_counter()
    subprocess.run(["ls", mountpoint], check=True, stdout=subprocess.DEVNULL)
    result = {"first_ls_s": round(time.perf_counter() - started, 3)}
    for key, test in (("find_per_s", ["-printf", "."]), ("stat_per_s", ["-size", "-100G", "-printf", "."])):
        best = 0.0
        for _ in range(rounds):
            started = time.perf_counter()
            found = subprocess.run(["find", mountpoint, *test], check=True, stdout=subprocess.PIPE).stdout
            best = max(best, len(found) / (time.perf_counter() - started))
        result[key] = round(best)
        result["entries"] = len(found)
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    result["peak_rss_mib"] = next(int(line.split()[1]) >> 10 for line in status if line.startswith("VmHWM"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--whole", action="store_true", help="a self-contained archive")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    files = max(1, arguments.entries // arguments.folders - 1)
    if arguments.serve:
        mountpoint, *store = arguments.serve
        if store:
            serve_archive(mountpoint, Path(store[0]))
        else:
            serve_memory(mountpoint, arguments.folders, files)
        return
    work = Path(tempfile.mkdtemp(prefix="mount-archive-", dir=arguments.work))
    try:
        sizes = ["--entries", str(arguments.entries), "--folders", str(arguments.folders)]
        make(work / "store", arguments.folders, files, arguments.whole)
        (work / "mnt").mkdir()
        with served(work / "mnt", str(work / "store"), *sizes) as pid:
            archive = measure(pid, work / "mnt", arguments.rounds)
        with served(work / "mnt", *sizes) as pid:
            limit = measure(pid, work / "mnt", arguments.rounds)
        print(json.dumps({"archive": archive, "limit": limit, "cpus": os.cpu_count()}, indent=2))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
