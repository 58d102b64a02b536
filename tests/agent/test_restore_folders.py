"""`fleece restore` of folders and files, as a person runs it."""

import io
import json
import os
import pty
import random
import select
import shutil
import signal
import stat
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pxar.backups import ext4
from tests.pxar.restored import AS_ROOT, described, names_below
from tests.support.stores import chunk_files

from .conftest import Fleece

MIB = 1 << 20
BIG = os.urandom(5 * MIB)
Popen = subprocess.Popen[str]
SNAPSHOT = "host/web/latest"
BOTH = pytest.mark.parametrize("mode", ["legacy", "data"])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name, data in {"etc/hosts": b"127.0.0.1\n", "etc/ssh/key": b"k", "big": BIG, "home/a.tmp": b"t"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    for number in range(300):
        (root / f"home/file-{number}").write_bytes(b"%d\n" % number * number)
    (root / "link").symlink_to("etc/hosts")
    os.link(root / "etc/hosts", root / "home/same")
    os.mkfifo(root / "fifo")
    (root / "etc/ssh").chmod(0o700)
    for path in (root, *root.rglob("*")):
        os.utime(path, ns=(5, 1_600_000_000_123_456_789), follow_symlinks=False)
    return root


def back_up(fleece: Fleece, tree: Path, *options: str | Path, mode: str = "data") -> Any:
    return fleece.json("backup", f"root.pxar:{tree}", *options, "--backup-id", "web", "--change-detection-mode", mode)


def piped(fleece: Fleece, *arguments: str | Path) -> tuple[int, bytes, str]:
    """Exit code, standard output as bytes, standard error."""
    process = fleece.start(*arguments)
    assert isinstance(process.stdout, io.TextIOWrapper)
    out = process.stdout.buffer.read()
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


@BOTH
def test_a_folder_comes_back_with_a_report(stored: Fleece, tree: Path, tmp_path: Path, mode: str) -> None:
    back_up(stored, tree, mode=mode)
    target = tmp_path / "restored"
    document = stored.json("restore", SNAPSHOT, "root.pxar", target)
    assert set(document) == {"snapshot", "restored", "duration-s", "warnings"}
    (one,) = document["restored"]
    assert one == {
        "name": "root.pxar", "target": str(target), "size": sum(map(len, map(Path.read_bytes, files_of(tree)))),
        "entries": 310, "files": 304, "hardlinks": 1, "directories": 3, "left-out": 0, "failed": 0,
    }  # fmt: skip
    assert described(target) == described(tree)
    answer = stored("restore", SNAPSHOT, "root", tmp_path / "second")
    assert answer.code == 0
    assert f"root.pxar -> {tmp_path / 'second'}: 310 entries" in answer.out
    assert described(tmp_path / "second") == described(tree)


def files_of(root: Path) -> list[Path]:
    """One name of each file."""
    files = {path.stat().st_ino: path for path in root.rglob("*") if path.is_file() and not path.is_symlink()}
    return list(files.values())


def test_patterns_and_paths_choose(stored: Fleece, tree: Path, tmp_path: Path) -> None:
    back_up(stored, tree)
    arguments = "--pattern", "/etc", "--pattern", "!key", "--pattern", "home/file-1?"
    stored.json("restore", SNAPSHOT, "root.pxar", tmp_path / "some", *arguments)
    numbers = {f"home/file-1{number}" for number in range(10)}
    assert names_below(tmp_path / "some") == {"etc", "etc/hosts", "etc/ssh", "home", *numbers}
    stored.json("restore", SNAPSHOT, "root.pxar/etc/", tmp_path / "etc")
    assert names_below(tmp_path / "etc") == {"hosts", "ssh", "ssh/key"}
    nothing = stored("restore", SNAPSHOT, "root.pxar", tmp_path / "none", "--pattern", "/nothing")
    assert (nothing.code, "root.pxar: no entry matches the patterns" in nothing.err) == (3, True)
    (tmp_path / "into").mkdir()
    document = stored.json("restore", SNAPSHOT, "root.pxar/etc/hosts", tmp_path / "into")
    assert document["restored"][0]["target"] == str(tmp_path / "into/hosts")
    assert (tmp_path / "into/hosts").read_bytes() == b"127.0.0.1\n"
    assert (tmp_path / "into/hosts").stat().st_mtime_ns == 1_600_000_000_123_456_789
    refused = stored("restore", SNAPSHOT, "root.pxar/etc/hosts", tmp_path / "into/hosts", "--output", "json")
    assert (refused.code, refused.error["hint"]) == (1, "use another name, or --force")
    assert stored("restore", SNAPSHOT, "root.pxar/link", tmp_path / "into/hosts", "--force").code == 0
    assert (tmp_path / "into/hosts").readlink() == Path("etc/hosts")


def test_paths_that_are_no_utf_8_stay_out_of_json_and_terminals(stored: Fleece, tmp_path: Path) -> None:
    folder = tmp_path / "tree" / os.fsdecode(b"d\xff\x1b")
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"x")
    back_up(stored, tmp_path / "tree")
    code, out, _ = piped(
        stored, "restore", SNAPSHOT, f"root.pxar/{folder.name}", tmp_path / os.fsdecode(b"t\xff"), "--output", "json"
    )
    (one,) = json.loads(out)["restored"]  # bytes, which must be UTF-8
    assert (code, one["name"]) == (0, "root.pxar/d\\xff\\x1b")
    assert os.fsencode(one["target"]) == os.fsencode(tmp_path) + b"/t\xff"
    answer = stored("restore", SNAPSHOT, f"root.pxar/{folder.name}", tmp_path / "second")
    assert answer.code == 0
    assert f"root.pxar/d\\xff\\x1b -> {tmp_path}/second: 1 entries" in answer.out


def test_one_file_goes_to_standard_output(stored: Fleece, tree: Path) -> None:
    back_up(stored, tree)
    assert piped(stored, "restore", SNAPSHOT, "root.pxar/big", "-")[:2] == (0, BIG)
    assert piped(stored, "restore", SNAPSHOT, "root.pxar/home/same", "-")[:2] == (0, b"127.0.0.1\n")
    reader, terminal = pty.openpty()
    try:
        shown = stored.start("restore", SNAPSHOT, "root.pxar/etc/hosts", "-", stdout=terminal)
        shown.communicate(timeout=60)
        assert shown.returncode == 0
        assert b"127.0.0.1" in os.read(reader, 65536)
        for name in ("root.pxar", "root.pxar/etc"):
            refused = stored.start("restore", SNAPSHOT, name, "-", stdout=terminal)
            assert "it is a terminal" in refused.communicate(timeout=60)[1]
            assert refused.returncode == 1
    finally:
        os.close(reader)
        os.close(terminal)


@BOTH
def test_folders_go_to_standard_output_as_tar_and_zip(stored: Fleece, tree: Path, mode: str) -> None:
    back_up(stored, tree, mode=mode)
    code, data, err = piped(stored, "restore", SNAPSHOT, "root.pxar", "-")
    assert (code, "310 entries" in err) == (0, True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert {name for name in archive.getnames() if name != "."} == names_below(tree)
        assert archive.extractfile("big").read() == BIG  # type: ignore[union-attr]
    code, data, _ = piped(stored, "restore", SNAPSHOT, "root.pxar/home", "-", "--format", "zip", "--pattern", "*.tmp")
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        assert (code, packed.namelist()) == (0, ["a.tmp"])


def test_all_archives_go_to_a_folder_each_under_its_name(stored: Fleece, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "web.conf").write_text("x")
    (tmp_path / "disk").write_bytes(BIG)
    back_up(stored, tree, f"web.conf:{tmp_path / 'web.conf'}", f"disk.img:{tmp_path / 'disk'}", mode="legacy")
    everything = tmp_path / "everything"
    document = stored.json("restore", SNAPSHOT, "--all", everything)
    assert [one["name"] for one in document["restored"]] == ["disk.img", "web.conf", "root.pxar"]
    assert sorted(path.name for path in everything.iterdir()) == ["disk.img", "root", "web.conf"]
    assert described(everything / "root") == described(tree)
    (everything / "root/home/file-7").unlink()
    assert stored("restore", SNAPSHOT, "--all", everything).code == 1
    stored.json("restore", SNAPSHOT, "--all", everything, "--force")
    assert described(everything / "root") == described(tree)


def test_what_is_there_is_kept_or_replaced_as_the_options_say(stored: Fleece, tree: Path, tmp_path: Path) -> None:
    back_up(stored, tree)
    target = tmp_path / "target"
    (target / "etc").mkdir(parents=True)
    for name in ("etc/hosts", "link"):
        (target / name).write_bytes(b"mine")
    refused = stored("restore", SNAPSHOT, "root.pxar", target, "--output", "json")
    assert (refused.code, "--force" in refused.error["hint"]) == (1, True)
    answer = stored("restore", SNAPSHOT, "root.pxar", target, "--allow-existing-dirs", "--output", "json")
    assert (answer.code, len(answer.document["warnings"]), answer.document["restored"][0]["failed"]) == (3, 2, 2)
    assert (target / "etc/hosts").read_bytes() == (target / "link").read_bytes() == b"mine"
    options = "--allow-existing-dirs", "--overwrite-files", "--output", "json"
    answer = stored("restore", SNAPSHOT, "root.pxar", target, *options)
    assert (answer.code, (target / "etc/hosts").read_bytes()) == (3, b"127.0.0.1\n")
    assert (target / "link").read_bytes() == b"mine"
    stored.json("restore", SNAPSHOT, "root.pxar", target, "--force")
    assert described(target) == described(tree)


@AS_ROOT
def test_metadata_are_left_out_as_the_options_say(stored: Fleece, tree: Path, tmp_path: Path) -> None:
    os.chown(tree / "big", 1000, 1000)
    (tree / "big").chmod(0o4750)
    back_up(stored, tree)
    stored.json("restore", SNAPSHOT, "root.pxar", tmp_path / "a", "--ignore-ownership", "--no-fifos")
    found = (tmp_path / "a/big").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode), (tmp_path / "a/fifo").exists()) == (0, 0o750, False)
    options = "--no-setuid", "--ignore-acls", "--ignore-xattrs", "--no-device-nodes", "--no-sockets"
    stored.json("restore", SNAPSHOT, "root.pxar", tmp_path / "b", *options)
    found = (tmp_path / "b/big").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (1000, 0o750)
    stored.json("restore", SNAPSHOT, "root.pxar", tmp_path / "c", "--ignore-permissions")
    assert stat.S_IMODE((tmp_path / "c/big").stat().st_mode) == 0o666 & ~umask()


def umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["root.pxar/nothing", "TARGET"], 1, "nothing at this path"),
        (["root.pxar/../etc", "TARGET"], 2, "'..' leads nowhere"),
        (["other.pxar", "TARGET"], 1, "no such archive"),
        (["catalog.pcat1", "TARGET"], 2, "it is no archive of files"),
        (["web.conf", "TARGET", "--pattern", "x"], 2, "is no folder"),
        (["web.conf", "-", "--format", "tar"], 2, "is no folder"),
        (["root.pxar", "TARGET", "--format", "tar"], 2, "standard output"),
        (["root.pxar", "TARGET", "--format", "qcow2"], 2, "no disk image"),
        (["root.pxar", "TARGET", "--pattern", "[a"], 2, "a class is not closed"),
        (["root.pxar/big", "-", "--format", "zip"], 2, "is no folder"),
        (["root.pxar/big", "TARGET", "--pattern", "big"], 2, "is no folder"),
        (["root.pxar/big", "TARGET/in/none"], 1, "the folder for it is not there"),
        (["root.pxar", "-", "--ignore-ownership"], 2, "decides on that"),
        (["--all", "TARGET", "--pattern", "x"], 2, "not for --all"),
    ],
)
def test_what_makes_no_sense_is_refused_and_writes_nothing(
    stored: Fleece, tree: Path, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    (tmp_path / "web.conf").write_text("x")
    back_up(stored, tree, f"web.conf:{tmp_path / 'web.conf'}", mode="legacy")
    given = [argument.replace("TARGET", str(tmp_path / "target")) for argument in arguments]
    answer = stored("restore", SNAPSHOT, *given)
    assert (answer.code, answer.out) == (code, "")
    assert text in answer.err
    assert not (tmp_path / "target").exists()


def test_encrypted_folders_need_their_key(stored: Fleece, tree: Path, tmp_path: Path) -> None:
    key = tmp_path / "backup.key"
    assert stored("key", "create", key, "--kdf", "none").code == 0
    back_up(stored, tree, "--keyfile", key)
    stored.json("restore", SNAPSHOT, "root.pxar", tmp_path / "target", "--keyfile", key)
    assert described(tmp_path / "target") == described(tree)
    assert stored("restore", SNAPSHOT, "root.pxar", tmp_path / "second").code == 1
    assert not (tmp_path / "second").exists()


def test_a_damaged_chunk_costs_the_files_in_it_and_is_told(stored: Fleece, tree: Path, tmp_path: Path) -> None:
    content = random.Random(4).randbytes(20 * MIB)
    (tree / "a file before").write_bytes(content)
    back_up(stored, tree)
    assert stored.repo is not None
    # The one with its end, which cannot be compressed and is too far from its beginning for one chunk.
    (victim,) = (path for path in chunk_files(stored.repo) if content[-MIB // 2 - 64 : -MIB // 2] in path.read_bytes())
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    answer = stored("restore", SNAPSHOT, "root.pxar", tmp_path / "target", "--output", "json")
    assert answer.code == 3
    document = answer.document
    assert 1 <= document["restored"][0]["failed"] == len(document["warnings"]) < 5
    assert "'a file before': not restored" in str(document["warnings"])
    assert victim.name in str(document["warnings"])
    missing = names_below(tree) - names_below(tmp_path / "target")
    assert {"a file before"} <= missing <= {"a file before", "big"}
    code, _, err = piped(stored, "restore", SNAPSHOT, "root.pxar/a file before", "-")
    assert (code, victim.name in err) == (1, True)
    for format in ("tar", "zip"):
        code, out, err = piped(stored, "restore", SNAPSHOT, "root.pxar", "-", "--format", format)
        assert (code, victim.name in err) == (1, True)
        assert "cannot write to its end 'a file before'" in err
        # Whoever unpacks what came so far notices that it is not all.
        (tmp_path / format).write_bytes(out)
        with pytest.raises((tarfile.ReadError, zipfile.BadZipFile)), (tmp_path / format).open("rb") as file:
            if format == "zip":
                zipfile.ZipFile(file)
            with tarfile.open(fileobj=file) as archive:
                archive.getmembers()
    failed = stored("restore", SNAPSHOT, "root.pxar/a file before", tmp_path / "one", "--output", "json")
    assert (failed.code, failed.out, (tmp_path / "one").exists()) == (1, "", False)
    assert victim.name in failed.error["why"]


@pytest.fixture
def full_of_files(tmpfs: Path) -> Path:
    """Enough that a restore takes a while."""
    root = tmpfs / "many"
    for number in range(300):
        folder = root / f"d{number:03d}"
        folder.mkdir(parents=True)
        for name in range(100):
            (folder / f"f{name}").write_bytes(b"%d %d\n" % (number, name) * 300)
    return root


def test_a_signal_ends_it_and_leaves_whole_files_only(
    stored: Fleece, full_of_files: Path, tmpfs: Path, ended: Callable[[Popen], Popen]
) -> None:
    back_up(stored, full_of_files)
    target = tmpfs / "restored"
    running = ended(stored.start("restore", SNAPSHOT, "root.pxar", target))
    while not (target / "d010").exists():
        assert running.poll() is None
        time.sleep(0.001)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    assert "SIGTERM received" in err
    assert "Traceback" not in err
    restored = [path for path in target.rglob("*") if path.is_file()]
    assert 0 < len(restored) < 30_000
    for path in restored:
        assert path.read_bytes() == (full_of_files / path.relative_to(target)).read_bytes()


def test_a_pipe_that_nobody_empties_or_closes_ends_it(
    stored: Fleece, tree: Path, ended: Callable[[Popen], Popen]
) -> None:
    back_up(stored, tree)
    running = ended(stored.start("restore", SNAPSHOT, "root.pxar", "-", encoding="latin-1"))
    assert running.stdout is not None
    assert select.select([running.stdout], [], [], 60)[0]
    time.sleep(0.5)  # until the pipe is full
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 1
    running = ended(stored.start("restore", SNAPSHOT, "root.pxar", "-", encoding="latin-1"))
    assert running.stdout is not None
    running.stdout.close()
    assert running.wait(timeout=60) == 1
    assert running.stderr is not None
    assert "went away" in running.stderr.read()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with ext4(tmp_path, 16 * MIB) as folder:
        yield folder


@AS_ROOT
def test_a_full_and_a_read_only_disk_end_it_with_a_clear_error(stored: Fleece, tree: Path, disk: Path) -> None:
    (tree / "large").write_bytes(os.urandom(20 * MIB))
    back_up(stored, tree)
    failed = stored("restore", SNAPSHOT, "root.pxar", disk / "target", "--output", "json")
    assert (failed.code, failed.error["why"]) == (1, "No space left on device")
    assert not (disk / "target/large").exists()
    shutil.rmtree(disk / "target")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    failed = stored("restore", SNAPSHOT, "root.pxar", disk / "target", "--output", "json")
    assert (failed.code, failed.error["why"]) == (1, "Read-only file system")
