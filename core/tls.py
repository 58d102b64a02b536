"""A TLS connection over trio that reads straight into the caller's memory.

trio's own hands over one record (16 KiB) for each pass through its scheduler, which takes longer than decrypting it.
"""

import os
import select
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio

from core.buffers import Buffer, WritableBuffer
from core.limits import in_io_thread

#: Bytes that are read from the socket, and encrypted, at once.
_PIECE: Final = 256 << 10
#: Milliseconds that a thread waits for more: on a busy machine less than the way to the event loop and back.
_LINGER_MS: Final = 5
#: Seconds that a thread is kept by one connection.
_AT_MOST_S: Final = 0.2
#: Bytes of a TLS record.
_RECORD: Final = 16 << 10


class TlsStream(trio.abc.Stream):
    """A connection to a server, or of a client. One task may send while another receives; `do_handshake` comes first.

    It ends as HTTPS connections do: by closing the socket, without a last message, so whoever reads must know by other
    means where the data end.

    Args:
        transport: connected; closed with this one.
        context: without renegotiation.
        server_hostname: that the certificate must be for, if the context verifies; None: this is the server.
    """

    def __init__(self, transport: trio.SocketStream, context: ssl.SSLContext, server_hostname: str | None) -> None:
        self._transport = transport
        self._came = ssl.MemoryBIO()
        self._goes = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._came, self._goes, server_side=server_hostname is None, server_hostname=server_hostname
        )
        self._sending = trio.Lock()
        self._receiving = False
        self._piece = memoryview(bytearray(_PIECE))
        self._plain = memoryview(bytearray(_PIECE))
        self._broken: ssl.SSLError | None = None

    @property
    def socket(self) -> trio.socket.SocketType:
        """What lies below."""
        return self._transport.socket

    def certificate(self) -> bytes:
        """The other side's own certificate, DER; empty if it has none."""
        return self._tls.getpeercert(True) or b""

    async def do_handshake(self) -> None:
        """Shake hands.

        Raises:
            trio.BrokenResourceError: it failed; its cause is an `ssl.SSLError`, for example about the certificate.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError as error:
                await self._flush()  # the alert that tells the server why
                raise trio.BrokenResourceError from error
            else:
                return await self._flush()

    async def send_all(self, data: Buffer) -> None:
        """See `trio.abc.SendStream.send_all`; cancelled, the connection is of no use any more."""
        view = memoryview(data).cast("B")
        await trio.lowlevel.checkpoint_if_cancelled()
        while view:
            # What goes just beyond is taken along: a few bytes are not worth a system call of their own.
            end = _PIECE if len(view) > _PIECE + _RECORD else len(view)
            piece, view = view[:end], view[end:]
            try:
                while piece:  # one record at a time
                    piece = piece[self._tls.write(piece) :]
            except ssl.SSLError as error:
                raise trio.BrokenResourceError from error
            await self._flush()

    async def send_parts(self, parts: Iterable[Buffer], taken: Callable[[], None] | None = None) -> None:
        """As `send_all` for one part after the other; once it waits, none of them is needed any more.

        They are encrypted in memory first: a megabyte together, not a hundred. `taken` is called whenever the system
        has taken a piece of them.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[self._tls.write(view) :]
        except ssl.SSLError as error:
            raise trio.BrokenResourceError from error
        await self._flush(taken)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `trio.abc.ReceiveStream.receive_some`."""
        buffer = self._plain[: max_bytes or _PIECE]
        count = await self.receive_into(buffer)
        return bytes(buffer[:count])

    async def receive_into(self, buffer: WritableBuffer, *, in_thread: bool = False) -> int:
        """Wait for data, and fill `buffer` as far as they go; returns how many bytes, 0 at the end.

        Cancelled, nothing is lost.

        Args:
            buffer: large or small.
            in_thread: decrypt in a worker thread as long as data come, so that several connections are decrypted side
                by side; nobody may send meanwhile.

        Raises:
            trio.BrokenResourceError: the connection broke, or what came is no TLS.
        """
        if self._receiving:
            raise trio.BusyResourceError("another task receives")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._receiving = True
        try:
            if in_thread:
                return await self._receive_in_thread(memoryview(buffer))
            return await self._receive_into(memoryview(buffer))
        finally:
            self._receiving = False

    async def _receive_in_thread(self, view: memoryview) -> int:
        while True:
            if not self._came.pending and not self._tls.pending():
                await trio.lowlevel.wait_readable(self.socket)
            count, ended = await in_io_thread(self._drain, view)
            if self._goes.pending:  # an answer to a message of the protocol itself
                await self._flush()
            if count or ended:
                return count

    def _drain(self, view: memoryview) -> tuple[int, bool]:
        """In a worker thread: fill `view` as long as data come; how many bytes, and whether it has ended.

        Cancellation waits for it: until `view` is full, nothing comes for `_LINGER_MS`, or `_AT_MOST_S` have passed.

        Raises:
            trio.BrokenResourceError: as `receive_into`.
        """
        count = 0
        until = time.monotonic() + _AT_MOST_S
        while count < len(view):
            if self._broken is not None:
                if count:
                    break
                raise trio.BrokenResourceError from self._broken
            try:
                more = int(self._tls.read(len(view) - count, view[count:]))
            except ssl.SSLWantReadError:
                if time.monotonic() > until:
                    break
                if self._goes.pending:
                    break
                try:
                    came = os.readv(self.socket.fileno(), [self._piece])
                except BlockingIOError:
                    if not _readable(self.socket.fileno(), _LINGER_MS):
                        break
                    continue
                except OSError as error:
                    if count:
                        break  # the next call says so
                    raise trio.BrokenResourceError from error
                if came:
                    self._came.write(self._piece[:came])
                else:
                    self._came.write_eof()
            except ssl.SSLEOFError:
                return count, True
            except ssl.SSLError as error:
                self._broken = error
            else:
                if not more:
                    return count, True
                count += more
        return count, False

    async def _receive_into(self, view: memoryview) -> int:
        count = 0
        waited = False
        while count < len(view):
            if self._broken is not None:  # OpenSSL would say that it has ended
                if count:
                    break
                raise trio.BrokenResourceError from self._broken
            try:
                # With a buffer it returns a number; typeshed knows only the other way.
                more = int(self._tls.read(len(view) - count, view[count:]))
            except ssl.SSLWantReadError:
                if count:
                    break
                if self._goes.pending:  # an answer to a message of the protocol itself
                    await self._flush()
                await self._fill()
                waited = True
            except ssl.SSLEOFError:
                break
            except ssl.SSLError as error:
                self._broken = error
            else:
                if not more:
                    break
                count += more
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return count

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block`."""
        await self._transport.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close the socket."""
        await self._transport.aclose()

    async def _fill(self) -> None:
        """Take what the socket has."""
        try:
            count = await self.socket.recv_into(self._piece)
        except OSError as error:
            raise trio.BrokenResourceError from error
        if count:
            self._came.write(self._piece[:count])
        else:
            self._came.write_eof()

    async def _flush(self, taken: Callable[[], None] | None = None) -> None:
        """Send what was encrypted, in that order.

        trio's own `send_all` passes through its scheduler for every piece that the system takes, which it mostly does
        at once: here that happens once.
        """
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            view = memoryview(self._goes.read())
            waited = False
            while view:
                end = len(view) if taken is None or len(view) <= _PIECE + _RECORD else _PIECE
                if (descriptor := self.socket.fileno()) < 0:
                    raise trio.ClosedResourceError("another task closed it")
                try:
                    view = view[os.write(descriptor, view[:end]) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.socket)
                    waited = True
                else:
                    if taken is not None:
                        taken()
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
        except OSError as error:
            raise trio.BrokenResourceError from error
        finally:
            self._sending.release()


def _readable(descriptor: int, wait_ms: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(wait_ms))


async def send_parts(
    stream: trio.abc.SendStream, parts: Sequence[Buffer], taken: Callable[[], None] | None = None
) -> None:
    """Send `parts` in order; once it waits, none of them is needed any more. Cancelled, the connection is of no use.

    `taken` is called whenever the system has taken a piece of them: it takes more only as the other side does.

    Raises:
        OSError, trio.BrokenResourceError: as `stream.send_all`.
    """
    if isinstance(stream, TlsStream):
        await stream.send_parts(parts, taken)
    else:
        await stream.send_all(bytes(parts[0]) if len(parts) == 1 else b"".join(parts))
        if taken is not None:
            taken()


async def receive_into(stream: trio.abc.ReceiveStream, view: memoryview) -> int:
    """Wait for data and fill `view` as far as they go; how many bytes, 0 at the end.

    Raises:
        OSError, trio.BrokenResourceError: as `stream.receive_some`.
    """
    if isinstance(stream, TlsStream):
        return await stream.receive_into(view)
    data = await stream.receive_some(len(view))
    view[: len(data)] = data
    return len(data)
