"""Starting QEMU's own NBD server at a socket that Fleece reaches, whatever user and confinement QEMU runs under."""

import contextlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from core.errors import FleeceError, os_reason
from hypervisor.errors import QmpCommandError
from hypervisor.qmp import Qmp
from hypervisor.state import Run, RunState


async def start_server(qmp: Qmp, run: Run, state: RunState, *, disks: int, fault: type[FleeceError]) -> None:
    """Start the server at `run.socket`, which may become another one; `state` is saved before and says if it is ours.

    QEMU makes the socket itself, or gets one that listens, where its user may not write into our folder, or makes it in
    libvirt's folder, where a security module allows neither.

    Raises:
        FleeceError: a `fault`: somebody else has started it, or none of these works.
        QmpError: as `Qmp.execute`, but for commands that are refused.
    """
    arguments: Mapping[str, object] = {"max-connections": 16 + 4 * disks}
    if not state.nbd_server:
        state.nbd_server = True
        await run.save(state)  # before: killed in between, the next run stops it
    try:
        await qmp.execute("nbd-server-start", {"addr": _unix(run.socket), **arguments})
    except QmpCommandError as refused:
        if "already running" in refused.desc:
            state.nbd_server = False
            await run.save(state)
            raise fault(
                "start the NBD server of",
                state.qmp,
                "it is running already, for somebody else",
                "QEMU has only one; stop it with nbd-server-stop when its user is done",
            ) from refused
        await _on_open_socket(qmp, run, state, arguments, refused, fault)


async def _on_open_socket(
    qmp: Qmp,
    run: Run,
    state: RunState,
    arguments: Mapping[str, object],
    refused: QmpCommandError,
    fault: type[FleeceError],
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(run.socket)  # noqa: PTH108 - what QEMU's own try may have left
            listening.bind(str(run.socket))
            listening.listen(16)
        except OSError as error:
            raise fault("listen at", str(run.socket), os_reason(error)) from error
        try:
            await qmp.get_fd(listening.fileno(), "fleece-nbd")
            address = {"type": "fd", "data": {"str": "fleece-nbd"}}
            await qmp.execute("nbd-server-start", {"addr": address, **arguments})
        except QmpCommandError as error:
            await _in_folder_of(qmp, run, state, arguments, refused, error, fault)


async def _in_folder_of(
    qmp: Qmp,
    run: Run,
    state: RunState,
    arguments: Mapping[str, object],
    refused: QmpCommandError,
    cause: QmpCommandError,
    fault: type[FleeceError],
) -> None:
    """Where a security module allows neither: in the folder that libvirt has made for sockets of this QEMU."""
    folder = await qmp.socket_folder()
    try:
        if folder is None:
            raise cause
        path = Path(folder) / "fleece-nbd"
        await qmp.execute("nbd-server-start", {"addr": _unix(path), **arguments})
    except QmpCommandError as error:
        raise fault("start the NBD server of", state.qmp, refused.desc) from error
    run.socket = path


def _unix(path: Path) -> dict[str, object]:
    return {"type": "unix", "data": {"path": str(path)}}
