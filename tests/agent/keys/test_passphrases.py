"""Passphrases from the environment and from a terminal."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.keys import (
    passphrase_from_environment,
)
from core.errors import FleeceError
from datastore.keyfile import KeyFile

from ..conftest import Answer, Fleece
from .conftest import PASSPHRASE, failed, files


def test_a_passphrase_comes_from_the_variable_a_descriptor_a_file_or_a_command(
    config_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passphrase_from_environment("PBS_X") is None
    monkeypatch.setenv("PBS_X_CMD", "printf '%s\\n' 'from a command' second")
    assert passphrase_from_environment("PBS_X") == b"from a command"
    (tmp_path / "p").write_bytes(b"from a file\r\nsecond line\n")
    monkeypatch.setenv("PBS_X_FILE", str(tmp_path / "p"))
    assert passphrase_from_environment("PBS_X") == b"from a file"
    reading, writing = os.pipe()
    os.write(writing, b"from a pipe")
    os.close(writing)
    monkeypatch.setenv("PBS_X_FD", str(reading))
    assert passphrase_from_environment("PBS_X") == b"from a pipe"
    monkeypatch.setenv("PBS_X", "from the variable\nsecond line")
    assert passphrase_from_environment("PBS_X") == b"from the variable"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FD", "x"), ("FD", "-1"), ("FD", "987654"), ("FD", "9" * 30), ("FILE", "/nonexistent"),
        ("CMD", ""), ("CMD", "/nonexistent"), ("CMD", "false"), ("CMD", "'"),
    ],
)  # fmt: skip
def test_a_way_to_a_passphrase_that_leads_nowhere_is_an_error(
    config_home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"PBS_X_{name}", value)
    with pytest.raises(FleeceError, match=f"PBS_X_{name}" if name != "FILE" else "nonexistent"):
        passphrase_from_environment("PBS_X")


# ---- the terminal ----


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, fleece: Fleece, *arguments: str | Path) -> None:
        self.ours, theirs = pty.openpty()
        self.shown = b""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", sys.executable, "-m", "agent.main", *map(str, arguments)],
            stdin=theirs, stdout=theirs, stderr=theirs, env=fleece._environment(),
        )  # fmt: skip
        os.close(theirs)

    def expect(self, text: str) -> None:
        """Wait until `text` was shown."""
        end = time.monotonic() + 60
        while text.encode() not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    self.shown += os.read(self.ours, 4096)
                except OSError:
                    pytest.fail(f"it ended: {self.shown!r}")

    def type(self, text: str) -> None:
        self.shown = b""
        time.sleep(0.1)  # getpass throws away what was typed before it asked
        os.write(self.ours, text.encode() + b"\n")

    def end(self) -> int:
        while True:
            try:
                if not (data := os.read(self.ours, 4096)):
                    break
                self.shown += data
            except OSError:
                break
        os.close(self.ours)
        return self.process.wait(60)


def test_a_passphrase_is_asked_for_twice_and_never_shown(fleece: Fleece, tmp_path: Path) -> None:
    terminal = Terminal(fleece, "key", "create", tmp_path / "n.key", "--hint", "red")
    terminal.expect("New passphrase: ")
    terminal.type(PASSPHRASE)
    terminal.expect("Once more: ")
    assert PASSPHRASE.encode() not in terminal.shown
    terminal.type(PASSPHRASE)
    terminal.expect("all backups made with it are lost")
    assert terminal.end() == 0
    assert PASSPHRASE.encode() not in terminal.shown
    file = KeyFile.parse((tmp_path / "n.key").read_bytes(), where="x")
    assert (file.hint, file.unlock(PASSPHRASE.encode(), where="x").fingerprint) == ("red", file.fingerprint)


@pytest.mark.parametrize(("typed", "why"), [(["four"], "at least 5 bytes"), (["first one", "other one"], "differ")])
def test_a_short_passphrase_and_two_different_ones_make_no_key(
    fleece: Fleece, tmp_path: Path, typed: list[str], why: str
) -> None:
    terminal = Terminal(fleece, "key", "create", tmp_path / "n.key")
    for prompt, text in zip(("New passphrase: ", "Once more: "), typed, strict=False):
        terminal.expect(prompt)
        terminal.type(text)
    terminal.expect(why)
    assert terminal.end() == 2
    assert not (tmp_path / "n.key").exists()


def test_a_backup_asks_for_the_passphrase_of_its_key(stored: Fleece, locked_key: Path, small: Path) -> None:
    terminal = Terminal(stored, "backup", f"vm.conf:{small}", "--backup-id", "web", "--keyfile", locked_key)
    terminal.expect("Passphrase of ")
    terminal.type(PASSPHRASE)
    terminal.expect("host/web/")
    assert terminal.end() == 0
    assert files(stored, "host/web/latest")["vm.conf.blob"] == "encrypt"


def test_a_job_asks_nobody_even_at_a_terminal(stored: Fleece, locked_key: Path, small: Path) -> None:
    stored.json("backup", f"vm.conf:{small}", "--backup-id", "web")
    (stored.home / "fleece.toml").write_text(
        f'[job.check]\ntype = "verify"\nrepository = "{stored.repo}"\nkeyfile = "{locked_key}"\n'
    )
    terminal = Terminal(stored, "job", "run", "check")
    assert terminal.end() == 1
    assert b"protected by a passphrase, and nobody is asked here" in terminal.shown
    assert b"Passphrase of" not in terminal.shown
    stored.environment["PBS_ENCRYPTION_PASSWORD"] = PASSPHRASE
    assert stored.json("job", "run", "check")["state"] == "ok"
    assert PASSPHRASE not in stored("job", "log", "check").out


def test_without_a_terminal_nothing_is_asked_but_the_ways_are_told(
    stored: Fleece, locked_key: Path, small: Path, tmp_path: Path
) -> None:
    for arguments in (("key", "create", tmp_path / "n.key"), ("backup", f"vm.conf:{small}", "--keyfile", locked_key)):
        done = subprocess.run(
            ["setsid", "--wait", sys.executable, "-m", "agent.main", *map(str, arguments)],
            env=stored._environment(), input="typed passphrase\n" * 3, capture_output=True, text=True, check=False,
        )  # fmt: skip
        failed(Answer(done.returncode, done.stdout, done.stderr), "no terminal", "PBS_ENCRYPTION_PASSWORD")
    assert not (tmp_path / "n.key").exists()
    assert stored.json("list") == []
