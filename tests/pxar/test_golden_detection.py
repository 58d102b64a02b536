"""26 edits of a tree of 250 MB: change detection reuses at least what PBS's client did, and everything reads back."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.pxar.backups import Backup, assert_restorable, back_up, ext4, run_script

MIB = 1 << 20
#: The root's time in both runs.
ROOT_NS = 1_700_500_000_000_000_000
#: In every run of the tests, the others in `make test-long`: a second or two each.
QUICK = {"unchanged", "touch_scattered", "delete", "link_sorts_first", "links_first_gone", "specials"}
NAMES = [
    "unchanged", "touch", "touch_dir100", "touch_scattered", "chmod", "chmod_dir", "chown", "xattr_added",
    "xattr_value", "rename", "rename_dir", "move", "move_large", "same_size_mtime", "grow_keep_mtime", "delete",
    "delete_large", "new", "append_large", "link_added", "links_4", "links_first_gone", "links_one_gone", "specials",
    "link_sorts_first", "links_broken",
]  # fmt: skip


@dataclass
class Pristine:
    """The tree before any edit, and its first backups by what was done to it before them."""

    root: Path
    noise: Callable[[str, int], bytes]
    cases: dict[str, dict[str, Any]]
    bases: dict[str, Backup] = field(default_factory=dict)


@pytest.fixture(scope="module")
def pristine(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pristine]:
    known = json.loads((golden / "detection.json").read_text())["cases"]
    assert {case["name"] for case in known} == set(NAMES)
    with ext4(tmp_path_factory.mktemp("detection"), 700 * MIB) as mounted:
        run_script(golden / "make_bulk.py", mounted / "bulk")
        sys.path.insert(0, str(golden))
        try:
            from make_tree import noise  # type: ignore[import-not-found]
        finally:
            sys.path.remove(str(golden))
            sys.modules.pop("make_tree", None)
        yield Pristine(mounted / "bulk", noise, {case["name"]: case for case in known})


def edit(root: Path, noise: Callable[[str, int], bytes], operation: str, *rest: Any) -> None:
    """One line of `detection.json`."""
    if operation == "symlink":
        (root / rest[1]).symlink_to(rest[0])
        return
    path, *more = rest
    at = root / path
    if operation == "utime":
        os.utime(at, ns=(more[0], more[0]), follow_symlinks=False)
    elif operation == "chmod":
        at.chmod(int(more[0], 8))
    elif operation == "chown":
        os.chown(at, *more)
    elif operation == "setxattr":
        os.setxattr(at, more[0], more[1].encode())
    elif operation == "rename":
        at.rename(root / more[0])
    elif operation == "link":
        os.link(at, root / more[0])
    elif operation == "mkfifo":
        os.mkfifo(at, 0o644)
    elif operation == "mkdir":
        at.mkdir(0o755)
    elif operation == "unlink":
        at.unlink()
    elif operation == "noise":
        at.write_bytes(noise(*more))
    elif operation == "append":
        with at.open("ab") as file:
            file.write(noise(*more))
    else:
        assert operation == "replace_keep", operation
        before = at.stat()
        at.unlink()
        at.write_bytes(noise(more[0], before.st_size))
        os.utime(at, ns=(before.st_mtime_ns, before.st_mtime_ns))


def in_bytes(text: str) -> float:
    """At most what PBS's client can have meant by a size that it rounded."""
    number, unit = text.split()
    half: float = 0.5 * 10.0 ** -len(number.partition(".")[2])
    return (float(number) + half) * {"B": 1, "KiB": 1 << 10, "MiB": MIB}[unit]


def figure(lines: list[str], pattern: str) -> str:
    return next(found[1] for line in lines if (found := re.search(pattern, line)))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
)
def test_an_edit_costs_no_more_than_with_pbs(pristine: Pristine, name: str) -> None:
    case = pristine.cases[name]
    root = pristine.root.with_name("edited")
    shutil.copytree(pristine.root, root, symlinks=True)
    old_umask = os.umask(0o022)
    try:
        apply = partial(edit, root, pristine.noise)
        for step in case["setup"]:
            apply(*step)
        os.utime(root, ns=(ROOT_NS, ROOT_NS))
        base = pristine.bases.get(str(case["setup"]))
        if base is None:
            base = pristine.bases[str(case["setup"])] = back_up(root)
        assert_base(base, case["base"])
        for step in case["steps"]:
            apply(*step)
        os.utime(root, ns=(ROOT_NS, ROOT_NS))
        made = back_up(root, base)
        but = {b"/d05/f0510"} if name == "same_size_mtime" else set()
        assert_restorable(made, root, but=but)
    finally:
        os.umask(old_umask)
        shutil.rmtree(root)
    assert made.report.warnings == []
    total, changed = (figure(case["summary"], rf"(\d+) {what}") for what in ("total files", "changed or"))
    report = made.report
    # PBS counts a file with several names twice, and its further names not at all.
    assert report.files == int(total) - int(figure(case["summary"], r"\((\d+) hardlinks"))
    assert report.reused_files + report.changed_files == report.files
    assert report.changed_files <= int(changed)
    uploaded = figure(case["log"], r"ppxar: had to backup (\S+ \S+) of")
    assert made.sink.uploaded <= in_bytes(uploaded)
    assert made.payload.size <= case["second"]["ppxar"]["size"]
    old = case["second"]["ppxar"]["old_chunks"]
    assert made.old_chunks >= old or made.payload.size < case["second"]["ppxar"]["size"]


def assert_base(base: Backup, expected: dict[str, dict[str, Any]]) -> None:
    """The first backup is the same as PBS's."""
    assert hashlib.sha256(base.archive.content()).hexdigest() == expected["mpxar"]["stream_sha256"]
    assert (base.archive.csum, base.payload.csum) == (expected["mpxar"]["csum"], expected["ppxar"]["csum"])
