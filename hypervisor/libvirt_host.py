"""libvirt on this host: its domains, their state, descriptions and monitors. The only module that uses its bindings.

The bindings (Debian: python3-libvirt) are optional and imported at the first connection. Their calls block, so each
runs in a worker thread; what they raise becomes an error of this room. docs/libvirt.md.
"""

import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from core.errors import FleeceError, NotFoundError
from core.limits import in_io_thread, io_limiter
from hypervisor.checked import of_type, printable
from hypervisor.domain_address import DomainAddress, is_elsewhere
from hypervisor.errors import (
    LibvirtError,
    QmpAnswerError,
    QmpCommandError,
    QmpConnectError,
    QmpError,
    QmpLostError,
    VmStateError,
)
from hypervisor.unix_socket import Peer, process_start_time

T = TypeVar("T")

#: Seconds between two tries of a command while another job of libvirt has the domain.
_RETRY_S: Final = 0.5
#: Bytes of `/proc/PID/cmdline` that are looked at; domains with hundreds of devices have some 100 KiB.
_MAX_COMMAND_LINE: Final = 4 * 1024 * 1024
#: What a domain does, by libvirt's numbers (`virDomainJobOperation`).
_OPERATIONS: Final = {
    1: "it is being started", 2: "it is being saved", 3: "it is being restored", 4: "it migrates to this host",
    5: "it migrates away", 6: "a snapshot of it is being made", 7: "it goes back to a snapshot",
    8: "its memory is being dumped", 9: "a backup of libvirt's own runs", 10: "a snapshot of it is being deleted",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DomainState:
    """One domain as libvirt describes it."""

    name: str
    uuid: str
    active: bool  #: it has a QEMU (running, paused, or asleep)
    persistent: bool  #: its definition outlives its QEMU
    xml: str  #: what it will be when it is started next; without secrets, such as passwords of displays
    live_xml: str | None  #: what it is now; None if it is not active
    saved: bool = False  #: what it had in memory is kept, and it goes on from there when it is started (managed save)


class Libvirt:
    """A connection, for worker threads; made by `connected`."""

    def __init__(self, uri: str, lib: Any, qemu: Any, connection: Any) -> None:
        self.uri: Final = uri
        self.lib: Final = lib  #: the module `libvirt`
        self.qemu: Final = qemu  #: the module `libvirt_qemu`
        self.connection: Final = connection  #: a `virConnect`

    async def call(self, what: str, where: str, work: Callable[..., T], *args: object) -> T:
        """Run `work(*args)`, calls of the bindings, in a thread; cancellation leaves the thread behind.

        Raises:
            NotFoundError: libvirt has no such domain.
            LibvirtError: what the bindings raise.
        """
        try:
            return await trio.to_thread.run_sync(work, *args, abandon_on_cancel=True, limiter=io_limiter())
        except self.lib.libvirtError as error:
            raise self.translated(error, what, where) from error

    def translated(self, error: Any, what: str, where: str) -> FleeceError:
        """`error` of the bindings as one of this room."""
        why = printable(str(error.get_error_message() or error), 2000)
        if error.get_error_code() == self.lib.VIR_ERR_NO_DOMAIN:
            return NotFoundError(what, where, "libvirt has no such domain", "'virsh list --all' lists them")
        if error.get_error_code() in (self.lib.VIR_ERR_OPERATION_TIMEOUT, self.lib.VIR_ERR_RESOURCE_BUSY):
            return VmStateError(what, where, why, "try again when the job that has the domain is done")
        return LibvirtError(what, where, why)

    def find(self, domain: str) -> Any:
        """The domain of that UUID or name. In a thread; raises what the bindings raise."""
        if DomainAddress.is_uuid(domain):
            with contextlib.suppress(self.lib.libvirtError):
                return self.connection.lookupByUUIDString(domain)
        return self.connection.lookupByName(domain)

    def state_of(self, domain: Any) -> DomainState:
        """In a thread; raises what the bindings raise."""
        active = bool(domain.isActive())
        live = None
        if active:
            with contextlib.suppress(self.lib.libvirtError):  # it has ended in between
                live = domain.XMLDesc(0)
        return DomainState(
            name=domain.name(),
            uuid=domain.UUIDString(),
            active=live is not None,
            persistent=bool(domain.isPersistent()),
            xml=domain.XMLDesc(self.lib.VIR_DOMAIN_XML_INACTIVE),
            live_xml=live,
            saved=live is None and bool(domain.hasManagedSaveImage(0)),
        )


@asynccontextmanager
async def connected(uri: str) -> AsyncIterator[Libvirt]:
    """A connection to the libvirt at `uri` while the block runs.

    Raises:
        LibvirtError: the bindings are missing, nothing answers, it is no libvirt of QEMU, or one of another host.
    """
    lib, qemu = await in_io_thread(_bindings_for, uri)
    try:
        connection = await trio.to_thread.run_sync(_opened, lib, uri, abandon_on_cancel=True, limiter=io_limiter())
    except lib.libvirtError as error:
        raise LibvirtError(
            "connect to libvirt at",
            uri,
            printable(str(error.get_error_message() or error), 2000),
            "is libvirtd running?",
        ) from error
    try:
        yield Libvirt(uri, lib, qemu, connection)
    finally:
        # Closing says good-bye on the socket, which does not wait for an answer; calls that were left behind keep it.
        with contextlib.suppress(lib.libvirtError):
            connection.close()


def _opened(lib: Any, uri: str) -> Any:
    """A connection to a libvirt of this host; raises what the bindings raise.

    Raises:
        LibvirtError: it is one of another host. What runs there is out of reach, and disks of what does not run would
            be looked for here, where others may have the same paths.
    """
    if not is_elsewhere(uri):
        connection = lib.open(uri)
        if not is_elsewhere(str(connection.getURI())):  # libvirt.conf may have given it another name
            return connection
        connection.close()
    raise LibvirtError("use the libvirt at", uri, "it is on another host", "run fleece there")


def _bindings_for(uri: str) -> tuple[Any, Any]:
    try:
        return bindings()
    except ImportError as error:
        raise LibvirtError(
            "use libvirt at", uri, "its Python bindings are missing", "apt-get install python3-libvirt"
        ) from error


def bindings() -> tuple[Any, Any]:
    """The modules `libvirt` and `libvirt_qemu`.

    Raises:
        ImportError: they are not installed.
    """
    import libvirt
    import libvirt_qemu

    # The library's own handler writes every error to standard error.
    libvirt.registerErrorHandler(_ignore, None)
    return libvirt, libvirt_qemu


def _ignore(_context: object, _error: object) -> None:
    pass


# -- domains ----------------------------------------------------------------------------------------------------------


async def domain_state(address: DomainAddress) -> DomainState:
    """The domain at `address`.

    Raises:
        NotFoundError: there is none.
        LibvirtError: libvirt cannot be asked.
    """
    async with connected(address.uri) as host:
        return await host.call("look at", str(address), lambda: host.state_of(host.find(address.domain)))


def domain_names(uri: str) -> list[str]:
    """Names of all domains, sorted. Blocks.

    Raises:
        LibvirtError: libvirt cannot be asked.
    """
    lib, _ = _bindings_for(uri)
    try:
        connection = _opened(lib, uri)
        try:
            return sorted(domain.name() for domain in connection.listAllDomains())
        finally:
            connection.close()
    except lib.libvirtError as error:
        raise LibvirtError("list the domains of", uri, printable(str(error), 2000), "is libvirtd running?") from error


async def volume_path(uri: str, pool: str, volume: str) -> str:
    """Path of a volume of a storage pool.

    Raises:
        LibvirtError: there is none, or the pool is not active.
    """

    def work(host: Libvirt) -> str:
        path = host.connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path()
        return of_type(path, str, f"{uri}, volume {volume}")

    async with connected(uri) as host:
        return await host.call("find the volume", f"{pool}/{volume}", work, host)


async def check_no_job(address: DomainAddress) -> None:
    """Refuse while a job of libvirt's has the domain: a migration, a save, a backup or snapshot of its own.

    Raises:
        VmStateError: one has it.
        NotFoundError, LibvirtError: as `domain_state`.
    """

    def work(host: Libvirt) -> tuple[int, int]:
        stats = host.find(address.domain).jobStats()
        return int(stats.get("type", 0)), int(stats.get("operation", 0))

    async with connected(address.uri) as host:
        kind, operation = await host.call("look for jobs of", str(address), work, host)
        if kind in (host.lib.VIR_DOMAIN_JOB_BOUNDED, host.lib.VIR_DOMAIN_JOB_UNBOUNDED):
            raise VmStateError(
                "back up",
                str(address),
                f"a job of libvirt's has it: {_OPERATIONS.get(operation, 'which one it does not say')}",
                "try again when it has ended; 'virsh domjobinfo' shows it",
            )


# -- the monitor ------------------------------------------------------------------------------------------------------


class MonitorSession:
    """QMP through libvirt, which holds the monitor: commands as `qmp.Commands` promises them."""

    def __init__(self, host: Libvirt, address: DomainAddress, domain: Any) -> None:
        self._host, self._address, self._domain = host, address, domain
        self._descriptor: int | None = None

    def send_fd(self, fd: int) -> None:
        """Hand a copy of `fd` over with the next command."""
        self._descriptor = os.dup(fd)

    async def execute(self, command: str, arguments: Mapping[str, object] | None) -> Any:
        """As `Qmp.execute`; waits as long as another job of libvirt's has the domain."""
        text = json.dumps({"execute": command, **({"arguments": arguments} if arguments is not None else {})})
        descriptor, self._descriptor = self._descriptor, None
        lib = self._host.lib
        try:
            while True:
                try:
                    answer = await trio.to_thread.run_sync(
                        self._run, text, descriptor, abandon_on_cancel=descriptor is None, limiter=io_limiter()
                    )
                    break
                except lib.libvirtError as error:
                    if error.get_error_code() != lib.VIR_ERR_OPERATION_TIMEOUT:
                        raise self._failed(error, command) from error
                await trio.sleep(_RETRY_S)
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return _result(answer, str(self._address), command)

    def _run(self, text: str, descriptor: int | None) -> str:
        if descriptor is None:
            return str(self._host.qemu.qemuMonitorCommand(self._domain, text, 0))
        answer, files = self._host.qemu.qemuMonitorCommandWithFiles(self._domain, text, [descriptor], 0)
        for file in files:
            file.close()
        return str(answer)

    def _failed(self, error: Any, command: str) -> FleeceError:
        why = printable(str(error.get_error_message() or error), 2000)
        what = f"run {command} in"
        if error.get_error_code() == self._host.lib.VIR_ERR_OPERATION_UNSUPPORTED:
            return QmpCommandError(str(self._address), command, "Unsupported", why)
        return QmpLostError(what, str(self._address), why, "the domain has ended, or libvirtd has")


def _result(answer: str, where: str, command: str) -> Any:
    where = f"{where}, answer to {command}"
    try:
        value = of_type(json.loads(answer), dict, where)
    except (ValueError, RecursionError) as error:
        raise QmpAnswerError("understand", where, printable(str(error))) from error
    if "return" in value:
        return value["return"]
    refusal = of_type(value.get("error"), dict, where)
    raise QmpCommandError(
        where.partition(", answer to")[0],
        command,
        printable(str(refusal.get("class", "")), 100),
        printable(str(refusal.get("desc", "")), 2000),
    )


@asynccontextmanager
async def monitor(address: DomainAddress, timeout_s: float) -> AsyncIterator[tuple[MonitorSession, Peer]]:
    """The monitor of a running domain while the block runs, and the process of its QEMU.

    Raises:
        QmpConnectError: libvirt does not answer, has no such domain, or it does not run on this host.
    """
    where = str(address)
    async with contextlib.AsyncExitStack() as stack:
        try:
            with trio.fail_after(timeout_s):
                host = await stack.enter_async_context(connected(address.uri))
                domain = await host.call("find", where, host.find, address.domain)
                state = await host.call("look at", where, host.state_of, domain)
                if not state.active or state.live_xml is None:
                    raise QmpConnectError("connect to the QEMU of", where, "the domain does not run")
                peer = await in_io_thread(_qemu_of, state)
        except QmpError:
            raise
        except FleeceError as error:
            raise QmpConnectError("connect to the QEMU of", where, error.why, error.hint) from error
        except trio.TooSlowError as error:
            raise QmpConnectError(
                "connect to the QEMU of", where, f"libvirt does not answer within {timeout_s:g} s"
            ) from error
        if peer is None:
            raise QmpConnectError(
                "connect to the QEMU of",
                where,
                "its process is not to be seen from here",
                "run fleece on the host of the domain, as root or as the user of its QEMU",
            )
        yield MonitorSession(host, address, domain), peer


def _qemu_of(state: DomainState) -> Peer | None:
    """The QEMU of a domain: the one process of its user whose command line has the UUID and the name.

    libvirt tells no process id, and its pid files lie where only its own mounts may show them.
    """
    from hypervisor.domain_xml import parse_domain

    owner = parse_domain(state.live_xml or "").owner
    uid = os.geteuid() if owner is None else owner
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if folder.stat().st_uid not in (uid, 0):
                continue
            with (folder / "cmdline").open("rb") as file:
                arguments = file.read(_MAX_COMMAND_LINE).split(b"\0")
            if _is_of(arguments, state):
                pid = int(folder.name)
                status = folder.stat()
                found.append(Peer(pid, status.st_uid, status.st_gid, process_start_time(pid)))
    return found[0] if len(found) == 1 else None


def _is_of(arguments: list[bytes], state: DomainState) -> bool:
    name = f"guest={state.name.replace(',', ',,')}".encode()
    pairs = list(pairwise(arguments))
    return (b"-uuid", state.uuid.encode()) in pairs and any(
        option == b"-name" and (value == name or value.startswith(name + b",")) for option, value in pairs
    )


# -- defining ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """What libvirt knows of the domain that is to be defined."""

    taken: DomainState | None  #: the domain that has the name
    uuid_taken_by: str | None  #: name of the domain that has the UUID
    saved: bool  #: the domain of that name has a managed save: memory that belongs to its disks as they are
    users: Mapping[str, str]  #: names of domains by the paths of disks that they have


async def look_around(uri: str, name: str, uuid: str) -> Known:
    """What stands in the way of a domain of that name and UUID (may be empty).

    Raises:
        LibvirtError: libvirt cannot be asked.
    """
    from hypervisor.domain_xml import parse_domain

    def work(host: Libvirt) -> Known:
        taken, saved, by_uuid = None, False, None
        users: dict[str, str] = {}
        for domain in host.connection.listAllDomains():
            try:
                state = host.state_of(domain)
                if state.name == name:
                    taken, saved = state, bool(domain.hasManagedSaveImage(0))
            except host.lib.libvirtError as error:
                if error.get_error_code() == host.lib.VIR_ERR_NO_DOMAIN:
                    continue  # a transient one that has ended meanwhile
                raise
            if uuid and state.uuid == uuid:
                by_uuid = state.name
            for disk in parse_domain(state.live_xml or state.xml, f"libvirt's description of {state.name}").disks:
                if disk.kind in ("file", "block"):
                    users.setdefault(os.path.realpath(disk.source), state.name)
        return Known(taken, by_uuid, saved, users)

    async with connected(uri) as host:
        return await host.call("look at the domains of", uri, work, host)


async def define(uri: str, xml: str, name: str, *, start: bool) -> None:
    """Define the domain, instead of one of that name that does not run, and start it.

    Raises:
        LibvirtError: libvirt refuses; with `start` the domain may be defined all the same, as the message says.
    """
    where = str(DomainAddress(uri, name))

    def forget(host: Libvirt) -> None:
        """What libvirt keeps of the former disks: memory that belongs to them, and names of bitmaps in them."""
        try:
            domain = host.connection.lookupByName(name)
        except host.lib.libvirtError:
            return
        if domain.hasManagedSaveImage(0):
            domain.managedSaveRemove(0)
        for checkpoint in domain.listAllCheckpoints(0):
            checkpoint.delete(host.lib.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)

    async with connected(uri) as host:
        await host.call("replace the domain", where, forget, host)
        domain = await host.call("define the domain", where, host.connection.defineXML, xml)
        if start:
            await host.call("start the domain, which is defined,", where, domain.create)
