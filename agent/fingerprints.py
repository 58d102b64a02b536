"""The certificates of servers that a user has confirmed: a text file with a line `<server> <fingerprint>` for each.

The form is that of `proxmox-backup-client`. A server on another port than 8007 is written with it. A fingerprint that
was given on the command line or in the environment is never stored.
"""

import os
import tempfile
from pathlib import Path
from typing import Final

from core.dial import parse_fingerprint
from core.errors import FleeceError, UsageError, os_reason
from repository.remote.address import DEFAULT_PORT, RemoteAddress

#: Bytes of the file that are read.
_MAX_SIZE: Final = 1 << 20


class FingerprintFile:
    """The file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, address: RemoteAddress) -> bytes | None:
        """The fingerprint that was confirmed for a server, None if there is none.

        Raises:
            FleeceError: the file cannot be read.
        """
        found = None
        for line in self._lines():
            name, _, text = line.strip().partition(" ")
            if name == _name(address):
                try:
                    found = parse_fingerprint(text)
                except UsageError:
                    continue
        return found

    def remember(self, address: RemoteAddress, fingerprint: bytes) -> None:
        """Store a fingerprint in place of an older one.

        Raises:
            FleeceError: the file cannot be written.
        """
        name = _name(address)
        lines = [line for line in self._lines() if line.strip().partition(" ")[0] != name]
        lines.append(f"{name} {fingerprint.hex(':')}")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=".fingerprints.", dir=self.path.parent)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write("\n".join(lines) + "\n")
                Path(temporary).replace(self.path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise FleeceError("remember the fingerprint in", str(self.path), os_reason(error)) from error

    def _lines(self) -> list[str]:
        try:
            with self.path.open("rb") as file:
                return file.read(_MAX_SIZE).decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FleeceError("read the fingerprints in", str(self.path), os_reason(error)) from error


def _name(address: RemoteAddress) -> str:
    if address.port == DEFAULT_PORT:
        return address.host.lower()
    return address.server.lower()
