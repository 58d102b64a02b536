"""What a service tells systemd: sd_notify(3) and entries of the journal, without a library: each is one datagram."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

#: Seconds that systemd may take to make room for a message.
_TIMEOUT_S: Final = 1.0
#: Where the journal takes entries; the format is systemd's "Native Journal Protocol".
_JOURNAL: Final = "/run/systemd/journal/socket"
#: Bytes of a value; with all of them an entry stays below what a datagram may have.
_MAX_VALUE: Final = 96 << 10


def notify(*lines: str) -> None:
    """Tell systemd `lines` (`READY=1`, `STATUS=...`), if it wants to know; that it cannot be told does not matter."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_TIMEOUT_S)
        sender.connect("\0" + path[1:] if path.startswith("@") else path)
        sender.sendall("\n".join(line.replace("\n", " ") for line in lines).encode())


def watchdog_s() -> float | None:
    """Seconds within which systemd wants to hear `WATCHDOG=1` each time; None if it does not."""
    text = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(text) / 1e6 if text.isascii() and text.isdigit() and int(text) else None


def to_journal(fields: Mapping[str, str], path: str = _JOURNAL) -> None:
    """Add an entry to systemd's journal.

    Args:
        fields: names (capitals, digits and `_`) and values, whatever those hold; too long ones are cut.
        path: of the journal's socket.

    Raises:
        OSError: there is no journal, or it does not take the entry.
    """
    entry = bytearray()
    for name, text in fields.items():
        value = text.encode("utf-8", "replace")[:_MAX_VALUE]
        # With its length in front: a line end in it begins no other field.
        entry += name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_TIMEOUT_S)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sender.connect(path)
        sender.sendall(entry)
