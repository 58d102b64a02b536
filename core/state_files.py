"""Small TOML files that only programs write: tables of plain values, changed one at a time, replaced as a whole."""

import fcntl
import json
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from core.errors import FleeceError, os_reason

#: What a table of such a file holds.
Plain = str | bool | int | float | Sequence[str]
#: Bytes of a file that are read.
_MAX_SIZE: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class StateFile:
    """One file of tables `[KIND.NAME]`."""

    path: Path
    kind: str  #: `datastore`
    what: str  #: for messages: "the list of datastores"
    header: str  #: comment at its beginning, one line
    repair: str  #: for messages: what to do about a damaged file
    mode: int = 0o644  #: permission bits: 0o600 for what nobody else may read

    def read(self) -> dict[str, dict[str, Any]]:
        """The tables by name, not checked further; none if the file is not there.

        Raises:
            FleeceError: it cannot be read, or somebody else wrote it.
        """
        try:
            with self.path.open("rb") as file:
                raw = file.read(_MAX_SIZE + 1)
            if len(raw) > _MAX_SIZE:
                raise self.wrong(f"it has more than {_MAX_SIZE} bytes")
            data = tomllib.loads(raw.decode())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise FleeceError(f"read {self.what}", str(self.path), os_reason(error)) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self.wrong(str(error)) from error
        tables = data.get(self.kind, {})
        if not isinstance(tables, dict):
            raise self.wrong(f"{self.kind} is no table")
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise self.wrong(f"{self.kind}.{name} is no table")
        return tables

    def wrong(self, why: str) -> FleeceError:
        """The error for a file that no command wrote."""
        return FleeceError(f"read {self.what}", str(self.path), why, self.repair)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep other commands from changing the file while the block reads and writes it.

        Raises:
            FleeceError: its folder cannot be written.
        """
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with (self.path.parent / f".{self.path.stem}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise FleeceError(f"write {self.what}", str(self.path), os_reason(error)) from error

    def write(self, tables: Mapping[str, Mapping[str, Plain | None]]) -> None:
        """Replace the file, at once and durably; what is None is left out.

        Raises:
            OSError: it cannot be written, the old one stays.
            FleeceError: it would be longer than what is read.
            UnicodeEncodeError: a text that is not UTF-8.
        """
        text = f"# {self.header}\n"
        for name, table in sorted(tables.items()):
            text += f"\n[{self.kind}.{_quoted(name)}]\n"
            text += "".join(f"{key} = {_value(value)}\n" for key, value in table.items() if value is not None)
        data = text.encode()
        if len(data) > _MAX_SIZE:
            raise FleeceError(f"write {self.what}", str(self.path), f"it would have more than {_MAX_SIZE} bytes")
        descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.stem}.", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), self.mode)
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


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _value(value: Plain) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    return "[" + ", ".join(map(_quoted, value)) + "]"
