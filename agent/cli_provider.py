"""`fleece provider`: what the plugin for Proxmox VE calls. People have no use for it."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from agent.invocation import Invocation, command

if TYPE_CHECKING:
    from agent.provider.channel import Channel
    from core.progress import Progress


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(
        no_args_is_help=True,
        help="What the backup provider for Proxmox VE calls: JSON on standard input and output.",
        rich_markup_mode=None,
    )
    application.add_typer(group, name="provider")
    command(
        group,
        "call",
        repository=False,
        examples="""
echo '{"storage": {"id": "fleece", "repository": "main"}}' | fleece provider call storage-status --output json
echo '{"storage": {"id": "fleece", "repository": "main"}, "vmid": 100}' | fleece provider call list-volumes
""",
    )(call)
    command(group, "session", repository=False, examples="fleece provider session --stream-fd 3")(session)
    command(group, "archive", repository=False, examples="fleece provider archive < walk.json > stream")(archive)


def _read_document() -> object:
    from agent.provider.messages import MAX_DOCUMENT, decoded
    from core.errors import FormatError

    data = sys.stdin.buffer.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        raise FormatError("understand", "standard input", f"more than {MAX_DOCUMENT} bytes")
    return decoded(data, "standard input")


def call(
    invocation: Invocation,
    name: Annotated[str, typer.Argument(metavar="CALL", help="As docs/proxmox-provider.md lists them.")],
) -> None:
    """Answer one question: its parameters are the JSON document on standard input, the answer is one, too."""
    import json

    document = _read_document()

    async def work(progress: "Progress") -> dict[str, object]:
        from agent.provider.calls import answer_call

        return await answer_call(name, document, invocation, progress)

    answer = invocation.run(work, what="answer", where=name)
    invocation.emit(answer, lambda: json.dumps(answer, ensure_ascii=False), cost=False)


def session(
    invocation: Invocation,
    stream_fd: Annotated[
        int | None,
        typer.Option("--stream-fd", metavar="N", min=3, help="Descriptor that the files of a container come from."),
    ] = None,
) -> None:
    """Back up or restore one guest, call by call: one JSON document a line, until standard input is closed.

    It begins with backup-init, restore-vm-init or restore-container-init. What is not finished at the end is undone.
    """
    from agent.provider.channel import take_standard_streams

    incoming, outgoing = take_standard_streams()

    async def work(progress: "Progress") -> None:
        import trio

        from agent.provider.channel import open_channel

        async with (
            trio.lowlevel.FdStream(incoming) as receiving,
            trio.lowlevel.FdStream(outgoing) as sending,
            open_channel(receiving, sending) as channel,
        ):
            await _serve(channel, invocation, stream_fd)

    invocation.run(work, what="serve", where="the session")
    invocation.warnings.clear()  # they are in the job's log


async def _serve(channel: "Channel", invocation: Invocation, stream_fd: int | None) -> None:
    from agent.provider.backup import serve_backup
    from agent.provider.messages import BackupInit, RestoreContainer, RestoreVm, parsed
    from agent.provider.restore import serve_restore
    from agent.provider.storage import UsedStorage
    from core.errors import FleeceError, UsageError

    request = await channel.question()
    try:
        match request.call:
            case "backup-init":
                init = parsed(BackupInit, request.parameters, request.call)
                await serve_backup(channel, UsedStorage(init.storage, invocation), init, stream_fd)
            case "restore-vm-init":
                machine = parsed(RestoreVm, request.parameters, request.call)
                await serve_restore(channel, UsedStorage(machine.storage, invocation), machine)
            case "restore-container-init":
                container = parsed(RestoreContainer, request.parameters, request.call)
                await serve_restore(channel, UsedStorage(container.storage, invocation), container)
            case _:
                raise UsageError("answer", request.call, "a session begins with another call")
    except FleeceError as error:
        # If it was answered already, it is told on standard error.
        if not channel.is_open:
            raise
        channel.refuse(error)


def archive(invocation: Invocation) -> None:
    """Read the files of a container, as the user who runs this, and write them to standard output for a session."""
    import os

    from agent.provider.channel import take_standard_streams
    from agent.provider.messages import Walk, parsed
    from agent.provider.stream import send_to_listener

    walk = parsed(Walk, _read_document(), "standard input")
    incoming, outgoing = take_standard_streams()

    async def work(progress: "Progress") -> None:
        await send_to_listener(walk, outgoing, 2)

    try:
        invocation.run(work, what="read", where="the files of the container")
    finally:
        os.close(incoming)
        os.close(outgoing)
