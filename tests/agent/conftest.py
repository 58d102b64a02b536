"""The real command in a process of its own, with its own state and no configuration of this host."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.warm_command import WarmCommand

Popen = subprocess.Popen[str]
#: Seconds for any command of these tests on a busy machine.
PATIENCE_S = 120


@dataclass
class Answer:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, str]:
        """The error on standard error, which must be the last line there."""
        found = json.loads(self.err.splitlines()[-1])
        assert set(found) == {"error"}
        assert set(found["error"]) == {"what", "where", "why", "hint"}
        error: dict[str, str] = found["error"]
        return error


@dataclass
class Fleece:
    """Runs `fleece`; `repo` is used unless the arguments name another."""

    home: Path
    warm: WarmCommand
    repo: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def _environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("FLEECE", "PBS"))}
        own = {
            "FLEECE_STATE_DIR": str(self.home / "state"),
            "FLEECE_RUN_DIR": str(self.home / "run"),
            "FLEECE_CONFIG": str(self.home / "fleece.toml"),
            # No key of this host.
            "XDG_CONFIG_HOME": str(self.home / "config"),
        }
        if self.repo is not None:
            own["FLEECE_REPOSITORY"] = str(self.repo)
        return clean | own | self.environment

    def __call__(self, *arguments: str | Path, stdin: str = "") -> Answer:
        """Run it to the end."""
        done = self.warm.run([*map(str, arguments)], self._environment(), stdin=stdin.encode(), timeout_s=PATIENCE_S)
        out, err = done.stdout.decode(), done.stderr.decode()
        assert "Traceback" not in err, err
        return Answer(done.returncode, out, err)

    def json(self, *arguments: str | Path) -> Any:
        """Run it with `--output json`; it must succeed and say nothing on standard error."""
        answer = self(*arguments, "--output", "json")
        assert (answer.code, answer.err) == (0, ""), answer
        return answer.document

    def start(self, *arguments: str | Path, stdout: Any = subprocess.PIPE, **options: Any) -> "subprocess.Popen[str]":
        """Start it; the caller ends it."""
        return subprocess.Popen(
            [sys.executable, "-m", "agent.main", *map(str, arguments)],
            env=self._environment(), stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
            text=True, **options,
        )  # fmt: skip


@pytest.fixture
def fleece(tmp_path: Path, warm_command: WarmCommand) -> Fleece:
    """The command, without a repository."""
    (tmp_path / "fleece.toml").touch()
    return Fleece(tmp_path, warm_command)


@pytest.fixture
def stored(fleece: Fleece, store_folder: Path) -> Fleece:
    """The command with an empty datastore as its repository."""
    fleece.repo = store_folder
    return fleece


@pytest.fixture
def ended() -> Iterator[Callable[["subprocess.Popen[str]"], "subprocess.Popen[str]"]]:
    """Sees to it that a started command is gone when the test is over."""
    started: list[subprocess.Popen[str]] = []

    def remember(process: "subprocess.Popen[str]") -> "subprocess.Popen[str]":
        started.append(process)
        return process

    yield remember
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
