"""Whole file archives in real mounts: those of PBS, large, damaged and forged ones, and random trees."""

import errno
import hashlib
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings

from pxar.format import Kind
from repository.local import open_local
from tests.fusefs.archives import ALL_KINDS, STREAMS, TIME, files_of, listed, store_trees
from tests.fusefs.mounts import (
    CHUNK,
    FIRST,
    KEY,
    chunk_path,
    error_of,
    flip_byte,
    mounted,
    names,
    random_bytes,
    run,
    write,
)
from tests.pxar.archives import Item, archived, item
from tests.pxar.strategies import trees
from tests.support.golden_store import golden_key

pytestmark = [pytest.mark.fuse, pytest.mark.usefixtures("fuse")]

# What a real PBS wrote.


def facts(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that a tree shows, by path."""
    found: dict[str, tuple[object, ...]] = {}
    links: dict[int, str] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted([*folders, *files]) if folder != str(root) else sorted([*folders, *files, "."]):
            path = Path(folder, name)
            one = path.lstat()
            content = ""
            if stat.S_ISREG(one.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(one.st_mode):
                content = str(path.readlink())
            attributes = {}
            if stat.S_ISREG(one.st_mode) or stat.S_ISDIR(one.st_mode):
                attributes = {
                    key: os.getxattr(path, key) for key in os.listxattr(path) if not key.startswith("trusted.not")
                }
            key = str(path.relative_to(root))
            is_folder = stat.S_ISDIR(one.st_mode)
            found[key] = (
                one.st_mode, one.st_uid, one.st_gid, one.st_mtime_ns, one.st_rdev,
                0 if is_folder else one.st_size, 0 if is_folder else one.st_nlink,
                links.setdefault(one.st_ino, key), content, attributes,
            )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def made_tree(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, ...]]:
    """What `make_tree.py` made, without what its archives leave out."""
    if os.geteuid():
        pytest.skip("only root can make devices and owners")
    root = tmp_path_factory.mktemp("made") / "tree"
    subprocess.run([sys.executable, golden / "make_tree.py", root], check=True, timeout=120, capture_output=True)
    found = facts(root)
    shutil.rmtree(root)
    return found


@pytest.mark.parametrize("group", ["tree-legacy", "tree-data", "tree-metadata"])
def test_archives_of_pbs_show_the_tree_that_they_were_made_from(
    golden_store: Path, made_tree: dict[str, tuple[object, ...]], mountpoint: Path, group: str
) -> None:
    with mounted(golden_store, mountpoint, "--archive", f"host/{group}/{TIME}", "root.pxar") as mount:
        shown = facts(mount.path)
        assert mount.errors() == []
    # What `.pxarexclude` leaves out.
    left_out = {path for path in made_tree if path not in shown}
    assert all(path.startswith("excluded/") for path in left_out)
    assert len(left_out) == 4
    extra = set(shown) - set(made_tree)
    assert extra <= {".pxarexclude-cli"}
    for path in set(shown) & set(made_tree):
        assert shown[path] == made_tree[path], path


def test_encrypted_archives_of_pbs_need_their_key(golden: Path, golden_store: Path, mountpoint: Path) -> None:
    key = golden_key(golden).hex()
    with mounted(golden_store, mountpoint) as mount:
        assert names(mount.path / f"host/enc/{TIME}") == []
        assert names(mount.path / f"host/enc-legacy/{TIME}") == []
    without = run(golden_store, mountpoint, "--archive", f"host/enc/{TIME}", "root.pxar")
    assert without.returncode == 1
    assert "is needed, none is given" in without.stderr
    with mounted(golden_store, mountpoint, "--key", key) as mount:
        trees = [facts(mount.path / f"host/{group}/{TIME}/root.pxar") for group in ("enc", "enc-legacy", "signed")]
        assert trees[0] == trees[2]
        assert len(trees[0]) > 300
        assert {k: v for k, v in trees[1].items() if k in trees[0]} == trees[0]
        assert mount.errors() == []


# Large, damaged and forged ones.


def big_tree() -> Item:
    many = {b"f%05d" % number: item(0o100644, content=b"%d" % number) for number in range(30_000)}
    large = {
        b"large%d" % number: item(0o100644, content=random_bytes(3 * CHUNK + number, number)) for number in range(3)
    }
    return item(0o40755, children={b"many": item(0o40755, children=many), **large})


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_a_damaged_chunk_is_an_error_for_what_lies_in_it_and_one_log_line(
    store_folder: Path, mountpoint: Path, split: bool
) -> None:
    tree = big_tree()
    files = files_of(tree, split=split)
    store_trees(store_folder, {"host/a": files})
    stream = files[STREAMS[split][-1]]
    at = stream.index(tree.children[b"large1"].content[:4096]) + CHUNK
    number = at // CHUNK
    flip_byte(chunk_path(store_folder, stream[number * CHUNK : (number + 1) * CHUNK]), 2000)
    with mounted(store_folder, mountpoint, "--archive", f"host/a/{TIME}", "root.pxar") as mount:
        root = mount.path
        for name in ("large0", "large2"):
            assert (root / name).read_bytes() == tree.children[name.encode()].content
        descriptor = os.open(root / "large1", os.O_RDONLY)
        try:
            assert error_of(lambda: os.pread(descriptor, 4096, CHUNK)) == errno.EIO
            assert os.pread(descriptor, 4096, 3 * CHUNK - 4096) == tree.children[b"large1"].content[-4097:-1]
        finally:
            os.close(descriptor)
        assert len(listed(root / "many")) == 30_000
        lines = mount.errors()
        assert len(lines) == 1, lines
        assert STREAMS[split][-1] in lines[0]


def test_a_listing_shows_what_can_be_read_and_says_that_it_is_not_all(store_folder: Path, mountpoint: Path) -> None:
    many = {b"f%06d" % number: item(0o100644, content=b"") for number in range(110_000)}
    files = files_of(item(0o40755, children=many), split=True)
    store_trees(store_folder, {"host/a": files})
    stream = files["root.mpxar.didx"]
    assert len(stream) > 3 * CHUNK
    flip_byte(chunk_path(store_folder, stream[CHUNK : 2 * CHUNK]), 2000)
    with mounted(store_folder, mountpoint, "--archive", f"host/a/{TIME}", "root.pxar") as mount:
        done = subprocess.run(["ls", "-U", mount.path], capture_output=True, timeout=60, text=True)
        assert done.returncode != 0
        assert "Input/output error" in done.stderr
        shown = done.stdout.split()
        assert 70_000 < len(shown) < 90_000
        assert {"f000000", "f109999"} <= set(shown)
        assert (mount.path / "f109999").stat().st_size == 0
        seen = set(shown)
        missing = next(name for name in (f"f{number:06}" for number in range(110_000)) if name not in seen)
        assert error_of(lambda: (mount.path / missing).stat()) == errno.EIO
        assert len(mount.errors()) == 1


def test_many_readers_and_walkers_at_once_see_the_same(store_folder: Path, mountpoint: Path) -> None:
    tree = big_tree()
    store_trees(store_folder, {"host/a": files_of(tree, split=True), "host/b": files_of(tree, split=False)})
    wrong: list[str] = []
    with mounted(store_folder, mountpoint, "-o", "cache=16M") as mount:
        roots = [mount.path / f"host/{group}/{TIME}/root.pxar" for group in "ab"]

        def walk(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(40):
                root = choose.choice(roots)
                number = choose.randrange(30_000)
                if (root / f"many/f{number:05}").read_bytes() != b"%d" % number:
                    wrong.append(f"{root}/{number}")
                name, offset = choose.choice([b"large0", b"large1", b"large2"]), choose.randrange(3 * CHUNK)
                with (root / os.fsdecode(name)).open("rb", buffering=0) as file:
                    if os.pread(file.fileno(), 70_000, offset) != tree.children[name].content[offset : offset + 70_000]:
                        wrong.append(f"{name!r} at {offset}")
            if len(listed(choose.choice(roots) / "many")) != 30_000:
                wrong.append("listing")

        threads = [threading.Thread(target=walk, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        assert not wrong
        assert mount.errors() == []


def test_a_removed_snapshot_makes_its_archive_stale(store_folder: Path, mountpoint: Path) -> None:
    store_trees(store_folder, {"host/a": files_of(big_tree(), split=True)})
    with mounted(store_folder, mountpoint, "--watch", "0.2") as mount:
        root = mount.path / f"host/a/{TIME}/root.pxar"
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        file = os.open(root / "large0", os.O_RDONLY)
        try:
            shutil.rmtree(store_folder / f"host/a/{TIME}")
            threading.Event().wait(1.5)
            assert error_of(lambda: os.stat("many/f00007", dir_fd=descriptor)) == errno.ESTALE
            assert error_of(lambda: os.pread(file, 100, CHUNK)) == errno.ESTALE
        finally:
            os.close(descriptor)
            os.close(file)


FORGED = [b"", b"x", bytes(200), random_bytes(5000, 9), archived(ALL_KINDS, split=False)[0][:-1]]


def test_what_is_no_archive_cannot_be_looked_into_and_harms_nothing_else(store_folder: Path, mountpoint: Path) -> None:
    forged = {f"host/x{number}": {"root.pxar.didx": data} for number, data in enumerate(FORGED) if data}
    store_trees(store_folder, {**forged, "host/a": files_of(ALL_KINDS, split=True)})
    with mounted(store_folder, mountpoint) as mount:
        for group in forged:
            assert names(mount.path / group / TIME) == ["root.pxar"]
            assert error_of(partial(listed, mount.path / group / TIME / "root.pxar")) == errno.EIO
        assert (mount.path / f"host/a/{TIME}/root.pxar/acl/f").read_bytes() == b"x"
        assert len(mount.errors()) == len(forged)


def look_at(path: Path) -> None:
    os.listxattr(path, follow_symlinks=False)
    if stat.S_ISREG(path.lstat().st_mode):
        path.read_bytes()


def test_flipped_bytes_neither_crash_nor_hang_the_mount(store_folder: Path, mountpoint: Path) -> None:
    choose = random.Random(4)
    plain = archived(ALL_KINDS, split=False)[0]
    trees: dict[str, dict[str, bytes]] = {}
    for number in range(60):
        data = bytearray(plain)
        for _ in range(choose.choice([1, 2, 8])):
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        trees[f"host/x{number}"] = {"root.pxar.didx": bytes(data)}
    store_trees(store_folder, trees)
    with mounted(store_folder, mountpoint) as mount:
        for group in trees:
            for folder, _, files in os.walk(mount.path / group / TIME / "root.pxar"):
                for name in files:
                    error_of(partial(look_at, Path(folder, name)))
        # No fault of ours: those come with a traceback.
        assert not [line for line in mount.log() if line.startswith("Traceback")]
        assert names(mount.path / "host")[0] == "x0"


def test_an_archive_given_by_the_name_of_a_stream_is_found(store_folder: Path, mountpoint: Path) -> None:
    store_trees(store_folder, {"host/a": files_of(ALL_KINDS, split=True)})
    for name in ("root.pxar", "root.mpxar", "root.mpxar.didx"):
        with mounted(store_folder, mountpoint, "--archive", "host/a/latest", name) as mount:
            assert (mount.path / "acl/f").read_bytes() == b"x"
    assert "file archives" in run(store_folder, mountpoint, "--archive", "host/a/latest", "root.ppxar").stderr


def test_the_owner_can_be_somebody_else(store_folder: Path, mountpoint: Path) -> None:
    store_trees(store_folder, {"host/a": files_of(ALL_KINDS, split=True)})
    with mounted(store_folder, mountpoint, "--archive", "host/a/latest", "root.pxar", "-o", "uid=77") as mount:
        found = (mount.path / "acl/f").stat()
        assert (found.st_uid, found.st_gid) == (77, 4_000_000_000)
        assert mount.path.stat().st_uid == 77


def test_an_encrypted_archive_is_shown_with_its_key(store_folder: Path, mountpoint: Path) -> None:
    async def fill() -> None:
        repo = await open_local(store_folder)
        await write(repo, "host/a", FIRST, files_of(ALL_KINDS, split=True), key=KEY)
        repo.close()

    trio.run(fill)
    with mounted(store_folder, mountpoint, "--key", bytes(range(32)).hex()) as mount:
        assert (mount.path / f"host/a/{TIME}/root.pxar/acl/f").read_bytes() == b"x"


# Any tree.


def owned(tree: Item) -> Item:
    """`tree` with owners that there can be: nobody, not even root, may look into a folder of user -1."""
    one = tree.metadata.stat
    one = replace(one, uid=min(one.uid, 0xFFFFFFFE), gid=min(one.gid, 0xFFFFFFFE))
    children = {name: owned(child) for name, child in tree.children.items()}
    return replace(tree, metadata=replace(tree.metadata, stat=one), children=children)


def check(path: Path, one: Item, root: Path, tree: Item) -> None:
    """The entry at `path` is `one`."""
    if one.kind is Kind.HARDLINK:
        file = tree
        for name in one.target.split(b"/"):
            file = file.children[name]
        assert path.lstat().st_ino == (root / os.fsdecode(one.target)).lstat().st_ino
        check(path, file, root, tree)
        return
    found, wanted = path.lstat(), one.metadata.stat
    assert (found.st_mode, found.st_uid, found.st_gid) == (wanted.mode, wanted.uid, wanted.gid)
    assert found.st_mtime_ns == wanted.mtime_s * 10**9 + wanted.mtime_ns
    if one.kind is Kind.FILE:
        assert path.read_bytes() == one.content
        assert found.st_size == len(one.content)
    elif one.kind is Kind.SYMLINK:
        assert os.fsencode(path.readlink()) == one.target
    elif one.kind is Kind.DIRECTORY:
        assert sorted(listed(path)) == sorted(one.children)
        for name, child in one.children.items():
            check(path / os.fsdecode(name), child, root, tree)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_any_tree_is_shown_as_it_was(store_folder: Path, mountpoint: Path, split: bool) -> None:
    some: list[Item] = []

    # One mount for all: making one takes a second.
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(trees())
    def collect(tree: Item) -> None:
        some.append(owned(tree))

    collect()
    store_trees(store_folder, {f"host/t{number}": files_of(tree, split=split) for number, tree in enumerate(some)})
    with mounted(store_folder, mountpoint) as mount:
        for number, tree in enumerate(some):
            root = mount.path / f"host/t{number}/{TIME}/root.pxar"
            check(root, tree, root, tree)
        assert mount.errors() == []
