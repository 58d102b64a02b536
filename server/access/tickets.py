"""Tickets, which clients show instead of a password, and the tokens against forged requests that go with them.

    PBS:<user id, percent-encoded but for "@">:<time %08X>::<base64 of the signature, without padding>

Lifetime and form: spec 2.2.
"""

import base64
import hashlib
import hmac
import os
import re
import tempfile
import time
from binascii import Error as Base64Error
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from core.errors import os_reason
from server.access.auth_ids import USER_ID
from server.errors import ServerError, UnauthorizedError

LIFETIME_S: Final = 7200
SKEW_S: Final = 300
_STAMP: Final = re.compile(r"[0-9A-F]{8}")
#: Bytes of a ticket that are looked at.
MAX_TICKET: Final = 1024


class Tickets:
    """Makes and checks tickets with the keys in the folder `state`, made at their first use."""

    def __init__(self, state: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        raw = _secret(state / "ticket.key", 32)
        self._key: Final = Ed25519PrivateKey.from_private_bytes(raw)
        self._public: Final = self._key.public_key()
        self._csrf: Final = _secret(state / "csrf.key", 32)

    @property
    def public_bytes(self) -> bytes:
        """The key that checks tickets."""
        return self._public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    def ticket(self, user: str) -> str:
        """A new ticket of `user`."""
        text = f"PBS:{quote(user, safe='@')}:{int(self._clock()):08X}"
        return f"{text}::{_base64(self._key.sign(text.encode()))}"

    def verify(self, ticket: str) -> str:
        """The user of `ticket`.

        Raises:
            UnauthorizedError: no ticket of this server, or not a valid one any more.
        """
        text, separator, signature = ticket.partition("::")
        if len(ticket) > MAX_TICKET or not separator:
            raise UnauthorizedError("ticket without data")
        parts = text.split(":")
        if len(parts) != 3 or parts[0] != "PBS" or _STAMP.fullmatch(parts[2]) is None:
            raise UnauthorizedError("invalid ticket")
        try:
            self._public.verify(base64.b64decode(signature + "=" * (-len(signature) % 4)), text.encode())
        except (InvalidSignature, Base64Error, ValueError):
            raise UnauthorizedError("invalid ticket - invalid signature") from None
        self._check_time(int(parts[2], 16), "ticket")
        user = unquote(parts[1])
        if USER_ID.fullmatch(user) is None:
            raise UnauthorizedError("invalid ticket")
        return user

    def csrf_token(self, user: str) -> str:
        """A new token for requests of `user` that change something."""
        stamp = f"{int(self._clock()):08X}"
        return f"{stamp}:{self._csrf_digest(stamp, user)}"

    def verify_csrf(self, token: str, user: str) -> None:
        """See to it that `token` is one of `user`.

        Raises:
            UnauthorizedError: it is not.
        """
        parts = token.split(":")
        if len(parts) != 2:
            raise UnauthorizedError("invalid csrf token - format error - wrong number of parts.")
        if _STAMP.fullmatch(parts[0]) is None:
            raise UnauthorizedError("invalid csrf token - timestamp format error")
        expected = self._csrf_digest(parts[0], user)
        if not hmac.compare_digest(parts[1].encode("utf-8", "replace"), expected.encode()):
            raise UnauthorizedError("invalid csrf token - signature invalid.")
        self._check_time(int(parts[0], 16), "csrf token")

    def _csrf_digest(self, stamp: str, user: str) -> str:
        return _base64(hmac.new(self._csrf, f"{stamp}:{user}:".encode(), hashlib.sha3_256).digest())

    def _check_time(self, made: int, what: str) -> None:
        age = self._clock() - made
        if age < -SKEW_S:
            raise UnauthorizedError(f"invalid {what} - timestamp newer than expected.")
        if age > LIFETIME_S + SKEW_S:
            raise UnauthorizedError(f"invalid {what} - timestamp too old.")


def unsigned(ticket: str) -> str:
    """`ticket` without a usable signature: what a browser's program may see."""
    return f"{ticket.partition('::')[0]}::ticketinfo"


def _secret(path: Path, size: int) -> bytes:
    """The `size` random bytes kept in `path`, made if it is missing."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raw = _made(path, os.urandom(size))
    except OSError as error:
        raise ServerError("use the key", str(path), os_reason(error)) from error
    if len(raw) != size:
        raise ServerError(
            "use the key", str(path), f"{len(raw)} bytes, not {size}", "remove it: a new one will be made"
        )
    return raw


def _made(path: Path, raw: bytes) -> bytes:
    """Write the file, whole or not at all; gives what is in it, which somebody else may have been quicker to write."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return path.read_bytes()
    finally:
        Path(temporary).unlink(missing_ok=True)
    return raw


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")
