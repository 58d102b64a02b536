"""A notification as a mail: through sendmail, or straight to an SMTP server."""

import os
import smtplib
import socket
import ssl
from contextlib import suppress
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from agent.errors import HookError
from agent.hooks import Hook
from agent.monitoring.errors import DeliveryError
from agent.monitoring.sections import split_host_port
from core.errors import os_reason
from core.limits import io_limiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.monitoring.messages import Message
    from agent.monitoring.sections import MailSection

#: Where distributions have it.
DEFAULT_SENDMAIL: Final = "/usr/sbin/sendmail"
_MAX_PASSWORD: Final = 4096
#: Says whether this process, and what it starts, can come to more rights than it has.
_OWN_STATUS: Final = Path("/proc/self/status")
_GREETING: Final = 220
#: Answers of an SMTP server that mean: later perhaps (RFC 5321, 4.2.1).
_TRANSIENT: Final = range(400, 500)


def compose(section: "MailSection", message: "Message") -> EmailMessage:
    """The mail. Texts of guests and stores are in its subject, cleaned to one line, and its body.

    Raises:
        FleeceError: the template cannot be used.
    """
    mail = EmailMessage(policy=SMTP)
    mail["From"] = _sender(section)
    mail["To"] = ", ".join(section.to)
    mail["Subject"] = message.subject(section)
    mail["Date"] = formatdate(localtime=True)
    domain = _sender(section).partition("@")[2] or _host_name()
    mail["Message-ID"] = make_msgid("fleece", domain=domain)
    # No vacation answers, no loops (RFC 3834).
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(message.body(section))
    return mail


async def send_mail(section: "MailSection", message: "Message", timeout_s: float, log: "Callable[[str], None]") -> None:
    """Hand the mail over to whoever delivers it.

    Cancelled, a program is ended and a connection closed; the mail may have been taken all the same.

    Raises:
        DeliveryError: it was not taken.
        FleeceError: password or template cannot be used.
    """
    mail = compose(section, message)
    if section.smtp is None:
        await _by_sendmail(section, mail, timeout_s, log)
    else:
        await _by_smtp(section, mail, timeout_s)


def _sender(section: "MailSection") -> str:
    return section.sender or "root"


def _host_name() -> str:
    """Of this host, if it can stand in a header."""
    name = socket.gethostname()
    return name if name.isascii() and name.replace("-", "").replace(".", "").isalnum() else "localhost"


async def _by_sendmail(
    section: "MailSection", mail: EmailMessage, timeout_s: float, log: "Callable[[str], None]"
) -> None:
    program = section.sendmail or Path(DEFAULT_SENDMAIL)
    # -i: a dot alone on a line does not end the mail. Recipients are those of the configuration, not of the text.
    arguments = ("-i", "-f", _sender(section), "--", *section.to)
    try:
        await Hook(program, timeout_s).call(arguments, {}, log, mail.as_bytes().replace(b"\r\n", b"\n"))
    except HookError as error:
        raise DeliveryError("send a mail by", str(program), error.why, error.hint or _hint()) from error


def _hint() -> str:
    """What a sendmail may have met: Exim becomes a user of its own, others belong to a group (setgid)."""
    try:
        confined = "\nNoNewPrivs:\t1\n" in _OWN_STATUS.read_text()
    except OSError:
        confined = False
    return (
        'smtp = "127.0.0.1:25" reaches mailers that change their user, which this service may not' if confined else ""
    )


class _Connection:
    """The connection that a thread uses, so that who waits can end it."""

    def __init__(self) -> None:
        self.smtp: smtplib.SMTP | None = None
        self.ended = False

    def end(self) -> None:
        self.ended = True
        sock = None if self.smtp is None else self.smtp.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


async def _by_smtp(section: "MailSection", mail: EmailMessage, timeout_s: float) -> None:
    from datastore.private_files import read_small

    assert section.smtp is not None
    password = ""
    if section.password_file is not None:
        raw = read_small(section.password_file, what="read the password from", limit=_MAX_PASSWORD)
        password = raw.split(b"\n", 1)[0].removesuffix(b"\r").decode("utf-8", "replace")
    connection = _Connection()
    with trio.move_on_after(timeout_s) as scope:
        try:
            # A server that says a byte now and then keeps smtplib waiting for ever: the thread is left alone then, and
            # ends because its connection does.
            await trio.to_thread.run_sync(
                _talk, section, mail, password, timeout_s, connection,
                abandon_on_cancel=True, limiter=io_limiter(),
            )  # fmt: skip
        finally:
            connection.end()
    if scope.cancelled_caught:
        raise _too_slow(section.smtp, timeout_s)


def _too_slow(where: str, timeout_s: float) -> DeliveryError:
    return DeliveryError("send a mail to", where, f"it did not take it in {timeout_s:.0f} s", temporary=True)


def _talk(section: "MailSection", mail: EmailMessage, password: str, timeout_s: float, connection: _Connection) -> None:
    """Deliver the mail, in a thread."""
    assert section.smtp is not None
    host, port = split_host_port(section.smtp)
    where = section.smtp
    try:
        context = None
        if section.encryption != "none":
            context = ssl.create_default_context(cafile=None if section.ca_file is None else os.fspath(section.ca_file))
        # The name is given: looking for a full one asks a name server that may not answer.
        name = _host_name()
        smtp: smtplib.SMTP
        if section.encryption == "tls":
            smtp = smtplib.SMTP_SSL(timeout=timeout_s, context=context, local_hostname=name)
        else:
            smtp = smtplib.SMTP(timeout=timeout_s, local_hostname=name)
        connection.smtp = smtp
        smtp._host = host  # type: ignore[attr-defined]  # what the constructor sets when it connects itself; for TLS
        try:
            code, words = smtp.connect(host, port)
            if code != _GREETING:
                raise smtplib.SMTPConnectError(code, words)
            if connection.ended:
                return
            if section.encryption == "starttls":
                smtp.starttls(context=context)
            if section.user is not None:
                smtp.login(section.user, password)
            refused = smtp.send_message(mail, _sender(section), section.to)
            with suppress(smtplib.SMTPException, OSError, ValueError):  # it has been taken, whatever comes now
                smtp.quit()
        finally:
            smtp.close()
        if refused:
            # Some were taken: trying again would send those a second mail.
            whom = ", ".join(sorted(refused))
            raise DeliveryError("send a mail to", where, f"the server refuses these recipients: {whom}")
    except smtplib.SMTPRecipientsRefused as error:
        codes = [code for code, _ in error.recipients.values()]
        why = "the server refuses all recipients"
        raise DeliveryError("send a mail to", where, why, temporary=all(code in _TRANSIENT for code in codes)) from None
    except smtplib.SMTPAuthenticationError as error:
        # Its words are not shown: they may repeat what was sent.
        why = f"the server does not accept user and password (code {error.smtp_code})"
        raise DeliveryError("send a mail to", where, why, temporary=error.smtp_code in _TRANSIENT) from None
    except smtplib.SMTPResponseException as error:
        if error.smtp_code < 0:  # smtplib's word for no code at all
            raise DeliveryError("send a mail to", where, "what it says is no SMTP", temporary=True) from None
        said = error.smtp_error.decode("utf-8", "replace") if isinstance(error.smtp_error, bytes) else error.smtp_error
        shown = "".join(char if char.isprintable() else " " for char in str(said))[:200]
        why = f"the server answers {error.smtp_code} {shown}".rstrip()
        raise DeliveryError("send a mail to", where, why, temporary=error.smtp_code in _TRANSIENT) from None
    except smtplib.SMTPNotSupportedError:
        what = "STARTTLS" if section.encryption == "starttls" else "what is needed (authentication)"
        raise DeliveryError("send a mail to", where, f"the server does not offer {what}") from None
    except smtplib.SMTPException as error:
        why = "the server ended the connection" if isinstance(error, smtplib.SMTPServerDisconnected) else "it failed"
        raise DeliveryError("send a mail to", where, why, temporary=True) from error
    except TimeoutError:
        raise _too_slow(where, timeout_s) from None
    except ssl.SSLError as error:
        why = f"TLS failed: {error.reason or error}"
        raise DeliveryError("send a mail to", where, why, "ca-file names other authorities") from error
    except UnicodeEncodeError:  # of the log-in; the error has the password in it
        raise DeliveryError("send a mail to", where, "user and password must be ASCII") from None
    except (OSError, ValueError) as error:
        why = os_reason(error) if isinstance(error, OSError) else "what it says is no SMTP"
        raise DeliveryError("send a mail to", where, why, temporary=True) from error
