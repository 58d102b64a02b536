"""Restores into folders in which something lies already."""

import os
from pathlib import Path

import pytest

from core.errors import TargetError
from pxar.extract import extract_folder
from pxar.extract_report import ExtractOptions
from tests.pxar.archives import item
from tests.pxar.restored import (
    MIB,
    REPLACE,
    file,
    folder,
    hardlink,
    names_below,
    opened,
    sample,
    symlink,
)


def test_a_folder_with_entries_is_refused_and_lost_found_is_none(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "lost+found").mkdir(parents=True)
    root = folder({b"lost+found": folder({b"x": file(b"x")}), b"a": file()})
    assert extract_folder(opened(root), str(target)).warnings == []
    assert (target / "lost+found/x").exists()
    with pytest.raises(TargetError, match=r"target: the folder is not empty; .*--force"):
        extract_folder(opened(sample()), str(target))
    with pytest.raises(TargetError, match="a: Not a directory"):
        extract_folder(opened(sample()), str(target / "a"))


def test_what_is_there_is_kept_and_named_unless_it_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    big = os.urandom(MIB)
    root = folder(
        {b"a": file(b"new", mode=0o600), b"big": file(big), b"fifo": item(0o010644), b"link": symlink(b"new"),
         b"other": hardlink(b"a"), b"sub": folder({b"f": file(b"f")})}
    )  # fmt: skip
    target.mkdir()
    for name in ("a", "big", "fifo", "link", "other", "elsewhere"):
        (target / name).write_bytes(b"old")
    (target / "second").hardlink_to(target / "a")
    (target / "sub").symlink_to(tmp_path)
    report = extract_folder(opened(root), str(target), ExtractOptions(allow_existing=True))
    assert report.failed == 6
    assert sorted(warning.partition(":")[0] for warning in report.warnings) == [
        "'a'", "'big'", "'fifo'", "'link'", "'other'", "'sub'",
    ]  # fmt: skip
    assert {(target / name).read_bytes() for name in ("a", "big", "fifo", "link", "other", "second")} == {b"old"}
    assert not (tmp_path / "f").exists()

    report = extract_folder(opened(root), str(target), REPLACE)
    assert [warning.partition(":")[0] for warning in report.warnings] == ["'sub'"]
    assert ((target / "a").read_bytes(), (target / "big").read_bytes()) == (b"new", big)
    assert (target / "a").samefile(target / "other")
    assert ((target / "link").readlink(), (target / "fifo").is_fifo()) == (Path("new"), True)
    # Whoever had the old file still has it.
    assert ((target / "second").read_bytes(), (target / "elsewhere").read_bytes()) == (b"old", b"old")
    assert not (tmp_path / "f").exists()
    assert not any(".fleece-" in name for name in names_below(target))
    # And once more, over what was restored.
    assert len(extract_folder(opened(root), str(target), REPLACE).warnings) == 1
    assert (target / "a").samefile(target / "other")


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "target/a").mkdir(parents=True)
    report = extract_folder(opened(folder({b"a": file(b"new")})), str(tmp_path / "target"), REPLACE)
    assert report.warnings == ["'a': not restored: a folder is there already, and was kept"]
    assert (tmp_path / "target/a").is_dir()
