"""A notification as a request to a web server: chat, pager, ntfy, or anything that takes JSON.

Redirects are not followed: they would take the secret in URL or headers to another place. What is shown and logged has
`$secret` where the secret was.
"""

from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

import trio

from agent.monitoring.errors import DeliveryError
from agent.monitoring.sections import SECRET
from core.errors import FleeceError, UsageError

if TYPE_CHECKING:
    from agent.monitoring.messages import Message
    from agent.monitoring.sections import WebhookSection

#: Bytes of an answer, which nobody reads.
_MAX_ANSWER: Final = 1 << 20
#: Statuses that may be others a little later.
_TRANSIENT: Final = frozenset((408, 425, 429, 500, 502, 503, 504))
#: What stands for itself in a URL: a secret may be several parts of a path.
_SAFE: Final = "!$&'()*+,/:;=?@%~-._"


def request_body(section: "WebhookSection", message: "Message") -> bytes:
    """What is sent: what the template gives, else the document.

    Raises:
        FleeceError: the template's file cannot be used, or does not give JSON where that is promised.
    """
    import json

    text = message.body(section, default="$document", as_json=section.is_json)
    if section.is_json:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FleeceError(
                "use the template", str(section.template or "body"), f"it gives no JSON: {error}"
            ) from error
    return text.encode("utf-8", "replace")


def _secret(section: "WebhookSection") -> str:
    from agent.secrets import MAX_SECRET, check_secret
    from datastore.private_files import read_small

    assert section.secret_file is not None
    raw = read_small(section.secret_file, what="read the secret from", limit=MAX_SECRET + 2)
    try:
        text = check_secret(raw.split(b"\n", 1)[0].removesuffix(b"\r").decode("ascii"))
    except (UnicodeDecodeError, UsageError):
        raise FleeceError("use the secret in", str(section.secret_file), "it is not one line of ASCII") from None
    return text


async def send_webhook(section: "WebhookSection", message: "Message", timeout_s: float) -> None:
    """Send the request; an answer of 200 to 299 means that it was taken.

    Cancelled, the connection is closed; the request may have been carried out.

    Raises:
        DeliveryError: it was not taken.
        FleeceError: secret or template cannot be used.
    """
    from core.dial import TlsPin
    from datastore.s3.http import HttpPool
    from datastore.s3.wire import Fault, HttpError, HttpRequest

    body = request_body(section, message)
    parts = urlsplit(section.url)
    target, headers = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}", dict(section.headers)
    if section.secret_file is not None:
        secret = _secret(section)
        target = target.replace(SECRET, quote(secret, safe=_SAFE))
        headers = {name: value.replace(SECRET, secret) for name, value in headers.items()}
    headers.setdefault("User-Agent", "fleece")
    request = HttpRequest(
        section.method,
        parts.scheme,
        parts.netloc,
        target,
        [
            ("Host", parts.netloc),
            *headers.items(),
            ("Content-Type", section.content_type),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ],
        [body],
    )
    pool = HttpPool(TlsPin.parse(section.fingerprint, only=section.fingerprint is not None), max_connections=1)
    where, status = section.url, 0

    def begun(answered: int) -> int:
        # It says whether the message was taken, whatever becomes of the rest: nobody is told twice because of that.
        nonlocal status
        status = answered
        return _MAX_ANSWER

    try:
        with trio.move_on_after(timeout_s):
            await pool.exchange(request, limit=begun, on_sent=lambda: None, fresh=True)
    except HttpError as error:
        if not status:
            temporary = error.fault in (Fault.CONNECT, Fault.LOST, Fault.TIMEOUT)
            hint = "fingerprint names the server's certificate" if error.fault is Fault.CERTIFICATE else ""
            raise DeliveryError("send a webhook to", where, error.why, hint, temporary=temporary) from None
    finally:
        with trio.CancelScope(shield=True):
            await pool.aclose()
    if not status:
        raise DeliveryError("send a webhook to", where, f"no answer in {timeout_s:.0f} s", temporary=True)
    if 300 <= status < 400:
        why = f"the server answers {status}, a redirect, and none is followed"
        raise DeliveryError("send a webhook to", where, why, "write the URL that it leads to")
    if not 200 <= status < 300:
        raise DeliveryError("send a webhook to", where, f"the server answers {status}", temporary=status in _TRANSIENT)
