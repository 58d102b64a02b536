"""Where an NBD server is to be found by its clients: a unix socket of ours, or TCP on this host unless asked otherwise.

The socket is made here and handed to the server, so that a free port is known at once, nobody else can reach a
unix socket in between, and the file of a server that was killed is not in the way of the next one.
"""

import contextlib
import os
import socket
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from core.errors import os_reason
from core.limits import in_io_thread
from hypervisor.errors import NbdServerError
from hypervisor.nbd_address import NbdAddress


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a disk is served: a unix socket, or an address and port of TCP."""

    path: Path | None = None
    host: str = "127.0.0.1"  #: for TCP
    port: int = 0  #: 0: one that is free
    tls_psk: Path | None = None  #: file of users and keys: clients must come with TLS and one of them
    replace: bool = False  #: who still listens at `path` is a server that is about to end, and has no more clients

    @property
    def is_local(self) -> bool:
        """Whether only this host can reach it."""
        return self.path is not None or ip_address(self.host).is_loopback


@dataclass(slots=True)
class Public:
    """A socket that listens, for a server that is about to start."""

    listener: socket.socket
    address: NbdAddress  #: for clients


@asynccontextmanager
async def listening(at: Endpoint | None) -> AsyncIterator[Public | None]:
    """The socket that clients connect to; a unix socket's file goes with the block, if it is still the same.

    Raises:
        NbdServerError: it is taken, or cannot be made.
    """
    if at is None:
        yield None
        return
    public = await in_io_thread(_listen, at)
    mark = None if at.path is None else at.path.lstat()
    try:
        yield public
    finally:
        public.listener.close()
        if at.path is not None and mark is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(at.path.lstat(), mark):
                    at.path.unlink()


def _listen(at: Endpoint) -> Public:
    shown = str(at.path) if at.path is not None else f"{at.host}:{at.port}"
    secure = "s" if at.tls_psk is not None else ""
    if at.tls_psk is not None and not os.access(at.tls_psk, os.R_OK):
        raise NbdServerError("read the keys of TLS in", str(at.tls_psk), "it is not there, or may not be read")
    family = socket.AF_UNIX if at.path is not None else socket.AF_INET6 if ":" in at.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if at.path is not None:
            path = at.path.absolute()
            NbdAddress.unix(path, "")  # too long a path has an error of its own
            if at.replace:
                path.unlink(missing_ok=True)
            else:
                _remove_stale(path)
            os.fchmod(listener.fileno(), 0o600)  # which the file gets, too
            listener.bind(str(path))
            address = NbdAddress.unix(path, "")
            if secure:
                address = NbdAddress(uri=str(address).replace("nbd+unix", "nbds+unix", 1))
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((at.host, at.port))
            host = f"[{at.host}]" if ":" in at.host else at.host
            address = NbdAddress.parse(f"nbd{secure}://{host}:{listener.getsockname()[1]}")
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise NbdServerError("serve at", shown, os_reason(error)) from error
    except BaseException:
        listener.close()
        raise
    return Public(listener, address)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that has ended."""
    try:
        if not path.is_socket():
            return  # nothing, or something that `bind` refuses
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.connect(str(path))
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)


def remove_stale_of(uri: str) -> bool:
    """Remove the unix socket that `uri` names, if the server behind it has ended; True if that was so. Blocks."""
    path = urllib.parse.parse_qs(urllib.parse.urlsplit(uri).query).get("socket")
    if not path or not Path(path[0]).is_socket():
        return False
    with contextlib.suppress(OSError):
        _remove_stale(Path(path[0]))
    return not Path(path[0]).exists()


def greets(uri: str, timeout_s: float) -> bool:
    """Whether an NBD server answers at `uri`, which may want TLS before it says more."""
    parts = urllib.parse.urlsplit(uri)
    path = urllib.parse.parse_qs(parts.query).get("socket")
    try:
        if path:
            asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        else:
            asking = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=timeout_s)
        with asking:
            asking.settimeout(timeout_s)
            if path:
                asking.connect(path[0])
            return asking.recv(8) == b"NBDMAGIC"
    except OSError:
        return False
