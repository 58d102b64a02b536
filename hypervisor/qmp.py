"""QMP, QEMU's control socket, for trio: `async with connect(path) as qmp: await qmp.execute("query-block")`.

The only module that knows `qemu.qmp`, which speaks asyncio; each connection runs it on an event loop of its own inside
trio, opened and closed with the connection, so that callers never meet asyncio.

A QMP socket serves one client at a time: connect, do what is to be done, leave. Events in between two connections are
lost, therefore none are kept at all: poll states instead. docs/hypervisor.md, "Connecting".

Where libvirt holds the socket, commands go through libvirt: `connect("libvirt+qemu:///system#web")`.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, Protocol

import trio
from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import ConnectError, StateError
from qemu.qmp.qmp_client import ExecInterruptedError, ExecuteError

from core.errors import os_reason
from hypervisor.checked import field, objects, of_type, printable
from hypervisor.domain_address import DomainAddress
from hypervisor.errors import QmpAnswerError, QmpCommandError, QmpConnectError, QmpError, QmpLostError, QmpTimeoutError
from hypervisor.unix_socket import Peer, connect_unix, peer_of

#: Seconds for connecting and the greeting. QEMU greets at once unless another client holds the socket.
CONNECT_TIMEOUT_S: Final = 10.0
#: Seconds for one command. The slowest that is sent drains the guest's requests, on bad storage many seconds long.
COMMAND_TIMEOUT_S: Final = 120.0
#: Bytes of one answer. The largest honest one, the schema, has about 250 KB; long backing chains a few MB.
MAX_ANSWER: Final = 16 * 1024 * 1024
#: Seconds between attempts at a session when QEMU closes the connection at once.
_HUNG_UP_PAUSES_S: Final = (0.1, 0.3, 1.0)
#: Seconds for saying good-bye; what is not closed by then is dropped.
_CLOSE_TIMEOUT_S: Final = 5.0
#: Seconds between two looks of `Qmp.poll`.
_POLL_INTERVAL_S: Final = 0.05

#: File names that QEMU opens by a descriptor it was given: this and the number of a set.
FD_SET: Final = "/dev/fdset/"
_quiet = logging.getLogger("fleece.qmp")
_quiet.setLevel(logging.CRITICAL + 1)


class _Client(QMPClient):
    """A client that keeps no events and writes no log: both would grow for as long as the connection lasts."""

    logger = _quiet

    def __init__(self) -> None:
        super().__init__(None, MAX_ANSWER)
        self.logger = _quiet  # the library's own goes to stderr when nobody has set up logging

    async def _event_dispatch(self, msg: Message) -> None:
        pass

    def _cb_inbound(self, msg: Message) -> Message:
        return msg  # the library's own formats every message for a log that nobody reads

    def _cb_outbound(self, msg: Message) -> Message:
        return msg


class Commands(Protocol):
    """Who carries commands to QEMU."""

    async def execute(self, command: str, arguments: Mapping[str, object] | None) -> Any:
        """As `Qmp.execute`, without its limit of time."""
        ...

    def send_fd(self, fd: int) -> None:
        """Hand a copy of `fd` over, for the next command.

        Raises:
            QmpError: QEMU is gone.
        """
        ...


class Qmp:
    """An open QMP session; made by `connect`.

    Several commands may be in flight at once. After `QmpLostError` every further command raises it too.
    """

    def __init__(self, where: str, peer: Peer, session: Commands) -> None:
        self.where: Final = where  #: the socket, the way messages name it
        self.peer: Final = peer  #: the process that listens: QEMU
        self.version: tuple[int, int, int] = (0, 0, 0)  #: major, minor, micro
        self.package: str = ""  #: the distributor's own version, for people
        self.commands: frozenset[str] = frozenset()  #: what this QEMU understands
        self._session = session
        self._fd_lock = trio.Lock()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> Any:
        """Run `command` and return its answer, JSON as Python values; check them with `hypervisor.checked`.

        Cancelled, the connection stays usable and the answer is dropped when it comes; QEMU may well have carried
        the command out.

        Raises:
            QmpCommandError: QEMU refused.
            QmpLostError: QEMU is gone.
            QmpTimeoutError: no answer within `timeout_s`.
            QmpAnswerError: an answer that is none.
        """
        with trio.move_on_after(timeout_s):
            return await self._session.execute(command, arguments)
        raise QmpTimeoutError(
            f"run {command} in", self.where, f"no answer within {timeout_s:g} s", "its storage may hang"
        )

    async def transaction(self, actions: Sequence[Mapping[str, object]]) -> None:
        """Run `actions` (`{"type": ..., "data": {...}}`) all or none; nothing is sent for none. Raises as `execute`."""
        if actions:
            await self.execute("transaction", {"actions": list(actions)})

    async def qom_set(self, path: str, prop: str, value: object) -> None:
        """Set the property `prop` of the object at `path`. Raises as `execute`."""
        await self.execute("qom-set", {"path": path, "property": prop, "value": value})

    async def qom_get(self, path: str, prop: str) -> Any:
        """The property `prop` of the object at `path`. Raises as `execute`."""
        return await self.execute("qom-get", {"path": path, "property": prop})

    async def poll(
        self,
        command: str,
        done: Callable[[Any], bool],
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float,
        interval_s: float = _POLL_INTERVAL_S,
    ) -> Any:
        """Repeat `command` until `done(answer)`, and return that answer.

        Raises:
            QmpTimeoutError: not done within `timeout_s`; and as `execute`.
        """
        with trio.move_on_after(timeout_s):
            while True:
                answer = await self.execute(command, arguments)
                if done(answer):
                    return answer
                await trio.sleep(interval_s)
        raise QmpTimeoutError(f"wait by {command} for", self.where, f"not done within {timeout_s:g} s")

    async def get_fd(self, fd: int, name: str) -> None:
        """Give QEMU a copy of the descriptor `fd` under `name`, as address `{"type": "fd"}` of a server uses it."""
        await self._send_fd(fd, "getfd", {"fdname": name})

    async def add_fd(self, fd: int, *, opaque: str = "fleece") -> str:
        """Give QEMU a copy of the descriptor `fd` and return the file name `/dev/fdset/N` that opens it.

        The set lives until `remove_fd_set` and the last user has closed it; before QEMU 9.1 also for as long as any
        client is connected to a monitor, and while the machine stands still.
        """
        answer = await self._send_fd(fd, "add-fd", {"opaque": opaque})
        where = f"{self.where}, answer to add-fd"
        return f"{FD_SET}{field(of_type(answer, dict, where), 'fdset-id', int, where)}"

    async def remove_fd_set(self, filename: str) -> None:
        """Take back what `add_fd` gave, by its file name; who has it open in QEMU keeps it."""
        await self.execute("remove-fd", {"fdset-id": int(filename.rpartition("/")[2])})

    async def fd_sets(self) -> dict[str, list[dict[str, Any]]]:
        """The open descriptors behind each `/dev/fdset/N`: `fd`, the number in QEMU, and perhaps `opaque`.

        Raises:
            QmpError, QmpAnswerError: as `execute`.
        """
        where = f"{self.where}, query-fdsets"
        return {
            f"{FD_SET}{field(one, 'fdset-id', int, where)}": list(objects(one.get("fds"), where))
            for one in objects(await self.execute("query-fdsets"), where)
        }

    async def socket_folder(self) -> str | None:
        """The folder that libvirt made for this QEMU's own sockets, None without libvirt.

        Raises:
            QmpError, QmpAnswerError: as `execute`.
        """
        if DomainAddress.parse(self.where) is None:
            return None
        where = f"{self.where}, query-chardev"
        for device in objects(await self.execute("query-chardev"), where):
            if device.get("label") == "charmonitor":
                path = field(device, "filename", str, where).partition("unix:")[2].partition(",server")[0]
                return os.path.dirname(path) if path.startswith("/") else None  # noqa: PTH120 - a word of QEMU's
        return None

    async def _send_fd(self, fd: int, command: str, arguments: Mapping[str, object]) -> Any:
        # QEMU takes the descriptor that came last: no other may come between it and its command.
        async with self._fd_lock:
            self._session.send_fd(fd)
            return await self.execute(command, arguments)

    async def _introduce(self) -> None:
        answer = await self.execute("query-version")
        where = f"{self.where}, answer to query-version"
        version = of_type(answer, dict, where)
        numbers = field(version, "qemu", dict, where)
        self.version = (
            field(numbers, "major", int, where),
            field(numbers, "minor", int, where),
            field(numbers, "micro", int, where),
        )
        self.package = printable(str(version.get("package", "")))
        where = f"{self.where}, answer to query-commands"
        self.commands = frozenset(
            field(entry, "name", str, where) for entry in objects(await self.execute("query-commands"), where)
        )


@asynccontextmanager
async def connect(path: str | os.PathLike[str], *, timeout_s: float = CONNECT_TIMEOUT_S) -> AsyncIterator[Qmp]:
    """A QMP session with the QEMU that listens on the unix socket `path`, or with that of a domain of libvirt.

    A connection that ends before anything was asked of it is tried again, a few times within 2 s: QEMU's monitor
    thread may close a new client in place of the former one, and a QEMU that is ending refuses the next attempt.

    Leaving the block, in whatever way, closes the socket within 5 s and leaves no task behind. While the block is
    being left (or cancelled), shielded code in it can still use the session.

    Raises:
        QmpConnectError: no socket, nobody listens, no right, or no greeting within `timeout_s`.
        QmpError, QmpAnswerError: as `Qmp.execute`, from asking for version and commands.
    """
    async with AsyncExitStack() as stack:
        address = DomainAddress.parse(os.fspath(path))
        if address is not None:
            from hypervisor.libvirt_host import monitor

            session, peer = await stack.enter_async_context(monitor(address, timeout_s))
            qmp = Qmp(str(address), peer, session)
            await qmp._introduce()
            yield qmp
            return
        for pause_s in _HUNG_UP_PAUSES_S:
            try:
                qmp = await stack.enter_async_context(_session(os.fspath(path), timeout_s))
            except (QmpConnectError, QmpLostError) as error:
                if not _hung_up(error):
                    raise
            else:
                break
            await trio.sleep(pause_s)
        else:
            qmp = await stack.enter_async_context(_session(os.fspath(path), timeout_s))
        yield qmp


@asynccontextmanager
async def connect_over(sock: socket.socket, where: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> AsyncIterator[Qmp]:
    """As `connect`, over a connected socket whose other end QEMU has inherited; `where` names it in messages.

    Takes `sock` over: it is closed in the end.
    """
    sock.setblocking(False)
    async with _over(sock, where, timeout_s) as qmp:
        yield qmp


@asynccontextmanager
async def _session(where: str, timeout_s: float) -> AsyncIterator[Qmp]:
    try:
        with trio.fail_after(timeout_s):
            sock = await connect_unix(where)
    except OSError as error:
        hint = "is the VM running?" if isinstance(error, FileNotFoundError | ConnectionRefusedError) else ""
        raise QmpConnectError("connect to QEMU at", where, os_reason(error), hint) from error
    except trio.TooSlowError as error:
        raise _held(where, timeout_s, None) from error
    async with _over(sock, where, timeout_s) as qmp:
        yield qmp


@asynccontextmanager
async def _over(sock: socket.socket, where: str, timeout_s: float) -> AsyncIterator[Qmp]:
    failure: BaseException | None = None
    session = _Session(where)
    qmp = Qmp(where, peer_of(sock), session)
    # A failing block must raise its own error, not a group: it is carried round the nursery.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run, sock, timeout_s)
        try:
            await session.opened()
            await qmp._introduce()
            yield qmp
        except BaseException as error:
            failure = error
        finally:
            session.closing.set()
            nursery.cancel_scope.shield = True  # closing is bounded by itself
    if failure is not None:
        raise failure


def _hung_up(error: QmpError) -> bool:
    """Whether the connection was made, and then closed from the other side; or not answered by a greeting.

    What QEMU could not send to a client that left in the middle it sends to the next one, before the greeting.
    """
    cause = error.__cause__
    return isinstance(error, QmpLostError) or (
        isinstance(cause, ConnectError)
        and not (isinstance(cause.exc, OSError) and not isinstance(cause.exc, ConnectionError))
    )


def _held(where: str, timeout_s: float, peer: Peer | None) -> QmpConnectError:
    why = f"no greeting within {timeout_s:g} s"
    if peer is not None and peer.stopped():
        return QmpConnectError(
            "connect to QEMU at", where, f"{why}: its process {peer.pid} is stopped", f"kill -CONT {peer.pid}"
        )
    hint = "give the VM a second one: -qmp unix:PATH,server=on,wait=off"
    return QmpConnectError("connect to QEMU at", where, f"{why}: another client holds the socket, or QEMU hangs", hint)


class _Session:
    """The asyncio side: one loop, one client, both living in the task `run`."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._client: _Client | None = None
        self._run_coroutine: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]] | None = None
        self._failure: Exception | None = None
        self._settled = trio.Event()
        self.closing: Final = trio.Event()

    async def opened(self) -> None:
        """Wait for the greeting, or raise what came instead."""
        await self._settled.wait()
        if self._failure is not None:
            raise self._failure

    async def run(self, sock: Any, timeout_s: float) -> None:
        """Hold the connection until `closing` is set. Never raises but to be cancelled; takes over `sock`."""
        import trio_asyncio

        try:
            async with trio_asyncio.open_loop() as loop:
                client, peer = _Client(), peer_of(sock)
                try:
                    with trio.fail_after(timeout_s):
                        await loop.run_aio_coroutine(client.connect(sock))
                except (ConnectError, trio.TooSlowError) as error:
                    self._failure = self._translated(error, timeout_s, peer, greeted=client.greeting is not None)
                    return
                self._client, self._run_coroutine = client, loop.run_aio_coroutine
                self._settled.set()
                with trio.CancelScope(shield=True):
                    await self.closing.wait()
                    with trio.move_on_after(_CLOSE_TIMEOUT_S), contextlib.suppress(Exception):
                        # Raises again what ended the connection, which `execute` has told already.
                        await loop.run_aio_coroutine(client.disconnect())
        except Exception as error:
            # The library lost its way; whoever waits learns of it as of a lost connection.
            self._failure = self._failure or self._lost("talk to", error)
        finally:
            self._client = self._run_coroutine = None
            self._settled.set()
            sock.close()

    async def execute(self, command: str, arguments: Mapping[str, object] | None) -> Any:
        client, run = self._client, self._run_coroutine
        if client is None or run is None:
            raise self._lost(f"run {command} in", self._failure)
        try:
            return await run(client.execute(command, arguments))
        except ExecuteError as error:
            raise QmpCommandError(
                self._where, command, printable(error.error_class), printable(str(error), 2000)
            ) from None
        except (ExecInterruptedError, StateError, OSError, EOFError, asyncio.CancelledError) as error:
            raise self._lost(f"run {command} in", error) from error
        except QMPError as error:
            raise QmpAnswerError("understand the answer to", command, printable(str(error))) from error

    def send_fd(self, fd: int) -> None:
        if self._client is None:
            raise self._lost("send a descriptor to", self._failure)
        try:
            self._client.send_fd_scm(fd)
        except (StateError, OSError, QMPError) as error:
            raise self._lost("send a descriptor to", error) from error

    def _lost(self, what: str, cause: BaseException | None) -> QmpError:
        if isinstance(cause, QmpError):
            return cause
        return QmpLostError(what, self._where, "the connection is lost", "QEMU has ended, or closed its QMP socket")

    def _translated(
        self, error: ConnectError | trio.TooSlowError, timeout_s: float, peer: Peer, *, greeted: bool
    ) -> QmpConnectError:
        if isinstance(error, trio.TooSlowError) and greeted:
            why = f"it greets, and does not answer within {timeout_s:g} s"
            failure = QmpConnectError("connect to QEMU at", self._where, why)
        elif isinstance(error, trio.TooSlowError):
            failure = _held(self._where, timeout_s, peer)
        elif isinstance(error.exc, OSError):
            failure = QmpConnectError("connect to QEMU at", self._where, os_reason(error.exc))
        elif isinstance(error.exc, EOFError):
            failure = QmpConnectError("connect to QEMU at", self._where, "it closed the connection without a greeting")
        else:
            failure = QmpConnectError("connect to QEMU at", self._where, "what answers there does not speak QMP")
        failure.__cause__ = error
        return failure
