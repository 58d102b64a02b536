"""Restores that cannot go on, or not with every entry."""

import errno
import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import TargetError
from pxar import writing
from pxar.accessor import ArchiveAccessor
from pxar.behind import Behind
from pxar.extract import extract_folder
from pxar.extract_report import MAX_ALIKE, ExtractOptions, ExtractReport
from pxar.format import ENTRY, U64
from pxar.tar_stream import write_tar
from tests.pxar.archives import Item, MemoryBytes, archived
from tests.pxar.restored import (
    AS_ROOT,
    MIB,
    Damaged,
    file,
    folder,
    names_below,
    names_in,
    opened,
    sample,
)


def test_files_that_cannot_be_read_are_named_and_the_others_restored(tmp_path: Path) -> None:
    big = os.urandom(3 * MIB)
    root = folder({b"%03d" % number: file(b"x" * 1000) for number in range(60)} | {b"big": file(big), b"z": file(b"z")})
    archive, payload = archived(root, split=True)
    middle = payload.index(big) + 2 * MIB
    accessor = ArchiveAccessor(MemoryBytes(archive), Damaged(payload, middle, middle + 10))
    report = extract_folder(accessor, str(tmp_path / "target"))
    assert len(names_below(tmp_path / "target")) == 61
    assert report.warnings == ["'big': not restored: cannot read chunk 7: the digest does not match"]
    accessor = ArchiveAccessor(MemoryBytes(archive), Damaged(payload, 0, 58 * 1016))
    report = extract_folder(accessor, str(tmp_path / "second"))
    assert names_below(tmp_path / "second") == {"058", "059", "big", "z"}
    assert (report.failed, report.files, len(report.warnings)) == (58, 4, MAX_ALIKE + 1)
    assert report.warnings[-1].endswith("more entries: not restored: the backup is damaged there")


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("to_tar", [True, False])
def test_what_stands_behind_something_damaged_is_restored(tmp_path: Path, split: bool, to_tar: bool) -> None:
    def some(count: int) -> Item:
        return folder({b"%03d" % number: file(b"content %d of it" % number) for number in range(count)})

    root = folder({name: some(60) for name in (b"a", b"b", b"c")} | {b"d": file(b"d")})
    archive, payload = archived(root, split=split)

    def place(name: bytes, start: int = 0) -> int:
        return archive.index(name + b"\0" + U64.pack(ENTRY), start)

    second = place(b"b")

    def restored(start: int, end: int) -> tuple[set[str], ExtractReport]:
        accessor = ArchiveAccessor(Damaged(archive, start, end), MemoryBytes(payload) if split else None)
        if to_tar:
            data = bytearray()
            report = write_tar(accessor, data.extend)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                return {name for name in tar.getnames() if name not in ("", ".")}, report
        target = tmp_path / str(start)
        report = extract_folder(accessor, str(target))
        return names_below(target), report

    everything, _ = restored(-1, -1)
    # The entry of one folder, and what stands before and behind it.
    names, report = restored(second, second + 60)
    assert everything - names == {"b"} | {f"b/{number:03}" for number in range(60)}
    assert report.failed == 1
    assert report.warnings[0].startswith("'/': an entry in it, with all that may be in that, is missing: ")
    # Some files within a folder.
    names, report = restored(place(b"020", second), place(b"022", second) - 60)
    assert everything - names == {"b/020", "b/021"}
    assert report.failed == 2
    assert all(warning.startswith("'b': an entry in it") for warning in report.warnings)


def test_an_error_of_the_store_ends_it_and_leaves_no_half_file(tmp_path: Path) -> None:
    big = os.urandom(3 * MIB)
    root = folder({b"a": file(b"a"), b"big": file(big), b"z": file(b"z")})
    archive, payload = archived(root, split=True)
    middle = payload.index(big) + 2 * MIB
    accessor = ArchiveAccessor(MemoryBytes(archive), Damaged(payload, middle, middle + 1, TargetError("x", "y", "z")))
    with pytest.raises(TargetError, match="cannot x y: z"):
        extract_folder(accessor, str(tmp_path / "target"))
    assert names_below(tmp_path / "target") <= {"a"}


def test_progress_is_told_and_can_end_it(tmp_path: Path) -> None:
    root = folder({b"%04d" % number: folder({b"f": file(b"x")}) for number in range(500)})
    calls = 0

    class StopError(Exception):
        pass

    def progress(_: ExtractReport) -> None:
        nonlocal calls
        calls += 1
        if calls == 100:
            raise StopError

    with pytest.raises(StopError):
        extract_folder(opened(root), str(tmp_path / "target"), progress=progress)
    assert len(names_in(tmp_path / "target")) < 110


@AS_ROOT
def test_a_full_disk_ends_it_and_leaves_whole_files_only(disk: Path) -> None:
    root = folder({b"f%03d" % number: file(os.urandom(MIB)) for number in range(160)})
    with pytest.raises(TargetError, match=r"target: No space left on device; what was restored so far stays"):
        extract_folder(opened(root), str(disk / "target"))
    for path in (disk / "target").iterdir():
        assert path.read_bytes() == root.children[os.fsencode(path.name)].content


@AS_ROOT
def test_a_read_only_file_system_ends_it_at_once(disk: Path) -> None:
    (disk / "target").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(TargetError, match="Read-only file system"):
        extract_folder(opened(sample()), str(disk / "target"))


def test_without_root_owners_are_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(os, "fchown", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(writing, "_writing", None)
    others: dict[str, Any] = {"ids": (os.getuid() + 1, os.getgid())}
    tree = folder({b"d": folder({b"f": file(b"x", **others)}, **others), b"mine": file(ids=(os.getuid(), os.getgid()))})
    tree.children[b"e"] = file(ids=(os.getuid(), os.getgid() + 1))
    report = extract_folder(opened(tree), str(tmp_path / "target"))
    assert report.warnings == ["4 entries: owner: only root can give files away"]  # the root is one of them


@AS_ROOT
def test_files_of_a_folder_with_a_group_for_all_get_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = folder({b"a": file(b"x", ids=(0, 0)), b"b": file(b"y", ids=(0, 54321)), b"c": file(b"z", ids=(54321, 0))})
    for form in (vars(writing)["_writing"], None):
        monkeypatch.setattr(writing, "_writing", form)
        target = tmp_path / f"target-{form is None}"
        target.mkdir()
        os.chown(target, 0, 54321)
        target.chmod(0o2755)
        report = extract_folder(opened(tree), str(target), ExtractOptions(allow_existing=True))
        assert report.warnings == []
        owners = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in target.iterdir()}
        assert owners == {"a": (0, 0), "b": (0, 54321), "c": (54321, 0)}


def beside(run: Callable[[], None]) -> None:
    threading.Thread(target=run, daemon=True).start()


def test_calls_run_in_order_behind_and_the_first_error_ends_them() -> None:
    done: list[int] = []

    def call(number: int) -> None:
        if number == 50:
            raise KeyError(number)
        done.append(number)

    with pytest.raises(KeyError), Behind(beside, 100_000) as behind:
        for number in range(10_000):
            behind.put(1000, call, number)
    assert done == list(range(50))
    with Behind(beside) as behind:
        for number in range(40, 50):
            behind.put(0, call, number)
        behind.drain()
        assert done[50:] == list(range(40, 50))
