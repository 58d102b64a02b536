"""Every command of a repository on a server: Fleece's own, in the test's process."""

import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from repository.local import open_local
from tests.support.fleece_command import FleeceCommand
from tests.support.fuse import NEEDS_FUSE
from tests.support.pbs_store import plain
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import RunningQemu, VmDisk
from tests.support.stores import StorePool
from tests.support.warm_command import WarmCommand
from tests.support.wire_server import WireServer, wire_server

MIB = 1 << 20
TOKEN = "root@pam!host"
GROUP = "host/web"


@pytest.fixture
async def server(store_pool: StorePool, tmp_path: Path) -> AsyncIterator[WireServer]:
    folder = store_pool.lend()
    store = await open_local(folder, name="main")
    async with wire_server(tmp_path / "server", {"main": store}) as server:
        server.right("/", TOKEN, "Admin")
        yield server
    store.close()
    store_pool.take_back(folder)


@pytest.fixture
def fleece(server: WireServer, tmp_path: Path, warm_command: WarmCommand) -> FleeceCommand:
    environment = {
        "FLEECE_REPOSITORY": f"{TOKEN}@127.0.0.1:{server.port}:main",
        "PBS_PASSWORD": server.secrets[TOKEN],
        "PBS_FINGERPRINT": server.certificate.fingerprint,
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
    return FleeceCommand(tmp_path / "f", tmp_path, environment, warm_command)


@pytest.fixture
async def snapshots(fleece: FleeceCommand, tmp_path: Path) -> list[str]:
    """Two snapshots of a folder and an image; a file was changed between them."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "kept.txt").write_text("the same")
    (folder / "changed.txt").write_text("before")
    (tmp_path / "disk.raw").write_bytes(os.urandom(5 * MIB))
    made = []
    for ctime in (1_700_000_000, 1_700_003_600):
        report = await fleece.json(
            "backup", f"root.pxar:{folder}", f"disk.img:{tmp_path}/disk.raw", "--backup-id", "web",
            "--backup-time", str(ctime),
        )  # fmt: skip
        made.append(report["snapshot"])
        (folder / "changed.txt").write_text("afterwards")
    return made


async def test_looking_into_snapshots(fleece: FleeceCommand, snapshots: list[str], tmp_path: Path) -> None:
    first, second = snapshots
    assert [entry["snapshot"] for entry in await fleece.json("list", GROUP)] == snapshots
    shown = await fleece.json("show", second)
    assert {"root.pxar.didx", "disk.img.fidx", "client.log.blob"} <= {file["filename"] for file in shown["files"]}
    found = (await fleece.run("find", "changed.txt", "--all-snapshots")).out
    assert first in found
    assert second in found
    assert len(list((fleece.home / "state" / "find-index").glob("*.sqlite"))) == 1
    assert (await fleece.run("find", "changed.txt", "--all-snapshots", "--no-index")).out == found
    assert (await fleece.run("find", "changed.txt", "--all-snapshots")).out == found
    differences = (await fleece.run("diff", first, second)).out
    assert "changed.txt" in differences
    assert "kept.txt" not in differences
    assert "kept.txt" in (await fleece.run("ls", second, "root.pxar")).out
    assert "kept.txt" in (await fleece.run("catalog", "dump", second)).out
    assert (await fleece.run("restore", first, "root.pxar", tmp_path / "out", "--pattern", "*.txt")).code == 0
    assert (tmp_path / "out/changed.txt").read_text() == "before"


async def test_small_changes_and_upkeep(fleece: FleeceCommand, snapshots: list[str], tmp_path: Path) -> None:
    first, second = snapshots
    assert (await fleece.run("notes", first, "before the upgrade")).code == 0
    assert "before the upgrade" in (await fleece.run("notes", first)).out
    assert (await fleece.run("protect", first)).code == 0
    refused = await fleece.run("forget", first)
    assert (refused.code, "protected" in refused.error["why"]) == (1, True)
    decided = {entry["snapshot"]: entry for entry in await fleece.json("prune", GROUP, "--keep-last", "1", "--dry-run")}
    assert [decided[one]["keep"] for one in snapshots] == [True, True]
    assert (await fleece.run("unprotect", first)).code == 0
    assert [entry["state"] for entry in await fleece.json("verify", first)] == ["ok"]
    assert (await fleece.run("namespace", "create", "customers/anna")).code == 0
    assert "customers/anna" in (await fleece.run("namespace", "list")).out
    assert (await fleece.run("namespace", "delete", "customers/anna")).code == 0
    assert (await fleece.run("owner", GROUP, "root@pam")).code == 0
    assert "root@pam" in (await fleece.run("owner", GROUP)).out
    await fleece.json("prune", GROUP, "--keep-last", "1")
    assert [entry["snapshot"] for entry in await fleece.json("list", GROUP)] == [second]
    assert (await fleece.run("gc")).code == 0
    assert (await fleece.run("forget", second)).code == 0
    assert await fleece.json("list") == []


async def test_a_remote_is_checked_and_updated(fleece: FleeceCommand, server: WireServer, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("11111111-2222-3333-4444-555555555555\n")
    (tmp_path / "secret").write_text(server.secrets[TOKEN] + "\n")
    await fleece.json(
        "remote", "add", "offsite", "--host", "127.0.0.1", "--port", str(server.port), "--auth-id", TOKEN,
        "--password-file", tmp_path / "wrong", "--store", "main", "--fingerprint", ":".join(["00"] * 32),
    )  # fmt: skip
    refused = await fleece.run("remote", "check", "offsite")
    assert (refused.code, "certificate is not accepted" in refused.error["why"]) == (1, True)
    await fleece.json("remote", "update", "offsite", "--fingerprint", server.certificate.fingerprint)
    refused = await fleece.run("remote", "check", "offsite")
    assert (refused.code, "authentication failed" in refused.error["why"]) == (1, True)
    assert "11111111" not in refused.err
    changed = await fleece.json(
        "remote", "update", "offsite", "--password-file", tmp_path / "secret", "--rate-out", "20M", "--unset", "store"
    )
    assert (changed["store"], changed["rate-out"], changed["auth-id"]) == (None, "20M", TOKEN)
    found = await fleece.json("remote", "check", "offsite")
    assert (found["datastores"], found["store"], found["auth-id"]) == (["main"], None, TOKEN)
    assert (await fleece.json("remote", "check", "offsite", "--store", "main"))["groups"] == 0
    assert (await fleece.run("remote", "check", "offsite", "--store", "other")).code == 1
    for arguments in (["--unset", "nonsense"], ["--rate-out", "fast"], [], ["--port", "8007", "--unset", "port"]):
        assert (await fleece.run("remote", "update", "offsite", *arguments)).code == 2


async def test_a_log_of_ones_own_is_stored_once(
    fleece: FleeceCommand, server: WireServer, store_pool: StorePool, tmp_path: Path
) -> None:
    (tmp_path / "x.conf").write_text("x")
    (tmp_path / "own.log").write_text("what a script said\n")
    local = FleeceCommand(tmp_path / "l", tmp_path, {"HOME": str(tmp_path)}, fleece.warm)
    store = store_pool.lend()  # backups into a folder bring no log along
    repo = ("--repo", str(store))
    report = await local.json("backup", f"x.conf:{tmp_path}/x.conf", "--backup-id", "web", *repo)
    stored = await local.json("upload-log", report["snapshot"], tmp_path / "own.log", *repo)
    assert stored == {"snapshot": report["snapshot"], "size": 19}
    log = store / report["snapshot"] / "client.log.blob"
    assert plain(log.read_bytes()) == b"what a script said\n"
    restored = await local.json("restore", report["snapshot"], "client.log", tmp_path / "out.log", *repo)
    assert restored["restored"] == [{"name": "client.log", "target": f"{tmp_path}/out.log", "size": 19}]
    assert (tmp_path / "out.log").read_bytes() == b"what a script said\n"
    again = await local.run("upload-log", f"{GROUP}/latest", tmp_path / "own.log", *repo)
    assert again.code in (1, 2)
    store_pool.take_back(store)
    # A backup to a server has brought its own.
    report = await fleece.json("backup", f"x.conf:{tmp_path}/x.conf", "--backup-id", "web")
    refused = await fleece.run("upload-log", report["snapshot"], tmp_path / "own.log")
    assert refused.code == 1
    assert "log" in refused.error["why"]
    assert (await fleece.run("upload-log", report["snapshot"], tmp_path / "missing")).code == 1
    for name in ("client.log.blob", "index.json"):
        await fleece.json("restore", report["snapshot"], name, tmp_path / name)
    assert "x.conf" in (tmp_path / "client.log.blob").read_text()
    assert [file["filename"] for file in json.loads((tmp_path / "index.json").read_text())["files"]] == ["x.conf.blob"]
    assert (await fleece.run("restore", report["snapshot"], "client.log", "-", "--format", "tar")).code == 2


@pytest.mark.fuse
@NEEDS_FUSE
async def test_a_server_is_mounted(fleece: FleeceCommand, snapshots: list[str], tmp_path: Path) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    assert await fleece.json("mount", point) == {"mountpoint": str(point)}
    try:
        latest = point / GROUP / "latest"
        image, text = await trio.to_thread.run_sync(
            lambda: ((latest / "disk.img").read_bytes(), (latest / "root.pxar/changed.txt").read_text())
        )
        assert image == (tmp_path / "disk.raw").read_bytes()
        assert text == "afterwards"
    finally:
        await trio.to_thread.run_sync(
            lambda: subprocess.run(["fusermount3", "-u", point], check=False, capture_output=True)
        )


@pytest.mark.qemu
async def test_a_running_vm_is_backed_up_to_a_server_and_goes_on_by_its_bitmap(
    fleece: FleeceCommand, qemu: QemuBinary, tmpfs: Path, tmp_path: Path
) -> None:
    await trio.run_process([qemu.img, "create", "-q", "-f", "qcow2", str(tmpfs / "a.qcow2"), "12M"])
    (tmpfs / "scratch").mkdir()
    fleece.home = tmpfs / "f"  # sockets lie in it: a short path
    fleece.home.mkdir()
    fleece.config.write_text(f'[vm.web]\nscratch = "{tmpfs}/scratch"\nscratch-beside-disks = true\n')
    async with RunningQemu.start(qemu, [VmDisk(tmpfs / "a.qcow2", "disk0", format="qcow2")], memory_mib=64) as vm:
        await vm.qemu_io("disk0", "write -P 0x11 0 8M")
        named = ("vm", "backup", "--qmp", vm.qmp, "--id", "web")
        first = await fleece.json(*named)
        await vm.qemu_io("disk0", "write -P 0x22 4M 1M")
        second = await fleece.json(*named)
    assert [report["archives"][0]["mode"] for report in (first, second)] == ["full", "incremental"]
    name = second["archives"][0]["name"]
    assert (await fleece.run("restore", second["snapshot"], name, tmp_path / "out.raw")).code == 0
    data = (tmp_path / "out.raw").read_bytes()
    assert data[: 4 * MIB] == b"\x11" * (4 * MIB)
    assert data[4 * MIB : 5 * MIB] == b"\x22" * MIB
    assert data[5 * MIB : 8 * MIB] == b"\x11" * (3 * MIB)
