"""The words of notifications, made of texts that are hostile."""

import json
from pathlib import Path

import pytest

from agent.monitoring.messages import Message, sample
from agent.monitoring.templates import VARIABLES, check_template, fill, one_line
from core.errors import FleeceError

from .conftest import HOSTILE, a_message, a_run, mail, webhook


def test_every_variable_is_filled_in_and_nothing_that_is_filled_in_is_a_template() -> None:
    values = a_message().values() | {"subject": "s"}
    assert set(values) == set(VARIABLES)
    text = fill("\n".join(f"{name}=${name}" for name in VARIABLES), values)
    assert "job=night\n" in text
    assert "figures=ok: 1\nfailed: 1\nread: 1.00 MiB\n" in text
    # The guest that failed comes first, and its name is not looked into.
    assert "$job${" in text
    assert text.index("broken") < text.index("db: ok")
    assert fill("$$5", values) == "$5"


def test_a_subject_is_one_line_of_printable_characters() -> None:
    section = mail('subject = "$host $error"')
    subject = a_message(host="h").subject(section)
    assert subject.startswith("h cannot back up web Bcc: all@example.org <script>")
    assert subject.isprintable()
    assert len(one_line("x" * 5000)) == 200


def test_controls_and_directions_do_not_reach_a_body() -> None:
    body = a_message().body(mail())
    assert "\x1b" not in body
    assert "\u202e" not in body
    assert "\r" not in body
    assert "night" in body.splitlines()[0]
    for heading in ("Why:", "Hint:", "Warnings:", "Figures:", "Guests:", "The end of the log:"):
        assert heading in body
    assert "3 messages about this job were left out" in a_message(left_out=3).body(mail())


def test_json_stays_json_whatever_is_filled_in() -> None:
    section = webhook(
        'url = "https://h/"\n'
        'body = """{"text": "$subject\\\\n$error $warnings $log", "all": $document, "n": $left_out}"""'
    )
    found = json.loads(a_message().body(section, as_json=True))
    assert "cannot back up web" in found["text"]
    assert found["all"]["result"]["guests"][1]["guest"] == HOSTILE
    assert found["n"] == 0


def test_a_template_in_a_file_is_read_when_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "t"
    section = mail(f'template = "{path}"')
    with pytest.raises(FleeceError, match="No such file"):
        a_message().body(section)
    path.write_text("$job!")
    assert a_message().body(section) == "night!"
    for wrong in (b"$nobody", b"\xff", b"x" * 70000):
        path.write_bytes(wrong)
        with pytest.raises(FleeceError, match="template"):
            a_message().body(section)


def test_a_message_without_guests_error_and_log_is_short() -> None:
    message = Message("success", a_run("ok"), host="h")
    assert message.body(mail()).splitlines()[0] == "Job night (backup) on h is done."
    assert "Why" not in message.body(mail())
    assert message.subject(mail()) == "[fleece] h: job night is done"
    for kind in ("test", "failure", "warning", "success", "recovery"):
        check = sample("night", kind)
        assert check.document["kind"] == kind
        assert check.body(mail())


def test_names_that_are_no_unicode_do_no_harm() -> None:
    run = a_run(warnings=["\udcff"])
    message = Message("failure", run, "\udcff")
    message.body(mail()).encode()
    json.dumps(message.document).encode()
    check_template("$job")
