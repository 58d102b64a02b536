"""Errors of remote repositories.

FleeceError
└── RemoteError
    ├── RemoteUnavailableError   no connection, or it was lost; later it may work
    │   └── FinishUnknownError   whether a snapshot is finished could not be found out
    ├── RemoteCertificateError   the server is not the one that is trusted
    ├── RemoteAnswerError        (FormatError) the server says what no server says
    └── RemoteRefusedError       the server says no; `status` and `text` are its own
        └── RemoteLoginError     credentials are missing, wrong or expired
"""

import re
from typing import Final

from core.errors import FleeceError, FormatError
from datastore.errors import LockedError, OwnerError, ProtectedError, SnapshotNotFoundError


class RemoteError(FleeceError):
    """Something with a server went wrong."""


class RemoteUnavailableError(RemoteError):
    """The server cannot be reached, or the connection was lost."""


class FinishUnknownError(RemoteUnavailableError):
    """The connection was lost while a snapshot was being finished, and whether it is could not be found out."""


class RemoteCertificateError(RemoteError):
    """The server's certificate is neither valid nor the expected one."""


class RemoteAnswerError(RemoteError, FormatError):
    """The server sent what no server sends."""


class RemoteRefusedError(RemoteError):
    """The server refused."""

    def __init__(self, what: str, where: str, why: str, hint: str = "", *, status: int = 400, text: str = "") -> None:
        super().__init__(what, where, why, hint)
        self.status = status  #: of HTTP
        self.text = text  #: the server's message, cleaned


class RemoteLoginError(RemoteRefusedError):
    """Credentials are missing, wrong or expired."""


#: Characters of a server's message that are shown.
_MAX_TEXT: Final = 500


def clean_text(body: bytes | bytearray) -> str:
    """A server's message as one line for people: printable, and not too long."""
    text = bytes(body[: 4 * _MAX_TEXT]).decode("utf-8", "replace")
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "..."


#: What servers say when somebody else holds a lock.
_LOCK: Final = re.compile(r"\block(?:ed|ing)?\b|\bbusy\b|would block", re.IGNORECASE)
#: How a 401 begins that is about credentials; others are about rights.
_LOGIN_TEXTS: Final = ("authentication failed", "permission check failed.")


def is_login_failure(status: int, text: str) -> bool:
    """True if an answer means that the credentials are wrong, and not that they give too few rights."""
    return status == 401 and (not text or text.startswith(_LOGIN_TEXTS))


def refusal(what: str, where: str, status: int, body: bytes | bytearray) -> RemoteRefusedError:
    """The error for an answer that is none of the 200s."""
    text = clean_text(body)
    why = text or f"the server answers with status {status}"
    if is_login_failure(status, text):
        hint = "check user and password, or run 'fleece login'"
        return RemoteLoginError(what, where, why, hint, status=status, text=text)
    hint = "the user or token has no such right there" if status in (401, 403) else ""
    return RemoteRefusedError(what, where, why, hint, status=status, text=text)


def precise(error: RemoteRefusedError) -> FleeceError:
    """The error that a local datastore would raise in that case, as far as the server's text tells; else `error`."""
    kind: type[FleeceError] | None = None
    if "owner check failed" in error.text:
        kind = OwnerError
    elif "ENOENT: No such file or directory" in error.text or "does not exist" in error.text:
        kind = SnapshotNotFoundError
    elif "protected snapshot" in error.text:
        kind = ProtectedError
    elif _LOCK.search(error.text):
        kind = LockedError
    return error if kind is None else kind(error.what, error.where, error.why, error.hint)
