"""What a service tells systemd: sd_notify(3), without a library, as it is one datagram."""

import os
import socket
from contextlib import suppress
from typing import Final

#: Seconds that systemd may take to make room for a message.
_TIMEOUT_S: Final = 1.0


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
