"""`fleece test-boot`: whether a machine starts from its backup."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agent.invocation import Invocation, command
from core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from agent.boot_trials import BootOrder, BootResult
    from core.progress import Progress
    from hypervisor.boot_watch import Trial
    from hypervisor.qmp import Qmp

#: Pictures that are kept of guests that did not come to life.
_KEPT_PICTURES = 50


def add_to(application: typer.Typer) -> None:
    """Register the verb."""
    command(
        application,
        "test-boot",
        examples="""
fleece test-boot vm/100/latest                           any sign of life within five minutes
fleece test-boot vm/100/latest --screenshot 100.png --serial-log 100.log
fleece test-boot vm/100/latest --wait guest-agent --timeout 10m
fleece test-boot vm/100/latest --wait 'serial:web login:' --wait screen
fleece test-boot vm/100/latest --wait 'serial:/Started .*nginx/' --memory 4G --cpus 4
fleece test-boot vm/100/latest --kernel vmlinuz --initrd initrd.img --append 'root=/dev/vda console=ttyS0'
""",
        keys="read",
    )(try_a_boot)


def try_a_boot(
    invocation: Invocation,
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="type/id/time or type/id/latest.")],
    wait: Annotated[
        list[str] | None,
        typer.Option(
            "--wait",
            metavar="SIGN",
            help="Sign of life: guest-agent, serial, serial:TEXT, serial:/REGEX/, screen or any; several: one of them.",
        ),
    ] = None,
    timeout: Annotated[str, typer.Option("--timeout", metavar="TIME", help="Wait so long: 90s, 10m.")] = "5m",
    settle: Annotated[
        str, typer.Option("--settle", metavar="TIME", help="So long a screen must stand still to be a sign.")
    ] = "10s",
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Of the machine; else its own, but 2G at most.")
    ] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, max=255, help="Else its own, but 2 at most.")] = None,
    accel: Annotated[
        Literal["auto", "kvm", "tcg"], typer.Option("--accel", help="auto: KVM where it works, else TCG.")
    ] = "auto",
    qemu: Annotated[str | None, typer.Option("--qemu", metavar="BINARY", help="The QEMU to use.")] = None,
    space: Annotated[
        str, typer.Option("--space", metavar="SIZE", help="What the guest may write; it is lost in the end.")
    ] = "4G",
    kernel: Annotated[
        Path | None, typer.Option("--kernel", metavar="FILE", help="Boot this kernel instead of what is on the disks.")
    ] = None,
    initrd: Annotated[Path | None, typer.Option("--initrd", metavar="FILE", help="Its initial RAM disk.")] = None,
    append: Annotated[str | None, typer.Option("--append", metavar="TEXT", help="Its arguments.")] = None,
    screenshot: Annotated[
        Path | None, typer.Option("--screenshot", metavar="FILE", help="Keep the last screen as PNG file.")
    ] = None,
    serial_log: Annotated[
        Path | None, typer.Option("--serial-log", metavar="FILE", help="Keep what the serial port said.")
    ] = None,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Let the machine run on until a signal comes; its screen is at a VNC socket."),
    ] = False,
) -> None:
    """Start the machine of a backup, without network, and wait for a sign of life.

    The backup stays as it is: what the guest writes is lost in the end. Ends with 0 if the guest came to life, 1 if it
    did not, 3 if it did but with warnings. A screen of a guest that did not come to life is kept in any case.
    """
    from agent.boot_trials import keep_evidence
    from agent.documents import find_snapshot

    order = _order(wait, timeout, settle, memory, cpus, accel, qemu, space, kernel, initrd, append)
    key = invocation.reading_key()
    ns = invocation.namespace()

    async def work(progress: "Progress") -> "BootResult":
        from agent.boot_trials import try_snapshot
        from agent.places import state_dir

        linger = _lingering(progress) if keep else None
        async with invocation.repository() as repository:
            found = await find_snapshot(repository, snapshot, ns)
            result = await try_snapshot(repository, found, order, codec=key.codec(), progress=progress, linger=linger)
        picture = screenshot
        if picture is None and not result.trial.alive:
            picture = _own_place(state_dir() / "test-boot", str(found))
        await keep_evidence(result, picture, serial_log, progress)
        return result

    result = invocation.run(work, what="test", where=snapshot)
    invocation.emit(result.to_json(), result.lines)
    if not result.trial.alive:
        invocation.show_warnings()
        raise typer.Exit(ExitCode.FAILED)


def _order(
    wait: list[str] | None,
    timeout: str,
    settle: str,
    memory: str | None,
    cpus: int | None,
    accel: str,
    qemu: str | None,
    space: str,
    kernel: Path | None,
    initrd: Path | None,
    append: str | None,
) -> "BootOrder":
    from agent.boot_trials import BootOrder, parse_memory, parse_signs
    from core.units import parse_size
    from hypervisor.machine import Kernel

    if kernel is None and (initrd is not None or append is not None):
        raise UsageError("use", "--initrd" if initrd is not None else "--append", "it belongs to --kernel")
    return BootOrder(
        parse_signs(wait or ()),
        _at_least_a_second("--timeout", timeout),
        _at_least_a_second("--settle", settle),
        None if memory is None else parse_memory(memory),
        cpus,
        accel,
        qemu,
        None if kernel is None else Kernel(kernel, initrd, append),
        parse_size(space),
    )


def _at_least_a_second(option: str, text: str) -> float:
    from agent.cli_verify import parse_duration

    seconds = parse_duration(text)
    if seconds < 1:
        raise UsageError("use", f"{option} {text}", "it is shorter than a second")
    return seconds


def _own_place(folder: Path, snapshot: str) -> Path:
    """Where the picture of a guest that did not come to life is kept, among the last ones."""
    with suppress(OSError):  # whoever writes there finds out
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        pictures = sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime)
        for old in pictures[: -(_KEPT_PICTURES - 1)]:
            old.unlink(missing_ok=True)
    return folder / f"{snapshot.replace('/', '-').replace(':', '')}.png"


def _lingering(progress: "Progress") -> "Callable[[Qmp, Trial], Awaitable[None]]":
    """Show the machine's screen until a signal comes."""

    async def linger(qmp: "Qmp", trial: "Trial") -> None:
        import os
        import signal

        import trio

        from agent.places import private_run_dir
        from hypervisor.boot_linger import screen_at

        path = private_run_dir() / f"test-boot-{os.getpid()}.vnc"
        progress.log("alive: " + trial.reason if trial.alive else "not alive: " + trial.reason)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async with screen_at(qmp, path):
                progress.log(f"the machine runs on, its screen is at vnc+unix://{path}; Ctrl-C ends it")
                async for _ in signals:
                    break

    return linger
