"""Dying at the N-th change to the file system, and power cuts after which only what was synced is left.

Run as a program (`python -m tests.support.crash STORE LEVEL kill|power MOST STEP`): for every STEP-th N up to MOST it
forks a child that backs up a small image and dies in its N-th call (or after its last one), then checks the store and
backs up again. Prints a line per problem and a closing line.
"""

import os
import random
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

import datastore.files
from datastore.files import SyncLevel
from datastore.names import Group, Snapshot
from repository.local import open_local
from tests.support.snapshots import CHUNK, put_all, read_image

GROUP = Group.parse("vm/100")
#: Calls that change a file system, or make a change last.
CALLS = (
    "write",
    "writev",
    "pwrite",
    "rename",
    "link",
    "fsync",
    "unlink",
    "mkdir",
    "rmdir",
    "ftruncate",
    "chmod",
    "fchmod",
)


class Journal:
    """What a power cut would take back: data and names that were not synced yet."""

    def __init__(self) -> None:
        self.data: dict[int, str] = {}  # inode -> a path for messages
        self.names: list[tuple[str, str]] = []  # (kind, path), oldest first
        self.given: set[str] = set()  # names that files got

    def note(self, call: str, args: tuple[Any, ...]) -> None:
        """Take down a call that has been made."""
        if call in ("write", "writev", "pwrite", "ftruncate"):
            found = os.fstat(args[0])
            if stat.S_ISREG(found.st_mode):
                self.data[found.st_ino] = str(Path(f"/proc/self/fd/{args[0]}").readlink())
        elif call == "fsync":
            found = os.fstat(args[0])
            path = str(Path(f"/proc/self/fd/{args[0]}").readlink())
            if stat.S_ISDIR(found.st_mode):
                self.names = [entry for entry in self.names if os.path.dirname(entry[1]) != path]  # noqa: PTH120
            else:
                self.data.pop(found.st_ino, None)
        elif call in ("link", "rename"):
            self.names.append((call, os.path.abspath(args[1])))  # noqa: PTH100
            self.given.add(self.names[-1][1])
        elif call == "mkdir":
            self.names.append((call, os.path.abspath(args[0])))  # noqa: PTH100
        elif call == "syncfs":
            self.data.clear()
            self.names.clear()

    def cut_power(self, base: Path, choose: Callable[[str], bool]) -> None:
        """Take back a choice of what was not synced; `choose` gets "name" or "data"."""
        for kind, name in reversed(self.names):
            path = Path(name)
            if not path.is_relative_to(base) or ".fleece" in path.parts or not choose("name"):
                continue
            if kind == "mkdir":
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        # Every file that lasts got its name by a link or a rename.
        for name in self.given:
            path = Path(name)
            if path.is_relative_to(base) and path.is_file() and path.stat().st_ino in self.data and choose("data"):
                os.truncate(path, 0)


@contextmanager
def dying_at(number: int, journal: Journal, on_death: Callable[[], None]) -> Iterator[list[int]]:
    """Let the `number`-th changing call be half done and then run `on_death`; gives a list that holds the count."""
    count = [0]
    real = {name: getattr(os, name) for name in CALLS}
    real_syncfs = datastore.files.sync_filesystem

    def patched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                if name in ("write", "pwrite") and len(args[1]) > 1:
                    args = (args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                    real[name](*args)
                    journal.note(name, args)
                on_death()
            result = real[name](*args, **kwargs)
            journal.note(name, args)
            return result

        return call

    def syncfs(path: Path | int) -> None:
        count[0] += 1
        if count[0] == number:
            on_death()
        real_syncfs(path)
        journal.note("syncfs", ())

    for name in CALLS:
        setattr(os, name, patched(name))
    sys.modules["datastore.local_meta"].sync_filesystem = syncfs  # type: ignore[attr-defined]
    try:
        yield count
    finally:
        for name in CALLS:
            setattr(os, name, real[name])
        sys.modules["datastore.local_meta"].sync_filesystem = real_syncfs  # type: ignore[attr-defined]


@contextmanager
def failing_at(number: int, code: int) -> Iterator[list[int]]:
    """Let the `number`-th changing call fail with the error `code`, once."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    with dying_at(number, Journal(), fail) as count:
        yield count


def image(ctime: int) -> bytes:
    """What the snapshot of `ctime` holds: mostly what its predecessor does."""
    parts = [random.Random(part).randbytes(CHUNK) for part in ("a", "b", f"c{ctime}", f"d{ctime}")]
    return b"".join([*parts, b"end" * 7])


async def back_up(base: Path, level: SyncLevel, ctime: int) -> None:
    """Write the snapshot of `ctime`."""
    repo = await open_local(base, sync_level=level)
    try:
        async with repo.backup(GROUP.at(ctime)) as session:
            await session.previous_index("disk.img.fidx")
            await put_all(session, {"disk.img.fidx": image(ctime), "vm.conf.blob": b"name: crash\n"})
            await session.finish()
    finally:
        repo.close()


async def check(base: Path) -> list[Snapshot]:
    """Read every listed snapshot wholly; returns them."""
    repo = await open_local(base)
    try:
        listed = [info.snapshot for info in await repo.snapshots()]
        for snapshot in listed:
            if await read_image(repo, snapshot, "disk.img.fidx") != image(snapshot.ctime):
                raise AssertionError(f"{snapshot} holds other data")
            async with repo.reader(snapshot) as reader:
                await reader.read_blob("vm.conf.blob")
        return listed
    finally:
        repo.close()


def leftovers(base: Path) -> list[str]:
    """Names below the store that no finished snapshot needs."""
    found = [
        str(path.relative_to(base))
        for path in base.glob("vm/*/*")
        if path.is_dir() and not (path / "index.json.blob").exists()
    ]
    found += [str(path.relative_to(base)) for path in (base / "vm").rglob("*tmp_*")]
    found += [str(path.relative_to(base)) for path in base.glob(".fleece/[tw]*/*")]  # temporary files, writers
    return found


#: Which of the unsynced names and data a power cut takes.
CUTS: dict[str, Callable[[random.Random, str], bool]] = {
    "everything": lambda dice, what: True,
    "data": lambda dice, what: what == "data",
    "half": lambda dice, what: dice.random() < 0.5,
}


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a fork, since threads that trio keeps must not be there at the next fork; its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"  {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main() -> int:
    """See the module."""
    base, level = Path(sys.argv[1]), SyncLevel(sys.argv[2])
    cuts = list(CUTS) if sys.argv[3] == "power" else [""]
    problems, number, ctime = 0, 0, 1000
    in_child(lambda: trio.run(back_up, base, level, ctime))

    def die(journal: Journal, cut: str) -> None:
        if cut:
            dice = random.Random(number)
            journal.cut_power(base, lambda what: CUTS[cut](dice, what))
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(cut: str) -> None:
        journal = Journal()
        with dying_at(number, journal, lambda: die(journal, cut)) as count:
            trio.run(back_up, base, level, ctime)
        if count[0] < number:
            print(f"{count[0]} calls", flush=True)
        die(journal, cut)

    def check_and_go_on() -> None:
        trio.run(check, base)
        trio.run(back_up, base, level, ctime + 5)
        listed = trio.run(check, base)
        if listed[-1].ctime != ctime + 5 or leftovers(base):
            raise AssertionError(f"left over: {leftovers(base)}")

    while number < int(sys.argv[4]):
        number += int(sys.argv[5])
        for cut in cuts:
            ctime += 10
            if not os.WIFSIGNALED(in_child(partial(dying, cut))):
                problems += 1
                print(f"call {number}: an error instead of death")
            if in_child(check_and_go_on) != 0:
                problems += 1
                print(f"call {number}, {cut}: see above")
            for path in sorted(base.glob("vm/*/*Z"))[:-1]:
                shutil.rmtree(path)
    print(f"{problems} problems")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
