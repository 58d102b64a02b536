"""`fleece backup`, `list`, `show`, `restore`, `forget`, `verify` on a real datastore, as a person runs them."""

import io
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datastore.names import parse_time
from tests.support.stores import chunk_files

from .conftest import Fleece

MIB = 1 << 20
Popen = subprocess.Popen


@pytest.fixture
def image(tmpfs: Path) -> Path:
    """11 MiB: data, 4 MiB of hole, data, a short last chunk."""
    path = tmpfs / "disk.raw"
    with path.open("wb") as file:
        file.write(os.urandom(4 * MIB))
        file.seek(8 * MIB)
        file.write(os.urandom(3 * MIB))
    return path


@pytest.fixture
def conf(tmpfs: Path) -> Path:
    path = tmpfs / "vm.conf"
    path.write_text("memory: 512\n")
    return path


def test_report_list_and_show_have_the_keys_of_the_contract(stored: Fleece, image: Path, conf: Path) -> None:
    report = stored.json(
        "backup", f"disk.img:{image}", f"vm.conf:{conf}", "--backup-id", "web", "--notes", "first\nmore"
    )
    assert set(report) == {"snapshot", "archives", "frozen-s", "duration-s", "warnings"}
    disk, small = report["archives"]
    assert set(disk) == {
        "name", "size", "mode", "reason", "read", "dirty", "reused", "new", "stored", "chunks", "chunks-new",
    }  # fmt: skip
    assert (disk["name"], disk["size"], disk["mode"], disk["dirty"]) == ("disk.img", 11 * MIB, "full", None)
    assert (disk["read"], disk["chunks"]) == (7 * MIB, 3)
    assert small["name"] == "vm.conf"
    assert report["warnings"] == []

    (listed,) = stored.json("list")
    assert listed == stored.json("show", report["snapshot"]) == stored.json("show", "host/web/latest")
    assert (listed["backup-type"], listed["backup-id"], listed["ns"]) == ("host", "web", "")
    assert listed["backup-time"] == parse_time(report["snapshot"].split("/")[2])
    assert [(file["filename"], file["crypt-mode"]) for file in listed["files"]] == [
        ("disk.img.fidx", "none"), ("vm.conf.blob", "none"), ("index.json.blob", "none"),
    ]  # fmt: skip
    assert (listed["owner"], listed["protected"], listed["comment"]) == ("root@pam", False, "first\nmore")


def test_a_second_backup_in_the_same_second_waits_and_stores_nothing_again(stored: Fleece, image: Path) -> None:
    reports = [stored.json("backup", f"disk.img:{image}", "--backup-id", "web") for _ in range(3)]
    assert len({report["snapshot"] for report in reports}) == 3
    # The chunk of zeros is not read, but it is new to an empty datastore.
    assert [report["archives"][0]["new"] for report in reports] == [11 * MIB, 0, 0]
    assert [report["archives"][0]["reused"] for report in reports] == [0, 11 * MIB, 11 * MIB]


def test_two_backups_of_one_group_at_once_do_not_mix(stored: Fleece, image: Path) -> None:
    slow = stored.start("backup", f"disk.img:{image}", "--backup-id", "web", "--bwlimit", "1M")
    try:
        while not stored.json("list", "--unfinished"):
            time.sleep(0.05)
        refused = stored("backup", f"disk.img:{image}", "--backup-id", "web", "--output", "json")
        assert refused.code == 1
        assert "another backup" in refused.error["why"]
        waited = stored("backup", f"disk.img:{image}", "--backup-id", "web", "--lock-wait", "60")
        assert waited.code == 0, waited.err
    finally:
        _, err = slow.communicate(timeout=60)
    assert slow.returncode == 0, err
    assert len(stored.json("list")) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_with_1_and_leaves_nothing(
    number: signal.Signals, stored: Fleece, image: Path, ended: Callable[["Popen[str]"], "Popen[str]"]
) -> None:
    running = ended(stored.start("backup", f"disk.img:{image}", "--backup-id", "web", "--bwlimit", "1M"))
    while not stored.json("list", "--unfinished"):
        time.sleep(0.05)
    running.send_signal(number)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    assert f"{number.name} received" in err or "SIGINT received" in err
    assert "Traceback" not in err
    assert stored.json("list", "--unfinished") == []
    assert stored("backup", f"disk.img:{image}", "--backup-id", "web").code == 0


def test_dry_run_says_what_would_be_read_and_writes_nothing(stored: Fleece, image: Path) -> None:
    plan = stored.json("backup", f"disk.img:{image}", "--backup-id", "web", "--dry-run")
    (archive,) = plan["archives"]
    assert (archive["mode"], archive["read"]) == ("full", 7 * MIB)
    assert "no dirty bitmap" in archive["reason"]
    assert stored.json("list", "--unfinished") == []
    assert stored.repo is not None
    assert not (stored.repo / "host").exists()


def test_the_sync_level_of_the_configuration_and_of_a_registered_datastore_is_that_of_a_backup(
    stored: Fleece, conf: Path
) -> None:
    assert stored.repo is not None
    arguments = "backup", f"vm.conf:{conf}", "--backup-id", "web", "--output", "json"
    assert stored(*arguments).code == 0
    stored.json("datastore", "create", stored.repo, "--reuse", "--name", "quick", "--sync-level", "none")
    (stored.home / "fleece.toml").write_text(f'[repository.named]\npath = "{stored.repo}"\nsync-level = "file"\n')
    for repo, code in (("quick", 3), ("named", 0)):
        answer = stored(*arguments, "--repo", repo)
        assert answer.code == code, answer
        # What a power cut may cost is said where the level is none.
        warnings = answer.document["warnings"]
        assert [warning.partition(":")[0] for warning in warnings] == ["sync level 'none'"] * (code == 3)


@pytest.mark.parametrize("source", ["empty", "missing", "folder"])
def test_a_source_that_cannot_be_backed_up_leaves_no_snapshot(source: str, stored: Fleece, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    answer = stored("backup", f"disk.img:{tmp_path / source}", "--backup-id", "web", "--output", "json")
    assert (answer.code, answer.out) == (1, "")
    assert str(tmp_path / source) in answer.error["where"]
    assert stored.json("list", "--unfinished") == []


def test_warnings_end_with_3_and_are_listed(stored: Fleece, image: Path) -> None:
    assert stored("backup", f"disk.img:{image}", "--backup-id", "web", "--owner", "other@pbs").code == 0
    answer = stored("backup", f"disk.img:{image}", "--backup-id", "web", "--output", "json")
    assert (answer.code, answer.err) == (3, "")
    assert "belongs to other@pbs" in answer.document["warnings"][0]
    answer = stored("backup", f"disk.img:{image}", "--backup-id", "web")
    assert answer.code == 3
    assert "Warning:\n  group host/web belongs to other@pbs" in answer.err


def test_backup_time_may_be_given_and_must_be_new(stored: Fleece, image: Path) -> None:
    report = stored.json("backup", f"disk.img:{image}", "--backup-id", "web", "--backup-time", "1767322984")
    assert report["snapshot"] == "host/web/2026-01-02T03:03:04Z"
    again = stored("backup", f"disk.img:{image}", "--backup-id", "web", "--backup-time", "2026-01-02T03:03:04Z")
    assert again.code == 2
    assert "not after" in again.err


def test_standard_output_of_a_restore_to_a_pipe_is_the_archive_and_nothing_else(
    stored: Fleece, image: Path, conf: Path
) -> None:
    stored.json("backup", f"disk.img:{image}", f"vm.conf:{conf}", "--backup-id", "web")
    piped = stored.start("restore", "host/web/latest", "disk.img", "-", umask=0o77)
    assert isinstance(piped.stdout, io.TextIOWrapper)
    assert piped.stdout.buffer.read() == image.read_bytes()
    piped.communicate(timeout=60)
    assert piped.returncode == 0
    assert stored("restore", "host/web/latest", "vm.conf", "-").out == conf.read_text()
    refused = stored("restore", "host/web/latest", "disk.img", "-", "--output", "json")
    assert (refused.code, refused.out) == (2, "")


def test_a_restore_into_a_pipe_that_nobody_empties_can_be_ended(
    stored: Fleece, image: Path, ended: Callable[["Popen[str]"], "Popen[str]"]
) -> None:
    stored.json("backup", f"disk.img:{image}", "--backup-id", "web")
    piped = ended(stored.start("restore", "host/web/latest", "disk.img", "-", encoding="latin-1"))
    assert piped.stdout is not None
    assert select.select([piped.stdout], [], [], 60)[0]
    time.sleep(0.5)  # until the pipe is full
    piped.send_signal(signal.SIGTERM)
    assert piped.wait(timeout=60) == 1


def test_an_image_is_not_restored_to_a_terminal(stored: Fleece, image: Path, conf: Path) -> None:
    stored.json("backup", f"disk.img:{image}", f"vm.conf:{conf}", "--backup-id", "web")
    reader, terminal = pty.openpty()
    try:
        refused = stored.start("restore", "host/web/latest", "disk.img", "-", stdout=terminal)
        _, err = refused.communicate(timeout=60)
        assert refused.returncode == 1
        assert "it is a terminal" in err
        shown = stored.start("restore", "host/web/latest", "vm.conf", "-", stdout=terminal)
        shown.communicate(timeout=60)
        assert shown.returncode == 0
        assert conf.read_bytes() in os.read(reader, 65536).replace(b"\r\n", b"\n")
    finally:
        os.close(reader)
        os.close(terminal)


def test_an_image_is_restored_sparse_and_never_over_something_without_force(
    stored: Fleece, image: Path, tmpfs: Path
) -> None:
    stored.json("backup", f"disk.img:{image}", "--backup-id", "web")
    target = tmpfs / "restored.raw"
    document = stored.json("restore", "host/web/latest", "disk.img", target)
    assert document["restored"] == [{"name": "disk.img", "target": str(target), "size": 11 * MIB}]
    assert target.read_bytes() == image.read_bytes()
    assert target.stat().st_blocks * 512 <= 8 * MIB
    target.write_bytes(b"precious")
    refused = stored("restore", "host/web/latest", "disk.img", target, "--output", "json")
    assert (refused.code, target.read_bytes()) == (1, b"precious")
    assert "--force" in refused.error["hint"]
    assert stored("restore", "host/web/latest", "disk.img", target, "--force").code == 0
    assert target.read_bytes() == image.read_bytes()


def test_a_whole_snapshot_goes_to_an_empty_folder(stored: Fleece, image: Path, conf: Path, tmpfs: Path) -> None:
    stored.json("backup", f"disk.img:{image}", f"vm.conf:{conf}", "--backup-id", "web")
    folder = tmpfs / "everything"
    document = stored.json("restore", "host/web/latest", "--all", folder)
    assert [one["name"] for one in document["restored"]] == ["disk.img", "vm.conf"]
    assert (folder / "disk.img").read_bytes() == image.read_bytes()
    assert (folder / "vm.conf").read_text() == conf.read_text()
    refused = stored("restore", "host/web/latest", "--all", folder)
    assert refused.code == 1
    assert "not empty" in refused.err
    assert stored("restore", "host/web/latest", "--all", folder, "--force").code == 0


def test_an_unknown_archive_lists_those_there_are(stored: Fleece, conf: Path, tmpfs: Path) -> None:
    stored.json("backup", f"vm.conf:{conf}", "--backup-id", "web")
    answer = stored("restore", "host/web/latest", "disk.img", tmpfs / "x", "--output", "json")
    assert answer.code == 1
    assert answer.error["hint"] == "it has vm.conf"
    assert not (tmpfs / "x").exists()


def test_forget_removes_one_snapshot_or_a_group_but_not_what_is_protected(stored: Fleece, conf: Path) -> None:
    times = ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"]
    for time_text in times:
        stored.json("backup", f"vm.conf:{conf}", "--backup-id", "web", "--backup-time", time_text)
    first, second, third = (f"host/web/{time_text}" for time_text in times)
    assert stored.json("forget", first, "--dry-run")["removed"] == [first]
    assert stored.json("forget", first) == {"removed": [first], "kept": [], "dry-run": False}
    assert stored("forget", first).code == 1
    assert stored.repo is not None
    (stored.repo / third / ".protected").touch()
    assert stored("forget", third).code == 1
    assert stored.json("forget", "--group", "host/web", "--dry-run")["kept"] == [third]
    answer = stored("forget", "--group", "host/web", "--output", "json")
    assert answer.code == 3
    assert answer.document == {"removed": [second], "kept": [third], "dry-run": False}
    assert [entry["snapshot"] for entry in stored.json("list")] == [third]
    assert stored("forget", "--group", "host/nobody").code == 1


def test_verify_tells_damaged_snapshots_from_whole_ones(stored: Fleece, image: Path, conf: Path) -> None:
    whole = stored.json("backup", f"vm.conf:{conf}", "--backup-id", "whole")["snapshot"]
    bad = stored.json("backup", f"disk.img:{image}", "--backup-id", "bad")["snapshot"]
    assert [(result["state"], result["skipped"]) for result in stored.json("verify")] == [("ok", None)] * 2
    assert stored.repo is not None
    chunk = max(chunk_files(stored.repo), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    assert stored("verify", "--no-record").code == 1
    assert chunk.read_bytes() == data, "with --no-record verify changes nothing"
    before = stored.json("verify", "--ignore-verified")
    assert [(one["state"], one["skipped"]) for one in before] == [("ok", "recently verified")] * 2
    answer = stored("verify", "--output", "json")
    assert answer.code == 1
    results = {result["snapshot"]: result for result in answer.document}
    assert (results[whole]["state"], results[whole]["errors"]) == ("ok", [])
    assert results[bad]["state"] == "failed"
    assert chunk.name in results[bad]["errors"][0]
    assert bad in answer.error["where"]
    assert stored("verify", whole).code == 0
    assert stored("verify", "host/bad").code == 1
    assert not chunk.exists()
    aside = chunk.with_name(f"{chunk.name}.0.bad")
    assert aside.read_bytes() == data
    os.utime(aside, (time.time() - 60,) * 2)  # what was read in the second in which a collection starts is in use
    # What is there is taken as base no more, so the next backup stores the chunk anew.
    again = stored.json("backup", f"disk.img:{image}", "--backup-id", "bad")["snapshot"]
    assert stored.json("verify", "--ignore-verified", "--output", "json")[-1]["snapshot"] == whole
    assert {one["snapshot"]: one["verification"]["state"] for one in stored.json("list")} == {
        whole: "ok",
        bad: "ok",
        again: "ok",
    }
    report = stored.json("gc")
    assert (report["still-bad"], report["disk-chunks"] > 1, report["missing-chunks"]) == (1, True, 0)
    assert stored("verify", "host/nobody").code == 1


def test_namespaces_are_listed_one_at_a_time_or_all(stored: Fleece, conf: Path) -> None:
    assert stored.repo is not None
    (stored.repo / "ns/a/ns/b").mkdir(parents=True)
    stored.environment = {"PBS_NAMESPACE": "a/b"}
    stored.json("backup", f"vm.conf:{conf}", "--backup-id", "web")
    assert [entry["ns"] for entry in stored.json("list")] == ["a/b"]
    assert stored.json("list", "--ns", "") == []
    assert [entry["ns"] for entry in stored.json("list", "--ns", "", "--recursive")] == ["a/b"]
    assert stored("restore", "host/web/latest", "vm.conf", "-", "--ns", "a/b").out == conf.read_text()
