"""Archives restored into folders: everything comes back as it was, and nothing leads out of the target."""

import errno
import fcntl
import os
import resource
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from core.buffers import Buffer
from core.errors import FormatError, TargetError
from pxar import writing
from pxar.accessor import ArchiveAccessor, Directory
from pxar.behind import Behind
from pxar.encoder import ArchiveEncoder
from pxar.extract import extract_entry, extract_folder
from pxar.extract_report import MAX_ALIKE, ExtractOptions, ExtractReport
from pxar.features import CHATTR_FLAGS, DEFAULT, FAT_FLAGS, Features
from pxar.filesystem import set_flags, set_projid
from pxar.metadata import Acl, DefaultAcl, Metadata, Stat, encode_metadata
from pxar.patterns import MatchPattern
from tests.pxar.archives import Item, MemoryBytes, MemorySink, archived, item
from tests.pxar.backups import back_up, ext4, run_script
from tests.pxar.golden_streams import stream
from tests.pxar.strategies import trees
from tests.support.file_systems import mounted

MIB = 1 << 20
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
EVERYTHING = DEFAULT | Features.NODUMP
REPLACE = ExtractOptions(
    allow_existing=True, overwrite_files=True, overwrite_symlinks=True, overwrite_hardlinks=True, overwrite_others=True
)


@pytest.fixture(params=["c", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of what writes contents, one after the other."""
    if request.param == "python":
        monkeypatch.setattr(writing, "_writing", None)
    elif vars(writing)["_writing"] is None:
        pytest.skip("the C part is not built")
    return str(request.param)


def opened(root: Item, *, split: bool = True) -> ArchiveAccessor:
    archive, payload = archived(root, split=split)
    return ArchiveAccessor(MemoryBytes(archive), MemoryBytes(payload) if split else None)


def folder(children: dict[bytes, Item] | None = None, mode: int = 0o755, **more: Any) -> Item:
    return item(0o040000 | mode, children=children or {}, **more)


def file(content: bytes = b"", mode: int = 0o644, **more: Any) -> Item:
    return item(0o100000 | mode, content=content, **more)


def symlink(target: bytes) -> Item:
    return item(0o120777, target=target)


def hardlink(target: bytes) -> Item:
    one = item(0o100644, target=target)
    one.kind = one.kind.HARDLINK
    return one


def patterns(*texts: bytes) -> tuple[MatchPattern, ...]:
    return tuple(MatchPattern.parse(text) for text in texts)


def names_in(root: Path) -> list[str]:
    return [path.name for path in root.iterdir()]


def names_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def described(root: Path, *, features: Features = EVERYTHING) -> dict[bytes, tuple[Any, ...]]:
    """All that a file system knows of every entry below `root`, and of itself; of equal trees it is equal."""
    top = os.fsencode(root)
    rows: dict[bytes, tuple[Any, ...]] = {}
    links: dict[int, bytes] = {}

    def add(path: bytes, shown: bytes) -> None:
        found = os.lstat(path)
        more: tuple[Any, ...] = ()
        if stat.S_ISREG(found.st_mode):
            more = Path(os.fsdecode(path)).read_bytes(), links.setdefault(found.st_ino, shown)
        elif stat.S_ISLNK(found.st_mode):
            more = (os.readlink(path),)  # noqa: PTH115 - names are bytes
        elif stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode):
            more = (found.st_rdev,)
        if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):
            more += tuple((name, os.getxattr(path, name)) for name in sorted(os.listxattr(path)))
            more += attributes(path)
        rows[shown] = (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, *more)
        if stat.S_ISDIR(found.st_mode):
            for name in sorted(os.listdir(path)):  # noqa: PTH208 - names are bytes
                add(path + b"/" + name, shown + b"/" + name)

    add(top, b"")
    return rows


def attributes(path: bytes) -> tuple[int, int]:
    """Inode flags without the one that says how a file lies on the disk, and project."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        (flags,) = struct.unpack("=I", fcntl.ioctl(fd, 0x8008_6601, bytes(4)))
        return flags & ~0x80000, struct.unpack("=IIIII8x", fcntl.ioctl(fd, 0x801C_581F, bytes(28)))[3]
    except OSError:
        return 0, 0
    finally:
        os.close(fd)


# --- what comes back ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system."""
    with ext4(tmp_path, 128 * MIB) as folder:
        yield folder


def varied_tree(root: Path) -> None:
    """A tree with all that ext4 can hold."""
    root.mkdir()
    (root / "below/deeper").mkdir(parents=True)
    (root / "plain").write_bytes(b"plain\n")
    (root / "holes").write_bytes(b"a" * 5000)
    with (root / "holes").open("r+b") as holed:
        holed.seek(3 * MIB)
        holed.write(b"z" * 10)
        holed.truncate(5 * MIB)
    (root / "large").write_bytes(os.urandom(3 * MIB) + bytes(MIB) + os.urandom(100))
    os.link(root / "large", root / "below/large too")
    os.link(root / "plain", root / "below/deeper/plain too")
    (root / "caps").write_bytes(b"\x7fELF")
    os.setxattr(root / "caps", "security.capability", struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0))
    (root / "setuid").write_bytes(b"#!")
    os.chown(root / "setuid", 1000, 100)
    (root / "setuid").chmod(0o6755)
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in [(1, 6, 2**32 - 1), (2, 4, 1001), (4, 4, 2**32 - 1), (8, 2, 2001), (16, 6, 2**32 - 1),
                      (32, 0, 2**32 - 1)]
    )  # fmt: skip
    (root / "acl").write_bytes(b"acl")
    os.setxattr(root / "acl", "system.posix_acl_access", acl)
    os.setxattr(root / "below", "system.posix_acl_access", acl)
    os.setxattr(root / "below", "system.posix_acl_default", acl)
    os.setxattr(root / "below/deeper", "user.on a folder", bytes(range(256)))
    os.setxattr(root / "plain", "user.empty", b"")
    os.setxattr(root / "plain", "trusted.kept", b"x" * 300)
    (root / "symlink").symlink_to("/etc/passwd")
    os.chown(root / "symlink", 1234, 5678, follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    os.mknod(root / "block", 0o060600, os.makedev(259, 70_000))
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(root / "socket"))
    (root / "secret").write_bytes(b"s")
    (root / "secret").chmod(0)
    os.chown(root / "secret", 4_000_000_000, 65534)
    (root / os.fsdecode(b"\xff\n" + b"n" * 250)).touch()
    (root / "long symlink").symlink_to(("a" * 200 + "/") * 5)
    for number, path in enumerate([root, *sorted(root.rglob("*"))]):
        os.utime(path, ns=(10**9, number * 1_000_000_007 - 5 * 10**9), follow_symlinks=False)


def set_attributes(root: Path) -> None:
    """Inode flags, which come last."""
    for path, flags in (
        (root / "plain", Features.APPEND | Features.NODUMP),
        (root / "large", Features.IMMUTABLE),
        (root / "holes", Features.NOATIME | Features.SYNC),
        (root / "below", Features.DIRSYNC | Features.IMMUTABLE),
    ):
        fd = os.open(path, os.O_RDONLY)
        try:
            set_flags(fd, flags, flags)
        finally:
            os.close(fd)


@AS_ROOT
@pytest.mark.usefixtures("form")
def test_all_that_a_disk_file_system_holds_comes_back(disk: Path) -> None:
    root, target = disk / "source", disk / "target"
    varied_tree(root)
    set_attributes(root)
    backup = back_up(root)
    report = extract_folder(backup.accessor(), str(target), ExtractOptions(features=EVERYTHING))
    assert report.warnings == []
    assert (report.failed, report.left_out) == (0, 0)
    assert described(target) == described(root)
    assert (target / "holes").stat().st_blocks < 100
    assert (report.files, report.hardlinks, report.folders) == (8, 2, 2)
    assert back_up(target).archive.content() == backup.archive.content()


@AS_ROOT
def test_projects_come_back(tmp_path: Path) -> None:
    with mounted("xfs", tmp_path) as point:
        root = point / "source"
        (root / "folder").mkdir(parents=True)
        (root / "file").write_bytes(b"x")
        for path in (root / "folder", root / "file"):
            fd = os.open(path, os.O_RDONLY)
            set_projid(fd, 77)
            os.close(fd)
        report = extract_folder(back_up(root).accessor(), str(point / "target"))
        assert report.warnings == []
        assert described(point / "target") == described(root)
        assert described(root)[b"/file"][-1] == 77


@AS_ROOT
@pytest.mark.usefixtures("form")
def test_archives_of_a_real_pbs_are_restored_to_the_trees_they_came_from(golden: Path, disk: Path) -> None:
    source, target = disk / "source", disk / "target"
    run_script(golden / "make_tree.py", source)
    for path in ("a.tmp", "sub", "deeper/x.tmp"):  # what a .pxarexclude in it leaves out
        subprocess.run(["rm", "-r", source / "excluded" / path], check=True)
    for path in ("excluded", "excluded/deeper"):
        os.utime(source / path, ns=(0, 0))
    wanted = described(source)
    for group, names in {"tree-data": ("root.mpxar", "root.ppxar"), "tree-legacy": ("root.pxar",)}.items():
        streams = [stream(golden / "store.tar", f"host/{group}/2026-01-01T00:00:00Z/{name}.didx") for name in names]
        report = extract_folder(
            ArchiveAccessor(*map(MemoryBytes, streams)), str(target), ExtractOptions(features=EVERYTHING)
        )
        assert report.warnings == []
        found = described(target)
        for name in (b"/excluded", b"/excluded/deeper"):
            found[name] = (*found[name][:3], 0, *found[name][4:])
        assert found.keys() == wanted.keys()
        for name, row in wanted.items():
            assert found[name] == row, name
        subprocess.run(["rm", "-r", target], check=True)


@settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(root=trees())
def test_any_tree_comes_back_or_is_complained_about(tmpfs: Path, root: Item) -> None:
    target = tmpfs / "target"
    options = ExtractOptions(features=DEFAULT & ~(CHATTR_FLAGS | FAT_FLAGS))
    try:
        report = extract_folder(opened(root), str(target), options)
        count = 0

        def check(one: Item, path: Path) -> int:
            known = 0
            for name, child in one.children.items():
                below = path / os.fsdecode(name)
                there = os.path.lexists(below)
                if there and child.kind is child.kind.DIRECTORY:
                    known += check(child, below)
                elif there and child.kind is child.kind.FILE:
                    assert below.read_bytes() == child.content
                known += there
            return known

        count = check(root, target)
        assert report.entries == count
        assert (report.failed == 0) == (count == len(list(below_of(root))))
        assert not any(name.startswith(".fleece-") for name in names_below(target))
    finally:
        subprocess.run(["rm", "-rf", target], check=True)


def below_of(root: Item) -> Iterator[Item]:
    for child in root.children.values():
        yield child
        yield from below_of(child)


@pytest.mark.parametrize("split", [True, False], ids=["split", "self-contained"])
@pytest.mark.usefixtures("form")
def test_files_of_all_sizes_come_back_with_holes(tmp_path: Path, split: bool) -> None:
    sizes = (0, 1, 4095, 4096, 4097, 100_000, 256 << 10, (256 << 10) + 1, MIB, 3 * MIB + 5)
    root = folder()
    for size in sizes:
        root.children[b"noise-%d" % size] = file(os.urandom(size))
        root.children[b"zeros-%d" % size] = file(bytes(size))
        root.children[b"island-%d" % size] = file((bytes(size // 2) + b"island" + bytes(size))[:size])
    report = extract_folder(opened(root, split=split), str(tmp_path / "target"))
    assert report.warnings == []
    for name, child in root.children.items():
        path = tmp_path / "target" / os.fsdecode(name)
        assert path.read_bytes() == child.content
        if name.startswith(b"zeros"):
            assert path.stat().st_blocks == 0
    assert (report.files, report.size) == (3 * len(sizes), 3 * sum(sizes))


def test_thousands_of_levels_cost_few_descriptors_and_no_recursion(tmp_path: Path) -> None:
    depth = 2500
    sink, payload = MemorySink(), MemorySink()
    encoder = ArchiveEncoder(sink, payload)
    meta = encode_metadata(Metadata(Stat(0o040751, 0, os.getuid(), os.getgid(), 77, 5)))
    encoder.begin(meta)
    for _ in range(depth):
        encoder.directory(b"level", meta)
    encoder.begin_file(b"bottom", encode_metadata(Metadata(Stat(0o100640, 0, os.getuid(), os.getgid()))), 3)
    encoder.content.write(b"end")
    encoder.end_file()
    for _ in range(depth):
        encoder.end_directory()
    encoder.finish()
    accessor = ArchiveAccessor(MemoryBytes(bytes(sink.data)), MemoryBytes(bytes(payload.data)))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(names_in(Path("/proc/self/fd"))) + 80, limits[1]))
    try:
        report = extract_folder(accessor, str(tmp_path / "target"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (report.folders, report.files, report.warnings) == (depth, 1, [])
    fd = os.open(tmp_path / "target", os.O_RDONLY)
    try:
        for _ in range(depth):
            found = os.stat(b"level", dir_fd=fd)
            assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o751, 77 * 10**9 + 5)
            below = os.open(b"level", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        assert os.stat(b"bottom", dir_fd=fd).st_size == 3
    finally:
        os.close(fd)
        subprocess.run(["rm", "-rf", tmp_path / "target"], check=True)


# --- what is chosen ---


ROOT = b"etc/passwd"


def sample() -> Item:
    return folder(
        {
            b"etc": folder({b"passwd": file(b"root"), b"ssh": folder({b"key": file(b"k"), b"key.pub": file(b"p")})}),
            b"home": folder({b"me": folder({b"a.tmp": file(b"t"), b"a.txt": file(b"x"), b"same": hardlink(ROOT)})}),
            b"var": folder({b"log": folder({b"messages": file(b"m")})}),
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([b"/etc/passwd"], {"etc", "etc/passwd"}),
        ([b"etc/"], {"etc", "etc/passwd", "etc/ssh", "etc/ssh/key", "etc/ssh/key.pub"}),
        ([b"*.txt"], {"home", "home/me", "home/me/a.txt"}),
        ([b"/etc", b"!*.pub"], {"etc", "etc/passwd", "etc/ssh", "etc/ssh/key"}),
        ([b"/etc", b"!ssh/", b"key.pub"], {"etc", "etc/passwd", "etc/ssh", "etc/ssh/key.pub"}),
        ([b"/*/ssh/k*"], {"etc", "etc/ssh", "etc/ssh/key", "etc/ssh/key.pub"}),
        ([b"/var/**"], {"var", "var/log", "var/log/messages"}),
        ([b"/v[a-z]r/log"], {"var", "var/log", "var/log/messages"}),
        ([b"/home/me/same"], {"home", "home/me", "home/me/same"}),
        ([b"nothing"], set()),
        ([b"!/etc", b"!/home"], {"var", "var/log", "var/log/messages"}),
    ],
)
def test_patterns_choose_and_folders_on_the_way_are_made(
    tmp_path: Path, texts: list[bytes], expected: set[str]
) -> None:
    report = extract_folder(opened(sample()), str(tmp_path / "target"), ExtractOptions(patterns(*texts)))
    assert report.warnings == []
    assert names_below(tmp_path / "target") == expected
    assert report.entries == len(expected)


def test_folders_on_the_way_that_were_there_keep_their_metadata(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "etc").mkdir(parents=True)
    for path in (target / "etc", target):
        path.chmod(0o701)
    options = ExtractOptions(patterns(b"/etc/passwd"), allow_existing=True)
    assert extract_folder(opened(sample()), str(target), options).warnings == []
    assert (stat.S_IMODE(target.stat().st_mode), stat.S_IMODE((target / "etc").stat().st_mode)) == (0o701, 0o701)
    assert extract_folder(opened(sample()), str(target), REPLACE).warnings == []
    assert (stat.S_IMODE(target.stat().st_mode), stat.S_IMODE((target / "etc").stat().st_mode)) == (0o755, 0o755)


def test_a_pattern_of_one_file_reads_no_folder_that_cannot_hold_it(tmp_path: Path) -> None:
    root = folder({b"other-%d" % number: folder({b"f%d" % n: file() for n in range(300)}) for number in range(20)})
    root.children[b"wanted"] = folder({b"one": file(b"1")})
    archive, payload = archived(root, split=True)
    stored = MemoryBytes(archive)
    accessor = ArchiveAccessor(stored, MemoryBytes(payload))
    extract_folder(accessor, str(tmp_path / "target"), ExtractOptions(patterns(b"/wanted/one")))
    assert (tmp_path / "target/wanted/one").read_bytes() == b"1"
    assert stored.total < 200_000 < len(archive)


def test_a_folder_of_the_archive_is_restored_as_if_it_were_all(tmp_path: Path) -> None:
    accessor = opened(sample())
    start = accessor.lookup(b"home/me")
    assert isinstance(start, Directory)
    report = extract_folder(accessor, str(tmp_path / "target"), start=start, prefix=b"home/me")
    assert report.warnings == []
    # The file itself lies outside, so its other name becomes one.
    assert (tmp_path / "target/same").read_bytes() == b"root"
    assert names_below(tmp_path / "target") == {"a.tmp", "a.txt", "same"}


def test_several_names_of_a_file_that_is_not_chosen_become_one_file(tmp_path: Path) -> None:
    names = {b"b": folder({name: hardlink(b"a") for name in (b"x", b"y")}), b"c": hardlink(b"a")}
    root = folder({b"a": file(b"content"), **names})
    report = extract_folder(opened(root), str(tmp_path / "target"), ExtractOptions(patterns(b"!/a")))
    assert len({(tmp_path / "target" / name).stat().st_ino for name in ("b/x", "b/y", "c")}) == 1
    assert (report.files, report.hardlinks) == (1, 2)
    assert (tmp_path / "target/c").read_bytes() == b"content"
    assert report.warnings == []


def test_one_entry_is_restored_under_a_new_name(tmp_path: Path) -> None:
    accessor = opened(sample())
    for number, path in enumerate((b"etc/passwd", b"home/me/same")):
        node = accessor.lookup(path)
        assert node is not None
        report = extract_entry(accessor, node, str(tmp_path), b"name-%d" % number)
        assert (report.files, report.warnings) == (1, [])
        assert (tmp_path / f"name-{number}").read_bytes() == b"root"


@AS_ROOT
def test_what_is_not_wanted_of_the_metadata_stays_away(tmpfs: Path) -> None:
    acl = Acl(users=((1001, 4),), group_obj=4, default=DefaultAcl(7, 5, 0, 5))
    fcaps = struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0)
    metadata = Metadata(Stat(0o106755, 0, 1000, 100, 5, 6), ((b"user.x", b"1"),), acl, fcaps, None)
    root = folder({b"file": Item(file().kind, metadata, b"content"), b"plain": file(b"p", 0o6711, ids=(1000, 100))})
    root.children |= {b"fifo": item(0o010644), b"null": item(0o020644, device=(1, 3)), b"socket": item(0o140644)}
    old = os.umask(0o027)
    try:
        for number, (features, drop, modes, owner, xattrs) in enumerate(
            [
                (DEFAULT, False, (0o6755, 0o6711), 1000, 3),
                (DEFAULT, True, (0o755, 0o711), 1000, 2),
                # Programs must not run as whoever restores them.
                (DEFAULT & ~Features.OWNER, False, (0o755, 0o711), 0, 3),
                (DEFAULT & ~Features.PERMISSIONS & ~Features.ACL, False, (0o640, 0o640), 1000, 2),
                (DEFAULT & ~Features.XATTRS & ~Features.FCAPS & ~Features.ACL, False, (0o6755, 0o6711), 1000, 0),
            ]
        ):
            target = tmpfs / str(number)
            options = ExtractOptions(features=features & ~Features.FIFOS & ~Features.DEVICE_NODES, drop_setuid=drop)
            report = extract_folder(opened(root), str(target), options)
            assert [text for text in report.warnings if "no such thing" not in text] == []
            found = (target / "file").stat(), (target / "plain").stat()
            assert tuple(stat.S_IMODE(one.st_mode) for one in found) == modes
            assert {one.st_uid for one in found} == {owner}
            assert len(os.listxattr(target / "file")) == xattrs - ("no such thing" in str(report.warnings))
            assert (report.left_out, names_below(target)) == (2, {"file", "plain", "socket"})
    finally:
        os.umask(old)


# --- what was there before ---


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


# --- forged archives ---


def forged(write: Callable[[ArchiveEncoder], None]) -> ArchiveAccessor:
    """An archive with what an honest tree cannot have, such as two entries of one name."""
    sink, payload = MemorySink(), MemorySink()
    encoder = ArchiveEncoder(sink, payload)
    encoder.begin(encode_metadata(Metadata(Stat(0o040755))))
    write(encoder)
    encoder.finish()
    return ArchiveAccessor(MemoryBytes(bytes(sink.data)), MemoryBytes(bytes(payload.data)))


FILE = encode_metadata(Metadata(Stat(0o100644)))
LINK = encode_metadata(Metadata(Stat(0o120777)))
FOLDER = encode_metadata(Metadata(Stat(0o040755)))


def add_file(encoder: ArchiveEncoder, name: bytes, content: bytes) -> int:
    position = encoder.begin_file(name, FILE, len(content))
    encoder.content.write(content)
    encoder.end_file()
    return position


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


# --- what goes wrong ---


class Damaged(MemoryBytes):
    """A stream of which a range cannot be read."""

    def __init__(self, data: Buffer, start: int, end: int, error: Exception | None = None) -> None:
        super().__init__(data)
        self.start, self.end = start, end
        self.error = error or FormatError("read", "chunk 7", "the digest does not match")

    def read(self, offset: int, length: int) -> Buffer:
        if offset < self.end and offset + length > self.start:
            raise self.error
        return super().read(offset, length)


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
    report = extract_folder(opened(sample()), str(tmp_path / "target"))
    assert report.warnings == ["13 entries: owner: only root can give files away"]


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
