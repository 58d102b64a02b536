"""Forged archives: nothing leads out of the folder that is restored to."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from core.errors import FormatError
from pxar.accessor import ArchiveAccessor
from pxar.encoder import ArchiveEncoder
from pxar.extract import extract_folder
from pxar.extract_report import ExtractOptions
from pxar.features import CHATTR_FLAGS, DEFAULT, FAT_FLAGS
from tests.pxar.archives import MemoryBytes, archived
from tests.pxar.restored import (
    FOLDER,
    LINK,
    MIB,
    REPLACE,
    add_file,
    file,
    folder,
    forged,
    hardlink,
    names_below,
    names_in,
    opened,
    sample,
)


@pytest.mark.parametrize("options", [ExtractOptions(), REPLACE], ids=["keep", "replace"])
@pytest.mark.parametrize("size", [6, MIB])
def test_no_file_is_written_through_a_symlink_of_the_same_name(
    tmp_path: Path, options: ExtractOptions, size: int
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"old")

    def write(encoder: ArchiveEncoder) -> None:
        encoder.symlink(b"a", LINK, os.fsencode(outside))
        add_file(encoder, b"a", os.urandom(size))

    extract_folder(forged(write), str(tmp_path / "target"), options)
    assert outside.read_bytes() == b"old"
    assert (tmp_path / "target/a").is_symlink() == (not options.overwrite_files)


@pytest.mark.parametrize("options", [ExtractOptions(), REPLACE], ids=["keep", "replace"])
def test_no_folder_is_entered_through_a_symlink_of_the_same_name(tmp_path: Path, options: ExtractOptions) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(0o711)

    def write(encoder: ArchiveEncoder) -> None:
        encoder.symlink(b"a", LINK, os.fsencode(outside))
        encoder.directory(b"a", FOLDER)
        add_file(encoder, b"evil", b"evil")
        encoder.directory(b"more", FOLDER)
        encoder.end_directory()
        encoder.end_directory()
        add_file(encoder, b"b", b"fine")

    report = extract_folder(forged(write), str(tmp_path / "target"), options)
    assert names_in(outside) == []
    assert stat.S_IMODE(outside.stat().st_mode) == 0o711
    (warning,) = report.warnings
    assert warning.startswith("'a': the folder, with all that is in it, is missing")
    assert (tmp_path / "target/b").read_bytes() == b"fine"


@pytest.mark.parametrize(
    "stored", [b"../outside", b"/etc/passwd", b"link/file", b"dir/../a", b"./a", b"a/", b"dir//file", b"missing"]
)
def test_hard_links_lead_to_nothing_but_what_was_restored(tmp_path: Path, stored: bytes) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"secret")

    def write(encoder: ArchiveEncoder) -> None:
        position = add_file(encoder, b"a", b"content")
        encoder.symlink(b"link", LINK, os.fsencode(outside))
        encoder.hardlink(b"z", stored, position)

    extract_folder(forged(write), str(tmp_path / "target"), REPLACE)
    # What the link's position says is a file of the archive, so its content is right.
    assert (tmp_path / "target/z").read_bytes() == b"content"
    assert (outside / "file").stat().st_nlink == 1


def test_hard_links_do_not_lead_to_files_that_were_there_before(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "a").write_bytes(b"old")
    root = folder({b"a": file(b"new"), b"b": hardlink(b"a")})
    report = extract_folder(opened(root), str(target), ExtractOptions(allow_existing=True))
    assert (report.failed, (target / "a").stat().st_nlink) == (1, 1)
    assert ((target / "a").read_bytes(), (target / "b").read_bytes()) == (b"old", b"new")


def test_a_hard_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    root = folder({b"a": file(b"new"), b"b": hardlink(b"a"), b"c": file(b"c")})
    archive, payload = archived(root, split=True)
    broken = bytearray(archive)
    at = broken.index(b"b\0") + 2 + 16
    broken[at] += 1
    accessor = ArchiveAccessor(MemoryBytes(bytes(broken)), MemoryBytes(payload))
    report = extract_folder(accessor, str(tmp_path / "target"))
    assert names_below(tmp_path / "target") == {"a", "c"}
    assert (report.failed, report.warnings[0].partition(":")[0]) == (1, "'b'")


def test_any_flipped_bit_ends_in_a_warning_or_an_error(tmpfs: Path) -> None:
    archive, payload = archived(sample(), split=True)
    (tmpfs / "outside").mkdir()
    features = DEFAULT & ~(CHATTR_FLAGS | FAT_FLAGS)
    for bit in range(0, 8 * len(archive), 37):
        broken = bytearray(archive)
        broken[bit // 8] ^= 1 << bit % 8
        target = tmpfs / "outside/target"
        try:
            accessor = ArchiveAccessor(MemoryBytes(bytes(broken)), MemoryBytes(payload))
            extract_folder(accessor, str(target), ExtractOptions(features=features))
        except FormatError:
            pass
        assert names_in(tmpfs) == ["outside"]
        assert names_in(tmpfs / "outside") in ([], ["target"])
        subprocess.run(["rm", "-rf", target], check=True)
