"""One connection to an NBD export, by libnbd, in a thread; `hypervisor.nbd_client` is the face of it.

libnbd releases the GIL, and its asynchronous reads land in the caller's own memory, so nothing is copied on the way.
What the server announces (sizes, limits, extents) is checked before it is used, a server that stops answering is given
up, and a cancelled call closes its connection at once, so that no late reply can touch the caller's buffer.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from types import ModuleType
from typing import Any, Final, Self, TypeAlias

import trio

from core.errors import FleeceError, SourceError, TargetError
from hypervisor.nbd_address import NbdAddress

#: Seconds without any finished request after which a server counts as dead.
TIMEOUT_S: Final = 60.0
#: Flushing may write back all of the page cache.
FLUSH_TIMEOUT_S: Final = 1800.0
#: One connection, 4 MiB buffers, MiB/s: 4 MiB x 1 in flight 800-1500, 1 MiB x 4 1800-2850, 256 KiB x 16 1500-2000.
READ_PIECE: Final = 1024**2
READ_DEPTH: Final = 4
#: QEMU 7.2 to 8.1 answers right only inside one cluster of the copy-before-write filter.
COMPAT_PIECE: Final = 64 * 1024
#: libnbd 1.14 has 32-bit extents, and servers may refuse more.
STATUS_STEP: Final = 1024**3
TRIM_STEP: Final = 1024**3
#: A server that has to write these zeros needs well under `TIMEOUT_S`.
ZERO_STEP: Final = 256 * 1024**2
#: No disk is larger than 1 PiB; a server that says so is wrong or hostile.
MAX_SIZE: Final = 1024**5
#: Servers that announce no limit take at least this.
_MAX_REQUEST: Final = 32 * 1024**2
#: Seconds between two looks at whether the caller was cancelled.
_SLICE_S: Final = 0.25
#: More extents than this for one answer to `block_status` are not kept; 1 TiB in alternating 1 MiB pieces has as many.
_MAX_EXTENTS: Final = 1024**2

#: What libnbd calls with the error number (`.value`) of a finished request.
Completed: TypeAlias = Callable[[Any], int]
#: Starts the next request of a run; False if there is none.
StartNext: TypeAlias = Callable[[Completed], bool]


class _NbdError(FleeceError):
    """What the errors of both directions have; never raised itself."""

    errno: int = 0  #: the server's answer, 0 if there was none
    lost: bool = False  #: the connection is gone

    def again(self) -> Self:
        """The same error once more, for another task: one exception object must not be raised in two."""
        error = type(self)(self.what, self.where, self.why, self.hint)
        error.errno, error.lost = self.errno, self.lost
        return error


class NbdSourceError(_NbdError, SourceError):
    """An NBD server did not give what was asked; `errno` is its answer (0: none), `lost` if it is gone."""


class NbdTargetError(_NbdError, TargetError):
    """An NBD server did not take what was sent; `errno` is its answer (0: none), `lost` if it is gone."""


class NbdConnection:
    """One connection to an export. Everything here runs in a thread; `NbdPool` is the async face.

    `fault` makes the errors: `NbdSourceError` for one who reads, `NbdTargetError` for one who writes.
    """

    def __init__(
        self,
        address: NbdAddress,
        *,
        contexts: tuple[str, ...] = (),
        sparse: bool = True,
        timeout_s: float = TIMEOUT_S,
        fault: type[NbdSourceError] | type[NbdTargetError] = NbdSourceError,
    ) -> None:
        self.address, self.contexts, self.timeout_s, self._fault = address, contexts, timeout_s, fault
        self._sparse = sparse or bool(contexts)
        self._nbd = _load_nbd(fault, str(address))
        self._handle: Any = None
        self._next_look = 0.0  # time.monotonic() at which to look for cancellation again
        self.size = 0
        self.read_only = True
        self.can_trim = self.can_zero = self.can_flush = self.multi_conn = False
        self.offered: frozenset[str] = frozenset()  #: those of `contexts` that the server has
        self.block = 1  #: bytes, what every request must be aligned to
        self.max_request = _MAX_REQUEST  #: bytes of one read or write

    @property
    def is_open(self) -> bool:
        """True until `close`, or until the server is gone."""
        return self._handle is not None

    def connect(self) -> None:
        """Connect and learn what the export is; after a failure the connection is closed."""
        handle = self._nbd.NBD()
        self._handle = handle
        try:
            with self._translated("connect to"):
                # Only those who ask for a context pay for it: one context per connection is what QEMU can bear.
                for context in self.contexts:
                    handle.add_meta_context(context)
                handle.set_request_structured_replies(self._sparse)
                # The caller's buffers hold old chunks of the same disk at worst, so nothing leaks that is not read.
                handle.set_pread_initialize(False)
                if self.address.uri:
                    handle.set_uri_allow_transports(self._nbd.ALLOW_TRANSPORT_TCP | self._nbd.ALLOW_TRANSPORT_UNIX)
                    handle.set_uri_allow_local_file(False)
                    handle.aio_connect_uri(self.address.uri)
                else:
                    handle.set_export_name(self.address.export)
                    handle.aio_connect_unix(self.address.socket)
                deadline = time.monotonic() + self.timeout_s
                while handle.aio_is_connecting() or handle.aio_is_negotiating():
                    self._poll(deadline, "connect to")
                if not handle.aio_is_ready():
                    raise self._error("connect to", "the server ended the connection", lost=True)
            self._learn(handle)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the socket; requests in flight are dropped and their buffers left alone. May be called twice."""
        handle, self._handle = self._handle, None
        # libnbd's binding has no close: it closes when the object goes. Tracebacks may keep the object for long, and
        # QEMU must not wait for that, so its finaliser is called now and made harmless for later.
        if handle is not None and hasattr(handle, "_o"):
            handle.__del__()
            del handle._o

    def changed(self) -> NbdSourceError | NbdTargetError:
        """The error for an export whose connections do not agree on the size."""
        return self._error("use", f"its size changed to {self.size} bytes", lost=True)

    def read_into(self, offset: int, buffer: memoryview, piece: int, depth: int) -> None:
        """Fill `buffer`, a flat memoryview of bytes, with requests that never cross a multiple of `piece`."""
        handle = self._alive("read")
        end = offset + len(buffer)
        if offset < 0 or end > self.size:
            raise self._error("read", f"{offset}..{end} lies outside its {self.size} bytes")
        if (offset | len(buffer)) % self.block:
            self._read_unaligned(offset, buffer, piece, depth)
            return
        piece = min(piece, self.max_request)
        position = offset

        def start_next(completed: Completed) -> bool:
            nonlocal position
            if position == end:
                return False
            stop = min(end, (position // piece + 1) * piece)
            # The slice itself, not an nbd.Buffer around it: libnbd 1.14 never gives back what such a one holds.
            handle.aio_pread(buffer[position - offset : stop - offset], position, completion=completed)
            position = stop
            return True

        self._run("read", start_next, depth)

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data`, a flat memoryview of bytes, at `offset`."""
        handle = self._alive("write to")

        def start(at: int, size: int, completed: Completed) -> None:
            handle.aio_pwrite(data[at - offset : at - offset + size], at, completion=completed)

        self._ranged("write to", offset, len(data), min(READ_PIECE, self.max_request), READ_DEPTH, start)

    def trim(self, offset: int, length: int) -> None:
        """Give the range up: its content is no longer defined, its space may be freed."""
        handle = self._alive("discard part of")

        def start(at: int, size: int, completed: Completed) -> None:
            handle.aio_trim(size, at, completion=completed)

        self._ranged("discard part of", offset, length, TRIM_STEP, 1, start)

    def zero(self, offset: int, length: int, *, may_trim: bool = True) -> None:
        """Make the range read as zeros; with `may_trim` without allocating it where the server can."""
        handle = self._alive("write zeros to")
        flags = 0 if may_trim else self._nbd.CMD_FLAG_NO_HOLE

        def start(at: int, size: int, completed: Completed) -> None:
            handle.aio_zero(size, at, completion=completed, flags=flags)

        self._ranged("write zeros to", offset, length, ZERO_STEP, 1, start)

    def flush(self) -> None:
        """Make finished writes durable, if the server knows how."""
        if not self.can_flush:
            return
        handle = self._alive("flush")
        flush = _once(lambda completed: handle.aio_flush(completion=completed))
        self._run("flush", flush, 1, timeout_s=max(FLUSH_TIMEOUT_S, self.timeout_s))

    def block_status(self, offset: int, length: int, context: str, sink: Callable[[int, int, int], None]) -> None:
        """Call `sink(offset, length, flags)` for the extents of the range, in order and without gaps."""
        handle = self._alive("read the map of")
        end = offset + length
        if offset < 0 or end > self.size:
            raise self._error("read the map of", f"{offset}..{end} lies outside its {self.size} bytes")
        if context not in self.offered:
            raise self._error("read the map of", f"the server does not offer {context!r}")
        while offset < end:
            trio.from_thread.check_cancelled()
            entries = iter(self._status(handle, offset, min(STATUS_STEP, end - offset), context))
            begin = offset
            for size in entries:
                flags = next(entries)
                # The last extent may reach further than asked.
                size = min(size, end - offset)
                if size <= 0:
                    break
                sink(offset, size, flags)
                offset += size
            if offset == begin:
                raise self._error("read the map of", f"the server gives no extent for {context!r} at {offset}")

    def _status(self, handle: Any, offset: int, length: int, context: str) -> list[int]:
        """One question: lengths and flags in turn, from `offset` on."""
        answers: list[list[int]] = []

        def collect(name: str, at: int, entries: list[int], _error: object) -> int:
            # Called under libnbd's lock: only keep what came, check it afterwards.
            if name == context and at == offset:
                answers.append(entries)
            return 0

        ask = _once(lambda completed: handle.aio_block_status(length, offset, collect, completion=completed))
        self._run("read the map of", ask, 1)
        if len(answers) != 1 or len(answers[0]) % 2 or len(answers[0]) > 2 * _MAX_EXTENTS:
            raise self._error("read the map of", f"the server's answer for {context!r} at {offset} makes no sense")
        return answers[0]

    # -- how a request is run ------------------------------------------------------------------------------------

    def _ranged(
        self, what: str, offset: int, length: int, step: int, depth: int, start: Callable[[int, int, Completed], None]
    ) -> None:
        """Run `start(offset, length, completed)` over the range in steps that end at multiples of `step`."""
        end = offset + length
        if offset < 0 or length < 0 or end > self.size:
            raise self._error(what, f"{offset}..{end} lies outside its {self.size} bytes")
        if (offset | length) % self.block:
            raise self._error(what, f"{offset}..{end} is not aligned to the {self.block} bytes that the server wants")
        position = offset

        def start_next(completed: Completed) -> bool:
            nonlocal position
            if position == end:
                return False
            stop = min(end, (position // step + 1) * step)
            start(position, stop - position, completed)
            position = stop
            return True

        self._run(what, start_next, depth)

    def _run(self, what: str, start_next: StartNext, depth: int, timeout_s: float | None = None) -> None:
        """Keep `depth` requests in flight until `start_next` has started them all.

        After a failure the requests still in flight are waited for, unless the connection is lost, the server is
        silent or the caller is cancelled: then the connection is closed, and with it every claim on the buffer.
        """
        handle = self._alive(what)
        allowed_s = self.timeout_s if timeout_s is None else timeout_s
        # The server's error numbers of finished requests. libnbd calls `completed` from `poll`; asking for each
        # request in flight after each poll would cost more than the reads do.
        answers: list[int] = []

        def completed(error: Any) -> int:
            answers.append(error.value)
            return 1  # finished, forget it

        failure: FleeceError | None = None
        started = finished = 0
        more = True
        deadline = time.monotonic() + allowed_s
        try:
            while True:
                try:
                    while more and started - finished < depth:
                        with self._translated(what):
                            more = start_next(completed)
                        started += more
                except FleeceError as error:
                    failure, more = failure or error, False
                if started == finished:
                    break
                if len(answers) == finished:
                    self._poll(deadline, what)
                if len(answers) > finished:
                    for errno in answers[finished:]:
                        if errno and failure is None:
                            failure, more = self._error(what, os.strerror(errno), errno=errno), False
                    finished = len(answers)
                    deadline = time.monotonic() + allowed_s
                if handle.aio_is_dead() or handle.aio_is_closed():
                    raise self._error(what, "the connection to the server was lost", lost=True) from failure
        except BaseException:
            self.close()
            raise
        if failure is not None:
            raise failure

    def _poll(self, deadline: float, what: str) -> None:
        """Wait until the connection makes progress, a slice of time at most; look at deadline and cancellation."""
        now = time.monotonic()
        if now >= deadline:
            raise self._error(what, "the server does not answer", lost=True)
        if now >= self._next_look:
            trio.from_thread.check_cancelled()
            self._next_look = now + _SLICE_S
        try:
            self._handle.poll(int(min(_SLICE_S, deadline - now) * 1000) + 1)
        except self._nbd.Error as error:
            if error.errno == "EINTR":
                return
            raise self._error(what, f"the connection to the server was lost ({error.string})", lost=True) from error

    def _read_unaligned(self, offset: int, buffer: memoryview, piece: int, depth: int) -> None:
        """Read through a buffer of our own that is as aligned as the server wants; no more than a piece at a time."""
        end = offset + len(buffer)
        while offset < end:
            start = offset // self.block * self.block
            stop = min((start // piece + 1) * piece, -(-end // self.block) * self.block)
            if stop > self.size:
                raise self._error("read", f"its last bytes are no whole block of {self.block} bytes")
            whole = memoryview(bytearray(stop - start))
            self.read_into(start, whole, piece, depth)
            take = min(stop, end) - offset
            position = len(buffer) - (end - offset)
            buffer[position : position + take] = whole[offset - start : offset - start + take]
            offset += take

    def _learn(self, handle: Any) -> None:
        """Take over what the server announced, as far as it makes sense."""
        try:
            size = handle.get_size()
        except self._nbd.Error:
            size = -1  # beyond what a signed number holds; libnbd then raises with the words of an older error
        with self._translated("connect to"):
            self.read_only = handle.is_read_only()
            self.can_trim, self.can_zero = handle.can_trim(), handle.can_zero()
            self.can_flush, self.multi_conn = handle.can_flush(), handle.can_multi_conn()
            self.offered = frozenset(context for context in self.contexts if handle.can_meta_context(context))
            block = handle.get_block_size(self._nbd.SIZE_MINIMUM)
            largest = handle.get_block_size(self._nbd.SIZE_MAXIMUM)
        if not 0 < size <= MAX_SIZE:
            raise self._error("use", "it is empty" if size == 0 else f"it claims to have {size % 2**64} bytes")
        self.size = size
        self.block = block or 1
        if self.block & (self.block - 1) or self.block > COMPAT_PIECE or size < self.block:
            raise self._error("use", f"it wants requests of whole {self.block} bytes")
        if largest and largest < max(self.block, 512):
            raise self._error("use", f"it wants requests of at most {largest} bytes")
        # A power of two, so that pieces stay aligned.
        self.max_request = 1 << (min(largest or _MAX_REQUEST, _MAX_REQUEST).bit_length() - 1)

    def _alive(self, what: str) -> Any:
        if self._handle is None:
            raise self._error(what, "the connection to the server is closed", lost=True)
        return self._handle

    def _error(self, what: str, why: str, *, errno: int = 0, lost: bool = False) -> NbdSourceError | NbdTargetError:
        hint = "free some space, or choose another place" if errno in (ENOSPC, EDQUOT) else ""
        error = self._fault(what, str(self.address), why, hint)
        error.errno, error.lost = errno, lost
        return error

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._nbd.Error as error:
            number = error.errnum or 0
            lost = self._handle is None or self._handle.aio_is_dead() or self._handle.aio_is_closed()
            words = os.strerror(number) if number else str(error.string)
            if lost and what != "connect to":
                words = f"the connection to the server was lost ({words})"
            raise self._error(what, words, errno=number, lost=bool(lost)) from error


def _once(start: Callable[[Completed], object]) -> StartNext:
    """`start` as the only request of a run."""
    pending = [start]

    def start_next(completed: Completed) -> bool:
        if not pending:
            return False
        pending.pop()(completed)
        return True

    return start_next


def _load_nbd(fault: type[NbdSourceError] | type[NbdTargetError], where: str) -> ModuleType:
    try:
        import nbd
    except ImportError as error:
        raise fault(
            "use", where, f"libnbd's Python module is missing ({error})", "apt install python3-libnbd"
        ) from error
    module: ModuleType = nbd
    return module
