"""Folders backed up into memory, and held against what an archive says of them."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from datastore.chunker import ARCHIVE_AVERAGE
from pxar.accessor import ArchiveAccessor
from pxar.create import CreateOptions, create_archive
from pxar.create_report import CreateReport, Progress
from pxar.decoder import ArchiveDecoder, Entry
from pxar.format import Kind
from pxar.reference import Reference
from tests.pxar.archives import MemoryReader, rows_of_accessor, rows_of_decoder
from tests.support.recorded_streams import RecordedStream, StoredStream


@dataclass
class Backup:
    """A split archive, and what is known of its making."""

    archive: StoredStream
    payload: StoredStream
    report: CreateReport
    sink: RecordedStream  #: that of the payload stream
    chunks: dict[bytes, bytes]
    old_chunks: int  #: entries of the payload index that the previous one has too

    def accessor(self) -> ArchiveAccessor:
        return ArchiveAccessor(self.archive, self.payload)

    def reference(self) -> Reference:
        return Reference(self.archive, self.payload)


def beside(work: Callable[[], None]) -> None:
    """A second thread, as `pxar.behind.Beside`."""
    threading.Thread(target=work, daemon=True).start()


def back_up(
    root: Path,
    previous: Backup | None = None,
    options: CreateOptions | None = None,
    *,
    average: int = ARCHIVE_AVERAGE,
    chunks: dict[bytes, bytes] | None = None,
    progress: Progress | None = None,
    alone: bool = False,
) -> Backup:
    """Back `root` up, with change detection if there is a `previous` backup; `alone`: in one thread."""
    if chunks is None:
        chunks = previous.chunks if previous is not None else {}
    known = previous.payload if previous is not None else None
    archive, payload = RecordedStream(chunks, average), RecordedStream(chunks, average, known)
    reference = previous.reference() if previous is not None else None
    lent = None if alone else beside
    report = create_archive(str(root), archive, payload, options, reference=reference, progress=progress, beside=lent)
    stored = payload.finish()
    base = {digest for digest, _ in known.entries} if known is not None else set()
    old_chunks = sum(digest in base for digest, _ in stored.entries)
    return Backup(archive.finish(), stored, report, payload, chunks, old_chunks)


#: What is compared of an entry: path, mode, owner, group, time of the last change, content, target, device.
Row = tuple[bytes, int, int, int, int, bytes, bytes, int]


def rows_of_folder(root: Path) -> dict[bytes, Row]:
    """Every entry below `root`, and itself."""
    top = os.fsencode(root)
    rows: dict[bytes, Row] = {}

    def add(path: bytes, shown: bytes) -> None:
        found = os.lstat(path)
        content = target = b""
        if stat.S_ISREG(found.st_mode):
            content = Path(os.fsdecode(path)).read_bytes()
        elif stat.S_ISLNK(found.st_mode):
            target = os.fsencode(Path(os.fsdecode(path)).readlink())
        device = found.st_rdev if stat.S_ISBLK(found.st_mode) or stat.S_ISCHR(found.st_mode) else 0
        ids = found.st_uid, found.st_gid
        rows[shown] = (shown, found.st_mode, *ids, found.st_mtime_ns, content, target, device)
        if stat.S_ISDIR(found.st_mode):
            for child in os.scandir(path):
                add(path + b"/" + child.name, shown.rstrip(b"/") + b"/" + child.name)

    add(top, b"/")
    return rows


def rows_of_archive(accessor: ArchiveAccessor) -> dict[bytes, Row]:
    """The same of an archive; a hard link has what its file has."""
    rows: dict[bytes, Row] = {}
    for path, kind, metadata, content, target, device, _ in rows_of_accessor(accessor):
        if kind is Kind.HARDLINK:
            rows[path] = (path, *rows[b"/" + target][1:])
            continue
        assert metadata is not None
        found = metadata.stat
        mtime = found.mtime_s * 10**9 + found.mtime_ns
        rows[path] = (path, found.mode, found.uid, found.gid, mtime, content, target, os.makedev(*device))
    return rows


def assert_restorable(
    backup: Backup, root: Path, *, but: Container[bytes] = (), left_out: Container[bytes] = ()
) -> None:
    """The archive holds what is below `root`, however it is read; `but`: paths whose content may be another.

    What lies at the paths `left_out` must not be in it. And nothing was put into the payload stream that no file needs.
    """
    found, expected = rows_of_archive(backup.accessor()), rows_of_folder(root)
    expected = {path: row for path, row in expected.items() if path not in left_out}
    assert found.keys() == expected.keys()
    for path, row in expected.items():
        if path in but:
            row = (*row[:5], found[path][5], *row[6:])
        assert found[path] == row, path
    archive, payload = backup.archive.content(), backup.payload.content()
    in_order = rows_of_decoder(ArchiveDecoder(MemoryReader(archive), MemoryReader(payload)))
    assert [row[:4] for row in in_order] == [row[:4] for row in rows_of_accessor(backup.accessor())]
    assert_no_useless_chunk(backup)


def references(backup: Backup) -> list[tuple[int, int]]:
    """Range in the payload stream of every file, in the order of the archive."""
    return [
        (event.payload_position, event.payload_position + 16 + event.size)
        for event in ArchiveDecoder(MemoryReader(backup.archive.content()))
        if isinstance(event, Entry) and event.kind is Kind.FILE and event.payload_position is not None
    ]


def assert_no_useless_chunk(backup: Backup) -> None:
    """References ascend without overlapping, each injected chunk holds a part of one, and the report is right."""
    ranges = references(backup)
    end = 16
    for start, stop in ranges:
        assert start >= end
        end = stop
    assert end <= backup.payload.size - 16
    report, used = backup.report, 0
    starts = sorted(ranges)
    index = partial = 0
    for position, chunk in backup.sink.injected:
        while index < len(starts) and starts[index][1] <= position:
            index += 1
        inside, at = 0, index
        while at < len(starts) and starts[at][0] < position + chunk.size:
            inside += min(starts[at][1], position + chunk.size) - max(starts[at][0], position)
            at += 1
        assert inside, f"nothing refers to the chunk that was put in at {position}"
        used += inside
        partial += inside < chunk.size
    injected = sum(chunk.size for _, chunk in backup.sink.injected)
    assert (report.injected_chunks, report.injected_size) == (len(backup.sink.injected), injected)
    assert (report.padding, report.partial_chunks) == (injected - used, partial)
    assert report.reused_size == used


@contextmanager
def ext4(folder: Path, size: int) -> Iterator[Path]:
    """An empty ext4 file system of `size` bytes, mounted; skips where that is not allowed."""
    image, mounted = folder / "ext4.img", folder / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m0", image], check=True, capture_output=True, timeout=60)
        done = subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        pytest.skip(f"no ext4 to test with: {error}")
    if done.returncode:
        pytest.skip(f"no ext4 to test with: {done.stderr.strip()}")
    try:
        (mounted / "lost+found").rmdir()
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True, timeout=60)
        image.unlink()


def run_script(script: Path, *arguments: str | Path) -> None:
    """Run one of the scripts that make golden trees."""
    subprocess.run([sys.executable, script, *arguments], check=True, timeout=280, env={"PYTHONDONTWRITEBYTECODE": "1"})
