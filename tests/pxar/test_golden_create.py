"""The trees of the golden archives become the same archives, indexes and catalogs that PBS's client made of them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pxar.create
from datastore.catalog import CatalogWriter
from datastore.chunker import CATALOG_AVERAGE
from pxar.create import create_archive
from pxar.patterns import parse_exclude_file
from tests.pxar.backups import Backup, assert_restorable, back_up, ext4, run_script
from tests.support.recorded_streams import RecordedStream, StoredStream

MIB = 1 << 20
#: What a `.pxarexclude` in the tree leaves out.
EXCLUDED = {b"/excluded/a.tmp", b"/excluded/sub", b"/excluded/sub/inside", b"/excluded/deeper/x.tmp"}
#: The same, but PBS takes anchored patterns in the root only.
ANCHORED = b"/excluded/only-here"


@pytest.fixture
def as_pbs_excludes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchored patterns below the root match nothing."""

    def parsed(data: bytes, folder: bytes) -> Any:
        return parse_exclude_file(data, folder if folder == b"/" else b"/nowhere")

    monkeypatch.setattr(pxar.create, "parse_exclude_file", parsed)


@pytest.fixture
def expected(golden: Path) -> Callable[[str, str], dict[str, Any]]:
    known = json.loads((golden / "expected.json").read_text())
    return lambda snapshot, name: known[f"host/{snapshot}T00:00:00Z"][name]


def assert_same(stored: StoredStream, expected: dict[str, Any]) -> None:
    assert stored.size == expected["size"]
    assert hashlib.sha256(stored.content()).hexdigest() == expected["content-sha256"]
    assert (stored.count, stored.csum) == (expected["chunks"], expected["csum"])


@pytest.mark.usefixtures("as_pbs_excludes")
def test_trees_become_the_same_archives_and_are_cut_alike(
    golden: Path, tmp_path: Path, expected: Callable[[str, str], dict[str, Any]]
) -> None:
    chunks: dict[bytes, bytes] = {}
    with ext4(tmp_path, 128 * MIB) as mounted:
        root = mounted / "tree"
        for day in (1, 2):
            run_script(golden / "make_tree.py", root, "--stage", str(day))
            archive, listed = RecordedStream(chunks), RecordedStream(chunks, CATALOG_AVERAGE)
            catalog = CatalogWriter(listed.write)
            catalog.start_archive(b"root.pxar.didx")
            report = create_archive(str(root), archive, catalog=catalog)
            catalog.finish()
            assert report.warnings == []
            assert_same(archive.finish(), expected(f"tree-legacy/2026-01-0{day}", "root.pxar.didx"))
            assert_same(listed.finish(), expected(f"tree-legacy/2026-01-0{day}", "catalog.pcat1.didx"))
            made = back_up(root, chunks=chunks)
            assert made.report.warnings == []
            assert_same(made.archive, expected(f"tree-data/2026-01-0{day}", "root.mpxar.didx"))
            assert_same(made.payload, expected(f"tree-data/2026-01-0{day}", "root.ppxar.didx"))


@pytest.mark.usefixtures("as_pbs_excludes")
def test_change_detection_reuses_as_much_as_pbs_does(
    golden: Path, tmp_path: Path, expected: Callable[[str, str], dict[str, Any]]
) -> None:
    previous: Backup | None = None
    with ext4(tmp_path, 128 * MIB) as mounted:
        root = mounted / "tree"
        for day, stage in enumerate((1, 2, 2, 3), 1):
            if day != 3:  # the second stage twice, unchanged
                run_script(golden / "make_tree.py", root, "--stage", str(stage))
            made = back_up(root, previous)
            assert made.report.warnings == []
            assert_restorable(made, root, left_out=EXCLUDED)
            theirs = expected(f"tree-metadata/2026-01-0{day}", "root.ppxar.didx")
            if day < 3:
                assert_same(made.payload, theirs)
            # PBS's are in `logs/metadata-N.txt`, "had to backup".
            assert made.payload.size <= theirs["size"]
            assert made.sink.uploaded <= {1: 23 * MIB, 2: 10.412 * MIB, 3: 32, 4: 1.6255 * MIB}[day]
            previous = made


def test_anchored_patterns_work_below_the_root_as_documented(golden: Path, tmp_path: Path) -> None:
    run_script(golden / "make_tree.py", tmp_path / "tree", "--small")
    made = back_up(tmp_path / "tree")
    assert_restorable(made, tmp_path / "tree", left_out=EXCLUDED | {ANCHORED})
