"""Every entry of file systems that the kernel, mtools and ntfs-3g wrote."""

from collections.abc import Callable

import pytest

from diskfs import btrfs, ext
from diskfs.entries import Id
from diskfs.errors import DiskFsError
from diskfs.image import RAW
from tests.diskfs.reading import Files, content, walk
from tests.support.disk_images import FAT_KINDS, KERNEL_KINDS, MadeImage, differences

_QUICK = [
    "ext4",
    "ext4-1k",
    "ext4-meta-bg",
    "ext4-bigalloc",
    "ext2",
    "xfs-1k",
    "btrfs",
    "btrfs-zstd",
    "ntfs",
    "fat12",
    "fat16",
    "fat32",
]
_KINDS = {
    "ext4": ("ext4", "root"), "ext4-1k": ("ext4", ""), "ext4-meta-bg": ("ext4", ""),
    "ext4-bigalloc": ("ext4", ""), "ext3": ("ext3", ""), "ext2": ("ext2", ""),
    "xfs": ("xfs", "data"), "xfs-16k": ("xfs", ""), "xfs-1k": ("xfs", ""), "btrfs": ("btrfs", "pool"),
    "btrfs-zstd": ("btrfs", ""),
    "btrfs-lzo": ("btrfs", ""), "btrfs-zlib": ("btrfs", ""), "ntfs": ("ntfs", "Windows"), "fat12": ("fat12", "ESP"),
    "fat16": ("fat16", "ESP"), "fat32": ("fat32", "ESP"),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in _QUICK else pytest.param(kind, marks=pytest.mark.long)
        for kind in [*KERNEL_KINDS, *FAT_KINDS, "ntfs"]
    ],
)
def test_every_entry_is_what_its_own_file_system_shows(
    kind: str, made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    image = made(kind)
    source = files(image.path)
    system = source.image().file_system(RAW)
    found = dict(walk(system))
    assert (system.kind, system.label) == _KINDS[kind]
    assert sorted(found) == sorted(image.entries)
    wrong = {}
    for path, entry in found.items():
        wanted = image.entries[path]
        data = content(source, system, entry) if "sha256" in wanted else b""
        xattrs = dict(system.xattrs(entry.id)) if "xattrs" in wanted else {}
        if different := differences(entry, wanted, data, xattrs):
            wrong[path] = different
    assert wrong == {}


def test_what_is_in_the_journal_only_is_read_from_there(
    made: Callable[[str], MadeImage], files: Callable[..., Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = made("ext4-dirty")
    source = files(image.path)
    system = source.image().file_system(RAW)
    found = dict(walk(system))
    assert sorted(found) == sorted(image.entries)
    wrong = {}
    for path, entry in found.items():
        wanted = image.entries[path]
        data = content(source, system, entry) if "sha256" in wanted else b""
        if different := differences(entry, wanted, data, dict(system.xattrs(entry.id))):
            wrong[path] = different
    assert wrong == {}
    # Without it, it would not be.
    monkeypatch.setattr(ext, "with_journal", lambda blocks, *_: blocks)
    assert sorted(name for name, _ in walk(files(image.path).image().file_system(RAW))) != sorted(found)


def test_what_the_guest_encrypts_is_said_to_be_so_and_is_no_content(
    made: Callable[[str], MadeImage], files: Callable[..., Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = files(made("ext4").path).image().file_system(RAW)
    assert isinstance(system, ext.ExtFileSystem)
    found = dict(walk(system))
    honest = system._inode
    monkeypatch.setattr(system, "_inode", lambda number: honest(number)._replace(flags=honest(number).flags | 0x800))
    for ask, path in ((system.names, b"/deep"), (system.runs, b"/deep/big"), (system.entry, b"/etc/link200")):
        with pytest.raises(DiskFsError, match="encrypted by the guest"):
            list(ask(found[path].id) or ())
    assert system.entry(found[b"/deep/big"].id) == found[b"/deep/big"]


def test_holes_and_what_was_never_written_take_no_place(
    made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    source = files(made("ext4").path)
    system = source.image().file_system(RAW)
    found = dict(walk(system))
    runs = system.runs(found[b"/deep/preallocated"].id)
    assert runs is not None
    # 4096 bytes at the beginning, and the blocks of 5000 bytes: not the MiB that was allocated.
    assert sum(run.length for run in runs) <= 5 * 4096
    assert system.runs(found[b"/etc/null"].id) in ([], None)


def test_packed_content_is_read_on_from_where_it_was_left(
    made: Callable[[str], MadeImage], files: Callable[..., Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = files(made("btrfs-zstd").path).image().file_system(RAW)
    assert isinstance(system, btrfs.BtrfsFileSystem)
    entry = dict(walk(system))[b"/deep/text"]
    text = b"the quick brown fox " * 20_000
    assert system.read(entry.id, 0, len(text)) == text
    asked: list[int] = []
    items = system._items

    def asking(id: Id, kind: int, first: int) -> object:
        asked.append(first)
        return items(id, kind, first)

    monkeypatch.setattr(system, "_items", asking)
    for offset in (300_000, 131_071, 131_072, 0, 399_999):
        assert system.read(entry.id, offset, 1000) == text[offset : offset + 1000]
    assert asked == [262_144, 0, 131_072, 0, 393_216]


def test_a_subvolume_lies_at_its_place_and_is_an_empty_folder_in_a_snapshot_of_what_it_lies_in(
    made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    found = dict(walk(files(made("btrfs").path).image().file_system(RAW)))
    assert found[b"/@home/nested/deep"].size == 4
    assert found[b"/snapshots/one/alice"].size == 5
    assert found[b"/@home/alice"].size == 14
    assert found[b"/snapshots/one/nested"].is_directory
    assert b"/snapshots/one/nested/deep" not in found
