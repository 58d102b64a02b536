"""Secrets of this host, one file each: of systemd's credentials, else of the state folder, for nobody else to read.

`LoadCredential=s3-aws:/etc/keys/aws` in a unit gives it the secret of endpoint `aws`. What commands store lies in
`secrets/` below the state folder, mode 0600; a file with wider permissions is refused.
"""

import os
import secrets
import stat
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from core.errors import FleeceError, NotFoundError, UsageError, os_reason
from datastore.names import is_safe_id

#: Where systemd tells a unit its credentials.
CREDENTIALS_VARIABLE: Final = "CREDENTIALS_DIRECTORY"
#: Bytes of a secret, at most.
MAX_SECRET: Final = 4096


class Source(Enum):
    """Where a secret comes from."""

    CREDENTIAL = "credential"  #: of systemd
    STORED = "stored"
    MISSING = "missing"
    UNSAFE = "unsafe"  #: others may read the file, so it is not used


@dataclass(frozen=True, slots=True)
class Stamp:
    """Tells whether a secret may have changed."""

    path: str
    inode: int
    mtime_ns: int
    size: int


class SecretStore:
    """The secrets below the folder `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, *, hint: str) -> str:
        """The secret `name`, without a line end.

        Args:
            name: as `s3-aws`.
            hint: what a person can do if it is missing.

        Raises:
            NotFoundError: there is none.
            FleeceError: others may read it, or it is no text of one line.
        """
        path = self._path(name)
        if path is None:
            raise NotFoundError("read the secret", name, "there is none", hint)
        return _read(path, private=path.parent == self.folder)

    def source(self, name: str) -> Source:
        """Where `read` would find it."""
        path = self._path(name)
        if path is None:
            return Source.MISSING
        if path.parent != self.folder:
            return Source.CREDENTIAL
        try:
            _read(path, private=True)
        except FleeceError:
            return Source.UNSAFE
        return Source.STORED

    def stamp(self, name: str) -> Stamp | None:
        """What changes whenever the secret does; None if there is none."""
        path = self._path(name)
        if path is None:
            return None
        try:
            found = path.stat()
        except OSError:
            return None
        return Stamp(str(path), found.st_ino, found.st_mtime_ns, found.st_size)

    def write(self, name: str, secret: str) -> None:
        """Store the secret, in place of an older one; durable.

        Raises:
            UsageError: it is empty, too long, or has more than one line.
            FleeceError: it cannot be written.
        """
        check_secret(secret)
        path = self.folder / _checked(name)
        temporary = self.folder / f".{name}.{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(self.folder, 0o700)  # noqa: PTH101 - beside os.open
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(descriptor, "w") as file:
                    file.write(secret + "\n")
                    file.flush()
                    os.fchmod(descriptor, 0o600)
                    os.fsync(descriptor)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise FleeceError("store the secret", str(path), os_reason(error)) from error

    def remove(self, name: str) -> None:
        """Remove what `write` stored, if it is there.

        Raises:
            FleeceError: it cannot be removed.
        """
        path = self.folder / _checked(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise FleeceError("remove the secret", str(path), os_reason(error)) from error

    def _path(self, name: str) -> Path | None:
        """The file of the secret; a credential of systemd comes first."""
        given = os.environ.get(CREDENTIALS_VARIABLE, "")
        folders = [Path(given), self.folder] if given.startswith("/") else [self.folder]
        for folder in folders:
            path = folder / _checked(name)
            if os.path.lexists(path):
                return path
        return None


def check_secret(text: str) -> str:
    """Return `text` if it can be a secret: one line of printable characters.

    Raises:
        UsageError: it cannot; the text does not appear.
    """
    if not text:
        raise UsageError("use", "the secret", "it is empty")
    if len(text) > MAX_SECRET or not text.isprintable():
        why = f"it must be one line of printable characters, at most {MAX_SECRET}"
        raise UsageError("use", "the secret", why)
    return text


def _checked(name: str) -> str:
    if not is_safe_id(name):
        raise UsageError("use the secret", repr(name), "it is no name of a secret")
    return name


def _read(path: Path, *, private: bool) -> str:
    """Read the file; `private`: only if nobody but its owner may."""
    what = "read the secret"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if private else 0))
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise FleeceError(what, str(path), "it is no regular file")
            if private and found.st_mode & 0o077:
                why = f"its mode is {stat.S_IMODE(found.st_mode):04o}, so that others may have read it"
                raise FleeceError(what, str(path), why, f"chmod 600 {path}, and think of making a new key")
            if private and found.st_uid not in (0, os.geteuid()):
                raise FleeceError(what, str(path), "it belongs to another user")
            data = file.read(MAX_SECRET + 2)
    except OSError as error:
        raise FleeceError(what, str(path), os_reason(error)) from error
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise FleeceError(what, str(path), "it is no text") from None
    text = text.removesuffix("\n").removesuffix("\r")
    try:
        return check_secret(text)
    except UsageError as error:
        raise FleeceError(what, str(path), error.why) from None
