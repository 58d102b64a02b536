"""Errors of the server.

FleeceError
└── ServerError     the server cannot be started, or its own files cannot be used
ApiError            a request is refused; becomes its answer
└── UnauthorizedError    401 without a content type, after 3 s
"""

from typing import Final

from core.errors import FleeceError

#: Seconds before an answer that says 401, and before one that refuses a declared privilege (spec 2.3).
UNAUTHORIZED_DELAY_S: Final = 3.0
FORBIDDEN_DELAY_S: Final = 0.5


class ServerError(FleeceError):
    """The server cannot be started, or its own files cannot be used."""


class ApiError(Exception):
    """A request is refused with `status` and the text `message`, after `delay_s` seconds."""

    def __init__(self, message: str, status: int = 400, *, delay_s: float = 0.0, errors: dict[str, str] | None = None):
        self.message = message
        self.status = status
        self.delay_s = UNAUTHORIZED_DELAY_S if status == 401 else delay_s
        self.errors = errors or {}  #: per parameter
        super().__init__(message)


class UnauthorizedError(ApiError):
    """Credentials are missing or wrong."""

    def __init__(self, reason: str):
        super().__init__(f"authentication failed - {reason}", 401)


class TooLargeError(Exception):
    """A head or a body has more bytes than are allowed; the connection ends."""


class BodyError(Exception):
    """A body did not come, or came too slowly; the connection ends."""


def forbidden(message: str = "permission check failed") -> ApiError:
    """A declared privilege is missing."""
    return ApiError(message, 403, delay_s=FORBIDDEN_DELAY_S)
