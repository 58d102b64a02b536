"""`fleece vzdump-hook`: what Fleece does as the `script:` of vzdump. docs/hooks.md, "As vzdump's script".

vzdump calls `SCRIPT PHASE [MODE VMID]` with an environment of a few variables of its own and nothing else, takes any
exit code but 0 as a failure, and writes down all that is printed.
"""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, get_args

from pydantic import Field

from agent.config_types import AbsolutePath, NamespaceText, Owner, Section, checked
from agent.errors import InterruptedBySignalError
from agent.job_sections import Duration
from core.errors import FleeceError, NotFoundError, UsageError, os_reason

if TYPE_CHECKING:
    from agent.config import Config

JobPhase = Literal["job-init", "job-start", "job-end", "job-abort"]
GuestPhase = Literal["backup-start", "pre-stop", "pre-restart", "post-restart", "backup-end", "backup-abort", "log-end"]
JOB_PHASES: Final[tuple[str, ...]] = get_args(JobPhase)
GUEST_PHASES: Final[tuple[str, ...]] = get_args(GuestPhase)
MODES: Final = ("stop", "suspend", "snapshot")
#: Variables that vzdump sets.
VARIABLES: Final = ("STOREID", "DUMPDIR", "VMTYPE", "HOSTNAME", "TARGET", "LOGFILE")
#: vzdump takes no heed of a failure in these.
UNHEEDED: Final = ("backup-abort", "log-end", "job-abort")
_TYPES: Final = {"qemu": "vm", "lxc": "ct"}
#: Characters of pxar's patterns that mean something.
_SPECIAL: Final = "\\*?[]!"


def _check_phase(text: str) -> None:
    if text not in JOB_PHASES + GUEST_PHASES:
        raise UsageError("use the phase", repr(text), f"vzdump has {', '.join(JOB_PHASES + GUEST_PHASES)}")


Phase = Annotated[str, checked(_check_phase)]


class VzdumpHookSection(Section):
    """`[vzdump-hook]`: what is done when vzdump calls."""

    store: bool = False  #: at backup-end: store the archive that vzdump has written
    required: bool = True  #: what fails here fails vzdump's backup
    repository: str | None = None
    ns: NamespaceText | None = None
    owner: Owner | None = None
    scripts: list[AbsolutePath] = Field(default_factory=list)  #: called at every phase, in order
    timeout: Duration = "10m"  #: of each script
    jobs: dict[Phase, list[str]] = Field(default_factory=dict)  #: jobs of this configuration that are run at a phase


@dataclass(frozen=True, slots=True)
class VzdumpCall:
    """One call by vzdump."""

    phase: str
    mode: str | None = None
    vmid: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> "VzdumpCall":
        """Read the arguments and the environment.

        Raises:
            UsageError: a phase that vzdump does not have, or arguments that it does not give.
        """
        if not arguments:
            raise UsageError("understand", "the call", "no phase is named", "vzdump calls PHASE [MODE VMID]")
        phase, *guest = arguments
        _check_phase(phase)
        variables = {name: environment[name] for name in VARIABLES if environment.get(name)}
        if phase in JOB_PHASES:
            if guest:
                raise UsageError("understand", f"the phase {phase}", "it has no arguments")
            return cls(phase, variables=variables)
        if len(guest) != 2 or guest[0] not in MODES or not (guest[1].isascii() and guest[1].isdigit()):
            why = f"MODE ({', '.join(MODES)}) and the number of the guest belong to it"
            raise UsageError("understand", f"the phase {phase}", why)
        return cls(phase, guest[0], guest[1], variables)

    @property
    def arguments(self) -> tuple[str, ...]:
        """As they were given."""
        return (self.phase,) if self.mode is None or self.vmid is None else (self.phase, self.mode, self.vmid)


@dataclass(frozen=True, slots=True)
class Doing:
    """What a call may make happen; the command line does it."""

    script: "Callable[[Path, VzdumpCall], None]"
    job: Callable[[str], None]
    store: "Callable[[VzdumpCall, Path], None]"


def handle(call: VzdumpCall, config: "Config", doing: Doing, say: Callable[[str], None]) -> bool:
    """Do what the configuration says of the call: scripts, then the archive, then jobs. Each is tried, whatever failed.

    Returns:
        True if nothing failed, or nothing that vzdump should heed.

    Raises:
        InterruptedBySignalError: a signal came.
    """
    section = config.vzdump_hook
    todo: list[tuple[str, Callable[[], None]]] = [
        (f"script {path}", lambda path=path: doing.script(path, call)) for path in section.scripts  # type: ignore[misc]
    ]  # fmt: skip
    if section.store and call.phase == "backup-end":
        todo.append(("storing the archive", lambda: doing.store(call, archive_of(call))))
    todo += [(f"job {name}", lambda name=name: doing.job(name)) for name in section.jobs.get(call.phase, ())]  # type: ignore[misc]
    failed = False
    for what, work in todo:
        try:
            work()
        except InterruptedBySignalError:
            raise  # vzdump is being ended: nothing more is begun
        except FleeceError as error:
            failed = True
            say(f"{what}: {error}")
    return not failed or not section.required or call.phase in UNHEEDED


def archive_of(call: VzdumpCall) -> Path:
    """The archive that vzdump has written.

    Raises:
        NotFoundError: there is none: vzdump has written to a Proxmox Backup Server or a provider.
        FleeceError: it is no regular file.
    """
    target = call.variables.get("TARGET", "")
    path = Path(target)
    if not path.is_absolute():
        raise NotFoundError(
            "find", "the archive", f"TARGET is {target!r}, no path of a file",
            "vzdump has no archive where its storage is a Proxmox Backup Server or a backup provider",
        )  # fmt: skip
    try:
        found = path.lstat()
    except OSError as error:
        raise FleeceError("look at the archive", target, os_reason(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise FleeceError("store the archive", target, "it is no regular file")
    return path


def group_of(call: VzdumpCall) -> str:
    """The group of stored archives: beside, not among, the snapshots that Fleece makes of the guest itself."""
    return f"{_TYPES.get(call.variables.get('VMTYPE', ''), 'host')}/vzdump-{call.vmid}"


def only(name: str) -> list[str]:
    """Patterns that leave out everything of a folder but the file `name` and what vzdump puts beside it."""
    escaped = "".join(f"\\{character}" if character in _SPECIAL else character for character in os.fspath(name))
    return ["/*", f"!/{escaped}", f"!/{escaped}.notes"]
