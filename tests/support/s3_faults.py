"""Faults that the S3 emulator makes on demand. One that is planned and never met fails the test."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

#: Often enough for "always".
ALWAYS: Final = 1 << 30

Kind = Literal[
    "answer",  # not carried out; `status` and `code` are told
    "lie",  # carried out; `status` and `code` are told
    "reset",  # not carried out; the connection is reset before an answer
    "lost",  # carried out; the connection is reset before an answer
    "late",  # reset like "reset"; carried out `seconds` later, or when `released`
    "cut",  # carried out; the connection is reset inside the answer's body
    "truncate",  # the body is a byte shorter, and content-length says so
    "corrupt",  # a byte of the body is another one
    "stall",  # carried out; half of the answer's body, then nothing, until the client hangs up
    "deaf",  # not carried out; no answer at all, until the client hangs up
    "delay",  # as always, after `seconds`, or when `released`
    "headers",  # as always, but `headers` are replaced (None: left out)
    "date",  # as always, but the Date header is off by `seconds`
    "damage",  # the body of the request arrives with one byte changed
]


@dataclass
class Fault:
    """What goes wrong, with which requests.

    `operation` is one of `Logged.operation`, or `*`. The first `skip` that match go well, the next `times` do not.
    """

    operation: str
    kind: Kind
    key: str = ""  #: part of the key
    skip: int = 0
    times: int = 1
    status: int = 500
    code: str = ""
    message: str = "planned"
    headers: Mapping[str, str | None] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)  #: more fields of the error's body
    seconds: float = 0.0
    released: threading.Event = field(default_factory=threading.Event)
    failed_keys: Mapping[str, str] = field(default_factory=dict)  #: POST: key -> code, with kind "answer", status 200
    seen: int = 0
    met: int = 0


class FaultPlan:
    """The faults of one emulator."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        """Plan a fault."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """End all faults, met or not."""
        with self._lock:
            self._faults.clear()

    def meet(self, operation: str, key: str) -> Fault | None:
        """The fault for this request."""
        with self._lock:
            for fault in self._faults:
                if fault.operation not in (operation, "*") or fault.key not in key:
                    continue
                fault.seen += 1
                if fault.skip < fault.seen <= fault.skip + fault.times:
                    fault.met += 1
                    return fault
        return None

    def unmet(self) -> list[Fault]:
        """Planned, but no request was right for it."""
        with self._lock:
            return [fault for fault in self._faults if not fault.met]
