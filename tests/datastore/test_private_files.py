"""Key files on the disk: whole or not at all, for nobody else, and never over one that is there."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from core.errors import FleeceError
from datastore.private_files import readable_by_others, replace, write_new


def test_a_new_file_is_for_its_owner_only_and_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/a.key"
    write_new(path, b"one", what="create")
    assert path.read_bytes() == b"one"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with pytest.raises(FleeceError, match="there is a file already"):
        write_new(path, b"two", what="create")
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.key"]


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FleeceError, match="there is a file already"):
        write_new(tmp_path / "a.key", b"one", what="create")
    assert not (tmp_path / "elsewhere").exists()


def test_of_many_writers_exactly_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    won: list[int] = []

    def write(number: int) -> None:
        try:
            write_new(path, b"%d" % number * 1000, what="create")
            won.append(number)
        except FleeceError:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert path.read_bytes() == b"%d" % won[0] * 1000


def test_replacing_keeps_the_link_and_narrows_the_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real.key", tmp_path / "link.key"
    real.write_bytes(b"old")
    real.chmod(0o644)
    link.symlink_to(real)
    replace(link, b"new", what="change")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.key"
    path.write_bytes(b"old")

    def full(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    if call == "write":
        monkeypatch.setattr(os, "fchmod", full)
    elif call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FleeceError, match="No space left"):
        replace(path, b"new", what="change")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.key"]


@pytest.mark.parametrize("call", ["fchmod", "fsync", "link"])
def test_a_full_disk_leaves_no_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(FleeceError, match="No space left"):
        write_new(tmp_path / "a.key", b"new", what="create")
    assert list(tmp_path.iterdir()) == []


def test_a_stick_without_links_and_modes_takes_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    # FAT: every file has the mode of the mount, and one name.
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fchmod", refuse)
    path = tmp_path / "a.key"
    write_new(path, b"one", what="create")
    assert not readable_by_others(path)
    path.chmod(0o755)
    assert readable_by_others(path)
    with pytest.raises(FleeceError, match="there is a file already"):
        write_new(path, b"two", what="create")
    assert path.read_bytes() == b"one"
    replace(path, b"two", what="change")
    assert path.read_bytes() == b"two"

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FleeceError, match="No space left"):
        write_new(tmp_path / "b.key", b"one", what="create")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.key"]
