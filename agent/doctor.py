"""What this host can do, what is missing, and the command that fixes it.

Every check looks and changes nothing: files are made without a name, locks are taken on those only.
"""

import fcntl
import importlib
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent.invocation import Invocation
from agent.places import run_dir, scratch_dir, state_dir
from core.errors import FleeceError, os_reason
from core.units import GIB, format_size

if TYPE_CHECKING:
    from agent.config import Config
    from agent.registry import Datastore

#: Seconds that a `--version` may take.
_VERSION_TIMEOUT_S: Final = 10
#: Free space below which a scratch folder breaks backups.
_SCRATCH_MINIMUM: Final = 2 * GIB
_NETWORK_FILE_SYSTEMS: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "fuse.sshfs", "9p", "glusterfs"})


class State(Enum):
    """How a check ended."""

    OK = "ok"
    INFO = "info"  #: something is not there that few need
    WARNING = "warning"  #: some of Fleece does not work, or not as well
    FAILED = "failed"  #: the main job does not work


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    detail: str  #: what is, in words
    fix: str = ""  #: a command or a sentence

    def to_json(self) -> dict[str, str]:
        """The check's part of the document."""
        return {"name": self.name, "state": self.state.value, "detail": self.detail, "fix": self.fix}


def missing_instructions(cpuinfo: str) -> list[str]:
    """Of what numpy is compiled for (x86-64-v2), what the processor in the text of /proc/cpuinfo lacks."""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = found[1].split() if found else []
    return [name for name in ("cx16", "popcnt", "ssse3", "sse4_1", "sse4_2") if flags and name not in flags]


def _processor() -> Iterator[Check]:
    if os.uname().machine != "x86_64" or not Path("/proc/cpuinfo").exists():
        return
    missing = missing_instructions(Path("/proc/cpuinfo").read_text(errors="replace"))
    if missing:
        yield Check(
            "processor", State.FAILED, f"it lacks {', '.join(missing)}: programs die of illegal instructions",
            "give this virtual machine another type of processor, x86-64-v2 or 'host'",
        )  # fmt: skip


def _python() -> Iterator[Check]:
    yield from _processor()
    yield Check("python", State.OK, f"{sys.version.split()[0]} in {sys.prefix}")
    for module, purpose, fix, state in (
        ("nbd", "reading virtual machines", "apt install python3-libnbd", State.FAILED),
        ("pyfuse3", "fleece mount", "apt install fuse3 libfuse3-3, then 'make setup'", State.WARNING),
        ("qemu.qmp", "talking to QEMU", "make setup", State.FAILED),
        ("isal", "checksums of every chunk", "make setup", State.FAILED),
        ("zstandard", "compression of every chunk", "make setup", State.FAILED),
    ):
        try:
            importlib.import_module(module)
        except ImportError as error:
            yield Check(f"module {module}", state, f"missing, needed for {purpose} ({error})", fix)
        else:
            yield Check(f"module {module}", State.OK, f"there, for {purpose}")


def _version(program: str) -> tuple[int, int] | None:
    """Major and minor version that `program --version` prints."""
    try:
        answer = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"version (\d+)\.(\d+)", answer.stdout)
    return (int(found[1]), int(found[2])) if found else None


def _qemu() -> Iterator[Check]:
    systems = [name for name in ("qemu-system-x86_64", "qemu-system-aarch64", "kvm") if shutil.which(name)]
    if not systems:
        yield Check(
            "qemu", State.INFO, "no QEMU on the PATH; virtual machines whose QEMU lies elsewhere work too",
            "apt install qemu-system-x86",
        )  # fmt: skip
    for name in systems[:1]:
        version = _version(name)
        words = "unknown version" if version is None else f"version {version[0]}.{version[1]}"
        if version is None:
            yield Check("qemu", State.WARNING, f"{name} does not tell its version", f"run {name} --version")
        elif version < (7, 2):
            yield Check("qemu", State.FAILED, f"{words}: too old", "QEMU 7.2 or newer is needed, better 9.1")
        elif version < (8, 2):
            yield Check("qemu", State.OK, f"{words}: works in compatibility mode, without iothreads", "9.1 is better")
        elif version < (9, 1):
            yield Check("qemu", State.OK, f"{words}: works, but not for a VM with iothreads", "9.1 is better")
        else:
            yield Check("qemu", State.OK, words)
    for program, purpose in (("qemu-nbd", "qcow2 files as source"), ("qemu-img", "looking at images")):
        if shutil.which(program) is None:
            yield Check(program, State.WARNING, f"missing, needed for {purpose}", "apt install qemu-utils")
        else:
            yield Check(program, State.OK, f"there, for {purpose}")
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        yield Check("kvm", State.OK, "/dev/kvm can be used; Fleece itself does not need it")
    else:
        yield Check("kvm", State.INFO, "/dev/kvm cannot be used; Fleece itself does not need it, guests are slow")
    if Path("/sys/module/nbd").is_dir():
        yield Check("kernel module nbd", State.OK, "loaded")
    else:
        yield Check(
            "kernel module nbd", State.INFO, "not loaded; only needed to use a backup as block device",
            "modprobe nbd nbds_max=16",
        )  # fmt: skip
    yield from _optional_tools()


def _optional_tools() -> Iterator[Check]:
    """Programs that `fleece nbd` is made with."""
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None or not _succeeds([nbdkit, "--dump-plugin", "python"]):
        yield Check(
            "nbdkit", State.INFO, "it, or its plugin for Python, is missing; only needed by fleece nbd for backups",
            "apt install nbdkit nbdkit-plugin-python",
        )  # fmt: skip
    else:
        yield Check("nbdkit", State.OK, "there, with its plugin for Python: backups can be connected")
    if shutil.which("nbdfuse") is None:
        yield Check(
            "nbdfuse", State.INFO, "missing; only needed by fleece nbd connect --files", "apt install libnbd-bin"
        )
    else:
        yield Check("nbdfuse", State.OK, "there, for fleece nbd connect --files")


def _succeeds(line: list[str]) -> bool:
    try:
        return subprocess.run(line, capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _fuse() -> Iterator[Check]:
    fuse = Path("/dev/fuse")
    if not fuse.exists():
        yield Check("fuse", State.WARNING, "/dev/fuse is missing: fleece mount does not work", "modprobe fuse")
    elif not os.access(fuse, os.R_OK | os.W_OK):
        yield Check("fuse", State.WARNING, "/dev/fuse is not for this user", "chmod 666 /dev/fuse")
    elif shutil.which("fusermount3") is None:
        yield Check("fuse", State.WARNING, "fusermount3 is missing: fleece mount does not work", "apt install fuse3")
    else:
        yield Check("fuse", State.OK, "/dev/fuse and fusermount3 are there")


def _hashing() -> Iterator[Check]:
    from datastore.sha256 import implementation

    yield Check("sha-256", State.OK, f"{implementation()} is the quickest here ('fleece benchmark' has figures)")


def _parent_that_exists(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _folder(name: str, path: Path, purpose: str) -> Check:
    """Whether `path` can be written, or made."""
    there = _parent_that_exists(path)
    if not there.is_dir():
        return Check(name, State.FAILED, f"{there} is no folder", f"move it away: {path} is needed for {purpose}")
    if os.access(there, os.W_OK | os.X_OK):
        return Check(name, State.OK, f"{path} is writable" if there == path else f"{path} will be made when needed")
    return Check(
        name, State.WARNING, f"{path} is not writable for this user, needed for {purpose}",
        f"install -d -o {os.geteuid()} {path}",
    )  # fmt: skip


def file_system_of(path: Path) -> str:
    """The type of the file system that holds `path`, "" if unknown."""
    try:
        wanted = os.stat(path).st_dev  # noqa: PTH116  # Path.stat would do the same, twice as long to read
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            major, _, minor = left.split()[2].partition(":")
            if os.makedev(int(major), int(minor)) == wanted:
                return right.split()[0]
    except (OSError, ValueError, IndexError):
        return ""
    return ""


def _folders(invocation: Invocation) -> Iterator[Check]:
    yield _folder("run folder", run_dir(), "sockets and locks")
    yield _folder("state folder", state_dir(), "the list of datastores")
    try:
        scratch = invocation.config.scratch or scratch_dir()
    except FleeceError:
        scratch = scratch_dir()
    check = _folder("scratch folder", scratch, "fleecing images")
    if check.state is State.OK:
        there = _parent_that_exists(scratch)
        free, kind = shutil.disk_usage(there).free, file_system_of(there)
        detail = f"{check.detail}, {format_size(free)} free" + (f" on {kind}" if kind else "")
        if kind in ("tmpfs", "ramfs"):
            check = Check(
                "scratch folder", State.WARNING, f"{detail}: what guests write during a backup takes memory",
                "name a folder on a disk of its own with 'scratch' in the configuration",
            )  # fmt: skip
        elif free < _SCRATCH_MINIMUM:
            check = Check(
                "scratch folder", State.WARNING, f"{detail}: backups of busy guests break below 2 GiB",
                "make room, or name another folder with 'scratch' in the configuration",
            )  # fmt: skip
        else:
            check = Check("scratch folder", State.OK, detail)
    yield check


def _has_nameless_files(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600))
    except OSError:
        return False
    return True


def _has_open_file_locks(folder: Path) -> bool:
    """Whether a lock can belong to an open file; tried on a file without a name."""
    command = getattr(fcntl, "F_OFD_SETLK", 37)
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        return True  # nothing to try it on without leaving a trace
    try:
        fcntl.fcntl(descriptor, command, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def check_datastore(name: str, path: Path) -> Iterator[Check]:
    """The checks of one datastore."""
    from datastore.pbs import find_store, read_config

    title = f"datastore {name}"
    try:
        chunks = (path / ".chunks").stat()
    except OSError as error:
        yield Check(
            title, State.FAILED, f"{path} cannot be used: {os_reason(error)}", f"fleece datastore create {path}"
        )
        return
    if not stat.S_ISDIR(chunks.st_mode):
        yield Check(title, State.FAILED, f"{path}/.chunks is no folder", "restore the folder from elsewhere")
        return
    free, kind = shutil.disk_usage(path).free, file_system_of(path)
    on = f" on {kind}" if kind else ""
    if not os.access(path, os.W_OK):
        yield Check(
            title, State.WARNING, f"{path}{on} is read-only for this user: restore and mount work", "run as root"
        )
        return
    yield Check(title, State.OK, f"{path}, {format_size(free)} free{on}")
    if not _has_nameless_files(path):
        yield Check(title, State.INFO, f"{path}{on} has no files without a name; temporary files serve instead")
    if not _has_open_file_locks(path):
        yield Check(title, State.FAILED, f"{path}{on} has no locks on open files", "use another file system")
    store = find_store(path)
    if store is not None:
        mode = f", in maintenance mode {store.maintenance}" if store.maintenance else ""
        state = State.WARNING if store.maintenance else State.OK
        yield Check(title, state, f"also the datastore {store.name!r} of the PBS on this host{mode}; locks are shared")
    elif kind in _NETWORK_FILE_SYSTEMS:
        yield Check(
            title, State.WARNING, f"{path} is on {kind}: a PBS on another host does not see Fleece's locks",
            "let only one of them write, or run Fleece on the PBS host",
        )  # fmt: skip
    elif (path / ".gc-status").exists() and not read_config():
        yield Check(
            title, State.INFO, "a PBS may have used it; a PBS on another host does not see Fleece's locks",
            "let only one of them write at a time",
        )  # fmt: skip


def _configuration(invocation: Invocation) -> Iterator[Check]:
    from agent.places import config_file

    named = invocation.config_path or os.environ.get("FLEECE_CONFIG")
    path = Path(named) if named else config_file()
    try:
        config = invocation.config
        registered = invocation.registry.datastores()
    except FleeceError as error:
        yield Check("configuration", State.FAILED, str(error), error.hint or "correct the file")
        return
    if not path.exists():
        yield Check("configuration", State.INFO, f"{path} is not there; everything can be said on the command line")
    else:
        sections = f"{len(config.repository)} repositories, {len(config.vm)} virtual machines"
        yield Check("configuration", State.OK, f"{path}: {sections}")
    from agent.hooks import check_script

    hooks = {config.hook, *(getattr(job, "hook", None) for job in config.job.values())}
    for script in sorted(path for path in hooks if path is not None):
        try:
            check_script(script)
            yield Check("hook", State.OK, f"{script} can be run")
        except FleeceError as error:
            yield Check("hook", State.FAILED, str(error), error.hint)
    yield from _monitoring(config)
    for name, vm in config.vm.items():
        if vm.libvirt is not None:
            yield _domain(name, vm.libvirt, vm.connect)
        if vm.qmp is None or vm.libvirt is not None:
            continue
        if vm.qmp.is_socket():
            yield Check(f"vm {name}", State.OK, f"QMP socket {vm.qmp} is there")
        elif vm.disks:
            yield Check(f"vm {name}", State.OK, "not running; its disks are backed up by path")
        else:
            yield Check(
                f"vm {name}", State.WARNING, f"no QMP socket {vm.qmp}: the VM does not run, and no [vm.{name}.disks]",
                f"start QEMU with -qmp unix:{vm.qmp},server=on,wait=off",
            )  # fmt: skip
    places = {name: section.path for name, section in config.repository.items() if section.path is not None}
    places |= {name: datastore.path for name, datastore in registered.items() if name not in places}
    if not places:
        yield Check("datastores", State.INFO, "none known", "fleece datastore create /backup/main")
    buckets = {datastore.path: datastore for datastore in registered.values() if datastore.s3 is not None}
    for name, folder in sorted(places.items()):
        if folder in buckets:
            yield from _bucket(invocation, name, buckets[folder])
        else:
            yield from check_datastore(name, folder)


def _domain(name: str, domain: str, uri: str | None) -> Check:
    from hypervisor.domain_address import DomainAddress, default_uri
    from hypervisor.libvirt_host import domain_names

    uri = uri or default_uri()
    try:
        known = domain_names(uri)
    except FleeceError as error:
        return Check(f"vm {name}", State.FAILED, str(error), error.hint)
    if domain in known or DomainAddress.is_uuid(domain):
        return Check(f"vm {name}", State.OK, f"libvirt at {uri} has the domain {domain}")
    return Check(
        f"vm {name}", State.WARNING, f"libvirt at {uri} has no domain {domain}", "'virsh list --all' lists them"
    )


def _monitoring(config: "Config") -> Iterator[Check]:
    from agent.monitoring.checks import find_faults

    faulty = set()
    for name, why, fix in find_faults(config):
        faulty.add(name)
        yield Check(name, State.WARNING, why, fix or "docs/monitoring.md explains what it needs")
    for name in config.notify:
        if f"notification {name}" not in faulty:
            yield Check(f"notification {name}", State.OK, f"what it needs is there ('fleece notify test {name}')")


def _bucket(invocation: Invocation, name: str, datastore: "Datastore") -> Iterator[Check]:
    """The checks of a datastore in a bucket; nothing is sent."""
    from agent.bucket_stores import MAINTENANCE, listed_maintenance

    place, title = datastore.s3, f"datastore {name}"
    assert place is not None
    try:
        invocation.endpoints.endpoint(place.endpoint)
    except FleeceError as error:
        yield Check(title, State.FAILED, str(error), error.hint)
    mode = listed_maintenance(datastore.path)
    if mode is None:
        free = shutil.disk_usage(datastore.path).free
        where = f"bucket {place.bucket} of endpoint {place.endpoint}, cache {datastore.path}, {format_size(free)} free"
        yield Check(title, State.OK, where)
    else:
        words, fix = MAINTENANCE[mode]
        state = State.WARNING if mode in ("s3-refresh", "incomplete") else State.FAILED
        yield Check(title, state, f"cache {datastore.path}: {words}", fix.format(name=name))


def examine(invocation: Invocation) -> list[Check]:
    """All checks; a check that breaks is a failed one."""
    parts: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("qemu", _qemu),
        ("fuse", _fuse),
        ("sha-256", _hashing),
        ("folders", lambda: _folders(invocation)),
        ("configuration", lambda: _configuration(invocation)),
    ]
    checks = []
    for name, part in parts:
        try:
            checks += list(part())
        except (OSError, ImportError, FleeceError) as error:
            checks.append(Check(name, State.FAILED, f"could not be checked: {error}", "run again with --debug"))
    return checks
