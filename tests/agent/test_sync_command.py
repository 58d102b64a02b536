"""`fleece sync`, `fleece remote` and jobs of type sync, against a datastore in a folder and the strict double."""

import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from repository.local import open_local
from tests.support.certificates import Certificate
from tests.support.fleece_command import FleeceCommand
from tests.support.pbs_double import PbsDouble
from tests.support.stores import StorePool
from tests.support.syncs import write
from tests.support.warm_command import WarmCommand

from .test_remote_command import certificate as certificate


@pytest.fixture
async def double(certificate: Certificate) -> AsyncIterator[PbsDouble]:
    double = PbsDouble()
    async with trio.open_nursery() as nursery:
        double.nursery = nursery
        double.port = await double.listen(certificate.context())
        yield double
        nursery.cancel_scope.cancel()


@pytest.fixture
async def stores(store_pool: StorePool) -> AsyncIterator[tuple[Path, Path]]:
    """One with two snapshots of vm/1 and one of ct/2, and an empty one."""
    folders = store_pool.lend(), store_pool.lend()
    source = await open_local(folders[0])
    await write(source, "vm/1", 1000, 2000)
    await write(source, "ct/2", 1000)
    source.close()
    yield folders
    for folder in folders:
        store_pool.take_back(folder)


@pytest.fixture
def fleece(stores: tuple[Path, Path], tmp_path: Path, warm_command: WarmCommand) -> FleeceCommand:
    environment = {
        "FLEECE_REPOSITORY": str(stores[0]),
        "FLEECE_STATE_DIR": str(tmp_path / "state"),
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
    return FleeceCommand(tmp_path / "f", tmp_path, environment, warm_command)


async def test_push_to_a_folder_reports_and_pull_takes_it_back(
    fleece: FleeceCommand, stores: tuple[Path, Path]
) -> None:
    report = await fleece.json("sync", "push", stores[1], "--group-filter", "type:vm", "--parallel", "2")
    assert [one["snapshot"] for one in report["snapshots"]] == [
        "vm/1/1970-01-01T00:16:40Z", "vm/1/1970-01-01T00:33:20Z",
    ]  # fmt: skip
    assert (report["groups"], report["failed"], report["removed"]["snapshots"]) == (1, [], 0)
    await fleece.json("forget", "ct/2/latest")
    pulled = await fleece.json("sync", "pull", stores[1], "--ns", "copy", "--rate-in", "100M", "--remove-vanished")
    assert (len(pulled["snapshots"]), pulled["created-namespaces"]) == (2, ["copy"])
    # A group of somebody else: a warning, and exit code 3.
    await fleece.json("owner", "vm/1", "x@pbs", "--repo", stores[1])
    await fleece.json("sync", "push", stores[1], "--group-filter", "type:vm", code=3)
    refused = await fleece.run("sync", "push", stores[1], "--remove-anyway")
    assert refused.code == 2


async def test_a_remote_is_added_checked_used_by_commands_and_jobs_and_removed(
    fleece: FleeceCommand, double: PbsDouble, certificate: Certificate, tmp_path: Path, stores: tuple[Path, Path]
) -> None:
    secret = double.secrets["root@pam!tok"]
    (tmp_path / "secret").write_text(secret + "\n")
    (tmp_path / "secret").chmod(0o600)
    added = await fleece.json(
        "remote", "add", "offsite", "--host", "127.0.0.1", "--port", str(double.port), "--auth-id", "root@pam!tok",
        "--fingerprint", certificate.fingerprint, "--store", "store", "--password-file", tmp_path / "secret",
    )  # fmt: skip
    assert (added["host"], added["auth-id"]) == ("127.0.0.1", "root@pam!tok")
    file = tmp_path / "state/secrets/remote-offsite"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret not in (tmp_path / "state/remotes.toml").read_text()
    listed = await fleece.json("remote", "list")
    assert [(one["name"], one["secret"]) for one in listed] == [("offsite", "stored")]
    assert secret not in json.dumps(listed)
    report = await fleece.json("sync", "push", "offsite", "--verbose")
    assert len(report["snapshots"]) == 3
    fleece.config.write_text(
        f'[repository.copy]\npath = "{stores[1]}"\n'
        '[job.fetch]\ntype = "sync"\nrepository = "copy"\nremote = "offsite"\ntransfer-last = 1\n'
    )
    run = await fleece.json("job", "run", "fetch")
    assert (run["state"], run["result"]["snapshots"], run["result"]["failed"]) == ("ok", 2, [])
    await fleece.json("remote", "remove", "offsite", code=3)  # a job names it
    assert not file.exists()
    failed = await fleece.run("job", "run", "fetch")
    assert failed.code == 1
