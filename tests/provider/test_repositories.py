"""The provider with repositories that are not on this host: a server's and a bucket's."""

import os
from pathlib import Path

import pytest

from agent.registry import Registry, S3Place
from core.units import MIB
from datastore.files import Owner
from datastore.s3.state import CacheState
from repository.local import open_local
from tests.provider.plugin import PATIENCE_S, Plugin, Worker
from tests.provider.test_file_handles import DEVICE, back_up, content_of
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_service import ACCESS_KEY, BUCKET, REGION, SECRET
from tests.support.stores import StorePool
from tests.support.warm_command import WarmCommand
from tests.support.wire_server import wire_server

START = 1_700_000_000
SIZE = 9 * MIB


async def chain(plugin: Plugin, folder: Path) -> None:
    """Two backups of a disk, of which the second reads one chunk, what is known of them, and what they hold."""
    disk = folder / "disk"
    old, new = os.urandom(SIZE), b"\x07" * SIZE
    disk.write_bytes(old)
    volume = {"size": SIZE, "bitmap-mode": "new", "file": str(disk), "mode": "<", "regions": [[0, SIZE]]}
    first = await back_up(plugin, START, volume)
    disk.write_bytes(new)
    changed = {**volume, "bitmap-mode": "reuse", "regions": [[4 * MIB, 4 * MIB]]}
    second = await back_up(plugin, START + 60, changed, keep=2)
    (folder / "log").write_text("TASK OK\n")
    await plugin("backup_handle_log_file", 100, str(folder / "log"))
    listed = await plugin.storage("list_volumes", "fleece", "@scfg", None, ["backup"])
    assert [one["volid"] for one in listed] == [f"fleece:backup/{first}", f"fleece:backup/{second}"]
    assert (await plugin.storage("status", "fleece", "@scfg", {}))[3] == 1
    assert await content_of(plugin, second, folder / "back") == old[: 4 * MIB] + new[: 4 * MIB] + old[8 * MIB :]
    await plugin.storage("update_volume_attribute", "@scfg", "fleece", f"backup/{first}", "protected", 1)
    pruned = await plugin.storage("prune_backups", "@scfg", "fleece", {"keep-last": 1}, 100, "qemu", 0, None)
    assert [one["mark"] for one in pruned] == ["protected", "keep"]
    await plugin("job_cleanup")
    assert plugin.children() == []


def with_qemu(worker: Worker, folder: Path) -> None:
    """The hypervisor's note of the VM's QEMU: a process that lives."""
    (folder / "100.pid").write_text(f"{os.getpid()}\n")
    worker.environment["FLEECE_QEMU_SERVER_DIR"] = str(folder)


@pytest.mark.fuse
async def test_a_datastore_on_a_server(worker: Worker, store_pool: StorePool, tmp_path: Path) -> None:
    folder = store_pool.lend()
    store = await open_local(folder, name="main")
    token = "root@pam!pve"
    async with wire_server(tmp_path / "server", {"main": store}) as server:
        server.right("/", token, "Admin")
        secret = worker.home / "secret"
        secret.write_text(server.secrets[token])
        (worker.home / "fleece.toml").write_text(
            f'[repository.offsite]\nserver = "{token}@127.0.0.1:{server.port}:main"\n'
            f'fingerprint = "{server.certificate.fingerprint}"\npassword-file = "{secret}"\n'
        )
        worker.scfg = {"fleece-repository": "offsite"}
        with_qemu(worker, tmp_path)
        async with worker.started() as plugin:
            await chain(plugin, tmp_path)
            lines = Path(f"/proc/{plugin.process.pid}/cmdline").read_text()
            assert server.secrets[token] not in lines + str(plugin.log)
    store.close()
    store_pool.take_back(folder)


@pytest.mark.fuse
async def test_a_datastore_in_a_bucket(
    worker: Worker, s3_emulator: S3Emulator, warm_command: WarmCommand, store_folder: Path, tmp_path: Path
) -> None:
    secret = worker.home / "secret"
    secret.write_text(f"{SECRET}\n")
    where = ["--endpoint", "127.0.0.1", "--port", str(s3_emulator.port), "--path-style", "--allow-http"]
    endpoint = ["s3", "endpoint", "add", "emu", *where, "--region", REGION, "--access-key", ACCESS_KEY]
    done = warm_command.run([*endpoint, "--secret-file", str(secret)], worker.fleece_environment, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    # Without the cost of making one.
    CacheState("cloud", BUCKET, "emu", complete=True).write(store_folder, Owner.of(store_folder))
    Registry(worker.home / "state/datastores.toml").add("cloud", store_folder, s3=S3Place("emu", BUCKET, 64 << 20))
    worker.scfg = {"fleece-repository": "cloud"}
    with_qemu(worker, tmp_path)
    async with worker.started() as plugin:
        await chain(plugin, tmp_path)
        assert f"{DEVICE}.img" in str(plugin.log)
