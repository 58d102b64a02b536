"""The event log: what happens, as JSON lines for programs. docs/monitoring.md, "Events", has all of them.

Every line goes into the file by one write of its own, and the file is opened for it: several processes share it, and
whoever rotates it need tell nobody.
"""

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from core.errors import os_reason
from core.systemd import to_journal

if TYPE_CHECKING:
    from agent.monitoring.sections import EventsSection

#: Grows if a key goes away or changes its meaning.
SCHEMA: Final = 1
#: Bytes of one line; longer ones lose what is listed in `_CUT`, in this order.
MAX_LINE: Final = 64 << 10
_CUT: Final = ("warnings", "result", "error", "message")
_MODE: Final = 0o640
#: Syslog's numbers.
_PRIORITIES: Final = {"failed": 3, "killed": 3, "warnings": 4, "interrupted": 5}


def _ignore(text: str) -> None:
    pass


class EventLog:
    """Where events go; without a section nowhere.

    Args:
        section: `[events]`.
        problem: told, once, that events cannot be written.
    """

    def __init__(self, section: "EventsSection | None", problem: Callable[[str], None] = _ignore) -> None:
        self._section = section
        self._problem = problem
        self._complained = False
        self._host = socket.gethostname()

    def emit(self, event: str, message: str, **fields: Any) -> None:
        """Write one event. Never fails: a log that cannot be written is told of once.

        Args:
            event: its name, `job-end`.
            message: the same for people, one line.
            fields: what else the line has; `_` in names becomes `-`.
        """
        if self._section is None:
            return
        document = self._document(event, message, fields)
        for write in (self._to_file, self._to_journal):
            try:
                write(document)
            except OSError as error:
                if not self._complained:
                    self._complained = True
                    self._problem(f"cannot write the event log: {os_reason(error)}")

    def _document(self, event: str, message: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
        document = {"schema": SCHEMA, "time": stamp, "host": self._host, "pid": os.getpid(), "event": event}
        document |= {"message": message, **{name.replace("_", "-"): value for name, value in fields.items()}}
        for name in _CUT:
            if len(_line(document)) <= MAX_LINE:
                break
            if name in document:
                document[name] = None
                document["cut"] = True
        return document

    def _to_file(self, document: Mapping[str, Any]) -> None:
        assert self._section is not None
        path = self._section.file
        if path is None:
            return
        descriptor = _open(path)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", str(path))
            # What a full disk or a crash cut off must not swallow this line too.
            torn = found.st_size > 0 and os.pread(descriptor, 1, found.st_size - 1) != b"\n"
            data = (b"\n" if torn else b"") + _line(document)
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(descriptor)

    def _to_journal(self, document: Mapping[str, Any]) -> None:
        assert self._section is not None
        if not self._section.journal:
            return
        fields = {
            "MESSAGE": str(document.get("message") or document["event"]),
            "PRIORITY": str(_PRIORITIES.get(str(document.get("state")), 6)),
            "SYSLOG_IDENTIFIER": "fleece",
            "FLEECE_EVENT": str(document["event"]),
            "FLEECE_DOCUMENT": _line(document).decode().rstrip(),
        }
        fields |= {
            f"FLEECE_{name.upper()}": str(document[name])
            for name in ("job", "run", "state", "repository", "group", "guest")
            if document.get(name) is not None
        }
        to_journal(fields)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, _MODE)
    except FileNotFoundError:
        path.parent.mkdir(mode=0o750)  # one folder, not a path that was mistyped
        return os.open(path, flags, _MODE)


def _line(document: Mapping[str, Any]) -> bytes:
    # ASCII: a name that is no UTF-8 is written as `\\udcff`, and no line end of Unicode can split the line.
    return json.dumps(document, default=str).encode() + b"\n"
