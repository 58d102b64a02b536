"""Mails: what is in them, and what programs and servers may do."""

from email import message_from_bytes
from email.policy import default
from pathlib import Path

import pytest
import trio

from agent.monitoring.delivery import PAUSES_S, deliver
from agent.monitoring.errors import DeliveryError
from agent.monitoring.mail import compose, send_mail
from core.errors import FleeceError
from tests.support.certificates import make_certificate
from tests.support.peers import DROP, HANG, MailPeer, listening, taken_port

from .conftest import a_message, mail, script


def quiet(text: str) -> None:
    pass


def test_hostile_names_make_no_header_and_no_second_part() -> None:
    data = compose(mail('subject = "$error"\nfrom = "fleece@example.org"'), a_message(host="h")).as_bytes()
    parsed = message_from_bytes(data, policy=default)
    assert sorted(parsed.keys()) == sorted(
        ["From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "Content-Type", "Content-Transfer-Encoding",
         "MIME-Version"]
    )  # fmt: skip
    assert parsed["To"] == "root, admin@example.org"
    assert "Bcc: all@example.org" in parsed["Subject"]
    assert parsed.get_content_type() == "text/plain"
    assert "the disk is gone" in parsed.get_content()
    assert max(map(len, data.splitlines())) < 999


def test_a_long_line_a_dot_alone_and_no_unicode_are_carried(tmp_path: Path) -> None:
    message = a_message()
    message.run.warnings = ["x" * 5000, ".", "\udcff", "grün"]
    content = message_from_bytes(compose(mail(), message).as_bytes(), policy=default).get_content()
    assert "x" * 5000 in content
    assert "grün" in content


async def test_sendmail_gets_recipients_of_the_configuration_and_the_mail(tmp_path: Path) -> None:
    program = script(tmp_path / "sendmail", f'printf "%s|" "$@" > {tmp_path}/words; cat > {tmp_path}/mail; echo taken')
    said: list[str] = []
    await send_mail(mail(f'sendmail = "{program}"\nfrom = "a@example.org"'), a_message(), 60, said.append)
    assert (tmp_path / "words").read_text() == "-i|-f|a@example.org|--|root|admin@example.org|"
    text = (tmp_path / "mail").read_bytes()
    assert b"\r" not in text
    assert message_from_bytes(text)["Auto-Submitted"] == "auto-generated"
    assert said == ["taken"]


async def test_a_sendmail_that_fails_hangs_or_is_anybodys_is_an_error(tmp_path: Path) -> None:
    program = script(tmp_path / "sendmail", "echo no >&2; exit 75")
    section = mail(f'sendmail = "{program}"')
    said: list[str] = []
    with pytest.raises(DeliveryError, match="exit code 75"):
        await send_mail(section, a_message(), 60, said.append)
    assert said == ["no"]
    script(program, f"echo $$ > {tmp_path}/pid; exec sleep 1000")
    with pytest.raises(DeliveryError, match="killed"):
        await send_mail(section, a_message(), 1, quiet)
    program.chmod(0o777)
    with pytest.raises(DeliveryError, match="could change it"):
        await send_mail(section, a_message(), 60, quiet)
    program.unlink()
    with pytest.raises(DeliveryError, match="No such file"):
        await send_mail(section, a_message(), 60, quiet)


@pytest.mark.parametrize(("bit", "told"), [("0", False), ("1", True)])
async def test_who_may_come_to_no_more_rights_is_told_of_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bit: str, told: bool
) -> None:
    (tmp_path / "status").write_text(f"Name:\tfleece\nNoNewPrivs:\t{bit}\nSeccomp:\t2\n")
    monkeypatch.setattr("agent.monitoring.mail._OWN_STATUS", tmp_path / "status")
    program = script(tmp_path / "sendmail", "exit 1")
    with pytest.raises(DeliveryError) as caught:
        await send_mail(mail(f'sendmail = "{program}"'), a_message(), 60, quiet)
    assert ('smtp = "127.0.0.1:25"' in str(caught.value)) is told


async def test_smtp_in_plain_text_to_this_host_and_a_line_with_a_dot() -> None:
    peer = MailPeer()
    async with listening(peer):
        section = mail(f'smtp = "127.0.0.1:{peer.port}"\nbody = "one\\n.\\ntwo"')
        await send_mail(section, a_message(), 60, quiet)
    assert [command.split(" ")[0] for command in peer.commands] == ["ehlo", "mail", "rcpt", "rcpt", "data", "quit"]
    assert peer.commands[1].lower().startswith("mail from:<root>")
    assert b"\r\n..\r\ntwo" in peer.mails[0]


@pytest.mark.parametrize("way", ["starttls", "tls"])
async def test_a_password_goes_over_tls_only_to_who_shows_the_right_certificate(tmp_path: Path, way: str) -> None:
    certificate = make_certificate(tmp_path / "server.pem")
    (tmp_path / "password").write_text("wonderful\n")
    context = certificate.context()
    peer = MailPeer(["STARTTLS", "AUTH PLAIN"] if way == "starttls" else ["AUTH PLAIN"], context=context)
    async with listening(peer, context if way == "tls" else None):
        text = f'smtp = "127.0.0.1:{peer.port}"\ntls = "{way}"\nuser = "me"\npassword-file = "{tmp_path}/password"\n'
        await send_mail(mail(f'{text}ca-file = "{certificate.path}"'), a_message(), 60, quiet)
        assert peer.credentials == [b"\0me\0wonderful"]
        assert len(peer.mails) == 1
        secrets = [secure for command, secure in zip(peer.commands, peer.encrypted, strict=True) if "AUTH" in command]
        assert secrets == [True]
        # Nobody vouches for it: nothing is sent.
        with pytest.raises(DeliveryError, match="TLS failed"):
            await send_mail(mail(text), a_message(), 60, quiet)
        assert len(peer.mails) == 1
        peer.replies["AUTH"] = b"535 wrong: wonderful"
        with pytest.raises(DeliveryError, match="does not accept user and password") as raised:
            await send_mail(mail(f'{text}ca-file = "{certificate.path}"'), a_message(), 60, quiet)
    assert "wonderful" not in repr(raised.value)
    assert raised.value.__cause__ is None
    assert not raised.value.temporary


async def test_a_password_that_cannot_be_sent_is_not_taken_for_a_fault_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("wunderschön\n")
    peer = MailPeer(["AUTH PLAIN"])
    async with listening(peer):
        text = f'smtp = "127.0.0.1:{peer.port}"\nuser = "me"\npassword-file = "{tmp_path}/password"'
        with pytest.raises(DeliveryError, match="user and password must be ASCII") as raised:
            await send_mail(mail(text), a_message(), 60, quiet)
    assert (raised.value.temporary, raised.value.__cause__) == (False, None)


async def test_a_server_that_hides_starttls_gets_no_password(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("wonderful\n")
    peer = MailPeer(["AUTH PLAIN"])
    async with listening(peer):
        section = mail(
            f'smtp = "127.0.0.1:{peer.port}"\ntls = "starttls"\nuser = "me"\npassword-file = "{tmp_path}/password"'
        )
        with pytest.raises(DeliveryError, match="does not offer STARTTLS"):
            await send_mail(section, a_message(), 60, quiet)
    assert peer.credentials == []


@pytest.mark.parametrize(
    ("command", "reply", "words", "temporary"),
    [
        ("", b"554 go away", "554", False),
        ("MAIL", b"451 later", "451 later", True),
        ("RCPT", b"550 who", "refuses all recipients", False),
        ("RCPT", b"450 later", "refuses all recipients", True),
        ("DATA.", b"552 too \x1b[2Jlong", r"552 too  \[2Jlong", False),
        ("DATA", DROP, "ended the connection", True),
        ("EHLO", DROP, "ended the connection", True),
        ("MAIL", b"250 " + b"x" * 20_000, "Line too long", False),
        ("MAIL", b"what", "no SMTP", True),
    ],
)  # fmt: skip
async def test_what_servers_say_is_an_error_that_tells_whether_it_may_pass(
    command: str, reply: bytes, words: str, temporary: bool
) -> None:
    peer = MailPeer(replies={command: reply})
    async with listening(peer):
        with pytest.raises(DeliveryError, match=words) as raised:
            await send_mail(mail(f'smtp = "127.0.0.1:{peer.port}"'), a_message(), 60, quiet)
    assert raised.value.temporary == temporary
    assert str(raised.value).isprintable()


async def test_a_mail_that_was_taken_counts_whatever_the_server_says_then() -> None:
    for replies in ({"QUIT": b"500 no"}, {"QUIT": DROP}):
        peer = MailPeer(replies=replies)
        async with listening(peer):
            await send_mail(mail(f'smtp = "127.0.0.1:{peer.port}"'), a_message(), 60, quiet)
        assert len(peer.mails) == 1


async def test_a_server_that_hangs_is_left_alone_and_one_that_is_gone_is_told() -> None:
    peer = MailPeer(replies={"MAIL": HANG})
    async with listening(peer):
        section = mail(f'smtp = "127.0.0.1:{peer.port}"')
        with pytest.raises(DeliveryError, match="did not take it in 1 s"):
            await send_mail(section, a_message(), 1, quiet)
    with taken_port() as port, pytest.raises(DeliveryError, match="refused") as raised:
        await send_mail(mail(f'smtp = "127.0.0.1:{port}"'), a_message(), 60, quiet)
    assert raised.value.temporary


async def test_what_may_pass_is_tried_again_and_what_may_not_is_not(autojump_clock: trio.abc.Clock) -> None:
    assert len(PAUSES_S) == 2
    said: list[str] = []
    section = mail('sendmail = "/nowhere/at/all"')
    with pytest.raises(FleeceError, match="No such file"):
        await deliver(section, a_message(), said.append)
    assert said == []
