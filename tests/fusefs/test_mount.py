"""Real mounts, each in a process of its own."""

import errno
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from datastore.errors import LockedError
from datastore.names import Snapshot
from repository.local import open_local
from tests.fusefs.mounts import (
    CHUNK,
    CONF,
    ENVIRONMENT,
    FIRST,
    IMAGE,
    KEY,
    MIB,
    SECOND,
    chunk_path,
    command,
    error_of,
    flip_byte,
    is_mounted,
    mounted,
    names,
    read_direct,
    run,
    write,
)
from tests.support.cache import ROOT as CHECKOUT
from tests.support.golden_store import golden_key

pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("fuse")]

FIRST_TIME, SECOND_TIME = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
DISK = f"vm/100/{FIRST_TIME}/drive-scsi0.img"


# One archive, encrypted archives, namespaces, many entries.


def test_one_archive_is_a_folder_with_one_file(shared_store: Path, mountpoint: Path) -> None:
    with mounted(shared_store, mountpoint, "--archive", "vm/100/latest", "drive-scsi0.img") as mount:
        assert names(mount.path) == ["drive-scsi0.img"]
        assert (mount.path / "drive-scsi0.img").read_bytes() == IMAGE
        assert (mount.path / "drive-scsi0.img").stat().st_mtime == SECOND


def test_with_its_key_an_encrypted_snapshot_reads_as_plain(shared_store: Path, mountpoint: Path) -> None:
    with mounted(shared_store, mountpoint, "--key", KEY.raw.hex()) as mount:
        assert (mount.path / "host/web/latest/data.img").read_bytes() == IMAGE
        assert (mount.path / "host/web/latest/note.conf").read_bytes() == CONF
        assert mount.errors() == []


def test_a_group_with_many_snapshots_lists_each_once(store_folder: Path, mountpoint: Path) -> None:
    folder = store_folder / "vm/9"
    trio.run(_one_snapshot, store_folder)
    made = folder / FIRST_TIME
    wanted = {FIRST_TIME, "latest"}
    for number in range(1500):
        name = f"2025-{number // 100 + 1:02}-01T{number % 100 // 60:02}:{number % 60:02}:00Z"
        if number < 1200:
            shutil.copytree(made, folder / name)
            wanted.add(name)
    with mounted(store_folder, mountpoint) as mount:
        assert names(mount.path / "vm/9") == sorted(wanted)


async def _one_snapshot(store: Path) -> None:
    repo = await open_local(store)
    await write(repo, "vm/9", 1_767_225_600, {"a.conf.blob": b"x"})
    repo.close()


def test_owner_and_source_follow_the_options(shared_store: Path, mountpoint: Path) -> None:
    with mounted(shared_store, mountpoint, "-o", "uid=1234,gid=99,fsname=my,allow_other") as m:
        found = (m.path / DISK).stat()
        assert (found.st_uid, found.st_gid) == (1234, 99)
        line = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(m.path) in line)
        source, _, kind, flags, *_ = line.split(" ")
        assert (source, kind) == ("my", "fuse.fleece")
        assert {"ro", "nosuid", "nodev", "default_permissions", "allow_other"} <= set(flags.split(","))


def test_two_mounts_of_one_store_work_side_by_side(shared_store: Path, tmp_path: Path) -> None:
    with mounted(shared_store, tmp_path / "one") as one, mounted(shared_store, tmp_path / "two") as two:
        assert (one.path / DISK).read_bytes() == (two.path / DISK).read_bytes()
        assert one.end() == 0
        assert read_direct(two.path / DISK, 0, 4096) == IMAGE[:4096]


# Faults.


def test_a_corrupt_chunk_is_an_error_of_its_range_only_and_one_line(store: Path, mountpoint: Path) -> None:
    path = chunk_path(store, IMAGE[2 * CHUNK : 3 * CHUNK])
    flip_byte(path, path.stat().st_size // 2)
    with mounted(store, mountpoint) as mount:
        with (mount.path / DISK).open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 2 * CHUNK, 0) == IMAGE[: 2 * CHUNK]
            for _ in range(3):
                for offset in (2 * CHUNK, 2 * CHUNK + 12345, 3 * CHUNK - 4096):
                    with pytest.raises(OSError) as caught:
                        os.pread(file.fileno(), 4096, offset)
                    assert caught.value.errno == errno.EIO
            assert os.pread(file.fileno(), 4096, 2 * CHUNK - 4096) == IMAGE[2 * CHUNK - 4096 : 2 * CHUNK]
            assert os.pread(file.fileno(), 4096, 3 * CHUNK) == IMAGE[3 * CHUNK : 3 * CHUNK + 4096]
            for offset in range(3 * CHUNK, len(IMAGE), MIB):
                assert os.pread(file.fileno(), MIB, offset) == IMAGE[offset : offset + MIB]
        lines = [line for line in mount.errors() if "encrypted" not in line]
        assert len(lines) == 1
        assert f"vm/100/{FIRST_TIME}/drive-scsi0.img.fidx at {2 * CHUNK}" in lines[0]


def test_a_missing_chunk_and_a_broken_index_and_blob_are_errors_of_their_own(store: Path, mountpoint: Path) -> None:
    chunk_path(store, IMAGE[:CHUNK]).unlink()
    flip_byte(store / f"vm/100/{SECOND_TIME}/drive-scsi0.img.fidx", 5000 % 4200)
    flip_byte(store / f"vm/100/{SECOND_TIME}/qemu-server.conf.blob", 20)
    with mounted(store, mountpoint) as mount:
        with pytest.raises(OSError) as caught:
            read_direct(mount.path / DISK, 0, 4096)
        assert caught.value.errno == errno.EIO
        assert read_direct(mount.path / DISK, CHUNK, 4096) == IMAGE[CHUNK : CHUNK + 4096]
        for name in ("drive-scsi0.img", "qemu-server.conf"):
            broken = mount.path / f"vm/100/{SECOND_TIME}" / name
            with pytest.raises(OSError) as caught:
                broken.read_bytes()
            assert caught.value.errno == errno.EIO
            assert name in names(broken.parent)
        assert (mount.path / f"vm/100/{FIRST_TIME}/qemu-server.conf").read_bytes() == CONF


def test_a_snapshot_removed_while_open_is_a_stale_handle(store: Path, mountpoint: Path) -> None:
    with mounted(store, mountpoint, "--watch", "0.2") as mount:
        disk = mount.path / DISK
        descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECT)
        try:
            assert os.pread(descriptor, 4096, 0) == IMAGE[:4096]
            # Somebody who does not know our locks.
            shutil.rmtree(store / f"vm/100/{FIRST_TIME}")
            deadline = time.monotonic() + 60
            while error_of(lambda: os.pread(descriptor, 4096, 3 * CHUNK)) != errno.ESTALE:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            os.close(descriptor)
        # The second one is not concerned.
        assert (mount.path / f"vm/100/{SECOND_TIME}/qemu-server.conf").read_bytes() == CONF
        deadline = time.monotonic() + 60
        while error_of(disk.stat) != errno.ENOENT or FIRST_TIME in names(mount.path / "vm/100"):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_an_open_file_keeps_its_snapshot_from_being_removed_and_a_closed_one_does_not(
    store: Path, mountpoint: Path
) -> None:
    snapshot = Snapshot.parse(f"vm/100/{FIRST_TIME}")

    async def forget() -> None:
        repo = await open_local(store)
        try:
            await repo.forget(snapshot)
        finally:
            repo.close()

    with mounted(store, mountpoint, "--idle", "1", "--watch", "0.3") as mount:
        names(mount.path / f"vm/100/{SECOND_TIME}")
        with (mount.path / DISK).open("rb"):
            time.sleep(1.5)
            with pytest.raises(LockedError):
                trio.run(forget)
        deadline = time.monotonic() + 60
        while True:
            try:
                trio.run(forget)
                break
            except LockedError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert not (store / f"vm/100/{FIRST_TIME}").exists()


def test_a_snapshot_made_anew_under_its_old_name_shows_nothing_of_the_old_one(store: Path, mountpoint: Path) -> None:
    new = IMAGE[4 * CHUNK : 5 * CHUNK] + IMAGE[CHUNK:]

    async def replace() -> None:
        repo = await open_local(store)
        try:
            for name in (FIRST_TIME, SECOND_TIME):
                await repo.forget(Snapshot.parse(f"vm/100/{name}"))
            await write(repo, "vm/100", FIRST, {"drive-scsi0.img.fidx": new, "qemu-server.conf.blob": b"new"})
        finally:
            repo.close()

    with mounted(store, mountpoint, "--idle", "0.2", "--watch", "0.1") as mount:
        assert (mount.path / DISK).read_bytes() == IMAGE
        deadline = time.monotonic() + 60
        while True:
            try:
                trio.run(replace)
                break
            except LockedError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert (mount.path / DISK).read_bytes() == new


def test_a_new_snapshot_shows_up_in_a_mount(store: Path, mountpoint: Path) -> None:
    async def add() -> None:
        repo = await open_local(store)
        await write(repo, "vm/100", SECOND + 86400, {"qemu-server.conf.blob": b"newest"})
        repo.close()

    with mounted(store, mountpoint) as mount:
        assert (mount.path / "vm/100/latest/qemu-server.conf").read_bytes() == CONF
        trio.run(add)
        deadline = time.monotonic() + 60
        while "2026-01-03T00:00:00Z" not in names(mount.path / "vm/100"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert (mount.path / "vm/100/2026-01-03T00:00:00Z/qemu-server.conf").read_bytes() == b"newest"
        deadline = time.monotonic() + 60
        while (mount.path / "vm/100/latest/qemu-server.conf").read_bytes() != b"newest":
            assert time.monotonic() < deadline
            time.sleep(0.2)


# Refusals, and the background.


@pytest.mark.parametrize("background", [[], ["--background"]])
def test_it_refuses_to_mount_over_the_datastore(store: Path, background: list[str]) -> None:
    (store / "inner").mkdir()
    for place, why in (
        (store, "datastore itself"),
        (store / "inner", "inside the datastore"),
        (store.parent, "hidden"),
    ):
        refused = run(store, place, *background)
        assert refused.returncode == 1
        assert why in refused.stderr
        assert not is_mounted(place)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--archive", "vm/100/latest", "none.img"], "the snapshot has no such archive; it has: drive-scsi0.img"),
        (
            ["--archive", "vm/100/latest", "catalog.pcat1"],
            "only disk images, file archives and small files can be mounted",
        ),
        (["--archive", "vm/777/latest", "a.img"], "the group has no finished snapshot"),
        (["--archive", f"host/web/{FIRST_TIME}", "data.img"], "is needed, none is given"),
        (["--archive", "vm/100/2030-01-01T00:00:00Z", "a.img"], "vm/100/2030-01-01T00:00:00Z"),
        (["--ns", "no/such"], "does not exist"),
    ],
)
def test_what_cannot_be_shown_is_said_before_there_is_a_mount(
    shared_store: Path, mountpoint: Path, options: list[str], why: str
) -> None:
    mountpoint.mkdir()
    for background in ([], ["--background"]):
        refused = run(shared_store, mountpoint, *options, *background)
        assert refused.returncode in (1, 2)
        assert why in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not is_mounted(mountpoint)


def test_what_libfuse_says_becomes_the_reason(shared_store: Path, mountpoint: Path) -> None:
    mountpoint.mkdir()
    refused = run(shared_store, mountpoint, "-o", "context=nonsense")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: cannot mount on")
    assert len(refused.stderr.splitlines()) == 1


def test_in_the_background_the_mount_is_usable_when_the_command_returns(
    shared_store: Path, mountpoint: Path, tmp_path: Path
) -> None:
    mountpoint.mkdir()
    log = tmp_path / "log"
    started = run(shared_store, mountpoint, "--background", "-o", f"log={log}")
    try:
        assert (started.returncode, started.stdout, started.stderr) == (0, "ready\n", "")
        assert is_mounted(mountpoint)
        assert (mountpoint / f"vm/100/{FIRST_TIME}/qemu-server.conf").read_bytes() == CONF
        names(mountpoint / f"host/web/{FIRST_TIME}")
        assert "encrypted archives are not shown" in log.read_text()
    finally:
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True, timeout=60)
    assert not is_mounted(mountpoint)


def test_the_background_keeps_no_pipe_of_its_caller_open(shared_store: Path, mountpoint: Path) -> None:
    mountpoint.mkdir()
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    words = command(shared_store, mountpoint, "--background")
    subprocess.run(words, check=True, timeout=60, cwd=CHECKOUT, env=ENVIRONMENT, close_fds=False)
    os.close(writing)
    try:
        readable, _, _ = select.select([reading], [], [], 20)
        assert readable
        assert os.read(reading, 1) == b""
    finally:
        os.close(reading)
        subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True, timeout=60)


@pytest.mark.parametrize("background", [[], ["--background"]])
def test_a_caller_without_standard_streams_gets_a_mount(
    shared_store: Path, mountpoint: Path, background: list[str]
) -> None:
    mountpoint.mkdir()
    words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command(shared_store, mountpoint, *background)]
    with subprocess.Popen(words, cwd=CHECKOUT, env=ENVIRONMENT) as process:
        try:
            if background:
                assert process.wait(60) == 0
            deadline = time.monotonic() + 60
            while not is_mounted(mountpoint):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert (mountpoint / DISK).stat().st_size == len(IMAGE)
        finally:
            if is_mounted(mountpoint):
                subprocess.run(["fusermount3", "-u", str(mountpoint)], check=True, timeout=60)


def test_a_command_that_was_killed_leaves_no_mount_to_be_made_in_the_background() -> None:
    code = (
        "import os; from core.background import Background, run_and_exit; from core.errors import FleeceError;"
        "reading, writing = os.pipe(); os.close(reading);"
        "run_and_exit(lambda ready: ready(None), writing, Background('mount on', '/mnt', 'fleece mount', FleeceError))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, env=ENVIRONMENT, timeout=60).returncode == 1


# mount(8).


@pytest.mark.skipif(os.getuid() != 0, reason="mount(8) is for root")
@pytest.mark.parametrize("kind", ["fleece", "fuse.fleece"])
def test_mount_8_mounts_through_the_helper(shared_store: Path, mountpoint: Path, tmp_path: Path, kind: str) -> None:
    helper = Path("/sbin") / f"mount.{kind}"
    script = CHECKOUT / ".venv/bin/mount.fleece"
    if shutil.which("mount") is None or not script.exists():
        pytest.skip("mount(8) or the script mount.fleece is not installed")
    if helper.exists():
        pytest.skip(f"{helper} is there already")
    mountpoint.mkdir()
    helper.symlink_to(script)
    try:
        subprocess.run(
            ["mount", "-t", kind, "-o", "ns=a/b,_netdev,cache=32M", str(shared_store), str(mountpoint)],
            check=True, timeout=60, capture_output=True,
        )  # fmt: skip
        try:
            assert (mountpoint / "vm/100/latest/qemu-server.conf").read_bytes() == b"other"
        finally:
            subprocess.run(["umount", str(mountpoint)], check=True, timeout=60)
        failed = subprocess.run(
            ["mount", "-t", kind, str(tmp_path / "nowhere"), str(mountpoint)],
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert failed.returncode == 32
        assert "cannot" in failed.stderr
    finally:
        helper.unlink()


# What a real PBS wrote.


@pytest.mark.parametrize("with_key", [False, True])
def test_a_datastore_of_pbs_shows_the_digests_that_pbs_had(
    golden: Path, golden_store: Path, mountpoint: Path, with_key: bool
) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    key = golden_key(golden)
    signed = expected["host/signed/2026-01-01T00:00:00Z"]["data.img.fidx"]["content-sha256"]
    seen = 0
    with mounted(golden_store, mountpoint, *(["--key", key.hex()] if with_key else [])) as mount:
        for snapshot, files in expected.items():
            shown = set(names(mount.path / snapshot))
            for filename, facts in files.items():
                name = filename.rpartition(".")[0]
                if filename.endswith(".pxar.didx"):
                    continue
                if not filename.endswith((".fidx", ".blob")):
                    assert name not in shown
                    continue
                content = facts.get("content-sha256")
                if content is None and not (with_key and snapshot.startswith("host/enc")):
                    assert name not in shown
                    continue
                path = mount.path / snapshot / name
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                seen += 1
                if content is not None:
                    assert digest == content
                elif filename.endswith(".fidx"):
                    # The same bytes as the signed, not encrypted one.
                    assert digest == signed
                if filename.endswith(".fidx"):
                    assert path.stat().st_size == facts["size"]
    assert seen == (11 if with_key else 8)
