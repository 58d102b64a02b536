"""The files of a container on their way from the process that may read them to the one that may store them.

The walk runs as the container's root, in its user namespace, where owners are those that the container sees; repository
and keys belong to a privileged process. Between the two is a socket with frames:

    kind     1 byte: `A` bytes of the archive, `C` bytes of the catalog, `E` the end, with a report
    length   4 bytes, little-endian, at most 4 MiB
    data

docs/proxmox-provider.md, "Containers".
"""

import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, Final

import trio

from agent.provider.messages import Walk, decoded
from core.buffers import Buffer
from core.errors import FormatError, SourceError, os_reason
from core.nursery import open_nursery
from datastore.catalog import CatalogWriter
from pxar.create import CreateOptions, create_archive
from pxar.create_report import MAX_MOUNTS, MAX_WARNINGS, CreateReport
from pxar.patterns import MatchPattern

#: The archive, as in snapshots of Proxmox's own.
ARCHIVE: Final = "root.pxar.didx"
#: Seconds without a frame after which the walk counts as hanging.
STALLED_S: Final = 900.0
_HEADER: Final = struct.Struct("<cI")
_MAX_FRAME: Final = 4 << 20
#: Bytes that are gathered before a frame is sent.
_GATHERED: Final = 1 << 20
#: Seconds between two looks at whether the backup was cancelled.
_SLICE_S: Final = 0.25
#: Figures of the report that are sent; the lists go beside them.
_FIGURES: Final = tuple(one.name for one in fields(CreateReport) if one.type in (int, "int"))


class FrameSink:
    """An `ArchiveSink` that sends frames of one kind into a descriptor."""

    def __init__(self, fd: int, kind: bytes) -> None:
        self._fd, self._kind = fd, kind
        self._memory = bytearray(_HEADER.size + _GATHERED + _MAX_FRAME)
        self._filled = 0
        self.position = 0  #: bytes of the stream so far

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _MAX_FRAME):
            piece = view[start : start + _MAX_FRAME]
            self.reserve(len(piece))[:] = piece
            self.commit(len(piece))

    def reserve(self, size: int) -> memoryview:
        """Room for `size` bytes, at most 4 MiB."""
        if self._filled + size > _MAX_FRAME:
            self.flush()
        start = _HEADER.size + self._filled
        return memoryview(self._memory)[start : start + size]

    def commit(self, size: int) -> None:
        """Append the first `size` bytes of what `reserve` gave."""
        self._filled += size
        self.position += size
        if self._filled >= _GATHERED:
            self.flush()

    def flush(self) -> None:
        """Send what was gathered.

        Raises:
            SourceError: nobody takes it.
        """
        if self._filled:
            _HEADER.pack_into(self._memory, 0, self._kind, self._filled)
            send_all(self._fd, memoryview(self._memory)[: _HEADER.size + self._filled])
            self._filled = 0


def send_all(fd: int, data: memoryview) -> None:
    """Write `data`, waiting where it must.

    Raises:
        SourceError: nobody takes it.
    """
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        raise SourceError("hand over", "the files", f"the session takes no more ({os_reason(error)})") from error


async def send_to_listener(walk: Walk, fd: int, listened: int) -> None:
    """As `send_archive`; ends this process as soon as nobody listens at the other end of the pipe `listened` any more.

    So it ends with the process that has started it, though that be killed: the hypervisor unmounts what is read here
    before it has the session cleaned up. Cancelled, the walk is left to the end of this process.
    """
    async with open_nursery() as nursery:
        nursery.start_soon(_end_without, listened)
        await trio.to_thread.run_sync(send_archive, walk, fd, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


async def _end_without(listened: int) -> None:
    try:
        await trio.lowlevel.wait_readable(listened)  # or broken, as nobody writes into this end
    except OSError:
        return  # a file, from which nobody can go away
    poll = select.poll()
    poll.register(listened, 0)
    if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        os._exit(1)


def send_archive(walk: Walk, fd: int) -> CreateReport:
    """Send the folder that `walk` describes as an archive with its catalog, and at the end the report.

    Raises:
        UsageError: a pattern that is none, or a source that is not there.
        SourceError: the folder cannot be read, or nobody takes it.
    """
    archive, catalog = FrameSink(fd, b"A"), FrameSink(fd, b"C")
    writer = CatalogWriter(catalog.write)
    writer.start_archive(ARCHIVE.encode())
    directory = os.fsdecode(walk.directory)
    options = CreateOptions(
        exclude=tuple(MatchPattern.parse(pattern.removeprefix(b".") if pattern[:2] == b"./" else pattern)
                      for pattern in walk.exclude),
        include_devices=tuple(os.fsdecode(os.path.join(walk.directory, source)) for source in walk.sources),  # noqa: PTH118
        skip_lost_and_found=walk.skip_lost_and_found,
    )  # fmt: skip
    report = create_archive(directory, archive, None, options, catalog=writer)
    writer.finish()
    archive.flush()
    catalog.flush()
    document = packed_report(report)
    send_all(fd, memoryview(_HEADER.pack(b"E", len(document)) + document))
    return report


def packed_report(report: CreateReport) -> bytes:
    """The report as JSON, for `unpacked_report`."""
    import json

    document: dict[str, Any] = {name: getattr(report, name) for name in _FIGURES}
    document["warnings"] = [text[:1000] for text in report.warnings]
    document["skipped_mounts"] = [os.fsdecode(path)[:1000] for path in report.skipped_mounts]
    return json.dumps(document).encode()


def unpacked_report(data: bytes, report: CreateReport) -> None:
    """Put the figures of `data` into `report`.

    Raises:
        FormatError: it is no report.
    """
    value = decoded(data, "the report of the files")
    if not isinstance(value, dict) or set(value) != {*_FIGURES, "warnings", "skipped_mounts"}:
        raise FormatError("understand", "the report of the files", "it has other keys")
    for name in _FIGURES:
        if type(value[name]) is not int or not 0 <= value[name] < 1 << 63:
            raise FormatError("understand", "the report of the files", f"{name} is no number")
        setattr(report, name, value[name])
    report.warnings[:] = _texts(value["warnings"], MAX_WARNINGS)
    report.skipped_mounts[:] = [os.fsencode(text) for text in _texts(value["skipped_mounts"], MAX_MOUNTS)]


def _texts(value: object, most: int) -> list[str]:
    """At most so many: whoever has the container's rights could send a million, and each is looked at."""
    if not isinstance(value, list) or len(value) > most or any(not isinstance(one, str) for one in value):
        raise FormatError("understand", "the report of the files", "a list of texts is needed")
    return ["".join(char if char.isprintable() else "?" for char in one) for one in value]


def receive_archive(
    fd: int, sinks: dict[bytes, Callable[[Iterator[memoryview]], None]], *, stalled_s: float = STALLED_S
) -> bytes:
    """Hand the frames that come from `fd` to the sink of their kind, up to the end; returns what came with it.

    To be called in a worker thread of trio. A sink gets the pieces of one frame, and takes all of them.

    Raises:
        FormatError: what comes is no frame.
        SourceError: it ends early, or nothing comes for `stalled_s`.
    """
    memory = bytearray(_MAX_FRAME)
    while True:
        header = bytearray(_HEADER.size)
        for _ in _received(fd, header, stalled_s):
            pass
        kind, length = _HEADER.unpack(header)
        # Empty frames without end would keep this thread busy for ever.
        if not 0 < length <= _MAX_FRAME or (kind not in sinks and kind != b"E"):
            raise FormatError("store", "the files", "what comes over the stream makes no sense")
        view = memoryview(memory)[:length]
        if kind == b"E":
            for _ in _received(fd, view, stalled_s):
                pass
            return bytes(view)
        sinks[kind](_received(fd, view, stalled_s))


def _received(fd: int, into: bytearray | memoryview, stalled_s: float) -> Iterator[memoryview]:
    """Fill `into` from `fd`, giving each part as it comes."""
    view = memoryview(into)
    while view:
        _wait_readable(fd, stalled_s)
        try:
            count = os.readv(fd, [view])
        except OSError as error:
            raise SourceError("store", "the files", f"the stream breaks off ({os_reason(error)})") from error
        if not count:
            raise SourceError("store", "the files", "the stream ends early: the walk over them has failed")
        yield view[:count]
        view = view[count:]


def _wait_readable(fd: int, stalled_s: float) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + stalled_s
    while not poll.poll(_SLICE_S * 1000):
        trio.from_thread.check_cancelled()
        if time.monotonic() >= deadline:
            raise SourceError("store", "the files", f"nothing came for {stalled_s:.0f} s: the walk hangs")


def put_pieces(write: Callable[[memoryview], None]) -> Callable[[Iterator[memoryview]], None]:
    """A sink of `receive_archive` that hands each piece to `write`."""

    def sink(pieces: Iterator[memoryview]) -> None:
        for piece in pieces:
            write(piece)

    return sink
