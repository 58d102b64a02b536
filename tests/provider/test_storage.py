"""A storage of Proxmox VE that is a repository: what its plugin lists, prunes and removes."""

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.provider.plugin import FLEECE, Died, Plugin, Worker
from tests.support.warm_command import WarmCommand

BACKUP = "backup"


def made(warm: WarmCommand, worker: Worker, group: str, *times: int, **files: str) -> None:
    """Backups as another program may have made them."""
    kind, _, name = group.partition("/")
    specifications = []
    for file, text in (files or {"qemu-server.conf": "name: web\n"}).items():
        path = worker.home / file
        path.write_text(text)
        specifications.append(f"{file}:{path}")
    for time in times:
        line = ["backup", *specifications, "--backup-type", kind, "--backup-id", name, "--backup-time", str(time)]
        done = warm.run(
            [*line, "--repo", worker.scfg["fleece-repository"], "--quiet"], worker.fleece_environment, timeout_s=120
        )
        assert done.returncode == 0, done.stderr


async def volumes(plugin: Plugin, vmid: int | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await plugin.storage("list_volumes", "fleece", "@scfg", vmid, [BACKUP])
    return found


async def test_an_empty_storage(worker: Worker) -> None:
    async with worker.started() as plugin:
        assert await plugin.storage("type") == "fleece"
        assert await plugin.storage("api") == 15
        data = await plugin.storage("plugindata")
        assert data["features"] == {"backup-provider": 1}
        assert set(await plugin.storage("properties")) <= set(await plugin.storage("options"))
        total, available, used, active = await plugin.storage("status", "fleece", "@scfg", {})
        assert total >= available > 0
        assert total >= used >= 0, "an empty store on an empty RAM disk takes no block"
        assert active == 1
        assert await volumes(plugin) == []
        assert await plugin.storage("list_volumes", "fleece", "@scfg", None, ["images"]) == []
        assert await plugin("provider_name") == "Fleece"
        await plugin("job_init", 1)
        assert plugin.log == [("info", f"Fleece backs up to {worker.scfg['fleece-repository']}")]
        with pytest.raises(Died, match="100"):
            await plugin("archive_get_guest_config", "backup/vm/100/2026-01-02T03:04:05Z")


async def test_what_is_listed_can_be_looked_at_changed_and_removed(worker: Worker, warm_command: WarmCommand) -> None:
    made(warm_command, worker, "vm/100", 1_700_000_000, 1_700_086_400)
    made(warm_command, worker, "ct/101", 1_700_000_000, **{"pct.conf": "hostname: tür\n", "fw.conf": "enable: 1\n"})
    made(warm_command, worker, "vm/web", 1_700_000_000)
    made(warm_command, worker, "host/102", 1_700_000_000)
    first, second = "backup/vm/100/2023-11-14T22:13:20Z", "backup/vm/100/2023-11-15T22:13:20Z"
    async with worker.started() as plugin:
        listed = {one["volid"]: one for one in await volumes(plugin)}
        # What is no guest of the hypervisor is not shown to it.
        assert sorted(listed) == [f"fleece:{name}" for name in ("backup/ct/101/2023-11-14T22:13:20Z", first, second)]
        one = listed[f"fleece:{first}"]
        assert one["size"] > 0
        assert {**one, "size": 1} == {
            "volid": f"fleece:{first}", "content": BACKUP, "format": "fleece-vm", "subtype": "qemu", "vmid": 100,
            "ctime": 1_700_000_000, "size": 1,
        }  # fmt: skip
        assert [one["vmid"] for one in await volumes(plugin, 101)] == [101]
        assert await volumes(plugin, 999) == []
        assert await plugin.storage("parse_volname", first) == [BACKUP, first[7:], 100, None, None, None, "fleece-vm"]
        for wrong in ("backup/vm/100", "backup/vm/1/2023-11-14T22:13:20Z", f"{first}/x", "images/vm/100"):
            with pytest.raises(Died, match="unable to parse"):
                await plugin.storage("parse_volname", wrong)
        for name, value in (("notes", "zwei\nZeilen ü"), ("protected", 1)):
            await plugin.storage("update_volume_attribute", "@scfg", "fleece", first, name, value)
            assert await plugin.storage("get_volume_attribute", "@scfg", "fleece", first, name) == value
        with pytest.raises(Died, match="'colour' is not supported"):
            await plugin.storage("update_volume_attribute", "@scfg", "fleece", first, "colour", "red")
        listed = {one["volid"]: one for one in await volumes(plugin, 100)}
        assert (listed[f"fleece:{first}"]["notes"], listed[f"fleece:{first}"]["protected"]) == ("zwei\nZeilen ü", 1)
        assert (await plugin.storage("volume_size_info", "@scfg", "fleece", first))[0] >= one["size"]
        with pytest.raises(Died, match="protected"):
            await plugin.storage("free_image", "fleece", "@scfg", first, 0)
        await plugin.storage("free_image", "fleece", "@scfg", second, 0)
        assert [one["volid"] for one in await volumes(plugin, 100)] == [f"fleece:{first}"]
        with pytest.raises(Died, match="22:13:20Z"):
            await plugin.storage("free_image", "fleece", "@scfg", second, 0)
        assert await plugin("archive_get_guest_config", "backup/ct/101/2023-11-14T22:13:20Z") == "hostname: tür\n"
        assert await plugin("archive_get_firewall_config", "ct/101/2023-11-14T22:13:20Z") == "enable: 1\n"
        assert await plugin("archive_get_firewall_config", first) is None


async def test_prune(worker: Worker, warm_command: WarmCommand) -> None:
    made(warm_command, worker, "vm/100", *(1_700_000_000 + day * 86400 for day in range(3)))
    made(warm_command, worker, "ct/101", 1_700_000_000, 1_700_086_400)
    async with worker.started() as plugin:
        prune = ("prune_backups", "@scfg", "fleece")
        kept = await plugin.storage(*prune, {"keep-all": 1}, None, None, 0, None)
        assert {one["mark"] for one in kept} == {"keep"}
        planned = await plugin.storage(*prune, {"keep-last": 1, "keep-daily": 0}, 100, "qemu", 1, None)
        assert [one["mark"] for one in planned] == ["remove", "remove", "keep"]
        assert {**planned[0], "ctime": 0} == {
            "volid": "fleece:backup/vm/100/2023-11-14T22:13:20Z", "vmid": 100, "type": "qemu", "ctime": 0,
            "mark": "remove",
        }  # fmt: skip
        assert len(await volumes(plugin)) == 5
        await plugin.storage(*prune, {"keep-last": 1}, 100, "qemu", 0, None)
        assert [one["vmid"] for one in await volumes(plugin)] == [101, 101, 100]
        assert await plugin.storage(*prune, {"keep-last": 1}, 100, "lxc", 0, None) == []
        await plugin.storage(*prune, {"keep-last": 1}, None, None, 0, None)
        assert [one["vmid"] for one in await volumes(plugin)] == [101, 100]


async def test_keys_and_namespaces_come_from_the_configuration(worker: Worker, tmp_path: Path) -> None:
    key, store = worker.home / "backup.key", worker.scfg["fleece-repository"]
    environment = worker.fleece_environment
    made_key = [*FLEECE, "key", "create", str(key), "--kdf", "none"]
    await trio.run_process(made_key, env=environment, capture_stdout=True, capture_stderr=True)
    (worker.home / "fleece.toml").write_text(
        f'[repository.main]\npath = {json.dumps(store)}\nkeyfile = "{key}"\nns = "pve"\nowner = "backup@pbs"\n'
    )
    await trio.run_process(
        [*FLEECE, "namespace", "create", "pve", "--repo", "main"], env=environment, capture_stdout=True
    )
    worker.scfg = {"fleece-repository": "main"}
    disk = tmp_path / "disk"
    disk.write_bytes(b"\x05" * 5_000_192)
    volume = {"size": 5_000_192, "bitmap-mode": "none", "file": str(disk), "mode": "<", "regions": []}
    log = tmp_path / "log"
    log.write_text("TASK OK\n")
    async with worker.started() as plugin:
        await plugin("job_init", 1)
        assert plugin.log == [("info", "Fleece backs up to main, namespace pve")]
        name = (await plugin("backup_init", 100, "qemu", 1_700_000_000))["archive-name"]
        await plugin("backup_vm", 100, "name: web\n", {"drive-scsi0": volume}, {})
        await plugin("backup_cleanup", 100, "qemu", 1, {})
        await plugin("backup_handle_log_file", 100, str(log))
        (one,) = await volumes(plugin)
        assert one["encrypted"].count(":") == 31
        assert await plugin("archive_get_guest_config", f"backup/{name}") == "name: web\n"
        shown = [*FLEECE, "show", name, "--repo", "main", "--output", "json"]
        document = json.loads((await trio.run_process(shown, env=environment, capture_stdout=True)).stdout)
        assert (document["owner"], document["ns"]) == ("backup@pbs", "pve")
        assert {file["filename"] for file in document["files"]} == {
            "drive-scsi0.img.fidx", "qemu-server.conf.blob", "index.json.blob", "client.log.blob",
        }  # fmt: skip
    # Without its key nothing is read, and nothing secret is said.
    (worker.home / "fleece.toml").write_text(f'[repository.main]\npath = {json.dumps(store)}\nns = "pve"\n')
    async with worker.started() as plugin:
        with pytest.raises(Died, match="key"):
            await plugin("archive_get_guest_config", name)
        await plugin("restore_vm_init", name)
        with pytest.raises(Died, match="key"):
            await plugin("restore_vm_volume_init", name, "drive-scsi0", {})
        await plugin("job_cleanup")
        assert plugin.children() == []


@pytest.mark.parametrize(
    ("scfg", "match"),
    [
        ({"fleece-repository": "nowhere"}, "no configured or registered datastore has that name"),
        ({"fleece-repository": "/not/there"}, "/not/there"),
        ({"fleece-repository": "a\nb"}, "storage.repository: characters are needed, and on one line"),
        ({"fleece-repository": "user@pbs@localhost:9:store"}, "localhost"),
    ],
)
async def test_a_repository_that_cannot_be_used(worker: Worker, scfg: dict[str, str], match: str) -> None:
    worker.scfg = scfg
    async with worker.started() as plugin:
        with pytest.raises(Died, match=match):
            await plugin("job_init", 1)
        if "/" in scfg["fleece-repository"]:
            with pytest.raises(Died, match=match):
                await plugin("backup_init", 100, "qemu", 1_700_000_000)
        assert plugin.children() == []
