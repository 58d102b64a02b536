"""The child that owns a guest freeze: it thaws when its parent lets go, dies, or 10 s have passed.

A script of its own with nothing but the standard library: it starts in 20 ms, detaches itself, outlives a killed
parent, and its only state is the agent's socket. Started by `hypervisor.guest_agent` with the arguments `freeze` or
`thaw`, the number of the socket's descriptor, the seconds that the guest may stay frozen, and mount points, if not all
file systems are meant.
docs/hypervisor.md, "Freezing the guest".

It writes one JSON object per line: `{"event": "frozen", "file-systems": 2}`, then `{"event": "thawed", "frozen-s": 0.3,
"early": false, "at": 1234.5}` (`early`: the time was over; `at`: when thawing began, on the clock that all processes
share, `time.monotonic()`); or `{"event": "failed", "why": "..."}` with nothing frozen; `{"event": "stuck", "why":
"..."}` if the guest could not be thawed. `was-frozen` in the first of them tells of an earlier freeze that was ended.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

#: Seconds for an agent to answer the first sync; where none runs in the guest, nothing ever answers.
SYNC_TIMEOUT_S: Final = 5.0
#: Seconds for one try to thaw, after how many tries the parent is told, and how many there are: an agent that is slow
#: to freeze obeys only when it is done.
THAW_TIMEOUT_S: Final = 5.0
TRIES_BEFORE_TELLING: Final = 2
THAW_TRIES: Final = 24
#: Bytes of one answer; the honest ones have under 200.
MAX_LINE: Final = 64 * 1024
#: More mounted file systems than any guest has.
MAX_FILE_SYSTEMS: Final = 100_000


class AgentError(Exception):
    """The agent does not answer, or answers nonsense."""


class AgentRefusedError(AgentError):
    """The agent has understood and says no."""


class AgentLostError(AgentError):
    """The socket is closed: the VM has ended, and with it every freeze."""


class Agent:
    """The guest agent's protocol; everything it sends may be hostile."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = bytearray()

    def sync(self, timeout_s: float) -> None:
        """Drop whatever lies in the line, and make sure that the agent listens.

        Raises:
            AgentError: it does not.
        """
        deadline = time.monotonic() + timeout_s
        number = secrets.randbits(31)
        self._send(_sync(number), deadline)
        self._synced(number, deadline)

    def execute(self, name: str, timeout_s: float, arguments: dict[str, Any] | None = None) -> Any:
        """What the agent returns.

        Raises:
            AgentRefusedError: an error of the agent.
            AgentError: nothing in time, or nonsense.
        """
        deadline = time.monotonic() + timeout_s
        self._send(_command(name, arguments), deadline)
        return self._answer(deadline)

    def thaw(self, timeout_s: float) -> None:
        """Thaw. The order lies in the line even if an earlier one keeps the agent from answering in time.

        Raises:
            AgentError: as `execute`.
        """
        deadline = time.monotonic() + timeout_s
        number = secrets.randbits(31)
        self._send(_sync(number) + _command("guest-fsfreeze-thaw"), deadline)
        self._synced(number, deadline)  # the answer to an earlier order may come first
        self._answer(deadline)

    def _synced(self, number: int, deadline: float) -> None:
        while True:
            # Everything up to the mark is older: half an answer for somebody else.
            while b"\xff" not in self._received:
                self._received.clear()
                self._receive(deadline)
            del self._received[: self._received.index(b"\xff") + 1]
            try:
                if self._answer(deadline) == number:
                    return
            except AgentError as error:
                if isinstance(error, AgentLostError) or time.monotonic() >= deadline:
                    raise

    def _answer(self, deadline: float) -> Any:
        try:
            answer = json.loads(self._line(deadline))
        except (ValueError, RecursionError):
            raise AgentError("the agent's answer is no JSON") from None
        if not isinstance(answer, dict):
            raise AgentError("the agent's answer is no JSON object")
        if "return" in answer:
            return answer["return"]
        error = answer.get("error")
        words = error.get("desc") if isinstance(error, dict) else None
        if not isinstance(words, str):
            raise AgentError("the agent's answer has no result")
        raise AgentRefusedError(f"the agent says {words[:200]!r}")

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._received:
            if len(self._received) > MAX_LINE:
                self._received.clear()
                raise AgentError(f"the agent's answer is longer than {MAX_LINE} bytes")
            self._receive(deadline)
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received[:] = rest
        return line

    def _send(self, data: bytes, deadline: float) -> None:
        try:
            while data:
                self._wait(select.POLLOUT, deadline)
                with contextlib.suppress(BlockingIOError):
                    data = data[self._sock.send(data) :]
        except OSError as error:
            raise AgentLostError(f"the agent's socket is lost: {error.strerror}") from error

    def _receive(self, deadline: float) -> None:
        try:
            self._wait(select.POLLIN, deadline)
            data = self._sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            raise AgentLostError(f"the agent's socket is lost: {error.strerror}") from error
        if not data:
            raise AgentLostError("the agent's socket is closed")
        self._received += data

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        left_s = deadline - time.monotonic()
        # The time ends also for one that sends without a pause.
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise AgentError("no answer from the agent in time")


def _sync(number: int) -> bytes:
    return b"\xff" + _command("guest-sync-delimited", {"id": number})


def _command(name: str, arguments: dict[str, Any] | None = None) -> bytes:
    return json.dumps({"execute": name, **({"arguments": arguments} if arguments else {})}).encode() + b"\n"


def tell(event: str, **details: object) -> None:
    """Write an event for the parent."""
    # The parent may be gone: then nobody needs to know.
    with contextlib.suppress(OSError):
        os.write(1, json.dumps({"event": event, **details}).encode() + b"\n")


def _thaw(agent: Agent, *, refusal_counts: bool = True) -> str:
    """Thaw, however often it takes; empty, or why it did not work. Tells the parent if it takes long.

    Raises:
        AgentLostError: nothing is left to thaw.
    """
    why = ""
    for attempt in range(THAW_TRIES):
        began = time.monotonic()
        try:
            agent.thaw(THAW_TIMEOUT_S)
        except AgentLostError:
            raise
        except AgentError as error:
            why = str(error)
            if isinstance(error, AgentRefusedError) and not refusal_counts:
                return ""
        else:
            return ""
        if attempt + 1 == TRIES_BEFORE_TELLING:
            tell("stuck", why=why)
        time.sleep(max(0.0, began + THAW_TIMEOUT_S - time.monotonic()) if attempt else 0)
    return why


def _is_frozen(agent: Agent) -> bool:
    try:
        return bool(agent.execute("guest-fsfreeze-status", SYNC_TIMEOUT_S) == "frozen")
    except AgentRefusedError:
        return False  # one without the command cannot freeze either, and says so when asked


def parent_lets_go(timeout_s: float) -> bool:
    """Wait until the parent writes or closes its end; False if the time is over before."""
    return bool(select.select([0], [], [], max(0.0, timeout_s))[0])


def _freeze(agent: Agent, mounts: Sequence[str], timeout_s: float) -> Any:
    if not mounts:
        return agent.execute("guest-fsfreeze-freeze", timeout_s)
    return agent.execute("guest-fsfreeze-freeze-list", timeout_s, {"mountpoints": list(mounts)})


def run(agent: Agent, *, freeze: bool, hold_s: float, mounts: Sequence[str] = ()) -> None:
    """The whole life of the child."""
    earlier: dict[str, object] = {}
    try:
        agent.sync(SYNC_TIMEOUT_S)
        if _is_frozen(agent):
            if why := _thaw(agent):
                return tell("stuck", why=why)
            earlier = {"was-frozen": True}
        if not freeze:
            return tell("thawed", **earlier)
        if parent_lets_go(0):
            return None
    except AgentError as error:
        return tell("failed", why=str(error), **earlier)

    began = time.monotonic()
    failure: AgentError | None = None
    early = False
    try:
        count = _freeze(agent, mounts, hold_s)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_FILE_SYSTEMS:
            raise AgentError("the agent's answer to the freeze is no number of file systems")
        tell("frozen", **{"file-systems": count}, **earlier)
        early = not parent_lets_go(began + hold_s - time.monotonic())
    except AgentError as error:
        # Perhaps frozen, perhaps in part, perhaps a moment later: thaw in any case.
        failure = error
    thawing = time.monotonic()
    try:
        why = _thaw(agent, refusal_counts=not isinstance(failure, AgentRefusedError))
    except AgentLostError as error:
        return tell("failed", why=str(failure or error), **earlier)
    if why:
        return tell("stuck", why=why)
    if failure is not None:
        return tell("failed", why=str(failure), **earlier)
    return tell("thawed", **{"frozen-s": time.monotonic() - began}, early=early, at=thawing)


def main() -> None:
    """Run as a script."""
    mode, descriptor, hold_s, *mounts = sys.argv[1:]
    if os.fork():
        os._exit(0)  # who started us has nothing to wait for
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        # Whoever ends the whole group of processes must not end the one that thaws.
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(descriptor)) as sock:
        sock.setblocking(False)
        run(Agent(sock), freeze=mode == "freeze", hold_s=float(hold_s), mounts=mounts)


if __name__ == "__main__":
    main()
