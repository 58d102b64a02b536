"""What of an archive is restored: patterns, folders in it, one entry, kinds of metadata."""

import os
import stat
import struct
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from pxar.accessor import ArchiveAccessor, Directory
from pxar.extract import extract_entry, extract_folder
from pxar.extract_report import ExtractOptions
from pxar.features import DEFAULT, Features
from pxar.metadata import Acl, DefaultAcl, Metadata, Stat
from tests.pxar.archives import Item, MemoryBytes, archived, item
from tests.pxar.restored import (
    AS_ROOT,
    REPLACE,
    chain,
    file,
    folder,
    hardlink,
    names_below,
    opened,
    patterns,
    sample,
)

VAR = ("var", "var/log", "var/log/messages")


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
        # What is left out takes with it what patterns before it match below.
        ([b"*", b"!/etc/", b"!home"], {"var", "var/log", "var/log/messages"}),
        ([b"!/etc/", b"*", b"!/home"], {"etc", "etc/passwd", "etc/ssh", "etc/ssh/key", "etc/ssh/key.pub", *VAR}),
        ([b"*", b"!/etc/", b"!/home", b"key"], {"etc", "etc/ssh", "etc/ssh/key", *VAR}),
        ([b"*", b"!/etc/", b"!/home", b"ssh/", b"!key"], {"etc", "etc/ssh", "etc/ssh/key.pub", *VAR}),
        ([b"key*", b"!/etc", b"ssh/key.pub", b"!/etc/ssh"], set()),
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


def test_names_of_a_file_that_is_not_chosen_stay_in_their_folders(tmp_path: Path) -> None:
    """A folder with such names holds further folders with them, between its own names."""
    inner = folder({b"z": hardlink(b"a/f")})
    root = folder({b"a": folder({b"f": file(b"content")}), b"b": folder({b"x": hardlink(b"a/f"), b"y": inner})})
    root.children[b"b"].children[b"zz"] = hardlink(b"a/f")
    target = tmp_path / "target"
    report = extract_folder(opened(root), str(target), ExtractOptions(patterns(b"/b")))
    assert report.warnings == []
    assert names_below(target) == {"b", "b/x", "b/y", "b/y/z", "b/zz"}
    assert len({(target / name).stat().st_ino for name in ("b/x", "b/y/z", "b/zz")}) == 1
    assert (target / "b/x").read_bytes() == b"content"


def test_names_of_a_file_that_is_not_chosen_survive_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    names = {b"x": hardlink(b"a/f"), b"y": folder({b"z": hardlink(b"a/f")})}
    root = folder({b"a": folder({b"f": file(b"content")}), b"b": folder(names)})
    target = tmp_path / "target"
    (target / "b").mkdir(parents=True)
    (target / "b/y").write_bytes(b"in the way")
    report = extract_folder(opened(root), str(target), ExtractOptions(patterns(b"/b"), allow_existing=True))
    assert (len(report.warnings), report.failed) == (1, 1)
    assert (target / "b/x").read_bytes() == b"content"


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


def test_paths_of_a_deep_tree_are_not_all_in_memory(tmpfs: Path) -> None:
    depth = 500
    accessor = chain(depth, b"n" * 250)
    target = tmpfs / "target"
    tracemalloc.start()
    try:
        report = extract_folder(accessor, str(target), ExtractOptions(patterns(b"bottom")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        subprocess.run(["rm", "-rf", target], check=True)
    assert (report.folders, report.files, report.warnings) == (depth, 1, [])
    # All paths together have 31 MB.
    assert peak < 12 << 20
