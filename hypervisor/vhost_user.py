"""Reading an export of QEMU through shared memory: vhost-user with queues of virtio-blk.

QEMU reads straight into memory of ours and says so through an eventfd; through a socket each byte would be copied twice
more. From there it is copied once into the caller's buffer: what QEMU can still write to is never worked on.

Protocols: https://qemu-project.gitlab.io/qemu/interop/vhost-user.html; virtio 1.2, sections 2.7 (split virtqueues) and
5.2 (block device). Only reading, one data buffer per request, no more than QEMU's own server needs; its answers are
checked.
"""

import fcntl
import mmap
import os
import platform
import select
import socket
import struct
import time
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from core.buffers import WritableBuffer
from core.errors import SourceError, os_reason
from core.limits import in_io_thread
from hypervisor.nbd_connection import TIMEOUT_S

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

#: Disks of which each gets two queues; and one, so that their memory is bounded.
_TWO_QUEUES, _ONE_QUEUE = 4, 16
#: Bytes of a request, and requests of a queue at the same time; together the chunk that is usually read.
PIECE: Final = 1 << 20
DEPTH: Final = 4
#: Bytes of a sector: offsets and lengths are multiples.
SECTOR: Final = 512

_SLICE_S: Final = 0.25
_PAGE: Final = 4096
#: Descriptors of a queue: three per request, as a power of two.
_RING: Final = 16
#: Parts of a queue's memory: descriptors, available and used ring, heads and states of requests, data.
_AVAILABLE, _USED, _HEADS, _DATA = _PAGE, 2 * _PAGE, 3 * _PAGE, 4 * _PAGE
_QUEUE_SIZE: Final = _DATA + DEPTH * PIECE
#: Where the memory lies for QEMU, in both address spaces of the protocol.
_BASE: Final = 1 << 32

_HEADER: Final = struct.Struct("<III")  # request, flags, size of what follows
_VERSION: Final = 1
_REPLY: Final = 4
_MAX_REPLY: Final = 256
_GET_FEATURES, _SET_FEATURES, _SET_OWNER, _SET_MEM_TABLE = 1, 2, 3, 5
_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE, _SET_VRING_KICK, _SET_VRING_CALL = 8, 9, 10, 12, 13
_GET_PROTOCOL_FEATURES, _SET_PROTOCOL_FEATURES, _SET_VRING_ENABLE, _GET_CONFIG = 15, 16, 18, 24
_F_VERSION_1: Final = 1 << 32
_F_PROTOCOL_FEATURES: Final = 1 << 30
_PROTOCOL_MQ: Final = 1 << 0
_PROTOCOL_CONFIG: Final = 1 << 9

_DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, bytes, flags, next
_NEXT, _WRITE = 1, 2
_HEAD: Final = struct.Struct("<IIQ")  # type, unused, sector
_HEAD_SIZE: Final = 32  # with the state behind it
_READ: Final = 0
_PENDING: Final = 0xFF
_U16: Final = struct.Struct("<H")
_U64: Final = struct.Struct("<Q")
_USED_ENTRY: Final = struct.Struct("<II")  # descriptor, bytes written

_F_ADD_SEALS: Final = 1033
_SEALS: Final = 1 | 2 | 4  # no other seals, no shrinking, no growing


class VhostUserError(SourceError):
    """QEMU did not read what was asked, or the export cannot be used."""


def usable() -> bool:
    """Whether this host keeps writes in order, as the queues need; ARM does not without instructions Python lacks."""
    return platform.machine() in ("x86_64", "AMD64")


def queues_for(disks: int) -> int:
    """How many queues the export of each of `disks` disks gets; 0: none is read like this. One serves one thread."""
    return 2 if disks <= _TWO_QUEUES else 1 if disks <= _ONE_QUEUE else 0


class Shared(NamedTuple):
    """Where an export listens."""

    path: str
    queues: int


class _Queue:
    """One virtqueue and its memory; one thread at a time."""

    def __init__(self, memory: mmap.mmap, start: int, where: str) -> None:
        import numpy as np

        self._memory, self._start, self._where = memory, start, where
        self._data: NDArray[uint8] = np.frombuffer(memory, np.uint8, DEPTH * PIECE, start + _DATA)
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except BaseException:
            os.close(self.kick)
            raise
        self._made = self._seen = 0  # requests so far: made available, and seen as used
        self._in_flight: dict[int, tuple[int, int]] = {}  # slot: place in the buffer, bytes
        address = _BASE + start
        for slot in range(DEPTH):
            head = address + _HEADS + slot * _HEAD_SIZE
            first = 3 * slot
            self._describe(first, head, _HEAD.size, _NEXT, first + 1)
            self._describe(first + 2, head + _HEAD.size, 1, _WRITE, 0)

    def addresses(self) -> tuple[int, int, int]:
        """Of descriptors, used and available ring."""
        address = _BASE + self._start
        return address, address + _USED, address + _AVAILABLE

    def read(self, offset: int, buffer: memoryview, sock: socket.socket, timeout_s: float) -> None:
        """Fill `buffer`; after an error requests may still be in flight, and the queue is of no use any more."""
        import numpy as np

        target = np.frombuffer(buffer, np.uint8)
        if self._in_flight:
            raise VhostUserError("read", self._where, "requests were given up")
        free = list(range(DEPTH))
        place = 0
        while place < len(buffer) or self._in_flight:
            started = False
            while place < len(buffer) and free:
                size = min(PIECE - (offset + place) % PIECE, len(buffer) - place)
                slot = free.pop()
                self._start_request(slot, offset + place, size)
                self._in_flight[slot] = (place, size)
                place += size
                started = True
            if started:
                os.eventfd_write(self.kick, 1)
            for slot in self._finished(sock, timeout_s):
                at, size = self._in_flight.pop(slot)
                np.copyto(target[at : at + size], self._data[slot * PIECE : slot * PIECE + size])
                free.append(slot)

    def _describe(self, number: int, address: int, size: int, flags: int, following: int) -> None:
        place = self._start + number * _DESCRIPTOR.size
        _DESCRIPTOR.pack_into(self._memory, place, address, size, flags, following)

    def _start_request(self, slot: int, offset: int, size: int) -> None:
        memory, head = self._memory, self._start + _HEADS + slot * _HEAD_SIZE
        _HEAD.pack_into(memory, head, _READ, 0, offset // SECTOR)
        memory[head + _HEAD.size] = _PENDING
        first = 3 * slot
        self._describe(first + 1, _BASE + self._start + _DATA + slot * PIECE, size, _NEXT | _WRITE, first + 2)
        ring = self._start + _AVAILABLE
        _U16.pack_into(memory, ring + 4 + 2 * (self._made % _RING), first)
        self._made = (self._made + 1) & 0xFFFF
        # Last: from here on QEMU may take it.
        _U16.pack_into(memory, ring + 2, self._made)

    def _finished(self, sock: socket.socket, timeout_s: float) -> Iterator[int]:
        """Slots of requests that have been answered, at least one."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self.call, select.POLLIN)
        poll.register(sock, select.POLLIN | select.POLLHUP)
        while True:
            if self._used() != self._seen:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                raise VhostUserError("read", self._where, "QEMU does not answer")
            ready = dict(poll.poll(min(left, _SLICE_S) * 1000))
            if self.call in ready:
                os.eventfd_read(self.call)
            elif sock.fileno() in ready:
                raise VhostUserError("read", self._where, "QEMU closed the connection")
            else:
                trio.from_thread.check_cancelled()
        end = self._used()
        if (end - self._seen) & 0xFFFF > len(self._in_flight):
            raise VhostUserError("read", self._where, "QEMU answers requests that were not made")
        while self._seen != end:
            place = self._start + _USED + 4 + _USED_ENTRY.size * (self._seen % _RING)
            descriptor, _ = _USED_ENTRY.unpack_from(self._memory, place)
            slot, rest = divmod(descriptor, 3)
            self._seen = (self._seen + 1) & 0xFFFF
            if rest or slot not in self._in_flight:
                raise VhostUserError("read", self._where, "QEMU answers a request that was not made")
            state = self._memory[self._start + _HEADS + slot * _HEAD_SIZE + _HEAD.size]
            if state:
                raise VhostUserError("read", self._where, f"QEMU could not read it (state {state})")
            yield slot

    def _used(self) -> int:
        (index,) = _U16.unpack_from(self._memory, self._start + _USED + 2)
        return int(index)


class VhostUserPool:
    """An export of QEMU; made by `open_vhost_user`, safe to be used by many tasks.

    After an error or a cancelled read it is of no use any more, and every read fails.
    """

    def __init__(self, export: Shared, timeout_s: float) -> None:
        self.size = 0  #: bytes, whole sectors
        self._where, self._count = export
        self._timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._queues: list[_Queue] = []
        self._free: list[_Queue] = []
        self._slots = trio.Semaphore(export.queues)
        self._broken = False

    async def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill `buffer` from `offset` on, both of whole sectors; cancelled or failed, its content is undefined.

        Raises:
            VhostUserError: QEMU could not, or is gone; it does not say why.
        """
        view = memoryview(buffer).cast("B")
        if offset < 0 or (offset | len(view)) % SECTOR or offset + len(view) > self.size:
            raise VhostUserError("read", self._where, f"no whole sectors of it: {len(view)} bytes at {offset}")
        async with self._slots:
            if self._broken:
                raise VhostUserError("read", self._where, "an earlier read failed")
            queue = self._free.pop()
            try:
                await in_io_thread(queue.read, offset, view, self._socket, self._timeout_s)
            except BaseException:
                self._broken = True
                raise
            finally:
                self._free.append(queue)

    # --- in a thread -------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect, share the memory and start the queues.

        Raises:
            VhostUserError: no such export, or it speaks another protocol.
        """
        self._socket.settimeout(self._timeout_s)
        try:
            self._socket.connect(self._where)
            features = self._asked(_GET_FEATURES)
            if not features & _F_VERSION_1 or not features & _F_PROTOCOL_FEATURES:
                raise VhostUserError("use", self._where, "it is another version of the protocol")
            self._send(_SET_OWNER)
            protocol = self._asked(_GET_PROTOCOL_FEATURES)
            if not protocol & _PROTOCOL_MQ or not protocol & _PROTOCOL_CONFIG:
                raise VhostUserError("use", self._where, "it has one queue, or no configuration")
            self._send(_SET_PROTOCOL_FEATURES, _U64.pack(_PROTOCOL_MQ | _PROTOCOL_CONFIG))
            self._send(_SET_FEATURES, _U64.pack(_F_VERSION_1 | _F_PROTOCOL_FEATURES))
            self.size = self._capacity() * SECTOR
            self._start_queues()
        except (OSError, struct.error) as error:
            why = os_reason(error) if isinstance(error, OSError) else "its answer makes no sense"
            raise VhostUserError("connect to", self._where, why) from error

    def close(self) -> None:
        """Close the connection; QEMU lets go of the memory. May be called twice."""
        self._broken = True
        self._socket.close()
        for queue in self._queues:
            os.close(queue.kick)
            os.close(queue.call)
        # The memory goes with them.
        self._queues.clear()
        self._free.clear()

    def _start_queues(self) -> None:
        size = self._count * _QUEUE_SIZE
        descriptor = os.memfd_create("fleece-read", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # QEMU would die of memory that is not there. So all of it is there, and cannot be taken away.
            os.posix_fallocate(descriptor, 0, size)
            fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(descriptor, size)
            region = struct.pack("<IIQQQQ", 1, 0, _BASE, size, _BASE, 0)
            self._send(_SET_MEM_TABLE, region, descriptor)
        finally:
            os.close(descriptor)
        for number in range(self._count):
            queue = _Queue(memory, number * _QUEUE_SIZE, self._where)
            self._queues.append(queue)
            descriptors, used, available = queue.addresses()
            self._send(_SET_VRING_NUM, struct.pack("<II", number, _RING))
            self._send(_SET_VRING_BASE, struct.pack("<II", number, 0))
            self._send(_SET_VRING_ADDR, struct.pack("<IIQQQQ", number, 0, descriptors, used, available, 0))
            self._send(_SET_VRING_CALL, _U64.pack(number), queue.call)
            self._send(_SET_VRING_KICK, _U64.pack(number), queue.kick)
            self._send(_SET_VRING_ENABLE, struct.pack("<II", number, 1))
        self._free = list(self._queues)

    def _capacity(self) -> int:
        """Sectors, the first field of virtio-blk's configuration."""
        head = struct.pack("<III", 0, _U64.size, 0)
        self._send(_GET_CONFIG, head + bytes(_U64.size))
        answer = self._receive(_GET_CONFIG)
        (capacity,) = _U64.unpack_from(answer, len(head))
        return int(capacity)

    def _asked(self, request: int) -> int:
        self._send(request)
        (value,) = _U64.unpack(self._receive(request))
        return int(value)

    def _send(self, request: int, payload: bytes = b"", descriptor: int | None = None) -> None:
        message = _HEADER.pack(request, _VERSION, len(payload)) + payload
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))]
        sent = self._socket.sendmsg([message], rights)
        if sent < len(message):
            self._socket.sendall(message[sent:])

    def _receive(self, request: int) -> bytes:
        answered, flags, size = _HEADER.unpack(self._exactly(_HEADER.size))
        if answered != request or not flags & _REPLY or size > _MAX_REPLY:
            raise VhostUserError("use", self._where, "its answer makes no sense")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                raise VhostUserError("use", self._where, "QEMU closed the connection")
            data += more
        return data


@asynccontextmanager
async def open_vhost_user(export: Shared, *, timeout_s: float = TIMEOUT_S) -> AsyncIterator[VhostUserPool]:
    """Connect to an export; it is closed when the block ends.

    Raises:
        VhostUserError: it cannot be used.
    """
    try:
        pool = VhostUserPool(export, timeout_s)
    except OSError as error:  # no descriptor
        raise VhostUserError("connect to", export.path, os_reason(error)) from error
    try:
        await in_io_thread(pool.connect)
        yield pool
    finally:
        pool.close()
