"""Folders that a second thread reads before the walk comes to them."""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pxar import ahead as ahead_module
from pxar import filesystem, filesystem_python
from pxar.ahead import Ahead, SeenFolder
from pxar.create import CreateOptions
from pxar.features import DEFAULT
from pxar.filesystem import Seen, list_folder, scan, scan_tree
from pxar.folders import Folder
from pxar.patterns import MatchPattern
from tests.pxar.backups import assert_restorable, back_up, beside
from tests.support.file_systems import mounted
from tests.support.waiting import until

DIRECTORY = 4
READER = vars(filesystem)["_reader"]


@pytest.fixture(params=["c", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of the calls, one after the other."""
    if request.param == "python":
        monkeypatch.setattr(filesystem, "_reader", filesystem_python)
    elif READER is filesystem_python:
        pytest.skip("the C part is not built")
    return str(request.param)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def tasks() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def folders_of(fd: int) -> list[bytes]:
    names, kinds = list_folder(fd)
    return [name for name, kind in zip(names, kinds, strict=True) if kind == DIRECTORY]


def tree(base: Path, seed: int = 1, entries: int = 400) -> None:
    """Folders and files in each other, with empty folders and odd names."""
    choose = random.Random(seed)
    folders = [base]
    base.mkdir(exist_ok=True)
    for number in range(entries):
        name = choose.choice(["b%d", "a%d", "z-%d", "\udcff%d", " %d\n"]) % number
        path = choose.choice(folders[-12:]) / name
        if choose.random() < 0.3:
            path.mkdir()
            folders.append(path)
        elif choose.random() < 0.1:
            path.symlink_to(name)
        else:
            path.write_bytes(choose.randbytes(choose.randrange(3000)))


def seen_in(
    fd: int, names: list[bytes], limit: int, last: bytes = b".none", helpers: int = 1
) -> tuple[list[Seen], list[tuple[int, int]]]:
    return scan_tree(fd, names, DEFAULT, dev=os.fstat(fd).st_dev, limit=limit, last=last, helpers=helpers)


# --- one call ---


def test_a_tree_is_read_folder_by_folder(tmp_path: Path, form: str) -> None:
    tree(tmp_path / "tree")
    expected: list[tuple[bytes, list[bytes], bytes]] = []

    def walk(path: Path) -> None:
        with opened(path) as fd:
            for name in folders_of(fd):
                with opened(path / os.fsdecode(name)) as below:
                    expected.append((name, *list_folder(below)))
                walk(path / os.fsdecode(name))

    walk(tmp_path / "tree")
    with opened(tmp_path / "tree") as fd:
        seen, left = seen_in(fd, folders_of(fd), 1 << 20)
    assert left == []
    assert [(name, names, kinds) for _, name, _, names, kinds, _, _ in seen] == expected
    assert all(entered for *_, entered in seen)
    paths: list[Path] = []
    for parent, name, found, names, kinds, scanned, _ in seen:
        paths.append((tmp_path / "tree" if parent < 0 else paths[parent]) / os.fsdecode(name))
        with opened(paths[-1].parent) as fd:
            assert scan(fd, [name], DEFAULT) == [found]
        with opened(paths[-1]) as fd:
            alone = scan(fd, names, DEFAULT, types=kinds)
        assert scanned == [None if kind == DIRECTORY else one for kind, one in zip(kinds, alone, strict=True)]


def test_both_forms_say_the_same_and_what_is_left_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "tree", seed=2)
    answers = []
    for reader in (READER, filesystem_python):
        monkeypatch.setattr(filesystem, "_reader", reader)
        for limit in (1, 2, 7, 50, 1000):
            with opened(tmp_path / "tree") as fd:
                seen, left = seen_in(fd, folders_of(fd), limit)
                places = []
                for number, index in left:
                    names = folders_of(fd) if number < 0 else seen[number][3]
                    kinds = b"\4" * len(names) if number < 0 else seen[number][4]
                    rest = zip(names[index:], kinds[index:], strict=True)
                    places.append((number, [name for name, kind in rest if kind == DIRECTORY]))
                # The Python form knows folders from other entries, no more.
                known = [(*one[:4], [kind == DIRECTORY for kind in one[4]], *one[5:]) for one in seen]
                answers.append((limit, known, places))
            assert sum(1 + len(names) for _, _, _, names, _, _, _ in seen[:-1]) < limit
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]


@pytest.mark.parametrize("helpers", [1, 2, 7, 50])
async def test_helpers_change_nothing_and_leave_nothing(tmp_path: Path, helpers: int) -> None:
    tree(tmp_path, seed=3, entries=200)
    for folder in range(150):  # more than may wait with entries that nobody has looked at
        (tmp_path / f"many/{folder}").mkdir(parents=True)
        for number in range(3):
            (tmp_path / f"many/{folder}/{number}").write_bytes(b"x" * number)
    (tmp_path / "large").mkdir()
    for number in range(400):  # more than one takes at a time
        (tmp_path / f"large/{number}").symlink_to(str(number))
    files, threads = open_files(), tasks()
    with opened(tmp_path) as fd:
        for limit in (1, 3, 100, 450, 1 << 20):
            alone = seen_in(fd, folders_of(fd), limit, helpers=0)
            for _ in range(5):
                assert seen_in(fd, folders_of(fd), limit, helpers=helpers) == alone
    assert open_files() == files
    await until(lambda: tasks() <= threads)  # the kernel forgets a thread a moment after it has been joined


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("limit", [0, -1, (1 << 24) + 1])
def test_a_limit_is_a_number_of_entries(tmp_path: Path, limit: int) -> None:
    with opened(tmp_path) as fd, pytest.raises(ValueError, match="limit"):
        seen_in(fd, [], limit)


def test_a_large_folder_and_another_device_are_left_to_the_walk(tmp_path: Path, form: str) -> None:
    for name in ("large", "small"):
        (tmp_path / "tree" / name / "inside").mkdir(parents=True)
    for number in range(12):
        (tmp_path / "tree/large" / str(number)).touch()
    with mounted("ext4", tmp_path / "tree") as point, opened(tmp_path / "tree") as fd:
        (point / "other").mkdir()
        seen, _ = seen_in(fd, [b"large", b"ext4", b"small"], 12)
    assert [(name, found) for _, name, found, *_ in seen[:2]] == [(b"large", errno.EAGAIN), (b"ext4", errno.EAGAIN)]
    assert [(name, entered) for _, name, _, _, _, _, entered in seen[2:]] == [(b"small", True), (b"inside", True)]


def test_folders_with_patterns_are_read_and_those_in_them_are_not(tmp_path: Path, form: str) -> None:
    (tmp_path / "a/below").mkdir(parents=True)
    (tmp_path / "a/.last").touch()
    (tmp_path / "b/below").mkdir(parents=True)
    with opened(tmp_path) as fd:
        seen, _ = seen_in(fd, [b"a", b"b"], 99, b".last")
    assert [(name, entered) for _, name, _, _, _, _, entered in seen] == [(b"a", False), (b"b", True), (b"below", True)]


def test_deep_folders_are_left_to_the_walk_and_nothing_stays_open(tmp_path: Path, form: str) -> None:
    deep = tmp_path
    for _ in range(50):
        deep = deep / "d"
        deep.mkdir()
    (tmp_path / "e").mkdir()
    before = open_files()
    with opened(tmp_path) as fd:
        seen, left = seen_in(fd, [b"d", b"e"], 999)
        assert left == []
        seen_in(fd, [b"d", b"e"], 5)
    assert open_files() == before
    assert [entered for *_, entered in seen] == [True] * 31 + [False, True]


def test_what_is_no_folder_is_told(tmp_path: Path, form: str) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    with opened(tmp_path) as fd:
        seen, _ = seen_in(fd, [b"file", b"fifo", b"none"], 99)
        for name in (b"", b"a/b", b"a\0b"):
            with pytest.raises(ValueError):
                seen_in(fd, [name], 99)
    assert [found for _, _, found, *_ in seen] == [errno.EAGAIN, errno.EAGAIN, errno.ENOENT]


# --- beside a walk ---


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead_module, "AT_ONCE", 12)
    monkeypatch.setattr(ahead_module, "WAITING", 20)


@contextmanager
def reading(path: Path, start: Callable[[Callable[[], None]], None] = beside) -> Iterator[tuple[Ahead, int]]:
    with opened(path) as fd:
        found = os.fstat(fd)
        root = Folder(None, b"", found.st_dev, found.st_ino, DEFAULT)
        with Ahead(start, root, fd, *list_folder(fd), last=b".last", skip_e2big=False) as ahead:
            yield ahead, fd


@pytest.mark.usefixtures("small_steps")
def test_every_folder_comes_in_the_order_of_the_walk(tmp_path: Path) -> None:
    tree(tmp_path / "tree", seed=3)
    taken = left = 0

    with reading(tmp_path / "tree") as (ahead, root):

        def walk(fd: int) -> None:
            nonlocal taken, left
            for name in folders_of(fd):
                seen = ahead.take(name)
                if seen is None:
                    left += 1  # more entries than a step reads
                    continue
                taken += 1
                below = os.open(name, os.O_RDONLY, dir_fd=fd)
                assert isinstance(seen, SeenFolder)
                assert (seen.names, seen.kinds) == list_folder(below)
                assert seen.entered
                walk(below)
                os.close(below)

        walk(root)
        assert ahead.take(b"more") is None
    assert taken > 50
    assert left < taken / 4


@pytest.mark.usefixtures("small_steps")
def test_it_ends_with_the_walk_wherever_that_is(tmp_path: Path) -> None:
    tree(tmp_path / "tree", seed=4)
    before = threading.active_count()
    for count in range(12):
        with reading(tmp_path / "tree") as (ahead, root):
            for name in folders_of(root)[: min(count, 1)]:
                ahead.take(name)
    with pytest.raises(KeyError), reading(tmp_path / "tree"):
        raise KeyError
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(10)
    assert threading.active_count() <= before


def test_another_folder_than_the_next_is_never_given(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    with reading(tmp_path) as (ahead, _):
        assert ahead.take(b"a") is not None
        assert ahead.take(b"c") is None
        assert ahead.take(b"b") is None


@pytest.mark.usefixtures("small_steps")
def test_folders_that_vanish_meanwhile_are_left_to_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        for number in range(9):
            (tmp_path / name / str(number)).mkdir(parents=True)
    gone = tmp_path / "gone"

    def step(*arguments: Any, **options: Any) -> tuple[list[Seen], list[tuple[int, int]]]:
        seen = scan_tree(*arguments, **options)
        if not gone.exists():
            (tmp_path / "a").rename(gone)
        return seen

    monkeypatch.setattr(ahead_module, "scan_tree", step)
    with reading(tmp_path) as (ahead, _):
        assert ahead.take(b"a") is not None
        assert [ahead.take(b"%d" % number) is None for number in range(9)] == [False] * 2 + [True] * 7
        assert ahead.take(b"b") is not None


# --- whole backups ---


def edited(base: Path, seed: int) -> None:
    choose = random.Random(seed)
    for folder, folders, files in os.walk(base):
        for name in files:
            path = Path(folder, name)
            if choose.random() < 0.03 and not path.is_symlink():
                path.write_bytes(choose.randbytes(50))
            elif choose.random() < 0.01:
                path.unlink()
        for _ in folders:
            if choose.random() < 0.05:
                Path(folder, f"new{choose.random()}").mkdir()
        if choose.random() < 0.05:
            Path(folder, f"new{choose.random()}").write_bytes(b"new")


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("seed", range(4))
def test_a_backup_is_the_same_with_and_without(tmp_path: Path, seed: int) -> None:
    root = tmp_path / "tree"
    tree(root, seed, entries=600)
    first = back_up(root, average=4096)
    edited(root, seed)
    alone, helped = back_up(root, first, average=4096, alone=True), back_up(root, first, average=4096)
    assert_restorable(helped, root)
    assert helped.archive.content() == alone.archive.content()
    assert helped.payload.entries == alone.payload.entries
    assert asdict(helped.report) == asdict(alone.report)
    assert helped.report.reused_files > 100


@pytest.mark.usefixtures("small_steps")
def test_patterns_of_a_folder_count_where_it_was_read_ahead(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    for name in ("a", "b", "c"):
        (root / name / "keep").mkdir(parents=True)
        (root / name / "leave").mkdir()
        for number in range(9):
            (root / name / "keep" / f"{number}.c").write_bytes(b"content")
            (root / name / "leave" / f"{number}.o").write_bytes(b"content")
        (root / name / "1.o").write_bytes(b"object")
    first = back_up(root)
    (root / "b/.pxarexclude").write_bytes(b"*.o\nleave\n")
    alone, helped = back_up(root, first, alone=True), back_up(root, first)
    assert helped.archive.content() == alone.archive.content()
    assert helped.report.excluded == alone.report.excluded == 2


def test_what_patterns_leave_out_is_not_looked_at_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "tree"
    tree(root, 5)
    first = back_up(root)

    def used(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be read ahead")

    monkeypatch.setattr(ahead_module, "scan_tree", used)
    for options in (CreateOptions(exclude=[MatchPattern.parse(b"a*")]), CreateOptions(exclude_caches=True)):
        back_up(root, first, options)
    (root / ".pxarexclude").write_bytes(b"a*\n")
    back_up(root, first)
