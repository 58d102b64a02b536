"""UPID: the name of a task as PBS writes it into manifests, `.gc-status` and its logs.

    UPID:<node>:<pid>:<start of the process>:<task number>:<start time>:<type>:<id>:<auth id>:

Numbers are hexadecimal; `id` is escaped as systemd escapes paths.
"""

import itertools
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from core.errors import FormatError

_UPID: Final = re.compile(
    r"UPID:([A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?):([0-9A-Fa-f]{8}):([0-9A-Fa-f]{8,9}):([0-9A-Fa-f]{8,16}):"
    r"([0-9A-Fa-f]{8}):([^:\s]+):([^:\s]*):([^:\s]+):.*"
)
#: Field of /proc/self/stat, counted behind the program's name: start of the process in ticks.
_START_FIELD: Final = 19
_numbers: Final = itertools.count()


@dataclass(frozen=True, slots=True)
class Upid:
    """One task."""

    node: str
    pid: int
    pstart: int  #: when the process started, in ticks since the machine did
    number: int  #: of the task in its process
    start: int  #: Unix seconds
    kind: str  #: `verify`, `garbage_collection`, ...
    id: str  #: what it works on
    auth_id: str  #: who started it

    @classmethod
    def new(cls, kind: str, worker_id: str, *, auth_id: str = "root@pam") -> Self:
        """A task of this process that starts now."""
        node = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0]).strip("-") or "localhost"
        return cls(node, os.getpid(), _process_start(), next(_numbers), int(time.time()), kind, worker_id, auth_id)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form.

        Raises:
            FormatError: another form.
        """
        match = _UPID.fullmatch(text)
        if match is None:
            raise FormatError("read the UPID", repr(text[:200]), "it is not of PBS's form")
        node, *numbers, kind, worker_id, auth_id = match.groups()
        pid, pstart, number, start = (int(digits, 16) for digits in numbers)
        return cls(node, pid, pstart, number, start, kind, _unescape(worker_id), auth_id)

    def __str__(self) -> str:
        return (
            f"UPID:{self.node}:{self.pid:08X}:{self.pstart:08X}:{self.number:08X}:{self.start:08X}:"
            f"{self.kind}:{_escape(self.id)}:{self.auth_id}:"
        )


def _process_start() -> int:
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return int(fields[_START_FIELD]) & 0xFFFFFFFFF
    except (OSError, ValueError, IndexError):
        return 0


def _escape(text: str) -> str:
    # Not `locks.escape`: a leading dash or slash stays here.
    escaped = []
    for position, byte in enumerate(text.encode()):
        char = chr(byte)
        if char == "/":
            escaped.append("-")
        elif char.isascii() and (char.isalnum() or char == "_" or (char == "." and position > 0)):
            escaped.append(char)
        else:
            escaped.append(f"\\x{byte:02x}")
    return "".join(escaped)


def _unescape(text: str) -> str:
    def byte(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 16)])

    return re.sub(rb"\\x([0-9a-f]{2})", byte, text.replace("-", "/").encode()).decode(errors="replace")
