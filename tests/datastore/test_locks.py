import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from datastore.errors import LockedError, StoreError
from datastore.files import Owner
from datastore.locks import LOCK_FOLDER, ChunkLocks, HeldLock, LockRoot, ProcessLocker, StoreLocks, escape, lock_file
from datastore.names import ROOT, Group, Namespace, Snapshot
from datastore.s3.chunk_locks import hold

SNAPSHOT = Snapshot.parse("vm/100/2022-05-02T08:11:33Z")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / ".lock").touch()
    return tmp_path


@pytest.fixture
def locks(base: Path) -> StoreLocks:
    return StoreLocks(lambda: [LockRoot(base, LOCK_FOLDER, Owner.of(base))])


def child(script: str, *args: object) -> "subprocess.Popen[str]":
    """Another process that runs `script` and prints a line when it is ready; it ends with its standard input."""
    command = [sys.executable, "-c", script, *map(str, args)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.communicate(timeout=10)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("vm/100", "vm-100"),
        ("vm/100/2022-05-02T08:11:33Z", r"vm-100-2022\x2d05\x2d02T08\x3a11\x3a33Z"),
        (
            "host/my-host/2022-05-02T08:11:33Z/.index.json.lck",
            r"host-my\x2dhost-2022\x2d05\x2d02T08\x3a11\x3a33Z-.index.json.lck",
        ),
        (".hidden", r"\x2ehidden"),
    ],
)
def test_lock_names_are_escaped_as_systemd_does(path: str, expected: str) -> None:
    assert escape(path) == expected


def test_lock_file_of_a_namespace_lies_in_a_folder_with_colons() -> None:
    assert lock_file(Namespace.parse("ns1/ns2"), "vm/100") == "ns1:ns2/vm-100"


def test_very_long_names_are_hashed() -> None:
    name = lock_file(ROOT, f"host/{'a' * 300}")
    assert name.startswith("hashed/host-aaa")
    assert len(name.rpartition("/")[2]) == 80 + 3 + 80 + 1 + 64
    assert lock_file(ROOT, f"host/{'a' * 249}") == f"host-{'a' * 249}"


async def test_a_group_is_held_by_one_at_a_time(locks: StoreLocks) -> None:
    async with locks.group(SNAPSHOT.group):
        with pytest.raises(LockedError, match="group vm/100: another backup"):
            async with locks.group(SNAPSHOT.group):
                pass
    async with locks.group(SNAPSHOT.group):
        pass


async def test_readers_share_a_snapshot_and_exclude_its_removal(locks: StoreLocks) -> None:
    async with locks.snapshot(SNAPSHOT, shared=True), locks.snapshot(SNAPSHOT, shared=True):
        with pytest.raises(LockedError):
            await locks.acquire_snapshot(SNAPSHOT, shared=False)
    (await locks.acquire_snapshot(SNAPSHOT, shared=False)).release()


async def test_a_wait_ends_when_the_holder_lets_go(locks: StoreLocks, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        started = trio.current_time()
        held = await locks.acquire_group(SNAPSHOT.group)
        nursery.start_soon(_release_later, held)
        async with locks.group(SNAPSHOT.group, wait_s=10):
            assert trio.current_time() >= started + 3


async def _release_later(held: HeldLock) -> None:
    await trio.sleep(3)
    held.release()


async def test_a_lock_file_that_is_removed_while_waiting_is_not_trusted(locks: StoreLocks, base: Path) -> None:
    first = await locks.acquire_snapshot(SNAPSHOT, shared=False)
    first.release(unlink=True)
    path = base / LOCK_FOLDER / lock_file(ROOT, str(SNAPSHOT))
    assert not path.exists()
    async with locks.snapshot(SNAPSHOT, shared=False):
        assert path.exists()


async def test_a_killed_holder_leaves_no_lock(locks: StoreLocks, base: Path) -> None:
    script = """
import sys, trio
from pathlib import Path
from datastore.files import Owner
from datastore.locks import LOCK_FOLDER, LockRoot, StoreLocks
from datastore.names import Group
async def main():
    base = Path(sys.argv[1])
    await StoreLocks(lambda: [LockRoot(base, LOCK_FOLDER, Owner.of(base))]).acquire_group(Group.parse("vm/100"))
    print("ready", flush=True)
    await trio.sleep_forever()
trio.run(main)
"""
    holder = child(script, base)
    with pytest.raises(LockedError):
        await locks.acquire_group(SNAPSHOT.group)
    holder.kill()
    end(holder)
    async with locks.group(SNAPSHOT.group):
        pass


async def test_lock_files_have_the_mode_that_lets_pbs_open_them(locks: StoreLocks, base: Path) -> None:
    async with locks.group(SNAPSHOT.group):
        assert (base / LOCK_FOLDER / "vm-100").stat().st_mode & 0o777 == 0o660


# The store's .lock. What PBS does is a whole-file POSIX record lock in another process.

PBS = """
import fcntl, sys
file = open(sys.argv[1] + "/.lock", "r+")
try:
    fcntl.lockf(file, getattr(fcntl, sys.argv[2]) | fcntl.LOCK_NB)
    print("locked", flush=True)
except OSError:
    print("refused", flush=True)
sys.stdin.read()
"""


def pbs(base: Path, kind: str) -> tuple["subprocess.Popen[str]", str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PBS, str(base), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


async def test_writers_run_beside_each_other_and_beside_our_own_garbage_collection(base: Path) -> None:
    locker = ProcessLocker(base, Owner.of(base))
    async with locker.writer(wait_s=0) as first, locker.writer(wait_s=0), locker.exclusive(wait_s=0) as oldest:
        assert oldest == first.start
    async with locker.exclusive(wait_s=0) as oldest:
        assert oldest is None


async def test_only_one_garbage_collection_runs(base: Path) -> None:
    locker = ProcessLocker(base, Owner.of(base))
    async with locker.exclusive(wait_s=0):
        with pytest.raises(LockedError, match="another garbage collection is running"):
            async with ProcessLocker(base, Owner.of(base)).exclusive(wait_s=0):
                pass


@pytest.mark.parametrize(("ours", "pbs_kind", "answer"), [
    ("writer", "LOCK_EX", "refused"),
    ("writer", "LOCK_SH", "locked"),
    ("exclusive", "LOCK_EX", "refused"),
    ("exclusive", "LOCK_SH", "refused"),
])  # fmt: skip
async def test_pbs_is_excluded_as_it_would_exclude_itself(base: Path, ours: str, pbs_kind: str, answer: str) -> None:
    async with getattr(ProcessLocker(base, Owner.of(base)), ours)(wait_s=0):
        process, said = pbs(base, pbs_kind)
        end(process)
        assert said == answer


async def test_garbage_collection_of_pbs_makes_writers_wait_and_is_named(base: Path) -> None:
    process, said = pbs(base, "LOCK_EX")
    assert said == "locked"
    with pytest.raises(LockedError, match=f"process {process.pid} holds its lock"):
        async with ProcessLocker(base, Owner.of(base)).writer(wait_s=0):
            pass
    end(process)


async def test_dead_writers_are_forgotten_and_living_ones_of_other_processes_count(base: Path) -> None:
    script = """
import sys, trio
from pathlib import Path
from datastore.files import Owner
from datastore.locks import ProcessLocker
async def main():
    base = Path(sys.argv[1])
    async with ProcessLocker(base, Owner.of(base)).writer(wait_s=0):
        print("ready", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    process = child(script, base)
    locker = ProcessLocker(base, Owner.of(base))
    assert [writer.pid for writer in locker.writers()] == [process.pid]
    process.kill()
    end(process)
    (left,) = (base / ".fleece/writers").iterdir()
    async with locker.writer(wait_s=0):
        assert not left.exists()  # the next writer cleans up as well
    assert locker.writers() == []
    assert list((base / ".fleece/writers").iterdir()) == []


async def test_a_registry_that_cannot_be_read_stops_garbage_collection_but_no_writer(base: Path) -> None:
    (base / ".fleece/writers/folder").mkdir(parents=True)
    locker = ProcessLocker(base, Owner.of(base))
    async with locker.writer(wait_s=0):
        pass
    with pytest.raises(StoreError, match=r"cannot look for writers of .*: Is a directory"):
        async with locker.exclusive(wait_s=0):
            pass


async def test_a_file_system_without_locks_is_a_clear_error(
    base: Path, locks: StoreLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StoreError, match=r"cannot lock .*/vm-100: No locks available"):
        await locks.acquire_group(Group.parse("vm/100"))
    with pytest.raises(StoreError, match=r"cannot lock .*/\.lock: No locks available"):
        async with ProcessLocker(base, Owner.of(base)).writer(wait_s=0):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def test_a_registry_entry_that_is_nonsense_still_counts_as_a_writer(base: Path) -> None:
    locker = ProcessLocker(base, Owner.of(base))
    async with locker.writer(wait_s=0):
        (entry,) = (base / ".fleece/writers").iterdir()
        for nonsense in ("", "[]", "{", json.dumps({"pid": "x", "host": 1, "start": 2})):
            entry.write_text(nonsense)
            assert len(locker.writers()) == 1


# Chunk locks.


def test_a_chunk_is_held_by_one_thread_at_a_time(base: Path) -> None:
    locks = ChunkLocks(base, Owner.of(base))
    digest = os.urandom(32)
    entered = threading.Event()

    def second() -> None:
        with locks.hold(digest):
            entered.set()

    with locks.hold(digest):
        with locks.hold(os.urandom(32)):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(5)
    assert entered.is_set()
    locks.close()


def test_a_chunk_held_by_another_process_is_waited_for_and_then_given_up(base: Path) -> None:
    script = """
import sys
from pathlib import Path
from datastore.files import Owner
from datastore.locks import ChunkLocks
base = Path(sys.argv[1])
with ChunkLocks(base, Owner.of(base)).hold(bytes.fromhex(sys.argv[2])):
    print("ready", flush=True)
    sys.stdin.read()
"""
    digest = bytes(range(32))
    process = child(script, base, digest.hex())
    locks = ChunkLocks(base, Owner.of(base))
    with pytest.raises(LockedError, match=digest.hex()), locks.hold(digest, wait_s=0.05):
        pass
    with locks.hold(bytes(32), wait_s=0.05):
        pass
    process.kill()
    end(process)
    with locks.hold(digest, wait_s=5):
        pass
    locks.close()


async def test_a_file_system_without_such_locks_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, command: int, request: bytes) -> bytes:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    with pytest.raises(StoreError, match="has no open-file-description locks"):
        async with ProcessLocker(base, Owner.of(base)).writer(wait_s=0):
            pass


async def test_tasks_and_threads_share_the_locks_of_chunks(base: Path) -> None:
    locks, other = ChunkLocks(base, Owner.of(base)), ChunkLocks(base, Owner.of(base))
    digest = bytes(32)
    assert locks.try_acquire(digest)
    assert not locks.try_acquire(digest)
    assert not other.try_acquire(digest)  # as another process would
    with pytest.raises(LockedError, match=digest.hex()):
        async with hold(locks, digest, wait_s=0.01):
            pass
    async with trio.open_nursery() as nursery:
        entered = trio.Event()

        async def waits() -> None:
            async with hold(other, digest):
                entered.set()

        nursery.start_soon(waits)
        await trio.sleep(0.02)
        assert not entered.is_set()
        locks.release(digest)
        await entered.wait()
    with locks.hold(digest, wait_s=0), other.hold(b"\xff" * 32, wait_s=0):
        pass
    locks.close()
    other.close()
