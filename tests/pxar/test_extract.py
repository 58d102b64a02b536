"""Archives restored into folders: everything comes back as it was."""

import os
import resource
import stat
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from pxar.accessor import ArchiveAccessor
from pxar.encoder import ArchiveEncoder
from pxar.extract import extract_folder
from pxar.extract_report import ExtractOptions
from pxar.features import CHATTR_FLAGS, DEFAULT, FAT_FLAGS, Features
from pxar.filesystem import set_flags, set_projid
from pxar.metadata import Metadata, Stat, encode_metadata
from tests.pxar.archives import Item, MemoryBytes, MemorySink
from tests.pxar.backups import back_up, run_script
from tests.pxar.golden_streams import stream
from tests.pxar.restored import (
    AS_ROOT,
    EVERYTHING,
    MIB,
    described,
    file,
    folder,
    names_below,
    names_in,
    opened,
    set_attributes,
    varied_tree,
)
from tests.pxar.strategies import trees
from tests.support.file_systems import mounted


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
def test_projects_and_flags_that_folders_hand_down_come_back_where_they_were(tmp_path: Path) -> None:
    with mounted("xfs", tmp_path) as point:
        root = point / "source"
        (root / "project/below").mkdir(parents=True)
        (root / "quiet/below").mkdir(parents=True)
        for path in (root / "file", root / "project/file", root / "quiet/file", root / "quiet/with attributes"):
            path.write_bytes(b"x")
        os.setxattr(root / "quiet/with attributes", "user.a", b"1")
        os.link(root / "project/file", root / "project/second name")
        for path, flags in (
            (root / "file", 0),
            (root / "project/file", 0),
            (root / "project", Features.PROJINHERIT),
            (root / "quiet", Features.NOATIME),
        ):
            fd = os.open(path, os.O_RDONLY)
            set_projid(fd, 77)
            set_flags(fd, flags, flags)
            os.close(fd)
        report = extract_folder(back_up(root).accessor(), str(point / "target"))
        assert report.warnings == []
        assert report.hardlinks == 1
        assert described(point / "target") == described(root)
        assert described(root)[b"/file"][-1] == 77


@AS_ROOT
def test_an_extended_attribute_that_is_refused_costs_neither_others_nor_capabilities(disk: Path) -> None:
    caps = struct.pack("<IIIII", 0x0200_0001, 1 << 13, 0, 0, 0)
    too_large = tuple((b"user.%d" % number, bytes(9000)) for number in range(3))
    tool = file(b"\x7fELF")
    tool.metadata = replace(tool.metadata, xattrs=(*too_large, (b"user.small", b"1")), fcaps=caps)
    report = extract_folder(opened(folder({b"tool": tool})), str(disk / "target"))
    assert report.warnings == ["'tool': extended attributes: No space left on device"]
    assert {name: os.getxattr(disk / "target/tool", name) for name in os.listxattr(disk / "target/tool")} == {
        "user.small": b"1",
        "security.capability": caps,
    }


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
