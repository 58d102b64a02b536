"""Change detection: what is reused, and that whatever was changed between backups everything reads back."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pxar.detection
import pxar.source
from core.buffers import Buffer
from core.errors import NotFoundError
from pxar.create import CreateOptions, create_archive, measure_archive
from pxar.create_report import Trouble
from pxar.errors import ArchiveError
from pxar.filesystem import open_entry
from pxar.format import HEADER, PAYLOAD_REF
from pxar.reference import Reference
from tests.pxar.backups import Backup, assert_restorable, back_up, references
from tests.support.recorded_streams import RecordedStream, StoredStream

AVERAGE = 1 << 14
KIB = 1 << 10


class Tree:
    """A folder that is changed at random; no two files ever have one time."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.choose, self.time = root, random.Random(seed), 0
        root.mkdir()
        for _ in range(40):
            self.add()

    def stamp(self, path: Path) -> None:
        self.time += 1
        os.utime(path, ns=(self.time * 10**9 + 7, self.time * 10**9 + 7), follow_symlinks=False)

    def folders(self) -> list[Path]:
        return [self.root, *sorted(path for path in self.root.rglob("*") if path.is_dir() and not path.is_symlink())]

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink())

    def free(self) -> Path:
        folder = self.choose.choice(self.folders())
        return folder / f"{self.choose.choice('abcxyz')}{self.choose.randrange(10_000)}"

    def content(self) -> bytes:
        size = self.choose.choice([0, 1, 300, 4 * KIB, 20 * KIB, 70 * KIB])
        size = self.choose.randint(0, size)
        return bytes(size) if self.choose.random() < 0.2 else self.choose.randbytes(size)

    def add(self) -> None:
        """Something new."""
        path = self.free()
        if path.exists() or path.is_symlink():
            return
        kind = self.choose.choice(["file"] * 8 + ["folder", "link", "name", "fifo"])
        files = self.files()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("somewhere")
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "name" and files:
            path.hardlink_to(self.choose.choice(files))
        else:
            path.write_bytes(self.content())
        self.stamp(path)

    def edit(self) -> None:
        """Change one thing."""
        files, folders = self.files(), self.folders()[1:]
        action = self.choose.choice(
            ["add", "remove", "write", "touch", "chmod", "move", "remove folder", "move folder"]
        )
        if action == "add" or not files:
            self.add()
            return
        file, target = self.choose.choice(files), self.free()
        if action == "remove":
            file.unlink()
        elif action == "write":
            file.write_bytes(self.content())
            self.stamp(file)
        elif action == "touch":
            self.stamp(file)
        elif action == "chmod":
            file.chmod(0o600 | self.choose.randrange(0o100))
        elif action == "move":
            file.rename(target)
        elif folders and self.choose.random() < 0.3:
            folder = self.choose.choice(folders)
            if action == "remove folder":
                shutil.rmtree(folder)
            elif folder not in target.parents and not target.exists():
                folder.rename(target)


@pytest.mark.parametrize("cache", ["small", "usual"])
@pytest.mark.parametrize("loose", [False, True])
def test_whatever_is_changed_every_backup_reads_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    long_rounds: Callable[[int], int],
    cache: str,
    loose: bool,
) -> None:
    if cache == "small":
        monkeypatch.setattr(pxar.detection, "EARLY", 3)
        monkeypatch.setattr(pxar.detection, "FULL", 10)
    reused = 0
    for seed in range(long_rounds(25)):
        tree = Tree(tmp_path / "tree", seed)
        made = back_up(tree.root, average=AVERAGE)
        for _ in range(8):
            for _ in range(tree.choose.choice([0, 1, 2, 5, 20])):
                tree.edit()
            made = back_up(tree.root, made, CreateOptions(loose=loose), average=AVERAGE)
            assert made.report.warnings == []
            assert_restorable(made, tree.root)
            if cache == "usual":
                # A full cache does without knowing what follows.
                assert made.report.injected_size <= made.report.reused_size / 0.9
            reused += made.report.reused_files
        shutil.rmtree(tree.root)
    assert reused > 100


def files(root: Path, count: int, size: int, start: int = 0) -> list[Path]:
    """`count` files of `size` bytes with contents of their own."""
    paths = []
    root.mkdir(exist_ok=True)
    for number in range(start, start + count):
        path = root / f"f{number:05d}"
        path.write_bytes(random.Random(number).randbytes(size))
        os.utime(path, ns=(number + 1, number + 1))
        paths.append(path)
    return paths


def new_symlinks(root: Path, number: int) -> None:
    (root / f"n{number}").mkdir()
    for name in "abcdefgh":
        (root / f"n{number}" / name).symlink_to("x")


def new_folders(root: Path, number: int) -> None:
    (root / f"n{number}").mkdir()


def new_names(root: Path, number: int) -> None:
    (root / f"n{number}").mkdir()
    for name in "abcdefgh":
        (root / f"n{number}" / name).hardlink_to(root / "f00000")


@pytest.mark.parametrize("make", [new_symlinks, new_folders, new_names])
def test_what_has_no_content_does_not_wait_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, int], None]
) -> None:
    """An unchanged file is in the cache, and nothing behind it settles what becomes of it."""
    monkeypatch.setattr(pxar.detection, "EARLY", 5)
    monkeypatch.setattr(pxar.detection, "FULL", 20)
    root = tmp_path / "tree"
    (file,) = files(root, 1, 100 * KIB)
    base = back_up(root, average=AVERAGE)
    for number in range(30):
        make(root, number)
    os.utime(file, ns=(1, 1))
    written: list[int] = []
    made = back_up(root, base, average=AVERAGE, progress=lambda report: written.append(report.entries))
    assert made.report.reused_files == 1
    # The last call comes before the end settles everything.
    assert written[-1] > made.report.entries - 20
    assert_restorable(made, root)


def assert_nothing_is_read(root: Path, base: Backup, options: CreateOptions | None = None) -> Backup:
    made = back_up(root, base, options, average=AVERAGE)
    assert made.report.changed_files == made.report.read == 0
    # The marks at begin and end of the payload stream.
    assert made.sink.uploaded == 32 or made.payload.entries[0] in base.payload.entries
    assert made.report.warnings == []
    assert_restorable(made, root)
    return made


def test_an_unchanged_tree_is_not_read_however_often(tmp_path: Path) -> None:
    files(tmp_path / "tree", 300, 2 * KIB)
    made = back_up(tmp_path / "tree", average=AVERAGE)
    first = references(made)
    for _ in range(4):
        made = assert_nothing_is_read(tmp_path / "tree", made)
        assert made.report.padding == 32
        assert references(made) == [(start + 16, end + 16) for start, end in first]


def test_one_reference_serves_again(tmp_path: Path) -> None:
    files(tmp_path / "tree", 300, 2 * KIB)
    base = back_up(tmp_path / "tree", average=AVERAGE)
    reference = base.reference()
    for _ in range(2):
        assert measure_archive(str(tmp_path / "tree"), reference=reference).read == 0


def test_a_chunk_that_ends_with_the_range_is_the_last(tmp_path: Path) -> None:
    # Suggested boundaries: every file is a chunk of its own.
    paths = files(tmp_path / "tree", 20, AVERAGE)
    base = back_up(tmp_path / "tree", average=AVERAGE)
    assert base.payload.count >= 20
    for number in (3, 7, 8, 15):
        os.utime(paths[number], ns=(99, 99))
    made = back_up(tmp_path / "tree", base, average=AVERAGE)
    assert (made.report.reused_files, made.report.changed_files) == (16, 4)
    assert made.report.padding == 32  # the marks before the first and behind the last file
    assert_restorable(made, tmp_path / "tree")


def test_repeated_chunks_are_told_apart_by_their_place(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(6):
        path = tree / f"zero{number}"
        path.write_bytes(bytes(AVERAGE * 60))
        os.utime(path, ns=(number, number))
    base = back_up(tree, average=AVERAGE)
    assert len({digest for digest, _ in base.payload.entries}) < base.payload.count
    (tree / "zero1").unlink()
    (tree / "zero3").unlink()
    made = back_up(tree, base, average=AVERAGE)
    assert made.report.reused_files == 4
    assert_restorable(made, tree)


def test_little_in_much_is_read_again(tmp_path: Path) -> None:
    paths = files(tmp_path / "tree", 100, KIB)
    base = back_up(tmp_path / "tree", average=AVERAGE)
    for path in paths[::2]:
        path.unlink()
    made = back_up(tmp_path / "tree", base, average=AVERAGE)
    assert made.report.changed_files == 50
    assert_restorable(made, tmp_path / "tree")


def test_gaps_in_one_chunk_put_it_in_once(tmp_path: Path) -> None:
    paths = files(tmp_path / "tree", 400, KIB)
    base = back_up(tmp_path / "tree", average=1 << 18)
    for number in range(50, 400, 50):
        paths[number].unlink()
    made = back_up(tmp_path / "tree", base, average=1 << 18)
    assert made.report.reused_files == 393
    assert made.report.injected_chunks == base.payload.count
    assert_restorable(made, tmp_path / "tree")


@pytest.mark.parametrize(
    ("what", "strict", "loose"),
    [
        (lambda path: path.chmod(0o640), 1, 0),
        (lambda path: os.chown(path, 1000, 1000), 1, 0),
        (lambda path: os.setxattr(path, "user.new", b"1"), 1, 0),
        (lambda path: os.setxattr(path, "user.old", b"2"), 0, 0),
        (lambda path: os.removexattr(path, "user.old"), 1, 0),
        (lambda path: os.utime(path, ns=(5, 6)), 1, 1),
        (lambda path: rewritten(path, b"other" * 100, path.stat().st_mtime_ns), 1, 1),
    ],
)
def test_what_makes_a_file_be_read_again(tmp_path: Path, what: Callable[[Path], None], strict: int, loose: int) -> None:
    if os.geteuid():
        pytest.skip("changing owners needs root")
    path = files(tmp_path / "tree", 20, AVERAGE)[10]
    try:
        os.setxattr(path, "user.old", b"1")
    except OSError as error:
        pytest.skip(f"no extended attributes: {error}")
    base = back_up(tmp_path / "tree", average=AVERAGE)
    what(path)
    for options, changed in ((CreateOptions(), strict), (CreateOptions(loose=True), loose)):
        made = back_up(tmp_path / "tree", base, options, average=AVERAGE)
        assert made.report.changed_files == changed
        assert_restorable(made, tmp_path / "tree")
        node = made.accessor().lookup(path.name.encode())
        assert dict(node.metadata.xattrs) == {  # type: ignore[union-attr]
            name.encode(): os.getxattr(path, name) for name in os.listxattr(path)
        }


def rewritten(path: Path, content: bytes, mtime_ns: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def test_names_of_one_file_are_links_and_any_of_them_may_become_the_first(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    paths = files(tree, 40, 4 * KIB)
    (tree / "f00010a").hardlink_to(paths[10])
    (tree / "g").hardlink_to(paths[10])
    made = back_up(tree, average=AVERAGE)
    made = assert_nothing_is_read(tree, made)
    assert made.report.hardlinks == 2
    paths[10].unlink()
    made = assert_nothing_is_read(tree, made)
    assert made.report.hardlinks == 1


def test_with_a_cache_that_is_never_large_everything_is_reused_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path / "tree", 2000, 100)
    base = back_up(tmp_path / "tree", average=AVERAGE)
    monkeypatch.setattr(pxar.detection, "EARLY", 20)
    monkeypatch.setattr(pxar.detection, "FULL", 60)
    monkeypatch.setattr(pxar.create, "BATCH", 10)
    made = assert_nothing_is_read(tmp_path / "tree", base)
    assert made.report.injected_chunks == base.payload.count


def test_what_vanishes_while_it_waits_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    paths = files(tree, 40, KIB)
    for path in paths[30:]:
        path.rename(tree / f"z{path.name}")
    (tree / "fz").hardlink_to(paths[5])
    (tree / "fy").mkdir()
    inside = files(tree / "fy", 3, KIB, 100)
    base = back_up(tree, average=1 << 18)
    # Read at last: what waits until then is too little of the old chunk, and is read too.
    os.utime(tree / "zf00030", ns=(99, 99))
    calls: list[bytes] = []
    before = (tree.stat().st_mtime_ns,) * 2 + ((tree / "fy").stat().st_mtime_ns,) * 2

    def opening(dir_fd: int, name: bytes, features: int, **more: Any) -> Any:
        if name == b"zf00030":
            assert not calls
            paths[5].unlink()
            paths[7].unlink()
            os.mkfifo(paths[7])
            paths[9].unlink()
            paths[9].mkdir()
            shutil.rmtree(tree / "fy")
            (tree / "fy").mkdir()
            for path in inside:
                path.write_bytes(b"of another folder")
            os.utime(tree, ns=before[:2])
            os.utime(tree / "fy", ns=before[2:])
        if name != b"fy":
            calls.append(name)
        return open_entry(dir_fd, name, features, **more)

    monkeypatch.setattr(pxar.source, "open_entry", opening)
    # In one thread, which has the folder open: a new one may get the number of the removed one.
    made = back_up(tree, base, average=1 << 18, alone=True)
    assert calls[:3] == [b"zf00030", b"f00000", b"f00001"]
    gone = {b"/f00009"} | {b"/fy/" + path.name.encode() for path in inside}
    assert_restorable(made, tree, left_out=gone)
    assert made.report.troubles == {Trouble.VANISHED: 5}
    # The other name of a file whose first one vanished is a file.
    assert made.accessor().lookup(b"fz").size == KIB  # type: ignore[union-attr]


class Failing:
    """An old archive that cannot be read any more after some time."""

    def __init__(self, stream: StoredStream, reads: int) -> None:
        self._stream, self._reads = stream, reads
        self.size = stream.size

    def read(self, offset: int, length: int) -> Buffer:
        self._reads -= 1
        if self._reads < 0:
            raise NotFoundError("read chunk", "0123", "it is not there")
        return self._stream.read(offset, length)


def with_reference(root: Path, reference: Reference, base: Backup) -> Backup:
    archive, payload = RecordedStream(base.chunks, AVERAGE), RecordedStream(base.chunks, AVERAGE, base.payload)
    report = create_archive(str(root), archive, payload, reference=reference)
    return Backup(archive.finish(), payload.finish(), report, payload, base.chunks, 0)


def test_an_old_archive_that_is_lost_on_the_way_means_reading_the_rest(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(20):
        files(tree / f"d{number:02d}" if number else tree, 20, 2 * KIB, number * 20)
    base = back_up(tree, average=AVERAGE)
    told = reused = 0
    for reads in range(0, 200, 7):
        try:
            reference = Reference(Failing(base.archive, reads), base.payload, where="host/x/root.mpxar")
        except NotFoundError:
            continue
        made = with_reference(tree, reference, base)
        assert_restorable(made, tree)
        reused += made.report.reused_files > 0
        if made.report.warnings:
            told += 1
            (warning,) = made.report.warnings
            assert warning.startswith("host/x/root.mpxar cannot be read any more, so every file is read from here on: ")
            assert made.report.changed_files
    assert told > 1
    assert reused > 1


def test_an_index_that_is_not_of_this_archive_makes_no_reference_into_nothing(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    files(tree, 50, 2 * KIB)
    base = back_up(tree, average=AVERAGE)
    half = StoredStream(base.chunks, base.payload.entries[: base.payload.count // 2])
    for short in (half, StoredStream(base.chunks, [])):
        made = with_reference(tree, Reference(base.archive, short), base)
        assert_restorable(made, tree)
        assert made.report.changed_files == 50


@pytest.mark.parametrize("offset", [0, 1 << 20, (1 << 63) - 1, (1 << 63) + 5, (1 << 64) - 1])
def test_a_payload_that_lies_nowhere_is_a_reason_to_read_the_file(tmp_path: Path, offset: int) -> None:
    tree = tmp_path / "tree"
    files(tree, 5, 30 * KIB)
    base = back_up(tree, average=AVERAGE)
    data = bytearray(base.archive.content())
    place = data.index(HEADER.pack(PAYLOAD_REF, 32)) + 16
    data[place : place + 8] = offset.to_bytes(8, "little")
    damaged = RecordedStream(base.chunks)
    damaged.write(bytes(data))
    made = with_reference(tree, Reference(damaged.finish(), base.payload), base)
    if offset:
        assert_restorable(made, tree)
        assert (made.report.changed_files, made.report.reused_files) == (1, 4)


@pytest.mark.parametrize("damage", range(12))
def test_a_damaged_archive_is_at_worst_of_no_use(tmp_path: Path, damage: int) -> None:
    tree = tmp_path / "tree"
    files(tree, 30, 2 * KIB)
    files(tree / "below", 30, 2 * KIB, 100)
    base = back_up(tree, average=AVERAGE)
    choose = random.Random(damage)
    data = bytearray(base.archive.content())
    for _ in range(20):
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    damaged = RecordedStream(base.chunks)
    damaged.write(bytes(data))
    try:
        reference = Reference(damaged.finish(), base.payload)
    except ArchiveError:
        return
    # A flipped bit in a place of a payload can make a file look reusable at a wrong place: what this module cannot
    # know. So only the structure is looked at, and that references ascend.
    made = with_reference(tree, reference, base)
    end = 0
    for start, stop in references(made):
        assert start >= end
        end = stop
