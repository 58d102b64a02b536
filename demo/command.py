"""Runs the command `fleece` the way a person or a script does, with settings of the demo's own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio


class CommandFailed(Exception):  # noqa: N818 - the demo ends with its text
    """The command did not do what the demo asked for."""


class Fleece:
    """The command of this environment; its configuration, state and run-time files lie in `folder`."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self._program = Path(sys.executable).with_name("fleece")
        for part in ("state", "run", "scratch"):
            (folder / part).mkdir()
        # The demo's disks lie in the same temporary folder, which a real set-up avoids.
        scratch = f'scratch = "{folder / "scratch"}"'
        (folder / "fleece.toml").write_text(f"{scratch}\n\n[vm.demo]\n{scratch}\nscratch-beside-disks = true\n")
        self._environment = {
            **os.environ,
            "FLEECE_CONFIG": str(folder / "fleece.toml"),
            "FLEECE_STATE_DIR": str(folder / "state"),
            "FLEECE_RUN_DIR": str(folder / "run"),
            "FLEECE_REPOSITORY": str(repository),
        }

    async def run(self, *arguments: str, timeout_s: float = 120.0) -> Any:
        """Run `fleece ARGUMENTS --output json` and return what it prints; None if it prints nothing.

        Raises:
            CommandFailed: it failed, or took too long.
        """
        _show(arguments)
        done = None
        with trio.move_on_after(timeout_s):
            done = await trio.run_process(
                [self._program, *arguments, "--output", "json"],
                env=self._environment,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        if done is None:
            raise CommandFailed(f"fleece {arguments[0]}: no end after {timeout_s:.0f} s")
        if done.returncode not in (0, 3):  # 3: done, with warnings
            raise CommandFailed(f"fleece {' '.join(arguments)}: exit code {done.returncode}: {_reason(done.stderr)}")
        return json.loads(done.stdout) if done.stdout.strip() else None


def _show(arguments: Sequence[str]) -> None:
    print(f"    $ fleece {' '.join(arguments)}", flush=True)


def _reason(stderr: bytes) -> str:
    text = stderr.decode(errors="replace").strip()
    for line in text.splitlines():
        try:
            error = json.loads(line)["error"]
        except (ValueError, KeyError, TypeError):
            continue
        return f"cannot {error['what']} {error['where']}: {error['why']}; {error['hint']}"
    return text


async def unmount(mountpoint: Path) -> None:
    """End a mount the way a user does."""
    print(f"    $ fusermount3 -u {mountpoint}", flush=True)
    await trio.run_process(["fusermount3", "-u", str(mountpoint)], stdin=subprocess.DEVNULL)
