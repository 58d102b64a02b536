"""A look at a machine on trial: its screen by VNC, at a unix socket of ours.

QEMU itself listens nowhere: each client's socket is handed to it.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from core.errors import os_reason
from core.nursery import open_nursery
from hypervisor.errors import BootTrialError, QmpError
from hypervisor.qmp import Qmp

#: Seconds between two looks whether the machine is there.
_LOOK_S: Final = 1.0


@asynccontextmanager
async def screen_at(qmp: Qmp, path: Path) -> AsyncIterator[None]:
    """Clients that connect to the unix socket `path` see the screen, and have keyboard and mouse, while the block runs.

    Only this user and root may connect. Needs a QEMU that was started with `-vnc none`.

    Raises:
        BootTrialError: nobody can listen there.
        QmpError: QEMU has ended.
    """
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        try:
            os.fchmod(listener.fileno(), 0o600)  # which the file gets, too
            await listener.bind(str(path))
        except OSError as error:
            raise BootTrialError("listen at", str(path), os_reason(error)) from error
        listener.listen(8)
        async with open_nursery() as nursery:
            nursery.start_soon(_hand_over, qmp, listener)
            nursery.start_soon(_until_ended, qmp)
            yield
            nursery.cancel_scope.cancel()
    finally:
        listener.close()
        with suppress(OSError):
            path.unlink()  # noqa: ASYNC240 - no thread, so that cancellation cannot come between


async def _until_ended(qmp: Qmp) -> None:
    while True:
        await trio.sleep(_LOOK_S)
        await qmp.execute("query-status")


async def _hand_over(qmp: Qmp, listener: trio.socket.SocketType) -> None:
    number = 0
    while True:
        client, _ = await listener.accept()
        with client:
            number += 1
            with suppress(QmpError):  # it has ended, which is told elsewhere
                await qmp.get_fd(client.fileno(), f"screen{number}")
                await qmp.execute("add_client", {"protocol": "vnc", "fdname": f"screen{number}", "skipauth": True})
