"""The other side of `hypervisor.vhost_user`: an export of bytes that can be told to misbehave."""

import contextlib
import mmap
import os
import select
import socket
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HEADER = struct.Struct("<III")
DESCRIPTOR = struct.Struct("<QIHH")
F_VERSION_1, F_PROTOCOL_FEATURES = 1 << 32, 1 << 30
PROTOCOL_MQ, PROTOCOL_CONFIG = 1, 1 << 9


@dataclass
class Request:
    """One read that arrived."""

    sector: int
    size: int


@dataclass
class VhostUserServer:
    """What the export is, how it answers, and what it saw."""

    content: bytes
    features: int = F_VERSION_1 | F_PROTOCOL_FEATURES | 0xFF
    protocol: int = PROTOCOL_MQ | PROTOCOL_CONFIG | 1 << 3
    #: By number of a message: what is sent instead of the answer; b"" closes the connection.
    answers: dict[int, bytes] = field(default_factory=dict)
    #: Called before each read is answered; the state that it returns is that of the request, None: no answer at all.
    answer: Callable[[Request], int | None] = lambda _request: 0
    #: What stands in the used ring instead of the descriptor.
    used: Callable[[int], int] = lambda descriptor: descriptor
    #: By how much the used index goes up for an answer.
    step: int = 1
    requests: list[Request] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    kicks: list[int] = field(default_factory=list)
    clients: int = 0
    _memory: mmap.mmap | None = None
    _rings: dict[int, "_Ring"] = field(default_factory=dict)

    def serve(self, sock: socket.socket) -> None:
        """One client to its end."""
        self.clients += 1
        try:
            with sock:
                self._serve(sock)
        finally:
            for ring in self._rings.values():
                for descriptor in (ring.kick, ring.call):
                    if descriptor >= 0:
                        os.close(descriptor)
            self._rings.clear()
            if self._memory is not None:
                self._memory.close()

    def _serve(self, sock: socket.socket) -> None:
        while True:
            kicks = {ring.kick: ring for ring in self._rings.values() if ring.enabled and ring.kick >= 0}
            ready, _, _ = select.select([sock.fileno(), *kicks], [], [], 10)
            if not ready:
                return
            for kick in ready:
                if kick in kicks:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(kick)
                    if not self._work(kicks[kick]):
                        return
            if sock.fileno() in ready and not self._message(sock):
                return

    def _message(self, sock: socket.socket) -> bool:
        head, rights, _, _ = sock.recvmsg(HEADER.size, 64)
        if not head:
            return False
        request, _, size = HEADER.unpack(head)
        payload = sock.recv(size, socket.MSG_WAITALL) if size else b""
        descriptors = array("i")
        for _, _, data in rights:
            descriptors.frombytes(data)
        self.messages.append(request)
        if request in self.answers:
            sock.sendall(self.answers[request])
            return bool(self.answers[request])
        self._act(sock, request, payload, list(descriptors))
        return True

    def _act(self, sock: socket.socket, request: int, payload: bytes, descriptors: list[int]) -> None:
        if request == 1:
            sock.sendall(HEADER.pack(1, 5, 8) + struct.pack("<Q", self.features))
        elif request == 15:
            sock.sendall(HEADER.pack(15, 5, 8) + struct.pack("<Q", self.protocol))
        elif request == 24:
            sock.sendall(HEADER.pack(24, 5, len(payload)) + payload[:12] + struct.pack("<Q", len(self.content) // 512))
        elif request == 5:
            count, _, self._base, size, _, _ = struct.unpack("<IIQQQQ", payload)
            assert count == 1
            self._memory = mmap.mmap(descriptors[0], size)
            os.close(descriptors[0])
        elif request in (8, 10, 18):
            number, value = struct.unpack("<II", payload)
            ring = self._rings.setdefault(number, _Ring())
            if request == 8:
                ring.size = value
            elif request == 10:
                assert value == 0
            else:
                ring.enabled = bool(value)
        elif request == 9:
            number, flags, ring_descriptors, used, available, log = struct.unpack("<IIQQQQ", payload)
            assert (flags, log) == (0, 0)
            ring = self._rings.setdefault(number, _Ring())
            ring.descriptors, ring.used, ring.available = (
                address - self._base for address in (ring_descriptors, used, available)
            )
        elif request in (12, 13):
            (number,) = struct.unpack("<Q", payload)
            ring = self._rings.setdefault(number, _Ring())
            if request == 12:
                ring.kick = descriptors[0]
                self.kicks.append(number)
            else:
                ring.call = descriptors[0]

    def _work(self, ring: "_Ring") -> bool:
        memory = self._memory
        assert memory is not None
        (end,) = struct.unpack_from("<H", memory, ring.available + 2)
        while ring.taken != end:
            (first,) = struct.unpack_from("<H", memory, ring.available + 4 + 2 * (ring.taken % ring.size))
            ring.taken = (ring.taken + 1) & 0xFFFF
            chain = []
            number = first
            while True:
                address, size, flags, following = DESCRIPTOR.unpack_from(memory, ring.descriptors + 16 * number)
                chain.append((address - self._base, size, flags))
                if not flags & 1:
                    break
                number = following
            (head, head_size, head_flags), (data, size, data_flags), (state, one, state_flags) = chain
            assert (head_size, one, head_flags & 2, data_flags & 2, state_flags & 2) == (16, 1, 0, 2, 2)
            kind, _, sector = struct.unpack_from("<IIQ", memory, head)
            assert kind == 0
            request = Request(sector, size)
            self.requests.append(request)
            answer = self.answer(request)
            if answer is None:
                continue
            if answer < 0:
                return False
            memory[data : data + size] = self.content[sector * 512 : sector * 512 + size]
            memory[state] = answer
            struct.pack_into("<II", memory, ring.used + 4 + 8 * (ring.done % ring.size), self.used(first), size + 1)
            ring.done = (ring.done + self.step) & 0xFFFF
            struct.pack_into("<H", memory, ring.used + 2, ring.done)
            os.eventfd_write(ring.call, 1)
        return True


@dataclass
class _Ring:
    size: int = 0
    descriptors: int = 0
    used: int = 0
    available: int = 0
    kick: int = -1
    call: int = -1
    enabled: bool = False
    taken: int = 0
    done: int = 0


@contextmanager
def serving(server: VhostUserServer, path: Path) -> Iterator[str]:
    """`server` listens at `path`, one client after the other, while the block runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen(4)
        ended = threading.Event()

        def run() -> None:
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    client, _ = listening.accept()
                    if ended.is_set():
                        client.close()
                        return
                    server.serve(client)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield str(path)
        finally:
            ended.set()
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as last:
                last.connect(str(path))
            thread.join(15)
            assert not thread.is_alive()
