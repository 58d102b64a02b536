"""The datastores of this host that `fleece datastore create` made: a small TOML file that only commands write."""

import fcntl
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.errors import FleeceError, os_reason
from datastore.names import check_store_name

SYNC_LEVELS: Final = ("filesystem", "file", "none")

_HEADER: Final = "# Datastores of this host. Written by 'fleece datastore', not for editing by hand.\n"


@dataclass(frozen=True, slots=True)
class Datastore:
    """One registered datastore."""

    name: str
    path: Path
    sync_level: str | None = None  #: how backups reach the disk; None: the default


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


class Registry:
    """The list in the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def datastores(self) -> dict[str, Datastore]:
        """All datastores by name; none if the file is not there.

        Raises:
            FleeceError: the file cannot be read, or somebody else wrote it.
        """
        try:
            data = tomllib.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise FleeceError("read the list of datastores", str(self.path), os_reason(error)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FleeceError(
                "read the list of datastores", str(self.path), str(error),
                "repair or remove the file, then 'fleece datastore create PATH --reuse' for each datastore",
            ) from error  # fmt: skip
        sections = data.get("datastore", {})
        found = {}
        for name, section in sections.items() if isinstance(sections, dict) else ():
            path = section.get("path") if isinstance(section, dict) else None
            if not isinstance(path, str) or not path.startswith("/"):
                raise FleeceError("read the list of datastores", str(self.path), f"datastore.{name} has no path")
            level = section.get("sync-level")
            if level not in (None, *SYNC_LEVELS):
                raise FleeceError(
                    "read the list of datastores", str(self.path), f"datastore.{name}: sync-level {level!r}"
                )
            found[name] = Datastore(name, Path(path), level)
        return found

    def add(self, name: str, path: Path, sync_level: str | None = None) -> None:
        """Register the datastore in the folder `path` under `name`; the same pair again is fine.

        Raises:
            FleeceError: the name is taken by another folder, the folder has another name, or the list is unwritable.
        """
        check_store_name(name)
        path = path.absolute()
        with self._changing() as known:
            if name in known and known[name].path != path:
                raise FleeceError(
                    "register the datastore", str(path), f"the name {name!r} belongs to {known[name].path}",
                    "choose another one with --name",
                )  # fmt: skip
            for other in known.values():
                if other.path == path and other.name != name:
                    raise FleeceError(
                        "register the datastore", str(path), f"it is registered as {other.name!r} already",
                        f"'fleece datastore remove {other.name}' forgets that name",
                    )  # fmt: skip
            known[name] = Datastore(name, path, sync_level)

    def remove(self, name: str) -> None:
        """Forget `name`; nothing happens if it is not there.

        Raises:
            FleeceError: the list is unwritable.
        """
        with self._changing() as known:
            known.pop(name, None)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Datastore]]:
        """The list, written back atomically at the end of the block; one change at a time."""
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with (self.path.parent / ".datastores.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                known = self.datastores()
                yield known
                self._write(known)
        except OSError as error:
            raise FleeceError("write the list of datastores", str(self.path), os_reason(error)) from error

    def _write(self, known: dict[str, Datastore]) -> None:
        text = _HEADER
        for name, datastore in sorted(known.items()):
            try:
                str(datastore.path).encode()
            except UnicodeEncodeError:
                raise FleeceError("register the datastore", repr(datastore.path), "its path is not UTF-8") from None
            text += f"\n[datastore.{_quoted(name)}]\npath = {_quoted(str(datastore.path))}\n"
            if datastore.sync_level is not None:
                text += f"sync-level = {_quoted(datastore.sync_level)}\n"
        descriptor, temporary = tempfile.mkstemp(prefix=".datastores.", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                os.fchmod(file.fileno(), 0o644)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
