"""Errors of the room that talks to QEMU.

    FleeceError
    ├── QmpError                    talking to QEMU failed
    │   ├── QmpConnectError         no socket, nobody listens, no greeting
    │   ├── QmpCommandError         QEMU refused a command
    │   ├── QmpTimeoutError         QEMU did not answer in time; what became of the command is not known
    │   └── QmpLostError            QEMU is gone, or closed the socket
    ├── FormatError
    │   └── QmpAnswerError          QEMU (or who sits behind the socket) spoke nonsense
    ├── UsageError
    │   └── DiskNameError           disks cannot be named or chosen as asked
    ├── SourceError
    │   ├── VmUnsupportedError      this VM or QEMU cannot be backed up this way
    │   ├── FleecingError           the frozen view cannot be set up or taken down
    │   └── SnapshotBrokenError     the frozen view broke while it was read; the guest is fine
    ├── TargetError
    │   └── RollbackError           the disks of a running VM cannot be put aside, or put back
    ├── NbdDeviceError              no block device /dev/nbdX, or file, can be made of an export, or taken away again
    ├── NbdServerError              a disk cannot be served over NBD
    ├── BootTrialError              a machine cannot be started to see whether it lives
    ├── LibvirtError                libvirt cannot be reached, or refuses
    └── BusyError
        ├── VmStateError            not now: the VM migrates, has an I/O error, a block job runs, ...
        └── DiskInUseError          another process holds the disk's image

What the guest agent does wrong is no error of a backup: it goes on without a freeze and warns.
"""

from core.errors import BusyError, FleeceError, FormatError, SourceError, TargetError, UsageError


class QmpError(FleeceError):
    """Talking to QEMU failed."""


class QmpConnectError(QmpError):
    """No QMP session could be opened: no socket, nobody listens, or no greeting came."""


class QmpCommandError(QmpError):
    """QEMU understood `command` and refused it, with its own `error_class` and words (`desc`)."""

    def __init__(self, where: str, command: str, error_class: str, desc: str) -> None:
        self.command, self.error_class, self.desc = command, error_class, desc
        super().__init__(f"run {command} in", where, desc)


class QmpTimeoutError(QmpError):
    """QEMU did not answer in time; whether the command was carried out is not known."""


class QmpLostError(QmpError):
    """The socket closed: QEMU is gone. Whether a command that was under way was carried out is not known."""


class QmpAnswerError(FormatError):
    """An answer of QEMU is not of the form that its schema promises."""


class DiskNameError(UsageError):
    """Disks cannot be named, or chosen, as the configuration asks."""


class VmUnsupportedError(SourceError):
    """This VM, or this QEMU, cannot be backed up this way."""


class FleecingError(SourceError):
    """The frozen view of a VM's disks cannot be set up or taken down."""


class SnapshotBrokenError(SourceError):
    """The frozen view broke while it was read (fleecing image full, too slow, or unwritable); the guest is fine."""


class VmStateError(BusyError):
    """The VM is in a state in which no backup may start."""


class DiskInUseError(BusyError):
    """Another process holds the image of a disk."""


class RollbackError(TargetError):
    """The disks of a running VM cannot be put aside, or put back; the message says how the VM is left."""


class NbdDeviceError(FleeceError):
    """No block device `/dev/nbdX`, or file, can be made of an NBD export, or it cannot be taken away again."""


class NbdServerError(FleeceError):
    """A disk cannot be served over NBD."""


class LibvirtError(FleeceError):
    """libvirt cannot be reached, or refuses what is asked of it."""


class BootTrialError(FleeceError):
    """A machine cannot be started to see whether it comes to life; that it does not is no error."""
