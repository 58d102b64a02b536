"""The commands on datastores in buckets: in this process, against the emulator."""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.main import run
from agent.places import datastores_file
from agent.registry import Registry, S3Place
from datastore.files import Owner
from datastore.s3.state import CacheState
from tests.support.rgw import RunningRgw
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_service import ACCESS_KEY, BUCKET, REGION, SECRET
from tests.support.stores import StorePool

CHUNK = 4 << 20


@dataclass
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, str]:
        error: dict[str, str] = json.loads(self.err.splitlines()[-1])["error"]
        return error


Fleece = Callable[..., Said]


@pytest.fixture
def fleece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fleece:
    """The command with a state of its own; `cost` lines and the like are on its standard error."""
    for name in ("FLEECE_REPOSITORY", "PBS_REPOSITORY", "PBS_NAMESPACE", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("FLEECE_S3_SECRET", "FLEECE_S3_SECRET_FILE", "FLEECE_S3_SECRET_FD", "FLEECE_S3_SECRET_CMD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLEECE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FLEECE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("FLEECE_CONFIG", str(tmp_path / "fleece.toml"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    # Nobody can be asked: tests that have a terminal are the others.
    monkeypatch.setattr("agent.keys.can_ask", lambda: False)
    (tmp_path / "fleece.toml").write_text('[s3]\npatience = "1s"\n')

    def call(*arguments: str | Path, as_json: bool = True, code: int = 0) -> Said:
        capfd.readouterr()
        found = run([*map(str, arguments), *(["--output", "json"] if as_json else [])])
        out, err = capfd.readouterr()
        said = Said(int(found), out, err)
        assert SECRET not in out + err
        assert said.code == code, said
        return said

    return call


@pytest.fixture
def endpoint(fleece: Fleece, tmp_path: Path, s3_emulator: S3Emulator) -> str:
    """The endpoint `emu`, which is the emulator."""
    file = tmp_path / "key"
    file.write_text(f"{SECRET}\n")
    fleece(*_add(s3_emulator.port), "--secret-file", file)
    return "emu"


def _add(port: int) -> list[str]:
    where = ["--endpoint", "127.0.0.1", "--port", str(port), "--path-style", "--allow-http", "--region", REGION]
    return ["s3", "endpoint", "add", "emu", *where, "--access-key", ACCESS_KEY]


@pytest.fixture
def cloud(endpoint: str, store_folder: Path) -> str:
    """The datastore `cloud` in the emulator's bucket, without the cost of making one."""
    CacheState("cloud", BUCKET, endpoint, complete=True).write(store_folder, Owner.of(store_folder))
    Registry(datastores_file()).add("cloud", store_folder, s3=S3Place(endpoint, BUCKET, 64 << 20))
    return "cloud"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image of three chunks."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(bytes([number]) * CHUNK for number in (1, 2, 3)))
    return path


@pytest.fixture
def second_folder(store_pool: StorePool) -> Iterator[Path]:
    base = store_pool.lend()
    try:
        yield base
    finally:
        store_pool.take_back(base)


# Endpoints


def test_an_endpoint_is_added_listed_changed_and_removed(fleece: Fleece, endpoint: str, tmp_path: Path) -> None:
    (found,) = fleece("s3", "endpoint", "list").document
    assert (found["id"], found["secret"], found["used-by"]) == (endpoint, "stored", [])
    assert (found["endpoint"], found["path-style"], found["content-md5"]) == ("127.0.0.1", True, "auto")
    changed = fleece(
        "s3", "endpoint", "update", endpoint, "--request-rate-limit", "30", "--throttle-code", "403",
        "--provider-quirk", "skip-if-none-match-header", "--no-path-style", "--endpoint", "{{bucket}}.localhost",
    ).document  # fmt: skip
    assert (changed["request-rate-limit"], changed["throttle-codes"], changed["path-style"]) == (30.0, ["403"], False)
    back = fleece("s3", "endpoint", "update", endpoint, "--unset", "throttle-codes").document
    assert (back["throttle-codes"], back["request-rate-limit"]) == ([], 30.0)
    assert "colour" in fleece("s3", "endpoint", "update", endpoint, "--unset", "colour", code=2).error["where"]
    assert fleece("s3", "endpoint", "update", endpoint, code=2).error["why"] == "nothing is to be changed"
    fleece("s3", "endpoint", "remove", endpoint)
    assert fleece("s3", "endpoint", "list").document == []
    assert "No S3 endpoints" in fleece("s3", "endpoint", "list", as_json=False).out
    assert list((tmp_path / "state/secrets").iterdir()) == []
    assert "fleece s3 endpoint add" in fleece("s3", "endpoint", "check", endpoint, "--bucket", BUCKET, code=1).err


def test_the_secret_comes_from_where_it_is_said_and_else_is_missed(
    fleece: Fleece, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_emulator: S3Emulator
) -> None:
    stored = tmp_path / "state/secrets/s3-emu"
    refused = fleece(*_add(s3_emulator.port), code=2)
    assert "--secret-file" in refused.error["hint"]
    assert not stored.exists()
    monkeypatch.setenv("FLEECE_S3_SECRET_CMD", f"echo {SECRET}")
    fleece(*_add(s3_emulator.port))
    assert stored.read_text() == f"{SECRET}\n"
    assert stored.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("FLEECE_S3_SECRET", "another")
    fleece("s3", "endpoint", "update", "emu", "--region", "x-1")
    assert stored.read_text() == f"{SECRET}\n"
    fleece("s3", "endpoint", "update", "emu", "--secret")
    assert stored.read_text() == "another\n"
    monkeypatch.setattr("agent.keys.can_ask", lambda: True)
    monkeypatch.delenv("FLEECE_S3_SECRET")
    monkeypatch.delenv("FLEECE_S3_SECRET_CMD")
    monkeypatch.setattr("getpass.getpass", lambda prompt: SECRET)
    fleece("s3", "endpoint", "update", "emu", "--secret")
    assert stored.read_text() == f"{SECRET}\n"
    fleece("s3", "endpoint", "remove", "emu")
    fleece(*_add(s3_emulator.port), "--systemd-credential")
    assert not stored.exists()
    assert fleece("s3", "endpoint", "list").document[0]["secret"] == "missing"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/s3-emu").write_text(SECRET)
    assert fleece("s3", "endpoint", "list").document[0]["secret"] == "credential"
    fleece("s3", "endpoint", "buckets", "emu")


def test_a_check_says_what_the_endpoint_can_do(fleece: Fleece, endpoint: str, s3_emulator: S3Emulator) -> None:
    assert fleece("s3", "endpoint", "buckets", endpoint).document[0]["name"] == BUCKET
    found = fleece("s3", "endpoint", "check", endpoint, "--bucket", BUCKET).document
    assert (found["id"], found["usable"], found["quirks-to-set"]) == (endpoint, True, [])
    s3_emulator.knows_if_none_match = s3_emulator.knows_multi_delete = False
    said = fleece(
        "s3", "endpoint", "check", endpoint, "--bucket", BUCKET, "--store-prefix", "cloud", as_json=False, code=3
    )
    assert re.search(r"-> fleece s3 endpoint update emu --provider-quirk \S+ --provider-quirk \S+\n", said.out)
    assert all(logged.key.startswith("cloud/") for logged in s3_emulator.requests("PUT")[-4:])
    gone = fleece("s3", "endpoint", "check", endpoint, "--bucket", "another", code=1)
    assert gone.document["usable"] is False
    assert gone.error["where"] == "emu:another"


# Datastores


def test_a_datastore_in_a_bucket_is_made_used_taken_over_and_destroyed(
    fleece: Fleece, endpoint: str, tmpfs: Path, disk: Path, s3_emulator: S3Emulator
) -> None:
    place = ["--s3", endpoint, "--bucket", BUCKET, "--cache", tmpfs / "cache"]
    made = fleece("datastore", "create", "cloud", *place, "--max-cache-size", "8M").document
    cost = made.pop("s3")
    assert cost["requests"]["put"] == 2  # the mark, and the chunk of zeros
    backend = {"type": "s3", "endpoint": endpoint, "bucket": BUCKET, "max-cache-size": 8 << 20}
    assert made == {"name": "cloud", "path": str(tmpfs / "cache"), "created": True, "backend": backend}
    assert fleece("datastore", "list").document == [
        {"name": "cloud", "path": str(tmpfs / "cache"), "source": "created", "backend": backend, "maintenance": None}
    ]
    assert "cloud uses it" in fleece("s3", "endpoint", "remove", endpoint, code=1).error["why"]
    assert "registered already" in fleece("datastore", "create", "cloud", *place, code=2).error["why"]
    report = fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", "cloud").document
    assert report["s3"]["by-work"]["backup"]["requests"]["put"] == 3 + 1 + 1 + 1  # chunks, owner, index, manifest
    status = fleece("datastore", "status", "cloud").document
    assert (status["backend"], status["maintenance"], "s3" in status) == (backend, None, False)
    assert (status["state"], status["state-reason"]) == ("ok", None)
    assert status["cache"]["known-chunks"] == 4
    # What all commands on it have cost so far.
    assert status["requests"]["put"] >= 4
    assert status["requests"].keys() == {"get", "put", "post", "head", "delete"}
    counted = fleece("s3", "counters", "cloud", "--threshold", "head=0,put=1,download=1MiB").document
    assert counted["counters"]["put"] == status["requests"]["put"]
    assert counted["thresholds"]["put"] == 1
    assert counted["thresholds"]["get"] is None
    reset = fleece("s3", "counters", "cloud", "--reset", "--reset-schedule", "monthly UTC").document
    assert (reset["counters"]["put"], reset["reset-schedule"]) == (0, "monthly UTC")
    assert reset["since"] < reset["next-reset"] <= reset["since"] + 31 * 86400
    assert time.gmtime(reset["next-reset"])[2:6] == (1, 0, 0, 0)
    note = tmpfs / "note"
    note.write_text("a note\n")
    for number, code in enumerate((3, 0)):
        said = fleece("backup", f"x.conf:{note}", "--backup-id", f"n{number}", "--repo", "cloud", code=code)
        assert ("S3 counters of cloud: more than 1 PUT" in said.out) == (code == 3)
    fleece("forget", "--group", "host/n0", "--repo", "cloud")
    fleece("forget", "--group", "host/n1", "--repo", "cloud")
    shown = fleece("s3", "counters", "cloud", "--threshold", "none", as_json=False)
    assert "GET" not in shown.err
    assert "'monthly UTC', next: " in shown.out
    assert "counted since" in shown.out
    assert fleece("s3", "counters", "cloud", "--reset-schedule", "none").document["next-reset"] is None
    assert "schedule" in fleece("s3", "counters", "cloud", "--reset-schedule", "whenever", code=2).err
    assert "hard" in fleece("s3", "counters", "cloud", "--threshold", "get=1,download=1,hard-limit", code=2).err
    assert status["uploaded"] > 0
    assert "PUT" in fleece("datastore", "status", "cloud", as_json=False).out
    # Given back, it is taken over without force; its chunks are known again.
    fleece("datastore", "remove", "cloud")
    place[-1] = tmpfs / "second"
    again = fleece("datastore", "create", "cloud", *place, "--reuse").document
    assert (again["created"], again["s3"]["requests"]["get"]) == (False, 2 + 3)
    before = len(s3_emulator.requests())
    unchanged = fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", "cloud").document
    assert unchanged["archives"][0]["new"] == 0
    assert [logged.operation for logged in s3_emulator.requests()[before:]] == ["PUT", "PUT"]
    # Its cache is lost: the hint is the command that helps.
    (tmpfs / "second").rename(tmpfs / "lost")
    assert fleece("datastore", "list").document[0]["maintenance"] == "missing"
    lost = fleece("list", "--repo", "cloud", code=1).error
    command = lost["hint"].split("'")[1].split()[1:]
    assert "in use by" in fleece(*command[:-1], code=2).error["why"]
    fleece(*command)
    assert len(fleece("list", "--repo", "cloud").document) == 2
    fleece("datastore", "remove", "cloud", "--destroy-data")
    assert s3_emulator.bucket.objects == {}
    assert not (tmpfs / "second").exists()
    assert fleece("datastore", "list").document == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["x-x", "--s3", "emu", "--bucket", BUCKET], "--bucket and --cache are needed"),
        (["x-x", "--s3", "emu", "--cache", "/tmp/x"], "--bucket and --cache are needed"),
        (["x-x", "--s3", "nobody", "--bucket", BUCKET, "--cache", "/nowhere/x"], "no endpoint has that name"),
        (["x", "--s3", "emu", "--bucket", BUCKET, "--cache", "/nowhere/x"], "3 to 32"),
        (["x-x", "--s3", "emu", "--bucket", "B", "--cache", "/nowhere/x"], "3 to 63"),
        (["x-x", "--s3", "emu", "--bucket", BUCKET, "--cache", "/x", "--max-cache-size", "big"], "not a number"),
        (["/nowhere/x", "--bucket", BUCKET], "belongs to a datastore in a bucket"),
        (["/nowhere/x", "--overwrite-in-use"], "belongs to a datastore in a bucket"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(
    fleece: Fleece, endpoint: str, s3_emulator: S3Emulator, arguments: list[str], why: str
) -> None:
    said = run(["datastore", "create", *arguments, "--output", "json"])
    assert said in (1, 2)
    assert s3_emulator.requests() == []
    assert why in str(fleece("datastore", "create", *arguments, code=said).error)
    assert fleece("datastore", "list").document == []


def test_a_forgotten_bucket_that_is_out_of_reach_is_a_warning_and_its_destruction_an_error(
    fleece: Fleece, cloud: str, store_folder: Path, s3_emulator: S3Emulator
) -> None:
    s3_emulator.secret = "changed"
    fleece("datastore", "remove", cloud, "--destroy-data", code=1)
    assert fleece("datastore", "list").document[0]["name"] == cloud
    said = fleece("datastore", "remove", cloud, code=3)
    assert "stays marked as in use" in said.err
    assert fleece("datastore", "list").document == []
    assert (store_folder / ".chunks").is_dir()


def test_one_that_another_host_uses_is_destroyed_only_on_demand(
    fleece: Fleece, cloud: str, s3_emulator: S3Emulator
) -> None:
    s3_emulator.bucket.put("cloud/.in-use", b'{"hostname":"pbs7"}')
    assert "pbs7" in fleece("datastore", "remove", cloud, "--destroy-data", code=1).error["why"]
    assert "cloud/.in-use" in s3_emulator.bucket.objects
    fleece("datastore", "remove", cloud, "--destroy-data", "--overwrite-in-use")
    assert s3_emulator.bucket.objects == {}


def test_the_doctor_looks_at_keys_and_caches(fleece: Fleece, cloud: str, store_folder: Path, tmp_path: Path) -> None:
    def checks() -> list[tuple[str, str]]:
        said = Said(0, "", "")
        for code in (0, 3, 1):
            try:
                said = fleece("doctor", code=code)
                break
            except AssertionError:
                continue
        found = [one for one in said.document["checks"] if one["name"] == f"datastore {cloud}"]
        return [(one["state"], one["detail"] + (one.get("fix") or "")) for one in found]

    ((state, text),) = checks()
    assert (state, f"bucket {BUCKET} of endpoint emu" in text) == ("ok", True)
    CacheState("cloud", BUCKET, "emu", complete=False).write(store_folder, Owner.of(store_folder))
    ((state, text),) = checks()
    assert (state, "fleece datastore refresh cloud" in text) == ("warning", True)
    (tmp_path / "state/secrets/s3-emu").chmod(0o644)
    assert checks()[0][0] == "failed"
    assert "chmod 600" in checks()[0][1]


def test_less_than_everything_is_verified_and_not_recorded(fleece: Fleece, cloud: str, disk: Path) -> None:
    fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud)
    listed = fleece("verify", "--repo", cloud, "--mode", "listing")
    assert json.loads(listed.err)["s3"]["requests"]["get"] == 0
    fleece("verify", "--repo", cloud, "--mode", "budget=1")
    assert fleece("list", "--repo", cloud).document[0].get("verification") is None
    fleece("verify", "--repo", cloud)
    assert fleece("list", "--repo", cloud).document[0]["verification"]["state"] == "ok"
    assert "listing" in fleece("verify", "--repo", cloud, "--mode", "quick", code=2).error["hint"]


# Every verb


def test_every_verb_works_on_a_bucket_as_on_a_folder(
    fleece: Fleece, cloud: str, disk: Path, tmp_path: Path, s3_emulator: S3Emulator
) -> None:
    (tmp_path / "folder/sub").mkdir(parents=True)
    (tmp_path / "folder/sub/file").write_text("text")
    (tmp_path / "fleece.toml").write_text(f'default-repository = "{cloud}"\n[s3]\npatience = "1s"\n')
    first = fleece("backup", f"root.pxar:{tmp_path / 'folder'}", f"disk.img:{disk}", "--backup-id", "web").document
    disk.write_bytes(bytes([9]) * CHUNK)
    fleece("backup", f"disk.img:{disk}", "--backup-id", "web")
    old = first["snapshot"]
    assert set(first) >= {"snapshot", "archives", "frozen-s", "duration-s", "warnings", "s3"}
    shown = fleece("show", old)
    assert (shown.document["snapshot"], "s3" in shown.document, shown.err) == (old, False, "")
    assert len(fleece("list").document) == 2
    assert [one["path"] for one in fleece("ls", old, "root.pxar").document] == ["/sub"]
    assert [one["path"] for one in fleece("find", "file", old).document] == ["/sub/file"]
    assert len(fleece("catalog", "dump", old).document) == 3
    assert fleece("diff", old, "host/web/latest", "disk.img").document
    restored = fleece("restore", old, "--all", tmp_path / "out").document
    assert restored["s3"]["endpoint"] == "emu"
    assert (tmp_path / "out/root/sub/file").read_text() == "text"
    assert (tmp_path / "out/disk.img").stat().st_size == 3 * CHUNK
    verified = fleece("verify")
    assert {one["state"] for one in verified.document} == {"ok"}
    assert json.loads(verified.err)["s3"]["by-work"]["verify"]["requests"]["get"] > 0
    fleece("protect", old)
    assert s3_emulator.bucket.objects[f"cloud/.cnt/{old}/.protected"].data == b""
    fleece("unprotect", old)
    fleece("notes", old, "the notes")
    fleece("owner", "host/web", "a@pbs")
    assert s3_emulator.bucket.objects["cloud/.cnt/host/web/owner"].data == b"a@pbs\n"
    fleece("namespace", "create", "a/b")
    assert "cloud/.cnt/ns/a/ns/b/.namespace" in s3_emulator.bucket.objects
    assert fleece("namespace", "list").document == [{"ns": ""}, {"ns": "a"}, {"ns": "a/b"}]
    fleece("namespace", "delete", "a")
    pruned = fleece("prune", "--all", "--keep-last", "1")
    assert [one["keep"] for one in pruned.document] == [False, True]
    assert not any(old in key for key in s3_emulator.bucket.objects)
    fleece("forget", "host/web/latest")
    assert fleece("list").document == []
    collected = fleece("gc", code=1)
    assert "--allow-empty" in collected.err
    fleece("gc", "--allow-empty", "--dry-run")


@pytest.mark.parametrize("mode", ["legacy", "data", "metadata"])
def test_folders_are_stored_in_each_mode_and_read_from_a_cold_cache(
    fleece: Fleece, cloud: str, store_folder: Path, tmp_path: Path, s3_emulator: S3Emulator, mode: str
) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/old").write_text("text")
    (folder / "link").symlink_to("sub/old")
    back_up = ["backup", f"root.pxar:{folder}", "--backup-id", "web", "--repo", cloud, "--change-detection-mode", mode]
    fleece(*back_up)
    (folder / "new").write_bytes(bytes(range(256)) * 40)

    def forget_contents() -> None:
        for file in (store_folder / ".chunks").glob("*/" + 64 * "?"):
            file.write_bytes(b"")

    forget_contents()  # the second one reads the first one's archive, where its mode wants that
    before = len(s3_emulator.requests("GET"))
    snapshot = fleece(*back_up).document["snapshot"]
    assert (len(s3_emulator.requests("GET")) > before) is (mode == "metadata")
    forget_contents()
    fleece("restore", snapshot, "root.pxar", tmp_path / "out", "--repo", cloud)
    assert (tmp_path / "out/new").read_bytes() == (folder / "new").read_bytes()
    assert (tmp_path / "out/sub/old").read_text() == "text"
    assert (tmp_path / "out/link").readlink() == Path("sub/old")
    assert [one["state"] for one in fleece("verify", "--repo", cloud).document] == ["ok", "ok"]


def test_a_mounts_cold_chunks_come_from_the_bucket(
    fleece: Fleece, cloud: str, second_folder: Path, disk: Path, tmp_path: Path, s3_emulator: S3Emulator
) -> None:
    """What `fleece mount` opens is what the other verbs open; here the reading alone, by a host that knows nothing."""
    snapshot = fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud).document["snapshot"]
    CacheState("cloud", BUCKET, "emu", complete=False).write(second_folder, Owner.of(second_folder))
    registry = Registry(datastores_file())
    registry.remove("cloud")
    registry.add("cloud", second_folder, s3=S3Place("emu", BUCKET, 0))
    assert fleece("datastore", "list").document[0]["maintenance"] == "incomplete"
    refused = fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud, code=1)
    assert "fleece datastore refresh" in refused.error["hint"]
    assert "refresh" in fleece("datastore", "status", cloud, as_json=False).out
    s3_emulator.bucket.put("cloud/.in-use", b'{"hostname":"pbs7"}')
    assert "in use by pbs7" in fleece("datastore", "refresh", cloud, "--chunks", code=1).error["why"]
    s3_emulator.bucket.delete("cloud/.in-use")
    found = fleece("datastore", "refresh", cloud, "--chunks").document
    assert (found["fetched"], found["unchanged"], found["chunks"]["marked"]) == (3, 0, 4 - 1)
    assert fleece("datastore", "list").document[0]["maintenance"] is None
    before = len(s3_emulator.requests("GET"))
    fleece("restore", snapshot, "disk.img", tmp_path / "out.raw", "--repo", cloud)
    assert (tmp_path / "out.raw").read_bytes() == disk.read_bytes()
    assert len(s3_emulator.requests("GET")) - before == 3


def test_reconciling_finds_what_was_removed_and_changes_nothing_when_tried(
    fleece: Fleece, cloud: str, disk: Path, s3_emulator: S3Emulator
) -> None:
    fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud)
    gone = next(key for key in s3_emulator.bucket.objects if "/.chunks/" in key)
    s3_emulator.bucket.delete(gone)
    s3_emulator.bucket.delete("cloud/.cnt/host/web/owner")
    tried = fleece("s3", "reconcile", cloud, "--metadata", "--dry-run", code=3)
    assert tried.document["repaired"] == [gone.rpartition("/")[2]]
    assert tried.document["metadata"] == {"only-here": ["host/web/owner"], "only-in-bucket": [], "uploaded": 0}
    assert gone not in s3_emulator.bucket.objects
    done = fleece("s3", "reconcile", cloud, "--metadata", code=3).document
    assert (done["repaired"], done["metadata"]["uploaded"]) == (tried.document["repaired"], 1)
    assert {gone, "cloud/.cnt/host/web/owner"} <= set(s3_emulator.bucket.objects)
    text = fleece("s3", "reconcile", cloud, as_json=False).out
    assert "0 stored again, 0 gone" in text
    assert "lies in a folder" in fleece("s3", "reconcile", "/tmp", code=2).error["why"]


def test_old_versions_of_a_bucket_are_purged_on_demand(
    fleece: Fleece, cloud: str, disk: Path, s3_emulator: S3Emulator
) -> None:
    assert fleece("s3", "purge-versions", cloud).document["versioning"] is None
    fake = s3_emulator.bucket
    fake.versioning = "Enabled"
    fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud)
    fleece("forget", "--group", "host/web", "--repo", cloud)
    told = fleece("s3", "purge-versions", cloud, "--dry-run", as_json=False).out
    assert re.search(r"^3 old versions \(\S+ \S+\) and 3 delete markers would be deleted$", told, re.MULTILINE)
    assert "3 old versions stay" in fleece("s3", "purge-versions", cloud, "--older-than", "7d", as_json=False).out
    locked = next(known[1].id for key, known in fake.versions.items() if key.endswith("owner"))
    fake.locked.add(locked)
    said = fleece("s3", "purge-versions", cloud, code=3)
    assert "object lock" in said.err
    assert {name: said.document[name] for name in ("versions", "markers", "locked", "failed", "strange")} == {
        "versions": 2, "markers": 2, "locked": 1, "failed": 0, "strange": 0,
    }  # fmt: skip
    fake.locked.clear()
    assert fleece("s3", "purge-versions", cloud).document["markers"] == 1
    assert all(len(known) == 1 for known in fake.versions.values() if known)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("secret", "the secret key or the region is wrong"),
        ("bucket", "the bucket does not exist"),
        ("away", "Connection refused"),
    ],
)
def test_a_bucket_that_cannot_be_used_fails_each_verb_with_its_reason_and_listing_goes_on(
    fleece: Fleece, cloud: str, disk: Path, tmp_path: Path, s3_emulator: S3Emulator, fault: str, why: str
) -> None:
    snapshot = fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud).document["snapshot"]
    if fault == "secret":
        s3_emulator.secret = "changed"
    elif fault == "bucket":
        s3_emulator.buckets.clear()
    else:
        fleece("s3", "endpoint", "update", "emu", "--port", "1")
    disk.write_bytes(bytes([8]) * CHUNK)
    for verb in (
        ["backup", f"disk.img:{disk}", "--backup-id", "web"],
        ["gc"],
        ["forget", snapshot],
        ["notes", snapshot, "x"],
    ):
        assert why in fleece(*verb, "--repo", cloud, code=1).error["why"], verb
    for name in ("refresh",):
        assert why in fleece("datastore", name, cloud, code=1).error["why"]
    assert [one["snapshot"] for one in fleece("list", "--repo", cloud).document] == [snapshot]
    # What the cache has is restored.
    fleece("restore", snapshot, "disk.img", tmp_path / "out.raw", "--repo", cloud)
    status = fleece("datastore", "status", cloud).document
    assert status["counts"]["host"]["snapshots"] == 1
    assert status["state"] == "degraded"
    assert why in status["state-reason"]
    assert "only what the cache has" in fleece("datastore", "status", cloud, as_json=False).out


def test_a_budget_warns_and_a_hard_limit_stops_verify_only(
    fleece: Fleece, cloud: str, disk: Path, tmp_path: Path
) -> None:
    said = fleece(
        "backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud,
        "--s3-budget", "put=2,requests=1,hard-limit", code=3,
    )  # fmt: skip
    assert said.document["warnings"] == ["S3 budget: more than 2 PUT requests"]
    assert "none of" in fleece("list", "--repo", cloud, "--s3-budget", "x=1", code=2).error["why"]
    # Requests that are under way when the limit is reached come to their end: so there are many chunks.
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_bytes(random.Random(1).randbytes(4 << 20))
    many = ["backup", f"root.pxar:{tmp_path / 'folder'}", "--backup-id", "many", "--chunk-size", "64", "--repo", cloud]
    assert fleece(*many, "--s3-budget", "requests=1,hard-limit").document["s3"]["requests"]["put"] > 20
    stopped = fleece("verify", "host/many", "--repo", cloud, "--s3-budget", "requests=1,hard-limit", code=3)
    assert "limit of 1 requests" in stopped.err + stopped.out
    assert fleece("list", "host/many", "--repo", cloud).document[0].get("verification") is None
    (tmp_path / "fleece.toml").write_text('[s3]\nbudget = "download=1M"\npatience = "1s"\n')
    assert "received, more than 1.00 MiB" in fleece("verify", "host/many", "--repo", cloud, code=3).err
    fleece("verify", "--repo", cloud, "--s3-budget", "download=1G")


def test_a_job_records_what_it_cost(fleece: Fleece, cloud: str, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "fleece.toml").write_text(
        f'[job.check]\ntype = "verify"\nrepository = "{cloud}"\ns3-budget = "get=1"\n'
        f'[job.clean]\ntype = "gc"\nrepository = "{cloud}"\nallow-empty = true\n[s3]\npatience = "1s"\n'
    )
    fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud)
    done = fleece("job", "run", "check", code=3).document
    assert done["result"]["s3"]["by-work"]["verify"]["requests"]["get"] == 3
    assert done["warnings"] == ["S3 budget: more than 1 GET requests"]
    log = fleece("job", "log", "check").document["log"]
    assert "S3 endpoint emu: 3 GET, 1 PUT" in log
    assert fleece("job", "history", "check").document[0]["result"]["s3"]["endpoint"] == "emu"
    fleece("job", "run", "clean", as_json=False)


@pytest.mark.rgw
def test_a_user_works_with_a_real_gateway(
    fleece: Fleece, rgw: RunningRgw, tmpfs: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, bucket = rgw.endpoint(), rgw.make_bucket()
    monkeypatch.setenv("FLEECE_S3_SECRET", where.secret)
    fleece(
        "s3", "endpoint", "add", "gate", "--endpoint", where.endpoint, "--port", str(where.port), "--path-style",
        "--allow-http", "--region", where.region, "--access-key", where.access_key,
    )  # fmt: skip
    assert fleece("s3", "endpoint", "check", "gate", "--bucket", bucket).document["usable"] is True
    place = ["--s3", "gate", "--bucket", bucket, "--cache", tmpfs / "cache"]
    fleece("datastore", "create", "cloud", *place)
    snapshot = fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", "cloud").document["snapshot"]
    assert fleece("verify", "--repo", "cloud").document[0]["state"] == "ok"
    fleece("datastore", "remove", "cloud")
    place[-1] = tmpfs / "second"
    fleece("datastore", "create", "cloud", *place, "--reuse")
    fleece("restore", snapshot, "disk.img", tmp_path / "out.raw", "--repo", "cloud")
    assert (tmp_path / "out.raw").read_bytes() == disk.read_bytes()
    fleece("protect", snapshot, "--repo", "cloud")
    fleece("unprotect", snapshot, "--repo", "cloud")
    assert fleece("gc", "--repo", "cloud").document["removed-chunks"] == 0
    assert fleece("s3", "reconcile", "cloud", "--metadata").document["lost"] == []
    monkeypatch.setenv("FLEECE_S3_SECRET", "wrong")
    fleece("s3", "endpoint", "update", "gate", "--secret")
    assert "SignatureDoesNotMatch" in fleece("forget", snapshot, "--repo", "cloud", code=1).error["why"]
    monkeypatch.setenv("FLEECE_S3_SECRET", where.secret)
    fleece("s3", "endpoint", "update", "gate", "--secret")
    fleece("forget", snapshot, "--repo", "cloud")
    fleece("datastore", "remove", "cloud", "--destroy-data")


def test_a_backup_that_is_killed_lists_nothing_and_the_next_one_is_whole(
    fleece: Fleece, cloud: str, disk: Path, s3_emulator: S3Emulator
) -> None:
    s3_emulator.latency_s = 0.5
    command = [sys.executable, "-m", "agent.main", "backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while len(s3_emulator.requests("PUT")) < 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    s3_emulator.latency_s = 0.0
    assert fleece("list", "--repo", cloud).document == []
    fleece("backup", f"disk.img:{disk}", "--backup-id", "web", "--repo", cloud)
    assert [one["state"] for one in fleece("verify", "--repo", cloud).document] == ["ok"]
    assert len(fleece("list", "--unfinished", "--repo", cloud).document) == 1
