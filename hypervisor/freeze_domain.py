"""The child that owns the freeze of a libvirt domain's guest; `freeze_child.py` is the same for an agent's own socket.

libvirt holds the agent's channel, so freeze and thaw are its calls (`virDomainFSFreeze`, `virDomainFSThaw`). Started by
`hypervisor.guest_agent` with the arguments `freeze` or `thaw`, the domain's address, the seconds that the guest may
stay frozen, and mount points, if not all file systems are meant. What it writes is what `freeze_child` writes.
docs/libvirt.md, "Freezing the guest".
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from hypervisor.domain_address import DomainAddress
from hypervisor.freeze_child import (
    THAW_TIMEOUT_S,
    THAW_TRIES,
    TRIES_BEFORE_TELLING,
    AgentError,
    AgentLostError,
    parent_lets_go,
    tell,
)

#: What the process that freezes tells if the agent is late.
_LATE: Final = "late"
UNANSWERED: Final = "the agent has not answered the order to freeze"
#: Seconds after which a failure may mean that the agent has the order, and libvirt, told not to wait for ever, has
#: given up on it. Before it sends one it waits up to 5 s for a sign of life.
_SURE_S: Final = 6.0


class DomainAgent:
    """The guest agent of a domain, through libvirt; a connection that was lost is made anew."""

    def __init__(self, connect: Callable[[], Any], domain: str, error: type[Exception]) -> None:
        self._connect, self._name, self._error = connect, domain, error
        self._connection: Any = None

    def freeze(self, mounts: Sequence[str]) -> int:
        """Freeze the file systems at `mounts` (none: all); their number.

        Raises:
            AgentError: the agent does not answer, or refuses.
        """
        return self._call(lambda domain: domain.fsFreeze(list(mounts) or None, 0))

    def thaw(self) -> int:
        """Thaw all; the number of those that were frozen.

        Raises:
            AgentLostError: the domain does not run any more.
            AgentError: as `freeze`.
        """
        return self._call(lambda domain: domain.fsThaw(None, 0))

    def _call(self, work: Callable[[Any], int]) -> int:
        domain = None
        try:
            if self._connection is None or not self._connection.isAlive():
                self._connection = self._connect()
            by_uuid = DomainAddress.is_uuid(self._name)
            find = self._connection.lookupByUUIDString if by_uuid else self._connection.lookupByName
            domain = find(self._name)
            return int(work(domain))
        except self._error as error:
            with contextlib.suppress(self._error):
                if domain is not None and not domain.isActive():
                    raise AgentLostError("the domain does not run any more") from error
            raise AgentError(f"libvirt says {str(error)[:200]!r}") from error


def run(make: Callable[[], DomainAgent], *, freeze: bool, hold_s: float, mounts: Sequence[str] = ()) -> None:
    """The whole life of the child."""
    agent = make()
    if not freeze:
        try:
            return tell("thawed", **({"was-frozen": True} if agent.thaw() > 0 else {}))
        except AgentError as error:
            return tell("failed", why=str(error))
    if parent_lets_go(0):
        return None
    began = time.monotonic()
    earlier: dict[str, object] = {}
    attempt = _Attempt(make, mounts)
    attempt.wait(hold_s)
    if attempt.refused and _thawed_leftover(agent):
        earlier = {"was-frozen": True}
        began = time.monotonic()
        attempt = _Attempt(make, mounts)
        attempt.wait(hold_s)
    early = False
    if attempt.count is None and not attempt.refused and not parent_lets_go(0):
        # The parent need not wait until libvirt gives up waiting for the agent.
        tell("stuck", why=UNANSWERED)
    if attempt.count is not None:
        tell("frozen", **{"file-systems": attempt.count}, **earlier)
        early = not parent_lets_go(began + hold_s - time.monotonic())
    thawing = time.monotonic()
    try:
        why = _thaw(agent, attempt)
    except AgentLostError as error:
        return tell("failed", why=str(attempt.failure or error), **earlier)
    attempt.look()
    if why and not attempt.refused:
        return tell("stuck", why=why)
    attempt.settle()
    if attempt.count is None:
        return tell("failed", why=str(attempt.failure or "no answer from the agent in time"), **earlier)
    return tell("thawed", **{"frozen-s": time.monotonic() - began}, early=early, at=thawing)


class _Attempt:
    """A freeze under way, in a process of its own: libvirt may wait for an answer for ever.

    If the guest is frozen after all when nobody is left here to thaw it, that process does it.
    """

    def __init__(self, make: Callable[[], DomainAgent], mounts: Sequence[str]) -> None:
        self.count: int | None = None
        self.failure: AgentError | None = None
        self.late = False  #: it has ended, and the guest may be frozen yet
        self._reads, writes = os.pipe()
        waits, self._settles = os.pipe()
        if not os.fork():
            try:
                os.close(self._reads)
                os.close(self._settles)
                _attempt(make(), mounts, writes, waits)  # with a connection of its own
            finally:
                os._exit(0)
        os.close(writes)
        os.close(waits)

    @property
    def refused(self) -> bool:
        """It has ended, and nothing was frozen."""
        return self.failure is not None

    def wait(self, timeout_s: float) -> None:
        """Until it has ended, the parent lets go, or the time is over."""
        if self._reads in select.select([self._reads, 0], [], [], max(0.0, timeout_s))[0]:
            self._take()

    def look(self) -> None:
        """See whether it has ended."""
        if self.count is None and self.failure is None and not self.late and select.select([self._reads], [], [], 0)[0]:
            self._take()

    def settle(self) -> None:
        """The guest is not frozen any more: whoever freezes it from now on is somebody else."""
        with contextlib.suppress(OSError):  # that process may have ended
            os.write(self._settles, b"!")

    def _take(self) -> None:
        said = os.read(self._reads, 4096).decode(errors="replace")
        if said.isdecimal():
            self.count = int(said)
        elif said == _LATE:
            self.late = True
        else:
            self.failure = AgentError(said or "the process that asks libvirt to freeze the guest has ended")


def _attempt(agent: DomainAgent, mounts: Sequence[str], writes: int, waits: int) -> None:
    """The life of the process that asks for the freeze; `waits` ends without a byte if nobody has thawed the guest."""
    said = _attempted(agent, mounts)
    with contextlib.suppress(OSError):
        os.write(writes, said)
    os.close(writes)
    if not said.isdigit() or os.read(waits, 1):
        return
    for _ in range(THAW_TRIES):
        try:
            agent.thaw()
        except AgentLostError:
            return
        except AgentError:
            time.sleep(THAW_TIMEOUT_S)
        else:
            return


def _attempted(agent: DomainAgent, mounts: Sequence[str]) -> bytes:
    """The number of frozen file systems, or why there are none, in words."""
    began = time.monotonic()
    try:
        return str(agent.freeze(mounts)).encode()
    except AgentError as error:
        return _LATE.encode() if time.monotonic() - began > _SURE_S else str(error).encode()[:4096]


def _thawed_leftover(agent: DomainAgent) -> bool:
    """Whether the freeze was refused because the guest is frozen; then it is thawed."""
    with contextlib.suppress(AgentError):
        return agent.thaw() > 0
    return False


def _thaw(agent: DomainAgent, attempt: _Attempt) -> str:
    """Thaw, however often it takes; empty, or why it did not work. Tells the parent if it takes long."""
    why = ""
    for number in range(THAW_TRIES):
        began = time.monotonic()
        try:
            agent.thaw()
        except AgentLostError:
            raise
        except AgentError as error:
            why = str(error)
            if attempt.refused:
                return why
        else:
            # A freeze that is still under way comes after this thaw; but an agent does one thing after the other.
            attempt.look()
            if attempt.count is not None or attempt.refused or attempt.late:
                return ""
            why = UNANSWERED
        if number + 1 == TRIES_BEFORE_TELLING:
            tell("stuck", why=why)
        time.sleep(max(0.0, began + THAW_TIMEOUT_S - time.monotonic()) if number else 0)
    return why


def main() -> None:
    """Run as a script."""
    from hypervisor.libvirt_host import bindings

    mode, text, hold_s, *mounts = sys.argv[1:]
    address = DomainAddress.parse(text)
    assert address is not None
    if os.fork():
        os._exit(0)  # who started us has nothing to wait for
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        # Whoever ends the whole group of processes must not end the one that thaws.
        signal.signal(number, signal.SIG_IGN)
    try:
        lib, _ = bindings()
    except ImportError:
        return tell("failed", why="libvirt's Python bindings are missing")

    def make() -> DomainAgent:
        return DomainAgent(lambda: lib.open(address.uri), address.domain, lib.libvirtError)

    return run(make, freeze=mode == "freeze", hold_s=float(hold_s), mounts=mounts)


if __name__ == "__main__":
    main()
    os._exit(0)  # a call that libvirt never returns from must not hold the process
