"""An image file that is written under another name, and takes its own when it is whole.

As long as it is not, what has the name is there, and nobody can open it: QEMU's locks are held on it.
"""

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

from core.errors import TargetError, os_reason
from hypervisor.image_files import check_kind, lock_for_writing, open_error, refuse_users, size_of

#: What is added to the name of a file that is not whole yet.
PARTIAL: Final = ".partial"
_FORCE_HINT: Final = "use another place, or --force to replace it"


class Replacement:
    """The file `path` to come, and the one that is there now."""

    def __init__(self, path: Path, held: int | None) -> None:
        self.path: Final = path  #: without symbolic links
        self.partial: Final = path.with_name(path.name + PARTIAL)
        self._held = held
        self._done = False

    @classmethod
    def begin(cls, named: str, *, force: bool) -> "Replacement":
        """Look at the file `named`, and hold it if it is there; what a killed restore left beside it is removed.

        Raises:
            TargetError: it has content and `force` is not given, or it is no regular file.
            DiskInUseError: somebody has it open, or another restore writes to it.
        """
        path = Path(os.path.realpath(named))
        held = _hold(path, named)
        try:
            if held is not None and (size := size_of(held)) and not force:
                raise TargetError("restore to", named, f"the file exists with {size} bytes", _FORCE_HINT)
            one = cls(path, held)
            left = _hold(one.partial, str(one.partial))
            if left is not None:
                one.partial.unlink(missing_ok=True)
                os.close(left)
        except OSError as error:
            if held is not None:
                os.close(held)
            raise open_error(error, "restore to", named, TargetError) from error
        except BaseException:
            if held is not None:
                os.close(held)
            raise
        return one

    def put_in_place(self) -> None:
        """Give the new file its name, and the owner and mode of the one that had it; durable when this returns.

        Raises:
            TargetError: it cannot be, or somebody else has made a file of that name meanwhile.
        """
        try:
            if self._held is None:
                try:
                    os.link(self.partial, self.path)  # never replaces
                    self.partial.unlink()
                except FileExistsError as error:
                    raise TargetError("restore to", str(self.path), "it was made by somebody else meanwhile") from error
                except OSError:  # a file system without links
                    self.partial.rename(self.path)
            else:
                status = os.fstat(self._held)
                with contextlib.suppress(PermissionError):
                    os.chown(self.partial, status.st_uid, status.st_gid)
                self.partial.chmod(stat.S_IMODE(status.st_mode))
                self.partial.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise TargetError("restore to", str(self.path), os_reason(error)) from error
        self._done = True

    def close(self) -> None:
        """Let go of the file that was there; one that did not get its place is removed."""
        if not self._done:
            with contextlib.suppress(OSError):
                self.partial.unlink(missing_ok=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _hold(path: Path, named: str) -> int | None:
    """Descriptor of the regular file `path`, which nobody can open meanwhile; None if there is none.

    Raises:
        TargetError, DiskInUseError: it is no file, cannot be opened, or is in use.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise open_error(error, "restore to", named, TargetError) from error
    try:
        if check_kind(os.fstat(descriptor).st_mode, "restore to", named, TargetError):
            raise TargetError("restore to", named, "it became a block device meanwhile")
        lock_for_writing(descriptor, named)
        refuse_users(descriptor, "write to", named)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
