"""Change detection: unchanged files are not read, their old chunks go into the new payload stream as they are.

An old chunk holds many files. Whether it is worth taking it over shows only once it is known how many of them are
still there, so entries wait in a cache until their payloads' range in the old stream ends: at a new or changed file, at
a gap, at the end. Then the chunks of the range are put in, or, if too much of them would be of no use, its files are
read and written again. Docs: docs/formats.md, "Change detection".

Differences from PBS's client, none of which a reader can tell:

- Gaps within one chunk do not settle the matter if the chunk would not be worth it so far: more may follow.
- A chunk that ends where the range ends is the last one; PBS takes the next one too.
- The chunk that was held back is known by its place in the index and not by its digest, which repeats in zeros.
- It must be put in anyway, so what a further range needs of it costs nothing.
- A cache that is full is written out early if that is worth it already, and never because of its last chunk.
- A name that was a further name of a file, and is its first one now, is found.
"""

import os
from typing import Final, NamedTuple, TypeAlias

from core.errors import FleeceError
from pxar.create_report import CreateReport, Trouble
from pxar.entry_writer import FILE, FOLDER, FORMAT, EntryWriter, FirstName, Key, first_name
from pxar.filesystem import Opened, Scanned
from pxar.folders import Folder
from pxar.format import HEADER_SIZE, MAX_NAME
from pxar.reference import OldFile, OldFolder, Reference, unchanged
from pxar.runs import compare
from pxar.sinks import PayloadSink, ReusedChunk
from pxar.source import Source

#: How much of what is put in may be of no use: the share of PBS's client.
MAX_PADDING: Final = 0.1
#: Entries in the cache (400 bytes each). From the first number on it is written out once that is worth it.
EARLY: Final = 4096
FULL: Final = 65536
#: No payload lies here.
_NOWHERE: Final = -1
#: Chunks handed over at a time.
_GROUP: Final = 128

#: A file in the cache: name, metadata, size, place in the range; its device and inode if it has several names.
CachedFile: TypeAlias = tuple[bytes, bytes, int, int, Key | None]


class _Link(NamedTuple):
    """A further name of a file."""

    name: bytes
    key: Key


class _Other(NamedTuple):
    """What has no content."""

    name: bytes
    found: Scanned | Opened


class _Start(NamedTuple):
    """A folder is entered."""

    folder: Folder
    meta: bytes


class _End(NamedTuple):
    """A folder is left."""


_Entry: TypeAlias = CachedFile | _Link | _Other | _Start | _End


class _Piece(NamedTuple):
    """A part of the range, up to its end."""

    start: int  #: in the old stream
    place: int  #: of its first entry in the cache
    files: int  #: files of the cache that come before


class _Held(NamedTuple):
    """The last chunk of what was put in, not yet put in itself: the next range may begin in it."""

    number: int
    size: int
    used: int  #: bytes that files refer to
    end: int  #: of these, in the old stream


class Lookahead:
    """Takes a walk's entries in order and passes them on to an `EntryWriter`, as references where that is worth it."""

    def __init__(
        self, writer: EntryWriter, source: Source, payload: PayloadSink, reference: Reference, *, loose: bool = False
    ) -> None:
        """`loose`: see `reference.unchanged`."""
        self._writer, self._source, self._payload = writer, source, payload
        self._chunks = reference.chunks
        self._reference = reference
        self._loose = loose
        self._report: CreateReport = writer.report
        self._cache: list[_Entry] = []
        self._check_at = EARLY
        #: The folder that the first entry of the cache lies in.
        self._folder = source.root
        #: Range of the old payload stream that the cached files' payloads fill, but for gaps: chunk -> bytes.
        self._start = self._end = _NOWHERE
        self._gaps: dict[int, int] = {}
        self._piece: _Piece | None = None  #: what follows the last gap
        self._files = 0
        self._held: _Held | None = None
        #: Files with several names that are in the cache.
        self._waiting: dict[Key, FirstName] = {}
        self._lost = False  #: the reference cannot be read any more

    # --- entries in order --------------------------------------------------------------------------------------------

    def start_folder(self, folder: Folder, meta: bytes) -> None:
        """`folder`, not the root, is entered."""
        if self._cache:
            self._put_off(_Start(folder, meta))
        else:
            self._writer.start_folder(folder.name, meta)

    def end_folder(self, parent: Folder) -> None:
        """A folder in `parent` is left."""
        if self._cache:
            self._put_off(_End())
        else:
            self._writer.end_folder()

    def other(self, folder: Folder, name: bytes, found: Scanned | Opened) -> None:
        """A symlink, device, FIFO or socket."""
        if self._cache:
            self._put_off(_Other(name, found))
        else:
            self._writer.other(folder, name, found)

    def new_file(self, folder: Folder, name: bytes, found: Opened) -> None:
        """A regular file that is to be read, unless it is a further name; closes it."""
        if found[5] > 1 and self._link(folder, name, found):
            os.close(found[9])
            return
        try:
            self._flush(keep=False)
        except BaseException:
            os.close(found[9])
            raise
        self._writer.file(folder, name, found)

    def file(self, folder: Folder, old: OldFolder, name: bytes, found: Scanned) -> bool:
        """A regular file that `files` did not take; False if it must be opened and given to `new_file`."""
        _, meta, size, dev, ino, nlink, *_ = found
        if nlink > 1 and self._link(folder, name, found):
            return True
        before = self._old_file(old, name)
        if before is None or not unchanged(before, meta, size, loose=self._loose):
            return False
        self._extend(folder, before.offset, size)
        place = before.offset - self._start
        if nlink > 1 and len(folder.path_of(name)) <= MAX_NAME:
            self._cache.append((name, meta, size, place, (dev, ino)))
            self._waiting[dev, ino] = first_name(folder, name, size, meta)
        else:
            self._cache.append((name, meta, size, place, None))
        self._files += 1
        return True

    def files(
        self, folder: Folder, old: OldFolder, names: list[bytes], scanned: list[Scanned | int], index: int
    ) -> int:
        """Take entries from `index` on as long as they are unchanged files that come next in the old folder.

        Returns:
            The index of the first that is anything else, or has to be looked at more closely.
        """
        if len(self._cache) >= self._check_at:
            self._relieve()
        positions = old.positions
        if self._lost or old.next >= len(positions):
            return index
        reference = old.reference
        try:
            reference.load(positions[old.next])
        except FleeceError as error:
            self._lose(error)
            return index
        if not self._cache:
            self._folder = folder
        while True:
            first, end = index, self._end
            index, old.next, self._end, offset = compare(
                names,
                scanned,
                index,
                positions,
                old.next,
                reference.data,
                reference.base,
                self._cache,
                self._start,
                end,
            )
            self._files += index - first
            if offset < 0:
                return index
            # Unchanged behind a gap: what is in the cache is settled first.
            size: int = scanned[index][2]  # type: ignore[index]
            self._extend(folder, offset, size)
            self._cache.append((names[index], scanned[index][1], size, offset - self._start, None))  # type: ignore[index]
            self._files += 1
            index += 1
            old.next += 1

    def finish(self) -> None:
        """All entries have come; the root is still open."""
        self._flush(keep=False)

    # --- the reference -----------------------------------------------------------------------------------------------

    def root(self) -> OldFolder:
        """The root of the previous archive."""
        return self._reference.root()

    def folder(self, old: OldFolder, name: bytes) -> OldFolder | None:
        """The folder `name` in `old`; None if there was none, or nothing can be read any more."""
        if self._lost:
            return None
        try:
            return old.folder(name)
        except FleeceError as error:
            self._lose(error)
            return None

    def _old_file(self, old: OldFolder, name: bytes) -> OldFile | None:
        if self._lost:
            return None
        try:
            return old.file(name)
        except FleeceError as error:
            self._lose(error)
            return None

    def _lose(self, error: FleeceError) -> None:
        self._lost = True
        self._report.note(Trouble.REFERENCE, f"{self._reference.where} {Trouble.REFERENCE.value}: {error.why}")

    # --- the cache ---------------------------------------------------------------------------------------------------

    def _put_off(self, entry: _Link | _Other | _Start | _End) -> None:
        """Put into the cache what has no content, and may come in any number."""
        self._cache.append(entry)
        if len(self._cache) >= self._check_at:
            self._relieve()

    def _link(self, folder: Folder, name: bytes, found: Scanned | Opened) -> bool:
        """Take a file as a further name of one that is in the archive or in the cache; False if it is none."""
        key = (found[3], found[4])
        waiting = self._waiting.get(key)
        if waiting is not None:
            if not self._writer.is_same(waiting, found):
                return False
            self._put_off(_Link(name, key))
            return True
        if not self._writer.is_further(found):
            return False
        if self._cache:
            self._put_off(_Link(name, key))
        else:
            self._writer.link(name, key)
        return True

    def _extend(self, folder: Folder, offset: int, size: int) -> None:
        """The range goes on with the payload at `offset`, or a new one begins there."""
        if offset != self._end and (self._start == self._end or not self._bridge(offset)):
            if self._start != self._end:
                self._flush(keep=True)
            self._start = offset
            # What was written before ends here, as if this file were written too: a large file's last chunk is the same
            # whether the file behind it is new or not.
            self._payload.suggest()
        if not self._cache:
            self._folder = folder
        self._end = offset + HEADER_SIZE + size

    def _bridge(self, offset: int) -> bool:
        """Let the range go on at `offset`, behind a gap within its last chunk, if it is not worth it as it is."""
        end = self._end
        if not end < offset < self._chunks.size:
            return False
        number = self._chunks.find(end - 1)
        start, size = self._chunks.span(number)
        if offset >= start + size or self._worthy() is not None:
            return False
        self._gaps[number] = self._gaps.get(number, 0) + offset - end
        self._piece = _Piece(offset, len(self._cache), self._files)
        return True

    def _relieve(self) -> None:
        """The cache is large: write it out if that is worth it now, or if it is full."""
        size = len(self._cache)
        if size >= FULL or self._start == self._end or self._worth(self._whole(), self._held, more=False):
            self._flush(keep=True, more=True)
        else:
            self._check_at = size + EARLY

    def _whole(self) -> _Piece:
        return _Piece(self._start, 0, 0)

    def _worthy(self, *, more: bool = False) -> _Piece | None:
        """What of the range is worth it: all, or what follows the last gap, or nothing. `more` as in `_flush`."""
        whole = self._whole()
        if self._worth(whole, self._held, more=more):
            return whole
        if self._piece is not None and self._worth(self._piece, None, more=more):
            return self._piece
        return None

    def _worth(self, piece: _Piece, held: _Held | None, *, more: bool) -> bool:
        """Whether the chunks of the range from `piece` on may be put in: little of them is of no use."""
        start, end = piece.start, self._end
        if end > self._chunks.size:
            return False  # no such payloads: the archive and the index do not belong together
        first, last = self._chunks.find(start), self._chunks.find(end - 1)
        gaps = 0 if piece.place else sum(self._gaps.values())
        used = end - start - gaps
        unused = gaps
        if held is not None and held.number == first and start >= held.end:
            unused -= self._gaps.get(first, 0)
        else:
            unused += start - self._chunks.span(first)[0]
            held = None
        if not more and (held is None or last != first):
            offset, size = self._chunks.span(last)
            unused += offset + size - end
        return unused <= MAX_PADDING * (used + unused)

    def _flush(self, *, keep: bool, more: bool = False) -> None:
        """Write what is in the cache.

        `keep`: a range may follow that begins in the last chunk, so it is held back. `more`: the range goes on, so the
        rest of its last chunk does not count as useless.
        """
        if self._start == self._end:
            self._write(self._cache, None)  # nothing in the cache has content
        else:
            piece = self._worthy(more=more)
            index = len(self._cache) if piece is None else piece.place
            if index:
                self._put_in_held()
                self._write(self._cache[:index], None)
            if piece is not None:
                rest = self._cache[index:]
                if index and not self._complete(rest):
                    self._write(rest, None)
                else:
                    self._reuse(piece, rest, keep)
        self._cache = []
        # What is written in between ends the range, even if the old payload goes on behind it.
        self._start = self._end = self._end if keep else _NOWHERE
        self._gaps = {}
        self._piece = None
        self._files = 0
        self._waiting.clear()
        self._check_at = EARLY
        if not keep:
            self._put_in_held()

    def _complete(self, entries: list[_Entry]) -> bool:
        """Whether all links in `entries` lead to files that are there; one before them may have vanished just now."""
        inside = {entry[4] for entry in entries if entry.__class__ is tuple}  # type: ignore[misc]
        return all(
            entry.key in inside or self._writer.linked(entry.key) for entry in entries if isinstance(entry, _Link)
        )

    def _reuse(self, piece: _Piece, entries: list[_Entry], keep: bool) -> None:
        """Write `entries`, the cache from `piece` on, with references to the chunks of the range, and put these in."""
        chunks, start, end = self._chunks, piece.start, self._end
        gaps = {} if piece.place else self._gaps
        first, last = chunks.find(start), chunks.find(end - 1)
        held = self._held
        used = 0
        if held is not None:
            if held.number == first and start >= held.end:
                used = held.used
            else:
                self._put_in_held()
        self._held = None
        report, files = self._report, self._files - piece.files
        reused = end - start - sum(gaps.values())
        report.reused_files += files
        report.files += files
        report.reused_size += reused
        report.size += reused - HEADER_SIZE * files
        # Places count from the begin of the range, wherever the piece begins.
        self._write(entries, self._payload.position + self._start - chunks.span(first)[0])
        group: list[ReusedChunk] = []
        for number in range(first, last + 1):
            offset, size = chunks.span(number)
            used += min(end, offset + size) - max(start, offset) - gaps.get(number, 0)
            if keep and number == last:
                self._held = _Held(number, size, used, end)
                break
            self._count(size, used)
            used = 0
            group.append(ReusedChunk(chunks.digest(number), size))
            if len(group) == _GROUP:
                self._payload.inject(group)
                group = []
        if group:
            self._payload.inject(group)

    def _put_in_held(self) -> None:
        held = self._held
        if held is not None:
            self._held = None
            self._count(held.size, held.used)
            self._payload.inject([ReusedChunk(self._chunks.digest(held.number), held.size)])

    def _count(self, size: int, used: int) -> None:
        report = self._report
        report.injected_chunks += 1
        report.injected_size += size
        report.padding += size - used
        report.partial_chunks += used < size

    def _write(self, entries: list[_Entry], base: int | None) -> None:
        """Write entries of the cache; files refer to payloads from `base` on, or are read if that is None."""
        writer, folder = self._writer, self._folder
        reference, references = writer.encoder.reference, writer.encoder.references
        index, count = 0, len(entries)
        while index < count:
            entry = entries[index]
            index += 1
            if entry.__class__ is tuple:
                name, meta, size, place, key = entry  # type: ignore[misc]
                if base is None:
                    self._read(folder, name)
                elif key is None:
                    taken = references(entries, index - 1, base)
                    if taken:
                        index += taken - 1
                    else:
                        reference(name, meta, base + place, size)
                else:
                    position = reference(name, meta, base + place, size)
                    writer.remember(key, first_name(folder, name, size, meta), position)
            elif isinstance(entry, _Other):
                writer.other(folder, entry.name, entry.found)
            elif isinstance(entry, _Link):
                if writer.linked(entry.key):
                    writer.link(entry.name, entry.key)
                else:
                    self._read(folder, entry.name)  # its first name has vanished
            elif isinstance(entry, _Start):
                folder = entry.folder
                writer.start_folder(folder.name, entry.meta)
            else:
                assert folder.parent is not None
                folder = folder.parent
                writer.end_folder()
        self._folder = folder

    def _read(self, folder: Folder, name: bytes) -> None:
        """Open an entry anew, whatever it is by now, and write it."""
        found = self._source.open(folder, name)
        if found is None:
            return
        kind = found[0] & FORMAT
        if kind == FILE:
            self._writer.file(folder, name, found)
            return
        os.close(found[9])
        if kind == FOLDER:
            self._report.warn(Trouble.VANISHED, folder.path_of(name), "a folder took its place")
        else:
            self._writer.other(folder, name, found)
