"""The asking side: disk images are read by a process of their own, which this module starts, asks and ends.

What the process says is checked, as it works on what strangers wrote. It keeps nothing that could be lost: one that
ended, or was ended because who asked was cancelled, is started again with the next question.
"""

import json
from array import array
from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple, Protocol

import trio

from core.buffers import Buffer
from core.errors import FormatError
from diskfs.entries import MAX_NAME, Entry, Id, Remark, Volume, bytes_of, entry_from_json, printable, text_of
from diskfs.errors import DiskFsError, ImageLibraryError
from diskfs.frames import HEADER, PAGE_CONTENT, lengths, pack
from diskfs.process import Worker

#: Seconds without a word from the process, which has 20 s of a processor for a request: it hangs.
SILENCE_S: Final = 300.0
#: Bytes of content that was unpacked for one file and is kept.
_KEPT_CONTENT: Final = 4 << 20
_BLOCK: Final = 512
#: Remarks on one volume, or on the disk.
_MAX_REMARKS: Final = 300


class Source(Protocol):
    """The bytes of one disk; `repository.archive.ArchiveReader` is one."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read_cached(self, offset: int, length: int) -> Buffer | None:
        """As `read` if it needs no waiting, else None."""
        ...

    async def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on, `length` of them or up to the end.

        Raises:
            FleeceError: this range cannot be read.
        """
        ...


class Disks(Protocol):
    """The disks of one snapshot."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each."""
        ...

    async def open(self, number: int) -> Source:
        """Disk `number`, opened when that is asked for the first time.

        Raises:
            FleeceError: it cannot be read.
        """
        ...


class Row(NamedTuple):
    """A name in a directory; what cannot be read has a reason in place of its entry."""

    name: bytes
    entry: Entry | None
    why: str = ""


class Page(NamedTuple):
    """A part of a directory, sorted by the bytes of the names."""

    rows: list[Row]
    more: bool  #: it goes on behind them
    dropped: int  #: names in the whole directory that are left out: twice there, or impossible


class LookedInto:
    """A disk image that is looked into; made by `look_into`. For any number of tasks; questions come one by one."""

    def __init__(self, disks: Disks, number: int, where: str, worker: Worker | None = None) -> None:
        self.where: Final = where  #: as the command line has it, `vm/100/latest drive-scsi0.img`
        self._disks, self._number = disks, number
        self._lock = trio.Lock()
        self._running = worker
        self._volumes: list[Volume] | None = None
        self._noted: set[bytes] = set()
        #: What people should know, as it comes up; each once. Whoever has told them empties it.
        self.remarks: Final[list[Remark]] = []
        #: Numbers of the other disks that were read as well, once `volumes` was asked.
        self.others: Final[set[int]] = set()

    async def volumes(self) -> Sequence[Volume]:
        """Everything on the disk that may hold a file system.

        Raises:
            DiskFsError: its partition table is damaged.
            FleeceError: the disk cannot be read.
        """
        if self._volumes is None:
            document, _ = await self._ask({"op": "volumes"}, b"")
            self._volumes = [
                Volume(bytes_of(name), int(size), printable(str(kind)), str(label), printable(str(problem)))
                for name, size, kind, label, problem in document["volumes"]
            ]
            self._note(b"", [Remark(printable(str(text)), bool(is_loss)) for text, is_loss in document["remarks"]])
        return self._volumes

    async def entry(self, volume: bytes, id: Id | None = None) -> Entry:
        """What `id` names in the file system of `volume`; None: its root.

        Raises:
            DiskFsError: the file system is unknown or damaged.
            ImageLibraryError: a library is missing.
            FleeceError: the disk cannot be read.
        """
        document, _ = await self._ask(_request("entry", volume, id), volume)
        if id is None:
            self._note(volume, [Remark(printable(str(text))) for text in document["notes"]])
        return _entry(document["entry"])

    async def lookup(self, volume: bytes, id: Id, name: bytes) -> Entry | None:
        """What is called `name` in the directory `id`; None if nothing is.

        Raises:
            DiskFsError, ImageLibraryError, FleeceError: as `entry`.
        """
        document, _ = await self._ask(_request("lookup", volume, id, name=text_of(name)), volume)
        return None if document["entry"] is None else _entry(document["entry"])

    async def page(self, volume: bytes, id: Id, start: int) -> Page:
        """The directory `id` from its entry number `start` on.

        Raises:
            DiskFsError, ImageLibraryError, FleeceError: as `entry`.
        """
        document, _ = await self._ask(_request("list", volume, id, start=start), volume)
        rows = []
        for text, found in document["rows"]:
            name = bytes_of(text)
            if not 0 < len(name) <= MAX_NAME or b"/" in name or b"\0" in name or name in (b".", b".."):
                raise FormatError("list", self.where, "a name that no directory has")
            rows.append(Row(name, None, printable(found)) if isinstance(found, str) else Row(name, _entry(found)))
        return Page(rows, bool(document["more"]) and bool(rows), int(document["dropped"]))

    async def xattrs(self, volume: bytes, id: Id) -> list[tuple[bytes, bytes]]:
        """Extended attributes by their full names.

        Raises:
            DiskFsError, ImageLibraryError, FleeceError: as `entry`.
        """
        document, _ = await self._ask(_request("xattrs", volume, id), volume)
        return [(bytes_of(name), bytes_of(value)) for name, value in document["xattrs"]]

    async def content(self, volume: bytes, entry: Entry) -> "FileContent":
        """The content of the file `entry`.

        Raises:
            DiskFsError, ImageLibraryError, FleeceError: as `entry`.
        """
        places = _Places(entry.size, self._disks.sizes)
        more = entry.size > 0
        while more:
            document, _ = await self._ask(_request("runs", volume, entry.id, start=len(places)), volume)
            if document["runs"] is None:
                return FileContent(self, volume, entry, None)
            for run in document["runs"]:
                places.add(*run)
            more = bool(document["more"]) and bool(document["runs"])
        return FileContent(self, volume, entry, places)

    async def packed(self, volume: bytes, id: Id, offset: int, length: int) -> bytes:
        """Content that does not lie on the disk as it is, up to 1 MiB at a time.

        Raises:
            DiskFsError, ImageLibraryError, FleeceError: as `entry`.
        """
        _, data = await self._ask(_request("read", volume, id, offset=offset, length=length), volume)
        return data

    async def disk(self, number: int) -> Source:
        """A disk, for who reads content that lies there as it is."""
        return await self._disks.open(number)

    @property
    def is_busy(self) -> bool:
        """Whether a question is being answered."""
        return self._lock.locked()

    async def aclose(self) -> None:
        """End the process, when it has answered; the next question starts another one."""
        with trio.CancelScope(shield=True):
            async with self._lock:
                if self._running is not None:
                    self._running.stop()
                    self._running = None

    def _note(self, volume: bytes, remarks: Sequence[Remark]) -> None:
        """Keep what is said of a volume, or of the disk, for the first time."""
        if volume not in self._noted:
            self._noted.add(volume)
            where = f"{self.where}/{_shown(volume)}" if volume else self.where
            self.remarks.extend(one._replace(text=f"{where}: {one.text}") for one in remarks[:_MAX_REMARKS])

    async def _ask(self, request: dict[str, Any], volume: bytes) -> tuple[dict[str, Any], bytes]:
        where = f"{self.where}/{_shown(volume)}" if volume else self.where
        async with self._lock:
            if self._running is None:
                self._running = Worker()
            running = self._running
            try:
                try:
                    document, data = await self._exchange(running, request, where)
                except trio.BrokenResourceError:
                    raise DiskFsError("look into", where, running.why_ended()) from None
            except BaseException:
                # It is in the middle of something that nobody waits for.
                self._running = None
                running.stop()
                raise
            if document.get("error") == "memory":
                self._running = None
                running.stop()
        if "error" not in document:
            return document, data
        if document["error"] == "library":
            raise ImageLibraryError(where, str(document["why"]).split()[2])
        raise DiskFsError("look into", where, printable(str(document["why"])))

    async def _exchange(self, running: Worker, request: Any, where: str) -> tuple[dict[str, Any], bytes]:
        """Send a request and serve the process until it answers."""
        sizes = self._disks.sizes
        if not running.told:
            await _send(running.stream, {"sizes": list(sizes), "number": self._number})
            running.told = True
        await _send(running.stream, request)
        failure: Exception | None = None
        while True:
            with trio.move_on_after(SILENCE_S) as patience:
                found = await _receive(running.stream)
            if patience.cancelled_caught:
                raise DiskFsError("look into", where, f"nothing was heard for {SILENCE_S:.0f} s; it may be damaged")
            if found is None:
                raise DiskFsError("look into", where, running.why_ended())
            document, data = found
            if document.get("op") != "fetch":
                if failure is not None:
                    raise failure  # whatever it made of that
                return document, data
            number, offset, length = int(document["disk"]), int(document["offset"]), int(document["length"])
            if (
                not (0 <= number < len(sizes) and 0 <= offset < offset + length <= sizes[number])
                or length > PAGE_CONTENT
            ):
                raise FormatError(
                    "look into", where, f"a part of a disk that is not there: {number}, {offset}, {length}"
                )
            if number != self._number:
                self.others.add(number)
            try:
                source = await self._disks.open(number)
                part = source.read_cached(offset, length)
                if part is None:
                    part = await source.read(offset, length)
            except Exception as error:
                failure = failure or error
                await _send(running.stream, {"failed": True})
            else:
                await _send(running.stream, {}, part)


class _Places:
    """The runs of a file, 32 bytes each."""

    def __init__(self, size: int, sizes: Sequence[int]) -> None:
        self._size, self._sizes = size, sizes
        self.starts, self.lengths, self.positions = array("Q"), array("Q"), array("Q")
        self.disks = array("H")
        self.data = 0  #: bytes in all runs

    def __len__(self) -> int:
        return len(self.starts)

    def add(self, offset: int, length: int, disk: int, position: int) -> None:
        """Add a run behind the last.

        Raises:
            FormatError: it lies before that, or outside of file or disk.
        """
        end = self.starts[-1] + self.lengths[-1] if self.starts else 0
        inside = 0 <= disk < len(self._sizes) and 0 <= position < position + length <= self._sizes[disk]
        if not inside or not end <= offset < offset + length <= self._size:
            raise FormatError("read", "file", f"{length} bytes at {offset} cannot lie at {position} of disk {disk}")
        self.starts.append(offset)
        self.lengths.append(length)
        self.disks.append(disk)
        self.positions.append(position)
        self.data += length


class FileContent:
    """The bytes of a file in an image; for any number of tasks at once. It has the shape of `fusefs.opened.Content`."""

    memory: Final = 0

    def __init__(self, image: LookedInto, volume: bytes, entry: Entry, places: _Places | None) -> None:
        self.size: Final = entry.size
        self.blocks: Final = -(-(entry.size if places is None else places.data) // _BLOCK)
        self._image, self._volume, self._id, self._places = image, volume, entry.id, places
        self._sources: dict[int, Source] = {}
        self._kept: dict[int, bytes] = {}  # unpacked, by offset

    def extents(self) -> list[tuple[int, int]] | None:
        """Offset and length of what is no hole, in order; None if that is not known."""
        places = self._places
        return None if places is None else list(zip(places.starts, places.lengths, strict=True))

    def read_cached(self, offset: int, length: int) -> Buffer | None:
        """As `read` if it needs no waiting, else None."""
        length = min(length, self.size - offset)
        places = self._places
        if length <= 0:
            return b""
        if places is None:
            return self._held(offset, length)
        slot = bisect_right(places.starts, offset) - 1
        if slot >= 0 and offset + length <= places.starts[slot] + places.lengths[slot]:
            source = self._sources.get(places.disks[slot])
            skip = offset - places.starts[slot]
            return None if source is None else source.read_cached(places.positions[slot] + skip, length)
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on, `length` of them or up to the end.

        Raises:
            DiskFsError, FleeceError: they cannot be read.
        """
        length = max(0, min(length, self.size - offset))
        if self._places is None:
            return await self._unpacked(offset, length)
        places = self._places
        end = offset + length
        slot = max(0, bisect_right(places.starts, offset) - 1)
        pieces: list[Buffer] = []
        while offset < end:
            if slot >= len(places) or places.starts[slot] >= end:
                pieces.append(bytes(end - offset))
                break
            start, stop = places.starts[slot], places.starts[slot] + places.lengths[slot]
            if offset < start:
                pieces.append(bytes(start - offset))
                offset = start
            if offset < stop:
                part = min(end, stop) - offset
                source = await self._source(places.disks[slot])
                pieces.append(await source.read(places.positions[slot] + offset - start, part))
                offset += part
            slot += 1
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _source(self, number: int) -> Source:
        source = self._sources.get(number)
        if source is None:
            source = self._sources[number] = await self._image.disk(number)
        return source

    def _held(self, offset: int, length: int) -> bytes | None:
        start = offset // PAGE_CONTENT * PAGE_CONTENT
        page = self._kept.get(start)
        if page is None or offset + length > start + len(page):
            return None
        return page[offset - start : offset - start + length]

    async def _unpacked(self, offset: int, length: int) -> bytes:
        pieces = []
        end = offset + length
        while offset < end:
            start = offset // PAGE_CONTENT * PAGE_CONTENT
            page = self._kept.get(start)
            if page is None:
                wanted = min(PAGE_CONTENT, self.size - start)
                page = await self._image.packed(self._volume, self._id, start, wanted)
                if len(page) != wanted:
                    why = f"{wanted} bytes of content were announced, {len(page)} came"
                    raise DiskFsError("read", self._image.where, why)
                while len(self._kept) >= _KEPT_CONTENT // PAGE_CONTENT:
                    del self._kept[next(iter(self._kept))]
                self._kept[start] = page
            piece = page[offset - start : end - start]
            pieces.append(piece)
            offset += len(piece)
        return b"".join(pieces)


@asynccontextmanager
async def look_into(disks: Disks, number: int, where: str, worker: Worker | None = None) -> AsyncIterator[LookedInto]:
    """Look into disk `number` of `disks` while the block runs; `where` names it in messages.

    The process is started with the first question, unless `worker` is one that runs already.
    """
    image = LookedInto(disks, number, where, worker)
    try:
        yield image
    finally:
        await image.aclose()


def _shown(volume: bytes) -> str:
    return printable(volume.decode("utf-8", "replace"))


def _request(op: str, volume: bytes, id: Id | None, **more: Any) -> dict[str, Any]:
    request: dict[str, Any] = {"op": op, "volume": text_of(volume), **more}
    return request if id is None else {**request, "id": id}


def _entry(data: Any) -> Entry:
    entry = entry_from_json(data)
    numbers = (entry.mode, entry.uid, entry.gid, entry.size, entry.links, *entry.id)
    if any(not 0 <= number < 1 << 64 for number in numbers) or not -(1 << 95) < entry.mtime_ns < 1 << 95:
        raise FormatError("read", "entry", "numbers that no entry has")
    if max(entry.uid, entry.gid) >> 32 or (entry.target is not None and b"\0" in entry.target):
        raise FormatError("read", "entry", "an owner or a target that no entry has")
    return entry


async def _send(stream: trio.SocketStream, document: Any, data: Buffer = b"") -> None:
    for piece in pack(document, data):
        if len(piece):
            await stream.send_all(piece)


async def _receive(stream: trio.SocketStream) -> tuple[dict[str, Any], bytes] | None:
    """The next frame; None if the process ended.

    Raises:
        FormatError: it is none.
    """
    header = await _exactly(stream, HEADER.size)
    if header is None:
        return None
    length, size = lengths(bytes(header))
    text = await _exactly(stream, length)
    data = await _exactly(stream, size)
    if text is None or data is None:
        return None
    try:
        document = json.loads(text)
    except ValueError as error:
        raise FormatError("look into", "disk image", f"no answer: {error}") from error
    if not isinstance(document, dict):
        raise FormatError("look into", "disk image", "no answer")
    return document, bytes(data)


async def _exactly(stream: trio.SocketStream, length: int) -> bytearray | None:
    found = bytearray()
    while len(found) < length:
        try:
            piece = await stream.receive_some(length - len(found))
        except trio.BrokenResourceError:
            return None
        if not piece:
            return None
        found += piece
    return found
