"""Worker threads that a worker thread asks for (pxar/behind.py, `Beside`)."""

from collections.abc import Callable

import trio

from pxar.behind import Beside


def lend_threads(nursery: trio.Nursery) -> Beside:
    """What a worker thread calls to have something run in another one, beside itself.

    It has to wait for the end of that while `nursery` is open. Cancelled, the work is waited for.
    """

    def beside(work: Callable[[], None]) -> None:
        trio.from_thread.run_sync(nursery.start_soon, _in_thread, work)

    return beside


async def _in_thread(work: Callable[[], None]) -> None:
    # Who gave the work waits for its end, also if all of it is cancelled.
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(work)
