"""Tickets between commands: a file in the user's run folder, mode 0600, that goes with the session or the next boot."""

import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from core.errors import FleeceError, os_reason
from repository.remote.address import RemoteAddress
from repository.remote.login import VALID_S, Ticket

#: Bytes of the file that are read.
_MAX_SIZE: Final = 1 << 20


class TicketFile:
    """See `repository.remote.login.TicketStore`. A file that others could have read or written is not used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, address: RemoteAddress) -> Ticket | None:
        """See `TicketStore.load`; what is unreadable counts as none."""
        entry = self._read().get(_key(address))
        if not isinstance(entry, dict):
            return None
        ticket, csrf, issued, cookie = (entry.get(name) for name in ("ticket", "csrf", "issued", "cookie"))
        if not isinstance(ticket, str) or not isinstance(csrf, str) or not isinstance(cookie, str):
            return None
        return Ticket(ticket, csrf, float(issued), cookie) if isinstance(issued, int | float) else None

    def save(self, address: RemoteAddress, ticket: Ticket) -> None:
        """See `TicketStore.save`; expired ones of other servers go.

        Raises:
            FleeceError: it cannot be written.
        """
        with self._changing() as entries:
            entries[_key(address)] = {
                "ticket": ticket.ticket, "csrf": ticket.csrf, "issued": ticket.issued, "cookie": ticket.cookie,
            }  # fmt: skip

    def forget(self, address: RemoteAddress) -> bool:
        """See `TicketStore.forget`.

        Raises:
            FleeceError: it cannot be written.
        """
        if _key(address) not in self._read():
            return False
        with self._changing() as entries:
            return entries.pop(_key(address), None) is not None

    def _read(self) -> dict[str, Any]:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077 or found.st_uid != os.geteuid():
                    return {}
                data = json.loads(file.read(_MAX_SIZE))
        except (OSError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """The entries, written back at the end of the block; one command at a time."""
        from agent.places import private_run_dir

        private_run_dir()  # nobody else's, or this fails
        try:
            with (self.path.parent / ".tickets.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                entries = {
                    key: entry
                    for key, entry in self._read().items()
                    if isinstance(entry, dict)
                    and isinstance(entry.get("issued"), int | float)
                    and entry["issued"] > time.time() - VALID_S
                }
                yield entries
                descriptor, temporary = tempfile.mkstemp(prefix=".tickets.", dir=self.path.parent)  # mode 0600
                try:
                    with os.fdopen(descriptor, "w") as file:
                        json.dump(entries, file)
                    Path(temporary).replace(self.path)
                except BaseException:
                    Path(temporary).unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise FleeceError("keep the ticket in", str(self.path), os_reason(error)) from error


def _key(address: RemoteAddress) -> str:
    return f"{address.auth_id}@{address.server.lower()}"
