"""Watching a machine that starts until it is certain whether it lives. docs/test-boot.md, "Signs"."""

import json
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from core.limits import in_io_thread
from core.nursery import open_nursery
from hypervisor import checked
from hypervisor.boot_ends import Ends, scratch_folder
from hypervisor.boot_signs import (
    LOGIN,
    Picture,
    Serial,
    failure_in,
    only_firmware,
    passphrase_in,
    plain,
    processors,
    screen_text,
)
from hypervisor.children import Child
from hypervisor.errors import QmpCommandError, QmpError
from hypervisor.machine import Kernel
from hypervisor.qmp import Qmp, connect_over

#: Seconds between two looks at the screen.
_LOOK_S: Final = 1.0
#: Seconds between two questions to the guest agent.
_AGENT_S: Final = 2.0
#: Seconds for QEMU to answer at all.
_ANSWER_S: Final = 60.0
#: How often a guest may start anew by itself, as installations and repairs do.
_RESTARTS: Final = 3
#: Of the looks at a screen that stands still, this part must find the processors at rest.
_AT_REST: Final = 0.5
#: Bytes of the guest agent's answer.
_MAX_AGENT: Final = 64 * 1024
#: Where text screens lie in the guest's memory, and 16-bit words of it.
_TEXT_MEMORY: Final = "xp /16384hx 0xb8000"


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign of life to wait for."""

    kind: str  #: `guest-agent`, `serial`, `screen`
    pattern: re.Pattern[str] | None = None  #: of `serial`; None: a login prompt


@dataclass(frozen=True, slots=True)
class TrialOptions:
    """How a machine is tried."""

    signs: Sequence[Sign]  #: any of them
    timeout_s: float
    settle_s: float = 10.0  #: so long a screen must stand still
    memory: int = 1 << 30  #: bytes
    cpus: int = 1
    accel: str = "auto"  #: `auto`, `kvm`, `tcg`
    program: str | None = None  #: QEMU; None: the one of the machine's architecture
    kernel: Kernel | None = None
    vnc: bool = False  #: clients can be given its screen (`boot_linger.py`)
    space: int = 4 << 30  #: bytes that all disks together may take for what the guest writes


@dataclass(slots=True)
class Event:
    """Something that happened."""

    after_s: float  #: since QEMU was started
    what: str


@dataclass(slots=True)
class Trial:
    """What became of it."""

    alive: bool = False
    sign: str | None = None  #: the kind of the sign that came
    reason: str = ""  #: what came, or why nothing did, in words
    after_s: float = 0.0  #: when
    accel: str = ""
    accel_reason: str = ""
    qemu: str = ""  #: its version
    machine: str = ""  #: its type
    restarts: int = 0  #: of the guest
    written: int = 0  #: bytes of disk space for what the guest wrote
    events: list[Event] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    picture: Picture | None = None  #: the last one
    serial: bytes = b""
    transient: bool = False  #: the accelerator broke, not the guest


class NotStartedError(Exception):
    """QEMU refused to make the machine."""


class Watch:
    """Looks at one running machine until something is certain."""

    def __init__(
        self,
        trial: Trial,
        options: TrialOptions,
        child: Child,
        ends: Ends,
        *,
        efi: bool,
        say: Callable[[str], None],
        linger: Callable[[Qmp, Trial], Awaitable[None]] | None,
    ) -> None:
        self._trial, self._options, self._child, self._ends = trial, options, child, ends
        self._efi, self._say, self._linger = efi, say, linger
        self._started = started = trio.current_time()
        self._serial = Serial()
        self._still: Picture | None = None  #: the screen since `_still_since`
        self._still_since = started
        self._rest: list[bool] = []  #: whether the processors were at rest, since then
        self._changes = 0  #: pictures that were not like the one before
        self._asks: dict[str, str] = {}  #: where it asks for a passphrase, and how
        self._scope = trio.CancelScope()

    async def until_decided(self) -> None:
        """Return when it is certain, or the time is over; the trial then says what.

        Raises:
            NotStartedError: QEMU ended before it said anything.
        """
        try:
            async with connect_over(self._ends.our_qmp, "QEMU", timeout_s=_ANSWER_S) as qmp:
                self._trial.qemu = ".".join(map(str, qmp.version))
                self._note(f"QEMU {self._trial.qemu} runs, machine {self._trial.machine}")
                with self._scope:
                    await self._watch(qmp)
                if not self._trial.reason:
                    self._trial.after_s = trio.current_time() - self._started
                    self._trial.reason = f"no sign of life within {self._options.timeout_s:.0f} s"
                    for where, question in self._asks.items():
                        self._trial.reason += f"; {where} it asks for a passphrase ({question!r})"
                        break
                    self._note(self._trial.reason)
                await self._last_look(qmp)
                if self._linger is not None:
                    await self._linger(qmp, self._trial)
        except QmpError as error:
            await self._ended(error)
        finally:
            self._trial.serial = self._serial.log
            self._trial.written = self._ends.space()

    async def _ended(self, error: QmpError) -> None:
        """QEMU is gone, or hangs."""
        with trio.move_on_after(5.0):
            words = await self._child.last_words()
            if not self._trial.qemu:
                raise NotStartedError(words[:500] or f"exit code {self._child.code}") from error
            if not self._trial.reason:
                self._decide_death(f"QEMU ended: {words[-300:] or f'exit code {self._child.code}'}")
            return
        if not self._trial.reason:
            self._decide_death(f"QEMU does not answer: {error.why}")

    async def _watch(self, qmp: Qmp) -> None:
        with trio.move_on_after(self._options.timeout_s):
            async with open_nursery() as nursery:
                nursery.start_soon(self._listen)
                nursery.start_soon(self._ask_agent)
                while True:
                    await self._look(qmp)
                    await trio.sleep(min(_LOOK_S, self._options.settle_s / 3))

    def _note(self, text: str) -> None:
        after_s = trio.current_time() - self._started
        self._trial.events.append(Event(after_s, text))
        self._say(f"{after_s:.1f} s: {text}")

    def _wants(self, kind: str) -> bool:
        return any(sign.kind == kind for sign in self._options.signs)

    def _decide_life(self, kind: str, text: str) -> None:
        if self._trial.reason:
            return
        self._trial.alive, self._trial.sign, self._trial.reason = True, kind, text
        self._decided(f"alive: {text}")

    def _decide_death(self, text: str) -> None:
        if self._trial.reason:
            return
        self._trial.reason = text
        self._decided(f"not alive: {text}")

    def _decided(self, text: str) -> None:
        self._trial.after_s = trio.current_time() - self._started
        self._note(text)
        self._scope.cancel()

    # -- serial port and guest agent

    async def _listen(self) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._ends.our_serial.dup()))
        async with stream:
            while True:
                try:
                    data = await stream.receive_some(65536)
                except trio.BrokenResourceError:
                    return
                if not data:
                    return
                self._read(self._serial.hear(data))

    def _read(self, text: str) -> None:
        # Death first: a guest that panics may have said the wanted word before.
        if (failure := failure_in(text)) is not None:
            self._decide_death(f"on the serial port: {failure}")
            return
        self._note_question("on the serial port", text)
        for sign in self._options.signs:
            if sign.kind == "serial" and (match := (sign.pattern or LOGIN).search(text)) is not None:
                words = checked.printable(" ".join(match[0].split()), 80)
                self._decide_life("serial", f"the serial port says {words!r}")

    async def _ask_agent(self) -> None:
        if not self._wants("guest-agent"):
            return
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self._ends.our_agent.dup()))
        number = int.from_bytes(os.urandom(4), "big")
        question = (
            b"\xff" + json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": number}}).encode() + b"\n"
        )
        heard = b""
        async with stream:
            while True:
                with trio.move_on_after(_AGENT_S):
                    try:
                        await stream.send_all(question)
                        while True:
                            data = await stream.receive_some(4096)
                            if not data:
                                return
                            heard = (heard + data)[-_MAX_AGENT:]
                            if _answers(heard, number):
                                self._decide_life("guest-agent", "the guest agent answers")
                    except trio.BrokenResourceError:
                        return

    # -- the screen, and what QEMU knows

    async def _look(self, qmp: Qmp) -> None:
        if self._ends.space() > self._options.space:
            self._decide_death(f"the guest wrote more than the {self._options.space} bytes that --space allows")
        await self._state(qmp)
        picture = await self._picture(qmp)
        if picture is None:
            return
        self._trial.picture = picture
        text = await self._text(qmp) if picture.is_text else ""
        if (failure := failure_in(text)) is not None:
            self._decide_death(f"on the screen: {failure}")
            return
        if picture.is_text:
            self._note_question("on the screen", plain(text))
        await self._stands_still(qmp, picture, text)

    def _note_question(self, where: str, text: str) -> None:
        question = passphrase_in(text)
        if question is None:
            self._asks.pop(where, None)
        else:
            if where not in self._asks:
                self._note(f"{where} it asks for a passphrase")
            self._asks[where] = checked.printable(question, 80)  # the first look may have seen half of it

    async def _state(self, qmp: Qmp) -> None:
        where = f"{qmp.where}, query-status"
        status = checked.field(checked.of_type(await qmp.execute("query-status"), dict, where), "status", str, where)
        if status == "guest-panicked":
            self._decide_death("the guest's kernel says that it panics")
        elif status == "internal-error":
            self._trial.transient = True
            self._decide_death("the accelerator gave up")
        elif status == "io-error":
            self._decide_death(await self._disk_fault(qmp))
        elif status == "shutdown":
            if self._trial.restarts >= _RESTARTS:
                self._decide_death(f"the guest has ended or started anew {self._trial.restarts + 1} times")
                return
            self._trial.restarts += 1
            self._note("the guest has ended or starts anew")
            for command, arguments in (
                ("set-action", {"reboot": "reset"}),
                ("system_reset", None),
                ("cont", None),
                ("set-action", {"reboot": "shutdown"}),
            ):
                await qmp.execute(command, arguments)

    async def _disk_fault(self, qmp: Qmp) -> str:
        where = f"{qmp.where}, query-block"
        for entry in checked.objects(await qmp.execute("query-block"), where):
            if checked.optional(entry, "io-status", str, where) == "nospace":
                return f"there is no space left in {scratch_folder()} for what the guest writes: set TMPDIR"
        return "a disk cannot be read or written"

    async def _picture(self, qmp: Qmp) -> Picture | None:
        self._ends.clear_canvas()
        try:
            await qmp.execute("screendump", {"filename": self._ends.canvas})
        except QmpCommandError:
            return None
        return await in_io_thread(lambda: Picture.parse(self._ends.read_canvas()))

    async def _text(self, qmp: Qmp) -> str:
        words = await qmp.execute("human-monitor-command", {"command-line": _TEXT_MEMORY})
        return screen_text(checked.of_type(words, str, f"{qmp.where}, xp"))

    async def _stands_still(self, qmp: Qmp, picture: Picture, text: str) -> None:
        now = trio.current_time()
        if self._still is None or not picture.same(self._still):
            self._changes += 1
            self._still, self._still_since, self._rest = picture, now, []
            return
        if not self._wants("screen") or self._asks or picture.blank or (picture.is_text and only_firmware(plain(text))):
            return
        # Without text that tells them apart: the firmware's own picture is not the guest's.
        if self._efi and self._changes < 3:
            return
        registers = await qmp.execute("human-monitor-command", {"command-line": "info registers -a"})
        states = processors(checked.of_type(registers, str, f"{qmp.where}, info registers"))
        # A kernel that panics runs in a circle for ever; a boot loader that gives up rests and cannot be woken.
        self._rest.append(all(halted and awake for halted, awake in states))
        if now - self._still_since < self._options.settle_s or sum(self._rest) < _AT_REST * len(self._rest):
            return
        self._decide_life("screen", f"the screen stands still for {now - self._still_since:.0f} s")

    async def _last_look(self, qmp: Qmp) -> None:
        """A picture for the report."""
        with trio.move_on_after(10.0):
            picture = await self._picture(qmp)
            if picture is not None:
                self._trial.picture = picture


def _answers(heard: bytes, number: int) -> bool:
    """Whether the agent has answered our question: what an earlier one left is skipped."""
    for line in heard.split(b"\n"):
        try:
            answer = json.loads(line.rpartition(b"\xff")[2])
        except (ValueError, RecursionError):
            continue
        if isinstance(answer, dict) and answer.get("return") == number:
            return True
    return False
