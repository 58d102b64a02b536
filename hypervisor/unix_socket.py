"""Connecting to a unix socket: paths of any length, and a full queue of waiting clients is no connection."""

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

#: Bytes of a path in `sockaddr_un`, its ending zero included.
_MAX_PATH: Final = 108
#: Seconds between two tries while the listener's queue is full.
_RETRY_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Peer:
    """Who listens on a unix socket; `pid` and `start_time` together name a process for ever."""

    pid: int
    uid: int
    gid: int
    start_time: int | None  #: clock ticks after boot; None if the process has ended or is hidden

    def alive(self) -> bool:
        """Whether that very process still runs; one that was never visible (in another container) may, so True."""
        return self.start_time is None or process_start_time(self.pid) == self.start_time

    def stopped(self) -> bool:
        """Whether it was stopped by a signal, or by who debugs it; False if that cannot be told."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])
        except OSError:
            return False


def process_start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks after boot; None if there is none, or a zombie."""
    try:
        # The name of the program, in brackets, may hold spaces and brackets of its own.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


async def connect_unix(path: str) -> socket.socket:
    """Connect to the unix stream socket at `path`; the socket is non-blocking and belongs to the caller.

    Waits as long as the listener's queue is full. Cancelled or failed, nothing stays open.

    Raises:
        OSError: no such socket, nobody listens, no right to it.
    """
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        sock.setblocking(False)
        address = path
        if len(os.fsencode(path)) >= _MAX_PATH:
            node = os.open(path, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, node)
            address = f"/proc/self/fd/{node}"
        while True:
            try:
                # trio's own connect would take the EAGAIN of a full queue for "under way".
                sock.connect(address)
            except BlockingIOError:
                await trio.sleep(_RETRY_S)
            else:
                break
        await trio.lowlevel.checkpoint()
        connected = socket.socket(fileno=sock.detach())
        connected.setblocking(False)
        return connected


def peer_of(sock: socket.socket) -> Peer:
    """The process that listens at the other end (for a descriptor it inherited: the one that made it listen)."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return Peer(pid, uid, gid, process_start_time(pid))
