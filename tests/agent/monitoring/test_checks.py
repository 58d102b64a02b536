"""What `fleece doctor` says of monitoring."""

from pathlib import Path

from agent.monitoring.checks import find_faults
from tests.support.certificates import make_certificate

from .conftest import config, script


def test_what_is_missing_is_named_with_its_section(tmp_path: Path) -> None:
    found = list(
        find_faults(
            config(f"""
[events]
file = "{tmp_path}/a/b/events.jsonl"
[metrics]
textfile = "{tmp_path}/none/fleece.prom"
[status]
token-file = "{tmp_path}/token"
[notify.mail]
type = "mail"
to = "root"
sendmail = "{tmp_path}/sendmail"
[notify.smtp]
type = "mail"
to = "root"
smtp = "mail.example:587"
user = "me"
password-file = "{tmp_path}/password"
ca-file = "{tmp_path}/ca"
[notify.chat]
type = "webhook"
url = "https://chat.example/$secret"
secret-file = "{tmp_path}/secret"
template = "{tmp_path}/template"
[notify.told]
type = "command"
command = "{tmp_path}/told"
""")
        )
    )
    assert [(name, words.split(":")[0].rpartition("/")[2]) for name, words, _ in found] == [
        ("notification mail", "sendmail"),
        ("notification smtp", "password"),
        ("notification smtp", "ca cannot be read"),
        ("notification chat", "template"),
        ("notification chat", "secret"),
        ("notification told", "told"),
        ("event log", "a"),
        ("metrics", "none"),
        ("status page", "token"),
    ]


def test_what_is_there_and_private_is_right_and_what_others_may_read_is_not(tmp_path: Path) -> None:
    program = script(tmp_path / "told", "exit 0")
    certificate = make_certificate(tmp_path / "server.pem")
    (tmp_path / "template").write_text("$job")
    for name in ("secret", "token"):
        (tmp_path / name).write_text("x" * 32)
        (tmp_path / name).chmod(0o600)
    certificate.path.chmod(0o600)
    text = f"""
[events]
file = "{tmp_path}/log/events.jsonl"
[metrics]
textfile = "{tmp_path}/fleece.prom"
[status]
token-file = "{tmp_path}/token"
certificate = "{certificate.path}"
key = "{certificate.path}"
[notify.chat]
type = "webhook"
url = "https://chat.example/$secret"
secret-file = "{tmp_path}/secret"
[notify.told]
type = "command"
command = "{program}"
template = "{tmp_path}/template"
"""
    assert list(find_faults(config(text))) == []
    (tmp_path / "secret").chmod(0o644)
    (tmp_path / "token").chmod(0o644)
    assert [(name, fix) for name, _, fix in find_faults(config(text))] == [
        ("notification chat", f"chmod 600 {tmp_path}/secret"),
        ("status page", f"chmod 600 {tmp_path}/token"),
    ]
    (tmp_path / "template").write_text("$nobody")
    certificate.path.write_text("none")
    assert [name for name, _, _ in find_faults(config(text))] == [
        "notification chat", "notification told", "status page",
    ]  # fmt: skip
