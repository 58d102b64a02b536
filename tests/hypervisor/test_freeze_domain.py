"""The child that freezes a domain's guest, with a double in the place of libvirt."""

import json
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor import freeze_domain
from hypervisor.freeze_domain import DomainAgent, run


class VirtError(Exception):
    """What the bindings raise."""


class Domain:
    """Connection and domain in one, with its state in a folder, since several processes use it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def isAlive(self) -> bool:  # noqa: N802 - the name of the bindings
        return True

    def lookupByName(self, name: str) -> "Domain":  # noqa: N802
        if (self._folder / "gone").exists():
            raise VirtError("no such domain")
        return self

    def isActive(self) -> bool:  # noqa: N802
        return not (self._folder / "off").exists()

    def _note(self, line: str) -> None:
        with (self._folder / "told").open("a") as file:
            file.write(f"{line}\n")

    def fsFreeze(self, mounts: list[str] | None, flags: int) -> int:  # noqa: N802
        self._note(f"freeze {mounts}")
        while (self._folder / "silent").exists():
            if (self._folder / "impatient").exists():
                raise VirtError("Guest agent not available for now")
            time.sleep(0.01)
        if (self._folder / "refuse").exists():
            raise VirtError("QEMU guest agent is not connected")
        if (self._folder / "frozen").exists():
            raise VirtError("the agent is in frozen state")
        (self._folder / "frozen").touch()
        return 2

    def fsThaw(self, mounts: list[str] | None, flags: int) -> int:  # noqa: N802
        self._note("thaw")
        if (self._folder / "silent").exists():
            raise VirtError("cannot acquire state change lock")
        if (self._folder / "off").exists() or (self._folder / "refuse").exists():
            raise VirtError("QEMU guest agent is not connected")
        frozen = (self._folder / "frozen").exists()
        (self._folder / "frozen").unlink(missing_ok=True)
        return 2 if frozen else 0


class Child:
    """Runs the child's life in a process that is forked off, its two pipes in our hands."""

    def __init__(self, folder: Path, *, freeze: bool = True, hold_s: float = 60, mounts: tuple[str, ...] = ()) -> None:
        stdin, self._let_go = os.pipe()
        self._out, stdout = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(self._let_go)
                os.dup2(stdin, 0)
                os.dup2(stdout, 1)
                run(
                    lambda: DomainAgent(lambda: Domain(folder), "web", VirtError),
                    freeze=freeze,
                    hold_s=hold_s,
                    mounts=mounts,
                )
            finally:
                os._exit(0)
        os.close(stdin)
        os.close(stdout)
        self._lines = os.fdopen(self._out, "rb")

    def event(self) -> dict[str, Any]:
        assert select.select([self._lines], [], [], 60)[0], "it says nothing"
        line = self._lines.readline()
        event: dict[str, Any] = json.loads(line) if line else {}
        return event

    def let_go(self) -> None:
        if self._let_go >= 0:
            os.close(self._let_go)
            self._let_go = -1

    def end(self) -> None:
        self.let_go()
        os.waitpid(self.pid, 0)
        self._lines.close()


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Child]]:
    monkeypatch.setattr(freeze_domain, "THAW_TIMEOUT_S", 0.01)
    started: list[Child] = []

    def start(**options: Any) -> Child:
        started.append(Child(tmp_path, **options))
        return started[-1]

    yield start
    for one in started:
        one.end()


def told(folder: Path) -> list[str]:
    return (folder / "told").read_text().splitlines()


def test_it_freezes_until_the_parent_lets_go(child: Callable[..., Child], tmp_path: Path) -> None:
    one = child(mounts=("/data",))
    assert one.event() == {"event": "frozen", "file-systems": 2}
    assert (tmp_path / "frozen").exists()
    one.let_go()
    event = one.event()
    assert (event["event"], event["early"]) == ("thawed", False)
    assert told(tmp_path) == ["freeze ['/data']", "thaw"]


def test_it_thaws_by_itself_when_the_time_is_over(child: Callable[..., Child], tmp_path: Path) -> None:
    one = child(hold_s=0.2)
    assert one.event()["event"] == "frozen"
    event = one.event()
    assert (event["event"], event["early"]) == ("thawed", True)
    assert not (tmp_path / "frozen").exists()


def test_a_guest_that_is_frozen_already_is_thawed_first(child: Callable[..., Child], tmp_path: Path) -> None:
    (tmp_path / "frozen").touch()
    one = child()
    assert one.event() == {"event": "frozen", "file-systems": 2, "was-frozen": True}
    one.let_go()
    assert one.event()["event"] == "thawed"
    assert told(tmp_path) == ["freeze None", "thaw", "freeze None", "thaw"]


def test_without_an_agent_it_says_so_and_ends(child: Callable[..., Child], tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    one = child()
    event = one.event()
    assert event["event"] == "failed"
    assert "not connected" in event["why"]
    assert one.event() == {}


def test_a_domain_that_ends_while_it_is_frozen_needs_no_thaw(child: Callable[..., Child], tmp_path: Path) -> None:
    one = child()
    assert one.event()["event"] == "frozen"
    (tmp_path / "off").touch()
    one.let_go()
    event = one.event()
    assert (event["event"], event["why"]) == ("failed", "the domain does not run any more")


def test_an_agent_that_is_lost_is_tried_again(child: Callable[..., Child], tmp_path: Path) -> None:
    one = child()
    assert one.event()["event"] == "frozen"
    (tmp_path / "refuse").touch()
    one.let_go()
    assert one.event()["event"] == "stuck"
    (tmp_path / "refuse").unlink()
    while (event := one.event()).get("event") == "stuck":
        pass
    assert event.get("event") in ("thawed", None)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_leftover_freeze_is_ended(child: Callable[..., Child], tmp_path: Path, frozen: bool) -> None:
    if frozen:
        (tmp_path / "frozen").touch()
    assert child(freeze=False).event() == {"event": "thawed", **({"was-frozen": True} if frozen else {})}


def test_an_agent_that_freezes_too_late_is_told_at_once_and_thawed_when_it_does(
    child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze_domain, "THAW_TRIES", 3)
    (tmp_path / "silent").touch()
    freeze = child(hold_s=0.05)
    while (event := freeze.event()) and event["event"] != "stuck":
        pass
    assert event["why"] == "the agent has not answered the order to freeze"
    assert freeze.event()["event"] == "stuck", "it has given up"
    while not os.waitid(os.P_PID, freeze.pid, os.WEXITED | os.WNOWAIT):
        pass
    assert "freeze None" in told(tmp_path)
    (tmp_path / "silent").unlink()
    until(lambda: told(tmp_path)[-1] == "thaw" and not (tmp_path / "frozen").exists())


def test_a_guest_that_is_frozen_when_libvirt_has_given_up_is_thawed(
    child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze_domain, "_SURE_S", -1.0)
    monkeypatch.setattr(freeze_domain, "THAW_TRIES", 6000)
    for name in ("silent", "impatient"):
        (tmp_path / name).touch()
    freeze = child()
    assert freeze.event()["event"] == "stuck"
    until(lambda: told(tmp_path).count("thaw") > 1)
    (tmp_path / "frozen").touch()
    (tmp_path / "silent").unlink()
    until(lambda: not (tmp_path / "frozen").exists())


def test_a_freeze_whose_keeper_is_killed_is_ended(child: Callable[..., Child], tmp_path: Path) -> None:
    freeze = child()
    assert freeze.event()["event"] == "frozen"
    os.kill(freeze.pid, signal.SIGKILL)
    until(lambda: not (tmp_path / "frozen").exists())


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_parent_that_is_gone_already_freezes_nothing(child: Callable[..., Child], tmp_path: Path) -> None:
    # Its end of the pipe is closed before the child looks.
    (tmp_path / "told").touch()
    read, write = os.pipe()
    os.close(write)
    pid = os.fork()
    if not pid:
        os.dup2(read, 0)
        run(lambda: DomainAgent(lambda: Domain(tmp_path), "web", VirtError), freeze=True, hold_s=1)
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(read)
    assert told(tmp_path) == []
