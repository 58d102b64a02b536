"""Every entry of file systems that the kernel, mtools and ntfs-3g wrote."""

from collections.abc import Callable

import pytest

from diskfs import btrfs, ext, ntfs, xfs, xfs_log
from diskfs.blocks import Blocks
from diskfs.entries import Entry, Id
from diskfs.errors import DiskFsError
from diskfs.filesystem import FileSystem
from diskfs.image import RAW
from diskfs.worker import Listing
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


def assert_all_as_made(image: MadeImage, source: Files, system: FileSystem) -> dict[bytes, Entry]:
    """Every entry is there, and as it was made; returns them by path."""
    found = dict(walk(system))
    assert sorted(found) == sorted(image.entries)
    wrong = {}
    for path, entry in found.items():
        wanted = image.entries[path]
        data = content(source, system, entry) if "sha256" in wanted else b""
        xattrs = dict(system.xattrs(entry.id)) if "xattrs" in wanted else {}
        if different := differences(entry, wanted, data, xattrs):
            wrong[path] = different
    assert wrong == {}
    return found


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
    assert (system.kind, system.label) == _KINDS[kind]
    assert_all_as_made(image, source, system)


def test_what_is_in_the_journal_only_is_read_from_there(
    made: Callable[[str], MadeImage], files: Callable[..., Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = made("ext4-dirty")
    source = files(image.path)
    system = source.image().file_system(RAW)
    found = assert_all_as_made(image, source, system)
    # Without it, it would not be.
    monkeypatch.setattr(ext, "with_journal", lambda blocks, *_: blocks)
    assert sorted(name for name, _ in walk(files(image.path).image().file_system(RAW))) != sorted(found)


def test_what_is_in_the_log_of_xfs_only_is_read_from_there(
    made: Callable[[str], MadeImage], files: Callable[..., Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = made("xfs-dirty")
    source = files(image.path)
    system = source.image().file_system(RAW)
    assert system.notes == ()
    assert_all_as_made(image, source, system)

    # Without it, it would not be; and where it cannot be read, that is said.
    def refuse(*_: object) -> Blocks:
        raise DiskFsError("read", "log", "it is damaged: no record is at its end")

    monkeypatch.setattr(xfs, "with_log", refuse)
    old = files(image.path).image().file_system(RAW)
    assert "its log is not read (it is damaged: no record is at its end)" in " ".join(old.notes)
    assert b"new" not in Listing(old, old.root).names

    def exhaust(*_: object) -> Blocks:
        raise MemoryError

    monkeypatch.setattr(xfs, "with_log", exhaust)
    assert "it takes too much memory" in " ".join(files(image.path).image().file_system(RAW).notes)


def test_a_damaged_log_of_xfs_is_said_to_be_so_and_the_file_system_is_read_without_it(
    made: Callable[[str], MadeImage], files: Callable[..., Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = files(made("xfs-dirty").path)
    head = source.fetch(0, 0, 512)
    size, blocks, shift = int.from_bytes(head[4:8], "big"), int.from_bytes(head[84:88], "big"), head[124]
    first, count = int.from_bytes(head[48:56], "big"), int.from_bytes(head[96:100], "big")
    start = ((first >> shift) * blocks + (first & (1 << shift) - 1)) * size
    log = source.fetch(0, start, count * size)
    # A mount puts empty ones of the cycle before behind them.
    sign = b"\xfe\xed\xba\xbe" + (1).to_bytes(4, "big")
    records = [start + at for at in range(0, len(log), 512) if log[at : at + 8] == sign]
    assert len(records) > 2
    # One before the last that was not written yet when the last one was is the end, as for the kernel.
    whole, window = xfs_log._WINDOW, (records[-1] - records[-2]) // 512 + 64
    for broken, blocks, why in (
        (records[-2:-1], whole, ""),
        (records[1:-1], window, "is none of a record"),
        (records, whole, "no record is at its end"),
    ):
        monkeypatch.setattr(xfs_log, "_WINDOW", blocks)
        source.changed = {place + 2: b"\0" for place in broken}
        system = source.image().file_system(RAW)
        assert why in "".join(system.notes)
        assert bool(why) == bool(system.notes)
        # What was there before; without the last record the transaction that it ends is not complete.
        assert sum(name.startswith(b"/old/file") for name, _ in walk(system)) == 300


@pytest.mark.parametrize(
    ("kind", "place", "value", "note"),
    [
        ("btrfs", 0x10060, b"\1", "flushed by fsync since its last commit"),
        ("fat16", 37, b"\1", "it was in use"),
        ("fat32", 65, b"\1", "it was in use"),
        ("ext2", 1024 + 58, b"\0", "it was in use, and has no journal"),
        ("ext4", 1024 + 58, b"\3", "the guest found errors in it"),
    ],
)
def test_a_file_system_that_was_in_use_says_so(
    kind: str, place: int, value: bytes, note: str, made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    source = files(made(kind).path)
    assert source.image().file_system(RAW).notes == ()
    source.changed[place] = value
    (said,) = source.image().file_system(RAW).notes
    assert note in said


def test_an_ntfs_was_in_use_if_its_log_has_clients_and_is_not_called_clean() -> None:
    def page(sequence: int, clients: int, flags: int) -> bytes:
        head = b"RSTR".ljust(16, b"\0") + (4096).to_bytes(4, "little") * 2 + (48).to_bytes(2, "little")
        area = sequence.to_bytes(8, "little") + bytes(4) + clients.to_bytes(2, "little") + flags.to_bytes(2, "little")
        return (head.ljust(48, b"\0") + area).ljust(4096, b"\0")

    assert ntfs._is_open(page(5, 0, 0))
    assert not ntfs._is_open(page(5, 0xFFFF, 0))
    assert not ntfs._is_open(page(5, 0, 2))
    assert ntfs._is_open(page(5, 0xFFFF, 0) + page(6, 0, 0))
    assert not ntfs._is_open(page(7, 0xFFFF, 0) + page(6, 0, 0))
    assert not ntfs._is_open(b"\xff" * 8192)
    assert not ntfs._is_open(b"RSTR" + b"\xff" * 8000)


def test_of_fat32_the_table_that_counts_is_read(made: Callable[[str], MadeImage], files: Callable[..., Files]) -> None:
    image = made("fat32")
    source = files(image.path)
    head = source.fetch(0, 0, 512)
    sector, table = int.from_bytes(head[11:13], "little"), int.from_bytes(head[14:16], "little")
    length = int.from_bytes(head[36:40], "little") * sector
    data = bytearray(image.path.read_bytes())
    data[table * sector : table * sector + length] = bytes(length)  # the first one is stale
    data[40] = 0x80 | 1
    source.fetch = lambda disk, offset, length: bytes(data[offset : offset + length])  # type: ignore[method-assign]
    system = source.image().file_system(RAW)
    assert sorted(dict(walk(system))) == sorted(image.entries)
    data[40] = 0x80 | 2
    with pytest.raises(DiskFsError, match="table 2 counts, and there are 2"):
        source.image().file_system(RAW)


@pytest.mark.parametrize(
    ("kind", "place", "value", "why"),
    [
        ("ext4", 1024 + 98, b"\x80", "is not read: it has a feature that is not known here: 0x800000"),
        ("xfs", 216, b"\x80", "is not read: it has a feature that is not known here: 0x80000000"),
        ("btrfs", 0x10088, b"\3", "it is one of 3 devices of a btrfs, and only those on a single one are read"),
    ],
)
def test_what_is_sound_and_not_read_is_not_called_damaged(
    kind: str, place: int, value: bytes, why: str, made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    source = files(made(kind).path)
    source.changed[place] = value
    with pytest.raises(DiskFsError) as caught:
        source.image().file_system(RAW)
    assert why in caught.value.why
    assert "damaged" not in caught.value.why


def test_content_on_the_realtime_device_of_an_xfs_is_not_read_from_another(
    made: Callable[[str], MadeImage], files: Callable[..., Files]
) -> None:
    system = files(made("xfs-1k").path).image().file_system(RAW)
    assert isinstance(system, xfs.XfsFileSystem)
    entry = dict(walk(system))[b"/deep/big"]
    assert system.runs(entry.id)
    system._inode(entry.id[0]).inode.di_flags |= 1
    with pytest.raises(DiskFsError, match="its content lies on the realtime device"):
        system.runs(entry.id)


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
