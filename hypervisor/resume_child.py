"""The child that lets a paused guest go on if its parent dies before it has done so.

A script of its own with nothing but the standard library, as `freeze_child.py`: it detaches itself and outlives a
killed parent. Started by `hypervisor.pause` with the path of the QMP socket and the process id of QEMU. One byte on its
standard input says that the guest goes on; the end of the input without one, that the parent is gone, and with it the
parent's connection to the socket, which serves one client at a time. docs/hypervisor.md, "Pausing the guest".
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time
from typing import Any, Final

#: Seconds for QEMU to answer, and how often all of it is tried: another client may have the socket in between.
ANSWER_TIMEOUT_S: Final = 30.0
TRIES: Final = 20
_MAX_LINE: Final = 1024 * 1024


def resume(path: str, pid: int) -> bool:
    """Let the guest go on if it is paused; False if QEMU cannot be asked now.

    Raises:
        OSError: nobody listens there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_TIMEOUT_S)
        sock.connect(path)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[0] != pid:
            return True  # another QEMU: the one that was paused has ended
        with sock.makefile("rb") as lines:
            json.loads(lines.readline(_MAX_LINE))  # the greeting
            _execute(sock, lines, "qmp_capabilities")
            status = _execute(sock, lines, "query-status")
            if isinstance(status, dict) and status.get("status") == "paused":
                _execute(sock, lines, "cont")
    return True


def _execute(sock: socket.socket, lines: Any, command: str) -> Any:
    sock.sendall(json.dumps({"execute": command, "id": command}).encode() + b"\n")
    while True:
        line = lines.readline(_MAX_LINE)
        if not line:
            raise OSError("the connection was closed")
        message = json.loads(line)
        if isinstance(message, dict) and message.get("id") == command:
            return message.get("return")


def to_the_background() -> None:
    """Detach: who started us has nothing to wait for, and ends us with nothing but `kill -9`."""
    if os.fork():
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)


def parent_is_gone() -> bool:
    """Wait; True if the parent ended without a word."""
    return not os.read(0, 1)


def main() -> None:
    """Run as a script."""
    path, pid = sys.argv[1:3]
    to_the_background()
    if not parent_is_gone():
        return
    for _ in range(TRIES):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if resume(path, int(pid)):
                return
        time.sleep(0.5)


if __name__ == "__main__":
    main()
