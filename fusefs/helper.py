"""`mount.fleece`: lets mount(8) and /etc/fstab mount a repository.

    mount.fleece REPO MOUNTPOINT [-sfnv] [-t TYPE] [-o OPTIONS]

mount(8) calls it for the type `fleece`, found as /sbin/mount.fleece, and for `fuse.fleece`, found as
/sbin/mount.fuse.fleece. It turns what it was given into a call of `fleece mount` and becomes that.
"""

import getopt
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from core.errors import ExitCode, UsageError
from fusefs.options import split_options

#: Options that are options of the command, not of `-o`.
_COMMAND: Final = {
    "ns": "--ns",
    "keyfile": "--keyfile",
    "config": "--config",
}
_USAGE: Final = "usage: mount.fleece REPO MOUNTPOINT [-o OPTIONS]"
#: What mount(8) expects of a helper: 1 wrong call, 32 the mount failed.
_WRONG_CALL: Final = 1
_FAILED: Final = 32


def command_line(arguments: Sequence[str]) -> list[str] | None:
    """The arguments of `fleece` for those of `mount.fleece`; None if nothing is to be done (`-f`, a rehearsal).

    Raises:
        UsageError: not of the form that mount(8) uses.
    """
    try:
        flags, names = getopt.gnu_getopt(list(arguments), "sfnvt:o:N:")
    except getopt.GetoptError as error:
        raise UsageError("understand", "mount.fleece", str(error), _USAGE) from error
    if len(names) != 2 or not all(names):
        raise UsageError("understand", "mount.fleece", f"{len(names)} names instead of two", _USAGE)
    if any(flag == "-N" for flag, _ in flags):
        raise UsageError("understand", "mount.fleece", "-N (a mount namespace) is not known", _USAGE)
    if any(flag == "-f" for flag, _ in flags):
        return None
    # What fstab calls it stands in /proc/mounts then, and 'mount -a' knows what is mounted already.
    command, rest = ["mount"], [_option("fsname", names[0])]
    snapshot = archive = None
    for name, value in split_options(*(text for flag, text in flags if flag == "-o")):
        if name in _COMMAND and value is not None:
            command += [f"{_COMMAND[name]}={value}"]
        elif name == "snapshot" and value:
            snapshot = value
        elif name == "archive" and value:
            archive = value
        else:
            rest.append(_option(name, value))
    if (snapshot is None) is not (archive is None):
        raise UsageError("understand", "mount.fleece", "snapshot= and archive= belong together", _USAGE)
    command.append(f"--repo={names[0]}")
    command += ["-o", ",".join(rest), "--"]
    if snapshot is not None and archive is not None:
        command += [snapshot, archive]
    return [*command, names[1]]


def _option(name: str, value: str | None) -> str:
    text = name if value is None else f"{name}={value}"
    return f'"{text}"' if "," in text else text


def _run(arguments: Sequence[str]) -> int:
    """Run `fleece` with `arguments` and return what mount(8) is to be told."""
    # mount(8) calls with a bare environment; the command lies beside this script or beside this Python.
    for folder in (Path(sys.argv[0]).resolve().parent, Path(sys.executable).parent):
        program = folder / "fleece"
        if os.access(program, os.X_OK):
            break
    else:
        print("mount.fleece: the command fleece is not beside it", file=sys.stderr)
        return _FAILED
    status = os.spawnv(os.P_WAIT, program, [str(program), *arguments])
    return {ExitCode.DONE: 0, ExitCode.USAGE: _WRONG_CALL}.get(status, _FAILED)  # type: ignore[call-overload,no-any-return]


def main() -> None:
    """The console script `mount.fleece`."""
    try:
        arguments = command_line(sys.argv[1:])
    except UsageError as error:
        print(f"mount.fleece: {error}", file=sys.stderr)
        sys.exit(_WRONG_CALL)
    sys.exit(0 if arguments is None else _run(arguments))
