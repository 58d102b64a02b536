"""A backup that dies at a chosen step: `python -m tests.hypervisor.killed_backup QMP FOLDER BASE ID PHASE [AGENT]`.

`BASE` is the backup time of the newest snapshot and the size of its disks (`5:4096`), or `-`; `PHASE` is a step of
`Fleecing`, `reading`, or `frozen` (between freeze and thaw); `AGENT` is the guest agent's socket. Says `go` when it
begins.
"""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import trio

from hypervisor.bitmaps import BaseInfo
from hypervisor.vm import Scratch, frozen_view
from tests.hypervisor.fleecing_bench import TARGET, read_disk


async def main(qmp: str, folder: Path, base: str, new_id: int, phase: str, agent: str | None = None) -> None:
    def die(step: str) -> None:
        if step == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    def base_of(archive: str) -> BaseInfo | str:
        if base == "-":
            return "first backup"
        ctime, size = base.split(":")
        return BaseInfo(int(ctime), int(size))

    async def finished(number: int) -> bool:
        return False

    async def at_instant(_qmp: object) -> None:
        die("frozen")

    print("go", flush=True)
    async with frozen_view(
        qmp,
        target=TARGET,
        new_id=new_id,
        base_of=base_of,
        finished=finished,
        scratch=Scratch(folder / "scratch", allow_shared=True, min_free=0, min_free_fraction=0),
        run_dir=folder / "run",
        guest_agent=None if agent is None else Path(agent),
        at_instant=at_instant,
        on_step=die,
    ) as view:
        for source in view.sources:
            die("reading")
            await read_disk(source, bytes(source.size))
        view.commit()


if __name__ == "__main__":
    trio.run(partial(main, sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), *sys.argv[5:]))
