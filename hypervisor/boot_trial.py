"""Starting a machine out of a backup to see whether it comes to life: `try_boot`. docs/test-boot.md.

Its disks are read over NBD; what it writes goes to files without a name, which end with it, however that ends. It has
no network, and QEMU itself as few rights as possible (`confined.py`).
"""

import errno
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import trio

from core.errors import TargetError, os_reason
from core.limits import in_io_thread
from hypervisor.boot_ends import Ends, connected, nameless, open_ends, scratch_folder
from hypervisor.boot_watch import NotStartedError, Trial, Watch
from hypervisor.boot_watch import Sign as Sign
from hypervisor.boot_watch import TrialOptions as TrialOptions
from hypervisor.children import running
from hypervisor.confined import SANDBOX, TCG, Limits, accelerator, confined
from hypervisor.errors import BootTrialError
from hypervisor.machine import Backing, Channels, Device, Firmware, Kernel, Machine, command_line
from hypervisor.nbd_address import NbdAddress
from hypervisor.qemu_tools import create_qcow2
from hypervisor.qmp import Qmp

#: Seconds for QEMU to say what it knows.
_ANSWER_S: Final = 60.0


async def try_boot(
    machine: Machine,
    disks: Mapping[str, tuple[NbdAddress, int]],
    options: TrialOptions,
    *,
    firmware: Path | None = None,
    variables: bytes | None = None,
    tpm: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    linger: Callable[[Qmp, Trial], Awaitable[None]] | None = None,
) -> Trial:
    """Start `machine` and wait for one of the signs, a failure, or the end of the time; nothing of it is left.

    Args:
        machine: what to start.
        disks: by archive: an NBD export on a unix socket that is only read, and bytes.
        options: how.
        firmware: EFI firmware's code, for a machine with EFI.
        variables: content of its EFI variables.
        tpm: control socket of a running swtpm.
        say: told of what happens.
        linger: called with the machine's control when it is certain whether it lives, before it ends.

    Raises:
        BootTrialError: QEMU is missing or does not start the machine, KVM is wanted and does not work, or there is no
            space for what the guest writes.
    """
    program = options.program or f"qemu-system-{machine.arch}"
    known = await _machine_types(program)
    accel, why = await accelerator(program, options.accel)
    say(f"accelerator {accel}: {why}")
    # A plain screen: every firmware and every guest can draw on it, and in its text mode it can be read.
    screen = Device("virtio-gpu-pci") if machine.arch == "aarch64" else Device("VGA")
    machine = replace(machine, display=screen)
    attempt = _Attempt(machine, disks, options, program, accel, known, firmware, variables, tpm, say, linger)
    trial = await attempt.run()
    if trial.transient and options.accel == "auto" and accel == "kvm":
        say("KVM broke: once more with TCG")
        trial = await replace(attempt, accel="tcg").run()
        why = "KVM broke"
        trial.warnings.append("KVM broke while the machine ran: it was tried once more with TCG")
    trial.accel_reason = why
    return trial


async def _machine_types(program: str) -> frozenset[str]:
    line = await confined([program, "-machine", "help"], Limits(1 << 30, 1 << 30))
    try:
        with trio.fail_after(_ANSWER_S):
            done = await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)
    except (OSError, trio.TooSlowError) as error:
        why = os_reason(error) if isinstance(error, OSError) else "it does not answer"
        raise BootTrialError("start", program, why) from error
    if done.returncode:
        words = " ".join(done.stderr.decode("utf-8", "replace").split())[:300]
        hint = "apt install qemu-system-x86" if "No such file" in words else ""
        raise BootTrialError("start", program, words or f"exit code {done.returncode}", hint)
    lines = done.stdout.decode("utf-8", "replace").splitlines()[1:]
    return frozenset(line.split()[0] for line in lines if line.split())


@dataclass(frozen=True)
class _Attempt:
    machine: Machine
    disks: Mapping[str, tuple[NbdAddress, int]]
    options: TrialOptions
    program: str
    accel: str
    known: frozenset[str]
    firmware: Path | None
    variables: bytes | None
    tpm: Path | None
    say: Callable[[str], None]
    linger: Callable[[Qmp, Trial], Awaitable[None]] | None

    async def run(self) -> Trial:
        trial = Trial(accel=self.accel, warnings=list(self.machine.warnings))
        try:
            return await self._run(trial, places=True)
        except NotStartedError as error:
            # What its devices were promised, this QEMU's board may have given away.
            self.say(f"QEMU does not start it: {error}; once more, with devices where QEMU likes them")
        trial = Trial(accel=self.accel, warnings=list(self.machine.warnings))
        trial.warnings.append("devices are not in their places: QEMU refused the machine as the configuration has it")
        try:
            return await self._run(trial, places=False)
        except NotStartedError as error:
            raise BootTrialError("start", f"the machine {self.machine.name}", str(error)) from error

    async def _run(self, trial: Trial, *, places: bool) -> Trial:
        async with AsyncExitStack() as stack:
            ends = stack.enter_context(open_ends())
            line = await self._line(stack, ends, trial, places=places)
            child = await stack.enter_async_context(
                running(line, fault=BootTrialError, pass_fds=ends.inherited, stop_s=1.0)
            )
            ends.close_theirs()
            watch = Watch(trial, self.options, child, ends, efi=self.machine.efi, say=self.say, linger=self.linger)
            await watch.until_decided()
        return trial

    async def _line(self, stack: AsyncExitStack, ends: Ends, trial: Trial, *, places: bool) -> list[str]:
        backings = {}
        for number, (archive, (address, size)) in enumerate(self.disks.items()):
            backings[archive] = await self._disk(ends, number, address, size)
        firmware = None
        if self.machine.efi and self.firmware is not None:
            variables = None if self.variables is None else ends.file(self.variables, "fleece-fw-vars")
            firmware = Firmware(self.firmware, variables)
        kernel = self.options.kernel
        if kernel is not None:
            paths = [
                None if one is None else await in_io_thread(ends.copy, one) for one in (kernel.kernel, kernel.initrd)
            ]
            assert paths[0] is not None
            kernel = Kernel(paths[0], paths[1], kernel.arguments)
        tpm = None
        if self.tpm is not None:
            tpm = await in_io_thread(connected, str(self.tpm))
            ends.keep(tpm)
        line = command_line(
            self.machine,
            backings,
            program=self.program,
            accel=[TCG if self.accel == "tcg" else self.accel],
            cpu="max",
            memory=self.options.memory,
            cpus=self.options.cpus,
            firmware=firmware,
            kernel=kernel,
            channels=Channels(ends.qmp, ends.serial, ends.agent, tpm),
            known_types=self.known,
            places=places,
        )
        trial.machine = line[line.index("-machine") + 1].partition(",")[0]
        # What is inherited must be there before a disk that uses it.
        line[1:1] = [*SANDBOX, *ends.sets()]
        line += ["-action", "reboot=shutdown,shutdown=pause,panic=pause,watchdog=none"]
        if self.machine.arch != "aarch64":
            line += ["-device", "pvpanic"]
        if self.options.vnc:
            line += ["-vnc", "none"]
        most = 2 * max(self.options.space, self.options.memory) + (256 << 20)
        return await confined(line, Limits(self.options.memory, most))

    async def _disk(self, ends: Ends, number: int, address: NbdAddress, size: int) -> Backing:
        overlay = await in_io_thread(nameless)
        ends.keep(overlay)
        try:
            await create_qcow2(Path(f"/proc/{os.getpid()}/fd/{overlay}"), size)
        except TargetError as error:  # its words are about a name that nobody knows
            why = os.strerror(errno.ENOSPC) if os.strerror(errno.ENOSPC) in error.why else error.why
            where = f"a temporary file in {scratch_folder()}"
            raise BootTrialError("make", where, why, "set TMPDIR to a folder with more room") from error
        ends.overlays.append(overlay)
        server = await in_io_thread(connected, address.socket)
        ends.keep(server)
        below = {
            "driver": "nbd", "read-only": True, "server": {"type": "fd", "str": str(server)}, "export": address.export,
        }  # fmt: skip
        file = {"driver": "file", "filename": ends.in_set(overlay), "discard": "unmap"}
        node = f"fleece-d{number}"
        top = {
            "driver": "qcow2", "node-name": node, "discard": "unmap", "cache": {"no-flush": True}, "file": file,
            "backing": below,
        }  # fmt: skip
        return Backing([top], node)
