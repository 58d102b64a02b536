"""Limits on how much runs at the same time, for all processes of this host together.

Each slot is a file below the run folder that who works holds a lock on; a killed process so frees it. A slot of the
repository and one of the host are taken together or not at all: who waits for one holds up nobody with the other.
"""

import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from core.errors import FleeceError, os_reason

if TYPE_CHECKING:
    from agent.config import Config
    from agent.registry import Registry

#: Seconds between two tries.
_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Slots:
    """The slots below `folder`."""

    folder: Path
    host: int  #: at most so many on this host
    store: int  #: at most so many with one repository

    @asynccontextmanager
    async def one(self, store: str, say: Callable[[str], None] = lambda text: None) -> AsyncIterator[None]:
        """Hold a slot of the host and one of `store` while the block runs; waits for them, for as long as it takes.

        Args:
            store: what tells the repository from others.
            say: told once that it waits.

        Raises:
            FleeceError: the folder cannot be used.
        """
        held = self._try(store)
        if held is None:
            say(f"waiting: {self.host} backups and jobs run on this host already, or {self.store} with this repository")
        while held is None:
            await trio.sleep(_RETRY_S)
            held = self._try(store)
        try:
            yield
        finally:
            for descriptor in held:
                os.close(descriptor)

    def _try(self, store: str) -> list[int] | None:
        held: list[int] = []
        name = hashlib.sha256(os.fsencode(store)).hexdigest()[:16]
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for kind, count in ((f"store-{name}", self.store), ("host", self.host)):
                descriptor = self._free(kind, count)
                if descriptor is None:
                    break
                held.append(descriptor)
            else:
                return held
        except OSError as error:
            _close(held)
            raise FleeceError("take a slot in", str(self.folder), os_reason(error)) from error
        _close(held)
        return None

    def _free(self, kind: str, count: int) -> int | None:
        for number in range(count):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.folder / f"{kind}-{number}", flags, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            else:
                return descriptor
        return None


def store_key(spec: str, config: "Config", registry: "Registry") -> str:
    """What tells the repository `spec` from others on this host, whatever it is called.

    Raises:
        NotFoundError, UsageError: as `agent.repositories.local_store` and `remote_spec`.
    """
    from agent.repositories import local_store, remote_spec

    remote = remote_spec(spec, config, registry)
    return str(remote.address) if remote is not None else os.path.realpath(local_store(spec, config, registry).path)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
