"""Containers of Proxmox VE by the mechanism `directory`: read as their own root, in a user namespace."""

import os
import re
import shlex
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from hypervisor.unix_socket import process_start_time
from tests.provider.plugin import Died, Plugin, Worker
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("as_root")

#: The host's user that is the container's root.
ROOT_ID = 100000
CONFIG = "arch: amd64\nhostname: tür\n#Notiz: grün\n"
FIREWALL = "[OPTIONS]\nenable: 1\n"
START = 1_700_000_000
NAME = "ct/101/2023-11-14T22:13:20Z"


@pytest.fixture
def mounts() -> Iterator[Path]:
    """A folder that every user can reach, as the mount points of the hypervisor are."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def make_container(folder: Path) -> None:
    """A root file system as it lies on the host: owners are shifted."""
    folder.mkdir()
    (folder / "etc").mkdir(mode=0o755)
    (folder / "etc/hostname").write_text("web\n")
    (folder / "etc/shadow").write_text("secret")
    (folder / "etc/shadow").chmod(0o600)
    (folder / "bin").symlink_to("usr/bin")
    (folder / "sbin").symlink_to("usr/sbin")
    (folder / "dev").mkdir()
    (folder / "dev/device").write_text("x")
    (folder / "var").mkdir()
    (folder / "var/data").write_bytes(os.urandom(3 << 20))
    (folder / "var/link").hardlink_to(folder / "var/data")
    os.mkfifo(folder / "var/pipe")
    (folder / "tmp").mkdir(mode=0o1777)
    (folder / "tmp/left-out").write_text("x")
    owners = {"etc/shadow": 42, "var/data": 1000, "var/link": 1000}
    for path in sorted([folder, *folder.rglob("*")]):
        owner = ROOT_ID + owners.get(str(path.relative_to(folder)), 0)
        os.chown(path, owner, owner, follow_symlinks=False)
    os.setxattr(folder / "etc/hostname", "user.test", b"\x00\xffvalue")
    # Of the namespace whose root is ROOT_ID: version 3, which the container's root sees as version 2.
    capability = bytes.fromhex("01000003 00040000 00000000 00000000 00000000") + ROOT_ID.to_bytes(4, "little")
    os.setxattr(folder / "var/data", "security.capability", capability)


def described(folder: Path, shift: int) -> dict[str, Any]:
    """Everything in `folder`, with owners as the container sees them."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: Any = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)  # noqa: PTH115
        names = os.listxattr(path, follow_symlinks=False)
        attributes = {name: os.getxattr(path, name, follow_symlinks=False)[1:20] for name in names}
        if "security.capability" in attributes:
            attributes["security.capability"] = b""  # its version differs with who looks
        owner = (status.st_uid - shift, status.st_gid - shift)
        found[str(path.relative_to(folder))] = (status.st_mode, owner, status.st_mtime_ns, content, attributes)
    return found


async def back_up(plugin: Plugin, folder: Path, start: int = START, **info: Any) -> Any:
    """One backup as the hypervisor makes it."""
    name = (await plugin("backup_init", 101, "lxc", start))["archive-name"]
    assert await plugin("backup_get_mechanism", 101, "lxc") == "directory"
    await plugin("backup_container_prepare", 101, {})
    info = {"directory": str(folder), "sources": ["."], "backup-user-id": ROOT_ID, "firewall-config": FIREWALL, **info}
    await plugin.forked(ROOT_ID, "backup_container", 101, CONFIG, ["/tmp/?*"], info)
    stats = await plugin("backup_cleanup", 101, "lxc", 1, {})
    assert stats["stats"]["archive-size"] > 3 << 20
    return name


#: How the hypervisor calls tar, beside what is its own of each call.
TAR_FLAGS = [
    "--one-file-system", "-p", "--sparse", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=user.*",
    "--xattrs-include=security.capability", "--warning=no-file-ignored", "--warning=no-xattr-write",
]  # fmt: skip


async def unpack(given: dict[str, str], target: Path) -> None:
    """Restore as the hypervisor does. A tar it opens, lists by its name, and unpacks from what it has opened."""
    unpacking = ["tar", "xpf", "-", "--totals", *TAR_FLAGS, "-C", str(target)]
    unpacking += ["--skip-old-files", "--anchored", "--exclude", "./dev/*"]
    if "tar-path" in given:
        path = given["tar-path"]
        assert Path(path).is_file()
        with Path(path).open("rb") as opened:
            listing = await trio.run_process(["tar", "-tvf", path, "--numeric-owner"], capture_stdout=True)
            assert len(listing.stdout.splitlines()) >= 10
            assert re.search(rb"(?m)^l.* (\./)?sbin -> ", listing.stdout)
            await trio.run_process(unpacking, stdin=opened, capture_stderr=True)
    else:
        assert Path(given["archive-directory"]).is_dir()
        flags = [flag for flag in TAR_FLAGS if flag != "--one-file-system"]
        packing = ["tar", "cpf", "-", *flags, f"--directory={given['archive-directory']}", "--", "."]
        piped = f"set -o pipefail; {shlex.join(packing)} | {shlex.join(unpacking)}"
        await trio.run_process(["bash", "-c", piped], capture_stderr=True)


@pytest.mark.parametrize("mechanism", ["tar", pytest.param("directory", marks=pytest.mark.fuse)])
async def test_what_a_container_has_comes_back(worker: Worker, mounts: Path, mechanism: str) -> None:
    folder, target = mounts / "ct", mounts / "back"
    make_container(folder)
    target.mkdir()
    worker.scfg["fleece-container-restore"] = mechanism
    async with worker.started() as plugin:
        name = await back_up(plugin, folder)
        assert name == NAME
        (volume,) = await plugin.storage("list_volumes", "fleece", "@scfg", None, ["backup"])
        assert volume["volid"] == f"fleece:backup/{NAME}"
        assert (volume["subtype"], volume["vmid"], volume["ctime"]) == ("lxc", 101, START)
        volname = f"backup/{NAME}"
        assert await plugin("restore_get_mechanism", volname) == [mechanism, "lxc"]
        assert await plugin("archive_get_guest_config", volname) == CONFIG
        assert await plugin("archive_get_firewall_config", volname) == FIREWALL
        await unpack(await plugin("restore_container_init", volname, "fleece", {}), target)
        await plugin("restore_container_cleanup", volname, "fleece", {})
        assert plugin.children() == []
    (folder / "tmp/left-out").unlink()
    expected, found = described(folder, ROOT_ID), described(target, 0)
    # As in Proxmox's own backups the archive says what was left out of it.
    assert found.pop(".pxarexclude-cli")[3] == b"/tmp/?*\nlost+found\n"
    # That changed the folder's time.
    mode, owner, _, *rest = expected.pop("tmp")
    assert [found["tmp"][0], found["tmp"][1], *found.pop("tmp")[3:]] == [mode, owner, *rest]
    # What the hypervisor always leaves out.
    assert expected.pop("dev/device")
    assert found == expected
    assert (target / "var/data").stat().st_ino == (target / "var/link").stat().st_ino


async def test_what_does_not_go_well(worker: Worker, mounts: Path) -> None:
    folder = mounts / "ct"
    make_container(folder)
    async with worker.started() as plugin:
        with pytest.raises(Died, match="there is no backup that has begun"):
            await plugin("backup_container_prepare", 101, {})
        await plugin("backup_init", 101, "lxc", START)
        with pytest.raises(Died, match="guest is of the type lxc"):
            await plugin("backup_vm_query_incremental", 101, {"drive-scsi0": {"size": 512}})
        info = {"directory": str(folder / "not-there"), "sources": ["."]}
        with pytest.raises(Died, match=r"not-there.*No such file"):
            await plugin.forked(ROOT_ID, "backup_container", 101, CONFIG, [], info)
        await plugin("backup_cleanup", 101, "lxc", 0, {"error": "no"})
        assert plugin.children() == []
        # A file that the container's root may not read is none of its own: it is left out, with a warning.
        os.chown(folder / "etc/shadow", 0, 0)
        (folder / "lost+found").mkdir(mode=0o700)  # nor may it read this one, which nobody wants to hear of
        await back_up(plugin, folder)
        assert [text for level, text in plugin.log if level == "warn"] == [
            "root.pxar: 'etc/shadow' cannot be read and was left out: Permission denied"
        ]
        volname = f"backup/{NAME}"
        with pytest.raises(Died, match="no disks"):
            await plugin("restore_vm_init", volname)
        assert plugin.children() == []
    assert list((worker.home / "run").rglob("restore-*")) == []


def walkers(folder: Path) -> list[int]:
    """Processes that have `folder` open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(fd).startswith(str(folder)) for fd in (process / "fd").iterdir()):  # noqa: PTH115
                found.append(int(process.name))
    return found


async def begin_slow_walk(plugin: Plugin, folder: Path) -> int:
    """Let a fork of the worker begin a backup of `folder` that would take minutes; the pid of its session."""
    await plugin("backup_init", 101, "lxc", START)
    await plugin("backup_container_prepare", 101, {})
    (session,) = plugin.children()
    info = {"directory": str(folder), "sources": ["."], "bandwidth-limit": 10_000}
    call = {"on": "provider", "call": "backup_container", "args": [101, CONFIG, [], info], "forked": ROOT_ID}
    await plugin.send(call)
    return session


async def test_a_worker_that_is_killed_takes_session_and_walk_along(worker: Worker, mounts: Path) -> None:
    folder = mounts / "ct"
    make_container(folder)
    async with worker.started() as plugin:
        session = await begin_slow_walk(plugin, folder)
        group = Path(worker.scfg["fleece-repository"], "ct/101")
        await until(lambda: list(group.glob("*/*didx*")))
        fork = [pid for pid in plugin.children() if pid != session]
        plugin.process.kill()
        plugin.ends_with = -signal.SIGKILL
        await until(lambda: all(process_start_time(pid) is None for pid in (session, *fork)))
        await until(lambda: not walkers(folder))
        assert list(group.glob("*/*")) == []
    async with worker.started() as plugin:
        assert await back_up(plugin, folder) == NAME


async def test_a_walk_does_not_outlive_the_fork_that_has_begun_it(worker: Worker, mounts: Path) -> None:
    """Whoever stops vzdump kills that fork, and then unmounts what is being read: before the session is told."""
    folder = mounts / "ct"
    make_container(folder)
    async with worker.started() as plugin:
        session = await begin_slow_walk(plugin, folder)
        await until(lambda: walkers(folder))
        (fork,) = [pid for pid in plugin.children() if pid != session]
        os.kill(fork, signal.SIGKILL)
        with pytest.raises(Died, match="the fork said nothing"):
            await plugin.answer()
        await until(lambda: not walkers(folder))
        assert plugin.children() == [session]
        await plugin("backup_cleanup", 101, "lxc", 0, {"error": "interrupted by signal"})
        assert plugin.children() == []
    assert list(Path(worker.scfg["fleece-repository"], "ct/101").glob("*/*")) == []


@pytest.mark.fuse
async def test_a_mount_ends_with_the_worker_and_that_of_a_killed_session_is_removed(
    worker: Worker, mounts: Path
) -> None:
    folder, volname = mounts / "ct", f"backup/{NAME}"
    make_container(folder)
    worker.scfg["fleece-container-restore"] = "directory"
    async with worker.started() as plugin:
        await back_up(plugin, folder)
        first = Path((await plugin("restore_container_init", volname, {}))["archive-directory"])
        assert (first / "etc/hostname").read_text() == "web\n"
        (session,) = plugin.children()
        plugin.process.kill()
        plugin.ends_with = -signal.SIGKILL
        await until(lambda: process_start_time(session) is None)
        assert not first.exists()
    async with worker.started() as plugin:
        second = Path((await plugin("restore_container_init", volname, {}))["archive-directory"])
        (session,) = plugin.children()
        os.kill(session, signal.SIGKILL)
        await until(lambda: process_start_time(session) is None)
        with pytest.raises(Died):
            await plugin("restore_container_cleanup", volname, {})
        third = Path((await plugin("restore_container_init", volname, {}))["archive-directory"])
        assert (third / "etc/hostname").read_text() == "web\n"
        assert not os.path.lexists(second.parent)
        await plugin("restore_container_cleanup", volname, {})
        assert not os.path.lexists(third.parent)


async def test_a_tar_file_is_whole_or_there_is_none_and_nothing_of_it_stays(worker: Worker, mounts: Path) -> None:
    folder, target = mounts / "ct", mounts / "back"
    make_container(folder)
    target.mkdir()
    volname = f"backup/{NAME}"
    worker.scfg["fleece-container-restore"] = "tar"
    worker.environment["TMPDIR"] = str(mounts)
    async with worker.started() as plugin:
        await back_up(plugin, folder)
        given = await plugin("restore_container_init", volname, {})
        assert {path.name for path in mounts.iterdir()} == {"ct", "back"}
        (session,) = plugin.children()
        os.kill(session, signal.SIGKILL)
        await until(lambda: process_start_time(session) is None)
        assert not Path(given["tar-path"]).exists()
        with pytest.raises(Died, match="ended by signal 9"):
            await plugin("restore_container_cleanup", volname, {})
        # The next one is as good as ever, and removes the link.
        await unpack(await plugin("restore_container_init", volname, {}), target)
        assert not os.path.lexists(given["tar-path"])
        await plugin("restore_container_cleanup", volname, {})
        for chunk in Path(worker.scfg["fleece-repository"], ".chunks").glob("*/*"):
            # The one with the contents: their bytes are random, so it is the largest.
            if chunk.stat().st_size > 1 << 20:
                chunk.unlink()
        with pytest.raises(Died, match="chunk"):
            await plugin("restore_container_init", volname, {})
        assert plugin.children() == []
        assert list((worker.home / "run").rglob("restore-*")) == []


async def test_mount_points_of_the_container_are_entered_and_no_others(worker: Worker, mounts: Path) -> None:
    folder = mounts / "ct"
    make_container(folder)
    async with AsyncExitStack() as stack:
        for name in ("mnt", "other"):
            path = folder / name
            path.mkdir()
            mounting = ["mount", "-t", "tmpfs", "-o", f"uid={ROOT_ID},gid={ROOT_ID},mode=0755", "tmpfs", str(path)]
            if (await trio.run_process(mounting, check=False, capture_stderr=True)).returncode:
                pytest.skip("nothing can be mounted")
            stack.push_async_callback(trio.run_process, ["umount", "-l", str(path)])
            (path / "inside").write_text(name)
            os.chown(path / "inside", ROOT_ID, ROOT_ID)
        worker.scfg["fleece-container-restore"] = "tar"
        async with worker.started() as plugin:
            await back_up(plugin, folder, sources=[".", "./mnt"])
            given = await plugin("restore_container_init", f"backup/{NAME}", {})
            told = await trio.run_process(["tar", "tf", given["tar-path"]], capture_stdout=True)
            await plugin("restore_container_cleanup", f"backup/{NAME}", {})
    names = {name.strip("./") for name in told.stdout.decode().split()}
    assert {"mnt/inside", "other", "etc/hostname"} <= names
    assert "other/inside" not in names


async def test_a_backup_that_waited_for_another_one_takes_a_later_time(worker: Worker, mounts: Path) -> None:
    folder = mounts / "ct"
    make_container(folder)
    async with worker.started() as plugin, worker.started() as other:
        assert (await other("backup_init", 101, "lxc", START + 60))["archive-name"].endswith("22:14:20Z")
        # Begun a minute before the one that it has to wait for.
        await plugin.send({"on": "provider", "call": "backup_init", "args": [101, "lxc", START]})
        await other("backup_container_prepare", 101, {})
        info = {"directory": str(folder), "sources": ["."], "backup-user-id": ROOT_ID}
        await other.forked(ROOT_ID, "backup_container", 101, CONFIG, [], info)
        await other("backup_cleanup", 101, "lxc", 1, {})
        name = (await plugin.answer())["archive-name"]
        assert name > "ct/101/2023-11-14T22:14:20Z"
        await plugin("backup_cleanup", 101, "lxc", 0, {})
