"""What goes into an archive and what does not, and what becomes of files that change or cannot be read meanwhile."""

import errno
import json
import os
import shutil
import socket
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import pxar.create
import pxar.entry_writer
import pxar.source
from core.errors import SourceError, UsageError
from pxar.accessor import ArchiveAccessor
from pxar.create import CreateOptions, create_archive, measure_archive
from pxar.create_report import MAX_WARNINGS, CreateReport, Trouble
from pxar.decoder import ArchiveDecoder, Entry
from pxar.filesystem import list_folder, open_entry, scan
from pxar.patterns import MatchPattern
from tests.pxar.archives import MemoryReader
from tests.pxar.backups import Backup, assert_restorable, back_up, ext4, rows_of_archive, rows_of_folder
from tests.support.recorded_streams import RecordedStream, StoredStream


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a bit of everything that needs no privileges."""
    tree = tmp_path / "tree"
    (tree / "a/deep/er").mkdir(parents=True)
    (tree / "empty").mkdir(mode=0o700)
    (tree / "a/file").write_bytes(b"content\n" * 1000)
    (tree / "a/deep/er/none").write_bytes(b"")
    (tree / "large").write_bytes(bytes(range(256)) * 40_000)
    (tree / "a/link").symlink_to("../large")
    (tree / "z-link").symlink_to("/no/such/place")
    os.mkfifo(tree / "a/fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "a/socket"))
    (tree / "a/second").hardlink_to(tree / "large")
    (tree / "a/third").hardlink_to(tree / "large")
    (tree / os.fsdecode(b"not-utf-8-\xff\n")).write_bytes(b"!")
    return tree


def self_contained(root: Path, options: CreateOptions | None = None) -> tuple[StoredStream, CreateReport]:
    sink = RecordedStream({})
    report = create_archive(str(root), sink, options=options)
    return sink.finish(), report


def names(backup: Backup) -> set[bytes]:
    return set(rows_of_archive(backup.accessor()))


def options(*exclude: bytes, **more: Any) -> CreateOptions:
    return CreateOptions(exclude=[MatchPattern.parse(text) for text in exclude], **more)


# --- what goes in ---


def test_everything_reads_back_and_is_counted(root: Path) -> None:
    made = back_up(root)
    assert_restorable(made, root)
    report = made.report
    assert (report.files, report.hardlinks, report.folders, report.others) == (4, 2, 5, 4)
    assert report.entries == len(rows_of_folder(root))
    assert report.size == report.read == 8000 + 256 * 40_000 + 1
    assert report.warnings == []


def test_self_contained_archives_hold_the_same(root: Path) -> None:
    stored, report = self_contained(root)
    assert rows_of_archive(ArchiveAccessor(stored)) == rows_of_folder(root)
    assert report.entries == len(rows_of_folder(root))


def test_devices_and_owners_are_kept(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("making devices needs root")
    os.mknod(tmp_path / "null", 0o020640, os.makedev(1, 3))
    os.mknod(tmp_path / "disk", 0o060600, os.makedev(0xABC, 0x12345))
    (tmp_path / "file").write_bytes(b"")
    os.chown(tmp_path / "file", 4_000_000_000, 12)
    os.utime(tmp_path / "file", ns=(-1_500_000_000, -1_500_000_000))
    assert_restorable(back_up(tmp_path), tmp_path)


def test_a_tree_deeper_than_any_path_and_than_descriptors_and_python_go(tmp_path: Path) -> None:
    levels = 2500
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(b"deep-er", dir_fd=fd)
        below = os.open(b"deep-er", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    for name in (b"a", b"b"):
        file = os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        os.write(file, name * 4000)
        os.close(file)
    os.link(b"a", b"c", src_dir_fd=fd, dst_dir_fd=fd)
    try:
        first = back_up(tmp_path)
        assert (first.report.folders, first.report.files) == (levels + 1, 3)  # its path is too long for a link to it
        again = back_up(tmp_path, first)
        assert again.report.reused_files == 3
        os.utime(b"b", ns=(1, 1), dir_fd=fd)
        # That leaves too little of the old chunk: those in the cache are read after all, from folders closed by then.
        third = back_up(tmp_path, again)
        assert (third.report.reused_files, third.report.changed_files, third.report.warnings) == (0, 3, [])
        events = ArchiveDecoder(MemoryReader(third.archive.content()), MemoryReader(third.payload.content()))
        assert max(event.path.count(b"/") for event in events if isinstance(event, Entry)) == levels + 1
    finally:
        os.close(fd)
        subprocess.run(["rm", "-rf", tmp_path / "deep-er"], check=True)


# --- what is left out ---


@pytest.mark.parametrize("detecting", [False, True])
def test_memory_does_not_grow_with_the_lengths_of_paths(tmp_path: Path, detecting: bool) -> None:
    depth, name = 500, b"n" * 250
    root = tmp_path / "tree"
    root.mkdir()
    fd = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open(b"bottom", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)
    base = back_up(root) if detecting else None
    tracemalloc.start()
    try:
        report = back_up(root, base).report
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        subprocess.run(["rm", "-rf", root], check=True)
    assert (report.folders, report.warnings) == (depth + 1, [])
    # All paths together have 31 MB.
    assert peak < 12 << 20


def test_patterns_of_the_command_line_are_stored_with_split_archives(root: Path) -> None:
    made = back_up(root, options=options(b"er/", b"!x", b"/large"))
    assert names(made) == set(rows_of_folder(root)) - {b"/a/deep/er", b"/a/deep/er/none", b"/large"}
    assert made.report.excluded == 2
    prelude = ArchiveDecoder(MemoryReader(made.archive.content())).prelude
    assert prelude is not None
    assert json.loads(prelude) == {"exclude-patterns": "er/\n!x\n/large\n"}


def test_a_further_name_takes_over_where_the_first_is_excluded(root: Path) -> None:
    made = back_up(root, options=options(b"second"))
    assert made.report.hardlinks == 1
    assert rows_of_archive(made.accessor())[b"/a/third"][5] == (root / "large").read_bytes()


@pytest.mark.parametrize("compared", [False, True])
def test_a_new_file_with_the_inode_of_one_that_is_gone_is_no_name_of_that(
    disk: Path, monkeypatch: pytest.MonkeyPatch, compared: bool
) -> None:
    tree = disk / "tree"
    (tree / "1").mkdir(parents=True)
    (tree / "2").mkdir()
    old = os.urandom(8192)  # enough for its chunk to be used again
    (tree / "1/a").write_bytes(old)
    (tree / "1/b").hardlink_to(tree / "1/a")
    base = back_up(tree) if compared else None

    def replace() -> None:
        inode = (tree / "1/a").stat().st_ino
        for name in ("a", "b"):
            (tree / "1" / name).unlink()
        (tree / "2/c").write_bytes(b"another")
        (tree / "2/d").hardlink_to(tree / "2/c")
        if (tree / "2/c").stat().st_ino != inode:
            pytest.skip("the file system gave another inode")  # ext4 gives the one just freed; it need not

    _before_the_last_of_two_folders(monkeypatch, replace)
    made = back_up(tree, base, alone=True)
    rows = rows_of_archive(made.accessor())
    contents = {path.decode(): row[5] for path, row in rows.items() if row[5]}
    assert contents == {"/1/a": old, "/1/b": old, "/2/c": b"another", "/2/d": b"another"}
    assert (made.report.hardlinks, made.report.reused_files) == (2, int(compared))


@pytest.mark.parametrize("gone", [False, True])
def test_names_of_a_file_that_grows_meanwhile_are_links_while_the_first_is_there(
    disk: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    tree = disk / "tree"
    (tree / "1").mkdir(parents=True)
    (tree / "2").mkdir()
    (tree / "1/a").write_bytes(b"old")
    (tree / "2/b").hardlink_to(tree / "1/a")
    (tree / "2/c").hardlink_to(tree / "1/a")

    def change() -> None:
        (tree / "1/a").write_bytes(b"longer")
        if gone:
            (tree / "1/a").unlink()

    _before_the_last_of_two_folders(monkeypatch, change)
    made = back_up(tree)
    second = b"longer" if gone else b"old"
    rows = sorted(rows_of_archive(made.accessor()).items())
    assert [row[5] for _, row in rows if row[5]] == [b"old", second, second]
    assert made.report.hardlinks == 2 - gone


def _before_the_last_of_two_folders(monkeypatch: pytest.MonkeyPatch, call: Callable[[], None]) -> None:
    """Have `call` called before the second folder in the root is listed."""
    listed: list[int] = []

    def listing(fd: int) -> tuple[list[bytes], bytes]:
        listed.append(fd)
        if len(listed) == 3:
            call()
        return list_folder(fd)

    monkeypatch.setattr(pxar.create, "list_folder", listing)


def test_patterns_of_the_command_line_are_a_file_of_self_contained_archives(root: Path) -> None:
    (root / ".pxarexclude-cli").write_bytes(b"an old one")
    stored, _ = self_contained(root, options(b"*.tmp", b"/large"))
    rows = rows_of_archive(ArchiveAccessor(stored))
    mode, *ids, mtime, content = rows[b"/.pxarexclude-cli"][1:6]
    assert (mode, ids, mtime, content) == (0o100600, [os.getuid(), os.getgid()], 0, b"*.tmp\n/large\n")
    last = [event for event in ArchiveDecoder(MemoryReader(stored.content())) if isinstance(event, Entry)][-1]
    assert last.name == b".pxarexclude-cli"


def test_a_file_of_that_name_is_left_out_of_the_root_only(root: Path) -> None:
    for folder in (root, root / "a"):
        (folder / ".pxarexclude-cli").write_bytes(b"x")
    assert_restorable(back_up(root), root, left_out={b"/.pxarexclude-cli"})


def test_patterns_in_the_tree_hold_below_their_folder(root: Path) -> None:
    (root / "a/.pxarexclude").write_bytes(b"# none\n\n/file\nnone\n!/deep\n")
    (root / "file").write_bytes(b"")
    made = back_up(root)
    assert_restorable(made, root, left_out={b"/a/file", b"/a/deep/er/none"})
    assert ArchiveDecoder(MemoryReader(made.archive.content())).prelude is None


@pytest.mark.parametrize("text", [b"[a", b"[[:no:]]", b"\\", b"a\0b"])
def test_bad_patterns_in_the_tree_are_named_and_the_others_hold(root: Path, text: bytes) -> None:
    (root / ".pxarexclude").write_bytes(text + b"\n/large\n")
    made = back_up(root)
    assert_restorable(made, root, left_out={b"/large"})
    (warning,) = made.report.warnings
    assert warning.startswith("'.pxarexclude' holds patterns that are not used: line 1: ")


def test_patterns_that_cannot_be_read_exclude_nothing(root: Path) -> None:
    (root / ".pxarexclude").symlink_to("gone")
    os.mkfifo(root / "a/.pxarexclude")
    (root / "empty/.pxarexclude").write_bytes(b"x\n" * (1 << 20))
    made = back_up(root)
    assert_restorable(made, root)
    assert made.report.troubles == {Trouble.PATTERNS: 3}


def test_a_class_that_may_be_meant_to_negate_is_pointed_out_once(root: Path) -> None:
    (root / ".pxarexclude").write_bytes(b"[!l]arge\n[!x]\n")
    made = back_up(root, options=options(b"[!x]y"))
    assert_restorable(made, root, left_out={b"/large"})
    (warning,) = made.report.warnings
    assert "'[!x]y' of the command line" in warning


@pytest.mark.parametrize("skip", [False, True])
def test_lost_and_found_is_left_out_on_demand(root: Path, skip: bool) -> None:
    for folder in (root, root / "a"):
        (folder / "lost+found").mkdir()
        (folder / "lost+found/x").write_bytes(b"")
    made = back_up(root, options=options(skip_lost_and_found=skip))
    assert (b"/lost+found" in names(made), b"/a/lost+found/x" in names(made)) == (not skip, not skip)
    assert (ArchiveDecoder(MemoryReader(made.archive.content())).prelude is not None) == skip


TAG = b"Signature: 8a477f597d28d172789f06886806bc55"


def test_of_caches_only_the_tag_is_kept(root: Path) -> None:
    (root / "a/CACHEDIR.TAG").write_bytes(TAG + b"\n# a comment\n")
    (root / "empty/CACHEDIR.TAG").write_bytes(TAG[:-1])
    (root / "empty/kept").write_bytes(b"")
    made = back_up(root, options=options(exclude_caches=True))
    below = {path for path in rows_of_folder(root) if path.startswith(b"/a/") and path != b"/a/CACHEDIR.TAG"}
    # What was a further name of a file in the cache is its first now.
    assert_restorable(made, root, left_out=below)
    assert_restorable(back_up(root), root)


def test_a_tag_that_is_a_symlink_is_none(root: Path) -> None:
    (root / "empty/tag").write_bytes(TAG)
    (root / "a/CACHEDIR.TAG").symlink_to("../empty/tag")
    assert_restorable(back_up(root, options=options(exclude_caches=True)), root)


def test_more_entries_than_allowed_end_it(root: Path) -> None:
    # Open at the same time: 5 in the root, 7 in a, 1 in deep, 1 in er.
    assert back_up(root, options=options(entries_max=14)).report.entries == 15
    with pytest.raises(SourceError, match=r"'a/deep/er' more than 13 entries .*; --entries-max"):
        back_up(root, options=options(entries_max=13))


# --- devices ---


@pytest.fixture
def mounted(root: Path) -> Iterator[Callable[..., Path]]:
    """Mounts something on a new folder of the tree."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    mounts: list[Path] = []

    def mount(name: str, kind: str = "tmpfs") -> Path:
        place = root / name
        place.mkdir()
        done = subprocess.run(["mount", "-t", kind, kind, place], capture_output=True, text=True, timeout=30)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        mounts.append(place)
        return place

    yield mount
    for place in reversed(mounts):
        subprocess.run(["umount", place], check=True, timeout=30)


def test_mount_points_are_empty_folders_unless_they_are_wanted(root: Path, mounted: Callable[..., Path]) -> None:
    first, second = mounted("first"), mounted("second")
    for place in (first, second):
        (place / "file").write_bytes(b"below")
        place.chmod(0o711)
    below = {b"/first/file", b"/second/file"}
    made = back_up(root)
    assert_restorable(made, root, left_out=below)
    assert made.report.skipped_mounts == [b"first", b"second"]
    only = back_up(root, options=options(include_devices=[str(second)]))
    assert_restorable(only, root, left_out={b"/first/file"})
    everything = back_up(root, options=options(all_file_systems=True))
    assert_restorable(everything, root)
    # Named the same, it is found again whichever way.
    assert_restorable(back_up(root, everything), root, left_out=below)


def test_file_systems_of_the_kernel_are_never_entered(root: Path, mounted: Callable[..., Path]) -> None:
    mounted("proc", "proc")
    made = back_up(root, options=options(all_file_systems=True))
    assert {name for name in names(made) if name.startswith(b"/proc")} == {b"/proc"}


def test_the_kernels_own_folders_are_refused_as_a_source() -> None:
    with pytest.raises(SourceError, match="cannot back up /proc: it lies on a file system of the kernel's own"):
        back_up(Path("/proc"))


def test_a_device_to_include_must_be_there(root: Path) -> None:
    with pytest.raises(UsageError, match="cannot include the device of /no/such: No such file"):
        back_up(root, options=options(include_devices=["/no/such"]))


@pytest.mark.parametrize(("name", "why"), [("none", "No such file"), ("large", "Not a directory")])
def test_a_source_that_is_no_folder_is_named(root: Path, name: str, why: str) -> None:
    with pytest.raises(SourceError, match=f"cannot back up {root / name}: {why}"):
        back_up(root / name)


# --- what cannot be read, or changes ---

#: With and without a previous backup, in which the file was the same or another.
Previous = Callable[[Path], Backup | None]


@pytest.fixture(params=["first", "unchanged", "changed"])
def previous(request: pytest.FixtureRequest) -> Previous:
    def make(root: Path) -> Backup | None:
        if request.param == "first":
            return None
        made = back_up(root, average=1 << 16)
        if request.param == "changed":
            for path in root.rglob("*"):
                os.utime(path, ns=(5, 5), follow_symlinks=False)
        return made

    return make


@pytest.fixture
def once_listed(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """`once_listed(action)`: it happens between the listing of the root and the first look at an entry.

    The root's own time, which was read before, stays.
    """

    def plan(action: Callable[[], None]) -> None:
        pending = [action]

        def listing(fd: int) -> tuple[list[bytes], bytes]:
            listed = list_folder(fd)
            if pending:
                before = root.stat().st_mtime_ns
                pending.pop()()
                os.utime(root, ns=(before, before))
            return listed

        monkeypatch.setattr(pxar.create, "list_folder", listing)

    return plan


def test_entries_that_vanish_are_left_out(
    root: Path, previous: Previous, once_listed: Callable[[Callable[[], None]], None]
) -> None:
    base = previous(root)

    def vanish() -> None:
        (root / "large").unlink()
        (root / "z-link").unlink()
        shutil.rmtree(root / "empty")

    once_listed(vanish)
    made = back_up(root, base, average=1 << 16)
    assert_restorable(made, root)
    assert made.report.troubles == {Trouble.VANISHED: 3}
    assert "'large' vanished while it was read" in made.report.warnings


def test_whatever_takes_a_files_place_is_archived_as_what_it_is(
    root: Path, previous: Previous, once_listed: Callable[[Callable[[], None]], None]
) -> None:
    base = previous(root)

    def swap() -> None:
        for name in ("large", "z-link"):
            (root / name).unlink()
        (root / "empty").rmdir()
        os.mkfifo(root / "large")
        (root / "empty").write_bytes(b"a file now")
        (root / "z-link").mkdir()
        (root / "z-link/file").write_bytes(b"in a folder now")

    once_listed(swap)
    made = back_up(root, base, average=1 << 16)
    assert_restorable(made, root)
    assert made.report.warnings == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, -errno.EIO, -errno.EACCES, errno.ENOTCONN])
def test_entries_that_cannot_be_opened_are_left_out(
    root: Path, previous: Previous, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    base = previous(root)
    refused = (b"large", b"deep", b"z-link")

    def opening(dir_fd: int, name: bytes, features: int, **more: Any) -> Any:
        return code if name in refused else open_entry(dir_fd, name, features, **more)

    def scanning(dir_fd: int, names: Sequence[bytes], features: int, **more: Any) -> Any:
        found = scan(dir_fd, names, features, **more)
        return [code if name in refused else one for name, one in zip(names, found, strict=True)]

    monkeypatch.setattr(pxar.source, "open_entry", opening)
    monkeypatch.setattr(pxar.source, "scan", scanning)
    made = back_up(root, base, average=1 << 16, alone=True)
    monkeypatch.undo()
    below = {b"/a/deep", b"/a/deep/er", b"/a/deep/er/none"}
    assert_restorable(made, root, left_out=below | {b"/large", b"/z-link"})
    trouble = Trouble.VANISHED if code == errno.ESTALE else Trouble.UNREADABLE
    assert made.report.troubles == {trouble: 3}
    if trouble is Trouble.UNREADABLE:
        assert f"'large' cannot be read and was left out: {os.strerror(abs(code))}" in made.report.warnings


def test_an_unprivileged_run_leaves_out_what_it_may_not_read(root: Path, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("changing the user needs root")
    (root / "large").chmod(0)
    (root / "a/deep").chmod(0)
    (root / "empty").chmod(0o444)  # may be listed, not searched
    (root / "empty/x").write_bytes(b"")
    for folder in (root, *root.parents):
        if folder.stat().st_uid == 0 and folder != Path("/") and folder.stat().st_mode & 5 != 5:
            folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        made = back_up(root)
    finally:
        os.seteuid(0)
    # The second name of the file needs the same rights.
    gone = {b"/large", b"/a/second", b"/a/third", b"/a/deep", b"/a/deep/er", b"/a/deep/er/none", b"/empty/x"}
    assert_restorable(made, root, left_out=gone)
    assert made.report.troubles == {Trouble.UNREADABLE: 5}


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, -errno.E2BIG])
def test_what_is_no_matter_of_one_file_ends_it(root: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(pxar.source, "open_entry", lambda *_, **__: code)
    hint = "; --skip-e2big-xattr leaves them out" if code < 0 else ""
    with pytest.raises(SourceError, match=rf"cannot read 'a': {os.strerror(abs(code))}{hint}"):
        back_up(root)


class Reading:
    """Stands for `os` where contents are read: something happens before the `call`-th read."""

    def __init__(self, call: int, action: Callable[[], None]) -> None:
        self._call, self._action = call, action

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def readv(self, fd: int, buffers: Sequence[Any]) -> int:
        self._call -= 1
        if not self._call:
            self._action()
        return os.readv(fd, buffers)


@pytest.fixture
def before_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    def plan(call: int, action: Callable[[], None]) -> None:
        monkeypatch.setattr(pxar.entry_writer, "os", Reading(call, action))

    return plan


@pytest.mark.parametrize("size", [1, 5000, 4 << 20, (4 << 20) + 1, 9 << 20])
@pytest.mark.parametrize("split", [True, False])
def test_a_file_that_grows_is_cut_off_where_it_ended(
    tmp_path: Path, before_read: Callable[[int, Callable[[], None]], None], size: int, split: bool
) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"1" * size)

    def grow() -> None:
        with file.open("ab") as stream:
            stream.write(b"2" * 10)

    before_read(1, grow)
    rows, report = backed_up(tmp_path, split=split)
    assert rows[b"/log"][5] == b"1" * size
    assert report.troubles == {Trouble.GROWN: 1}


@pytest.mark.parametrize(("size", "left", "call"), [(5000, 10, 1), (1, 0, 1), (9 << 20, 100, 1), (9 << 20, 5 << 20, 2)])
@pytest.mark.parametrize("split", [True, False])
def test_a_file_that_shrinks_is_filled_up_with_zeros(
    tmp_path: Path,
    before_read: Callable[[int, Callable[[], None]], None],
    size: int,
    left: int,
    call: int,
    split: bool,
) -> None:
    file = tmp_path / "log"
    file.write_bytes(b"1" * size)
    (tmp_path / "next").write_bytes(b"whole")
    before_read(call, lambda: os.truncate(file, left))
    rows, report = backed_up(tmp_path, split=split)
    assert rows[b"/log"][5] == (b"1" * left).ljust(size, b"\0")
    assert rows[b"/next"][5] == b"whole"
    assert report.troubles == {Trouble.SHRUNK: 1}


def test_a_large_file_that_changes_is_told(
    tmp_path: Path, before_read: Callable[[int, Callable[[], None]], None]
) -> None:
    file = tmp_path / "image"
    file.write_bytes(bytes(6 << 20))
    before_read(2, lambda: os.utime(file, ns=(1, 1)))
    _, report = backed_up(tmp_path, split=True)
    assert report.troubles == {Trouble.CHANGED: 1}


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_file_whose_content_cannot_be_read_is_left_out_of_a_split_archive(
    tmp_path: Path, before_read: Callable[[int, Callable[[], None]], None], call: int
) -> None:
    (tmp_path / "bad").write_bytes(b"1" * (9 << 20))
    (tmp_path / "also").hardlink_to(tmp_path / "bad")
    (tmp_path / "good").write_bytes(b"whole")

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before_read(call, fail)
    made = back_up(tmp_path)
    # The other name of the same file is tried anew.
    assert_restorable(made, tmp_path, left_out={b"/also"})
    assert made.report.warnings == ["'also' cannot be read and was left out: Input/output error"]
    assert_restorable(back_up(tmp_path, made), tmp_path)


@pytest.mark.parametrize(("call", "kept"), [(1, 0), (2, 4 << 20), (3, 8 << 20)])
def test_a_file_whose_content_cannot_be_read_is_filled_up_in_a_self_contained_archive(
    tmp_path: Path, before_read: Callable[[int, Callable[[], None]], None], call: int, kept: int
) -> None:
    size = 9 << 20
    (tmp_path / "bad").write_bytes(b"1" * size)
    (tmp_path / "next").write_bytes(b"whole")

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before_read(call, fail)
    rows, report = backed_up(tmp_path, split=False)
    assert rows[b"/bad"][5] == (b"1" * kept).ljust(size, b"\0")
    assert rows[b"/next"][5] == b"whole"
    assert report.warnings == [
        "'bad' cannot be read to its end, and what is missing was filled up with zeros: "
        f"Input/output error at or behind byte {kept} of {size}"
    ]


def backed_up(root: Path, *, split: bool) -> tuple[dict[bytes, Any], CreateReport]:
    if split:
        made = back_up(root)
        return rows_of_archive(made.accessor()), made.report
    stored, report = self_contained(root)
    return rows_of_archive(ArchiveAccessor(stored)), report


def test_short_reads_are_no_end(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Reading):
        def readv(self, fd: int, buffers: Sequence[Any]) -> int:
            return os.readv(fd, [memoryview(buffers[0])[:100_000], *buffers[1:]][:1])

    monkeypatch.setattr(pxar.entry_writer, "os", Slow(0, lambda: None))
    made = back_up(root)
    assert_restorable(made, root)
    assert made.report.warnings == []


def test_warnings_do_not_grow_without_end() -> None:
    report = CreateReport()
    for number in range(MAX_WARNINGS + 7):
        report.warn(Trouble.VANISHED, b"%d" % number)
    assert (len(report.warnings), report.more_warnings) == (MAX_WARNINGS, 7)
    assert report.troubles[Trouble.VANISHED] == MAX_WARNINGS + 7


def test_warnings_give_the_whole_path_and_nothing_that_a_terminal_acts_on() -> None:
    report = CreateReport()
    report.warn(Trouble.UNREADABLE, b"/".join([b"long" * 60] * 20 + [b"\x1b[2J\n\xff"]), "why")
    name = "/".join(["long" * 60] * 20)
    assert report.warnings == [f"'{name}/\\x1b[2J\\n\\xff' cannot be read and was left out: why"]


# --- around it ---


def test_nothing_stays_open_whatever_happens(
    root: Path, before_read: Callable[[int, Callable[[], None]], None]
) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_: object) -> None:
        raise Stop

    before = sorted(Path("/proc/self/fd").iterdir())
    base = back_up(root, average=1 << 16)
    back_up(root, base, average=1 << 16)
    for base_or_none in (None, base):
        with pytest.raises(Stop):
            back_up(root, base_or_none, average=1 << 16, progress=stop)
    before_read(1, stop)
    with pytest.raises(Stop):
        back_up(root)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_progress_shows_the_report_as_it_grows(root: Path) -> None:
    seen = []
    report = back_up(root, progress=lambda report: seen.append(report.entries)).report
    assert seen == sorted(seen)
    assert seen[-1] == report.entries
    assert len(seen) >= report.folders + 2  # two more within a file of 10 MB


@pytest.mark.parametrize("split", [True, False])
def test_measuring_reads_no_content_and_counts_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch, split: bool
) -> None:
    made = back_up(root, average=1 << 16).report if split else self_contained(root)[1]
    monkeypatch.setattr(os, "readv", lambda *_: pytest.fail("content was read"))
    measured = measure_archive(str(root), split=split)
    assert [getattr(measured, name) for name in CreateReport.__slots__] == [
        getattr(made, name) for name in CreateReport.__slots__
    ]


def test_measuring_with_a_reference_tells_what_would_be_read(root: Path) -> None:
    base = back_up(root, average=1 << 16)
    (root / "a/file").write_bytes(b"changed")
    measured = measure_archive(str(root), reference=base.reference())
    made = back_up(root, base, average=1 << 16).report
    assert (measured.read, measured.injected_size) == (made.read, made.injected_size)
    assert measured.read < measured.size


def test_empty_symlink_targets_are_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opening(dir_fd: int, name: bytes, features: int, **more: Any) -> Any:
        found = open_entry(dir_fd, name, features, **more)
        if name == b"z-link" and not isinstance(found, int):
            return (*found[:7], b"", *found[8:])
        return found

    monkeypatch.setattr(pxar.source, "open_entry", opening)
    made = back_up(root)
    assert_restorable(made, root, left_out={b"/z-link"})
    assert made.report.troubles == {Trouble.UNSTORABLE: 1}


def test_attributes_that_are_too_large_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opening(dir_fd: int, name: bytes, features: int, **more: Any) -> Any:
        found = open_entry(dir_fd, name, features, **more)
        return (*found[:8], errno.E2BIG, *found[9:]) if name == b"large" and not isinstance(found, int) else found

    monkeypatch.setattr(pxar.source, "open_entry", opening)
    made = back_up(root, options=options(skip_e2big_xattr=True))
    assert made.report.troubles == {Trouble.ATTRIBUTES: 1}


def test_attributes_acls_and_capabilities_are_kept_where_the_file_system_has_them(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("mounting needs root")
    with ext4(tmp_path, 16 << 20) as place:
        (place / "file").write_bytes(b"")
        os.setxattr(place / "file", "user.a", b"1")
        metadata = back_up(place).accessor().lookup(b"file")
        assert metadata is not None
        assert metadata.metadata.xattrs == ((b"user.a", b"1"),)  # type: ignore[union-attr]
