"""Which notification is sent, repeated, left out, tried again."""

import json
from pathlib import Path

import pytest

from agent.monitoring.rules import PENDING_S, TRYING_S, TargetState, TargetStates, is_meant
from agent.monitoring.sections import AnyNotify

from .conftest import target

NOW = 1_800_000_000.0
MINUTE, HOUR = 60.0, 3600.0


def section(text: str = "") -> AnyNotify:
    return target(f'type = "command"\ncommand = "/bin/true"\n{text}')


class Told:
    """A target whose messages all arrive, or not."""

    def __init__(self, text: str = "", *, arrives: bool = True) -> None:
        self.section, self.state, self.now, self.arrives = section(text), TargetState(), NOW, arrives
        self.number = 0

    def run(self, state: str, job: str = "night", after_s: float = 0.0) -> str | None:
        """What is sent about a run that ends so, that much later."""
        self.now += after_s
        self.number += 1
        message = self.state.decide(self.section, job, f"{job}:{self.number}", state, self.now)
        if message is not None:
            self.state.done(message, None if self.arrives else "no network", self.now)
        return None if message is None else message.kind


def test_failures_and_warnings_are_told_and_success_only_after_a_failure() -> None:
    told = Told()
    assert [told.run(state) for state in ("ok", "failed", "ok", "ok", "warnings", "ok", "killed")] == [
        None, "failure", "recovery", None, "warning", None, "failure",
    ]  # fmt: skip
    # Done with warnings is a recovery too.
    assert told.run("warnings") == "recovery"
    assert told.state.sent == 5


def test_what_is_told_is_chosen() -> None:
    assert [Told('on = "success"').run(state) for state in ("ok", "failed", "interrupted")] == ["success", None, None]
    every = Told('on = "always"')
    assert [every.run(state) for state in ("ok", "ok", "warnings", "interrupted", "failed", "ok")] == [
        "success", "success", "warning", "interrupted", "failure", "recovery",
    ]  # fmt: skip
    silent = Told("recovery = false")
    assert [silent.run(state) for state in ("failed", "ok", "failed")] == ["failure", None, "failure"]
    only = Told('on = "failure"')
    assert [only.run(state) for state in ("warnings", "failed", "warnings", "ok")] == [
        None,
        "failure",
        "recovery",
        None,
    ]


def test_a_store_that_stays_broken_does_not_mail_every_minute() -> None:
    told = Told('repeat = "6h"')
    sent = [told.run("failed", after_s=MINUTE) for _ in range(24 * 60)]
    assert sent.count("failure") == 4
    assert told.state.left_out == 24 * 60 - 4
    # The next message says how many were left out, and a recovery ends it.
    message = told.state.decide(told.section, "night", "night:x", "failed", told.now + 7 * HOUR)
    assert message is not None
    assert message.left_out > 0
    assert told.run("ok", after_s=8 * HOUR) == "recovery"
    assert told.run("failed") == "failure"


def test_jobs_do_not_silence_each_other_but_all_together_stay_below_a_limit() -> None:
    told = Told("at-most = 5")
    assert [told.run("failed", f"job{number}") for number in range(8)] == ["failure"] * 5 + [None] * 3
    assert told.state.left_out == 3
    # An hour later those that were left out are told.
    assert told.run("failed", "job7", after_s=HOUR) == "failure"
    # One that flaps is bounded too.
    flapping = Told("at-most = 5")
    sent = [flapping.run("failed" if number % 2 else "ok", after_s=MINUTE) for number in range(60)]
    assert len([kind for kind in sent if kind]) == 5


def test_an_interruption_neither_tells_nor_ends_a_failure() -> None:
    told = Told()
    assert [told.run(state) for state in ("failed", "interrupted", "ok")] == ["failure", None, "recovery"]


def test_what_could_not_be_sent_is_tried_again_and_not_left_out() -> None:
    told = Told(arrives=False)
    assert told.run("failed") == "failure"
    assert (told.state.failed, told.state.last_error, len(told.state.pending)) == (1, "no network", 1)
    # Whenever something else happens; and the next failure of the job does not count as a repetition.
    (late,) = told.state.late(told.now + HOUR)
    assert (late.job, late.run, late.kind) == ("night", "night:1", "failure")
    assert told.state.late(told.now + HOUR + 1) == []  # somebody sends it
    told.state.done(late, "still none", told.now + HOUR)
    assert told.run("failed", after_s=2 * HOUR) == "failure"
    assert [one.run for one in told.state.pending] == ["night:2"]
    told.arrives = True
    # A failure that nobody heard of is over: that is told, in one message.
    assert told.run("ok", after_s=HOUR) == "recovery"
    assert told.state.pending == []
    assert told.state.last_error is None


@pytest.mark.parametrize(
    ("text", "states", "left"),
    [("", ("warnings", "ok"), ["warning"]), ("recovery = false", ("failed", "ok"), ["failure"]),
     ("recovery = false", ("failed", "warnings"), ["failure", "warning"]),
     ('on = ["failure", "success"]\nrecovery = false', ("failed", "ok", "ok"), ["failure", "success"]),
     ('on = "always"', ("failed", "interrupted", "failed"), ["failure"]), ("", ("failed", "ok"), ["recovery"]),
     ("", ("failed", "interrupted", "ok"), ["recovery"]), ('on = "success"', ("ok", "ok"), ["success"]),
     ("at-most = 1", ("warnings", "failed"), ["warning"])],
)  # fmt: skip
def test_what_could_not_be_sent_is_not_lost_because_the_job_is_fine_again(
    text: str, states: tuple[str, ...], left: list[str]
) -> None:
    told = Told(text, arrives=False)
    for state in states:
        told.run(state, after_s=MINUTE)
    assert [one.kind for one in told.state.late(told.now + MINUTE)] == left


def test_what_nobody_could_be_told_for_a_day_is_given_up_and_a_crash_while_sending_is_not() -> None:
    told = Told(arrives=False)
    told.run("failed")
    assert told.state.late(NOW + PENDING_S + 1) == []
    assert told.state.pending == []
    message = told.state.decide(told.section, "other", "other:1", "failed", NOW)
    assert message is not None
    assert told.state.late(NOW + TRYING_S / 2) == []
    assert [one.run for one in told.state.late(NOW + TRYING_S + 1)] == ["other:1"]


def test_the_file_survives_processes_and_damage(tmp_path: Path) -> None:
    states = TargetStates(tmp_path)
    wanted = section()
    (message,) = states.decide("x", wanted, [("night", "night:1", "failed")], NOW)
    states.done("x", message, None, NOW)
    assert TargetStates(tmp_path).decide("x", wanted, [("night", "night:2", "failed")], NOW + 1) == []
    (figures,) = states.figures({"x": wanted})
    assert (figures["sent"], figures["left-out"], figures["pending"], figures["last-sent"]) == (1, 1, 0, NOW)
    path = tmp_path / "monitoring/notify/x.json"
    good = json.loads(path.read_text())
    for text in ("", "{", "[]", '{"sent": []}', json.dumps({**good, "pending": [1], "hour": "x"}),
                 json.dumps({**good, "jobs": {"night": {"told": 1}}}), "[" * 100_000):  # fmt: skip
        path.write_text(text)
        assert [one.kind for one in states.decide("x", wanted, [("a", "a:1", "failed")], NOW)] == ["failure"]
    assert states.read("nobody").sent == 0


@pytest.mark.parametrize(
    ("text", "job", "meant"),
    [("", "night", True), ('jobs = "n*"', "night", True), ('jobs = ["gc", "x"]', "night", False),
     ('exclude-jobs = "night"', "night", False), ('jobs = "*"\nexclude-jobs = ["test-*"]', "night", True)],
)  # fmt: skip
def test_jobs_are_chosen_by_patterns(text: str, job: str, meant: bool) -> None:
    assert is_meant(section(text), job) == meant
