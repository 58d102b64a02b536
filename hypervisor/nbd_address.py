"""Where an NBD export is: URIs and unix sockets, checked before libnbd sees them."""

import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from core.errors import UsageError

_MAX_EXPORT_NAME: Final = 4096
_MAX_SOCKET_PATH: Final = 107
_SCHEMES: Final = ("nbd", "nbds", "nbd+unix", "nbds+unix")


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where an export is: an NBD URI, or a unix socket and the export's name."""

    uri: str = ""
    socket: str = ""
    export: str = ""

    def __str__(self) -> str:
        if self.uri:
            return self.uri
        return f"nbd+unix:///{urllib.parse.quote(self.export, safe='')}?socket={urllib.parse.quote(self.socket)}"

    @classmethod
    def unix(cls, socket: str | Path, export: str) -> Self:
        """The export named `export` (may be empty) of the server at the unix socket `socket`.

        Raises:
            UsageError: path or name longer than the system or the protocol allow.
        """
        address = cls(socket=os.fspath(socket), export=export)
        if len(os.fsencode(address.socket)) > _MAX_SOCKET_PATH:
            raise UsageError("use the socket", address.socket, f"its path is longer than {_MAX_SOCKET_PATH} bytes")
        if len(export.encode()) > _MAX_EXPORT_NAME:
            raise UsageError("use the export name", repr(export[:40] + "..."), "it is longer than the protocol allows")
        return address

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Check an NBD URI: `nbd://HOST[:PORT]/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, `nbds` for TLS.

        Raises:
            UsageError: another scheme, no host, no socket, or parameters that name files of this host.
        """
        hint = "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
        try:
            parts = urllib.parse.urlsplit(uri)
            port = parts.port
        except ValueError as error:
            raise UsageError("use the NBD URI", uri, str(error), hint) from error
        if parts.scheme not in _SCHEMES:
            raise UsageError("use the NBD URI", uri, f"the scheme {parts.scheme!r} is not known", hint)
        if parts.password is not None:
            raise UsageError("use the NBD URI", f"{parts.scheme}://{parts.hostname}", "it has a password", hint)
        parameters = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        if parts.scheme.endswith("+unix"):
            if not parameters.get("socket") or parts.hostname or port is not None:
                raise UsageError("use the NBD URI", uri, "a unix socket needs ?socket=PATH and no host", hint)
            cls.unix(parameters["socket"], "")
        elif not parts.hostname or "socket" in parameters:
            raise UsageError("use the NBD URI", uri, "it names no host", hint)
        if others := sorted(set(parameters) - {"socket"}):
            raise UsageError("use the NBD URI", uri, f"the parameter {others[0]!r} is not allowed", hint)
        if "\0" in urllib.parse.unquote(uri):
            raise UsageError("use the NBD URI", repr(uri), "it contains a zero byte", hint)
        return cls(uri=uri)


def is_nbd_uri(spec: str) -> bool:
    """True if `spec` is meant as an NBD URI (it need not be a right one)."""
    scheme, colon, _ = spec.partition("://")
    return bool(colon) and scheme.lower().startswith("nbd")
