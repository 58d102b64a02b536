"""One request and its answer, and what an answer means: its code decides, not its status alone (R14)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from core.buffers import Buffer
from datastore.s3.counters import Method
from datastore.s3.errors import S3BackendError, S3ClockError, S3Error, S3ObjectError
from datastore.s3.xml import ErrorBody, printable

#: Bytes of an answer that refuses something.
MAX_ERROR_SIZE: Final = 1 << 20
#: Seconds between the clocks from which on a refusal is blamed on them.
CLOCK_TOLERANCE_S: Final = 60.0
_RETRY_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})
_THROTTLE_STATUS: Final = frozenset({429, 503})
_RETRY_CODES: Final = frozenset(
    {
        "SlowDown",
        "RequestTimeout",
        "InternalError",
        "ServiceUnavailable",
        "ThrottlingException",
        "OperationAborted",
        "ConditionalRequestConflict",
    }
)
_THROTTLE_CODES: Final = frozenset({"SlowDown", "ThrottlingException", "ServiceUnavailable"})
_FATAL: Final[Mapping[str, str]] = {
    "NoSuchBucket": "the bucket does not exist",
    "AccessDenied": "the access key may not do this",
    "InvalidAccessKeyId": "the endpoint does not know the access key",
    "SignatureDoesNotMatch": "the secret key or the region is wrong",
    "AuthorizationHeaderMalformed": "the region is wrong",
    "AllAccessDisabled": "the bucket is disabled",
    "AccountProblem": "the account is disabled",
    "ExpiredToken": "the access key has expired",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One request as the link is asked for it."""

    what: str  #: for people: "read the object"
    method: Method
    verb: str  #: GET, HEAD, PUT, POST or DELETE
    bucket: str | None
    key: str = ""
    query: Sequence[tuple[str, str | None]] = ()
    headers: Sequence[tuple[str, str]] = ()
    body: Sequence[Buffer] | None = None  #: None: no body and no content-length
    md5: bool = False  #: send content-md5 whatever the endpoint's setting
    ok: frozenset[int] = frozenset({200})
    accept: frozenset[int] = frozenset()  #: refusals that the caller wants to see
    limit: int = MAX_ERROR_SIZE  #: bytes of a good answer
    keys: Sequence[str] = ()  #: what it changes
    fresh: bool = False  #: over a connection of its own


@dataclass(frozen=True, slots=True)
class Reply:
    """A good answer, or an accepted refusal."""

    status: int
    headers: Mapping[str, str]
    body: Buffer
    error: ErrorBody | None = None  #: of a refusal with a readable body
    md5: str = ""  #: content-md5 that was sent

    @property
    def code(self) -> str:
        """S3's code, empty if there is none."""
        return self.error.code if self.error is not None else ""


class UnusableAnswerError(Exception):
    """An answer with a good status that is no good; raised by `Link.send`'s `check`. The request is sent again."""

    def __init__(self, why: str, error: ErrorBody | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.error = error


def is_retryable(reply: Reply) -> bool:
    """True if the same request may be answered better later (R13)."""
    return reply.status in _RETRY_STATUS or reply.code in _RETRY_CODES


def is_throttle(reply: Reply) -> bool:
    """True if the endpoint asks for fewer requests."""
    return reply.status in _THROTTLE_STATUS or reply.code in _THROTTLE_CODES


#: What a person can do, by code; `{id}` is the endpoint's.
_HINTS: Final[Mapping[str, str]] = {
    "SignatureDoesNotMatch": "'fleece s3 endpoint update {id} --secret' stores another secret key",
    "InvalidAccessKeyId": "'fleece s3 endpoint update {id} --access-key KEY --secret' stores other keys",
    "AccessDenied": "'fleece s3 endpoint check {id} --bucket BUCKET' tells what the access key may do",
    "NoSuchBucket": "buckets are never made: it was removed, or another one is meant",
}


def refusal(call: Call, reply: Reply, where: str, ahead_s: float) -> S3Error:
    """The error for an answer that more attempts will not change.

    Args:
        call: what was asked.
        reply: what was answered.
        where: the object, for people.
        ahead_s: how far the endpoint's clock is ahead of ours; 0 if unknown.
    """
    status, code = reply.status, reply.code
    if code == "RequestTimeTooSkewed":
        why = f"the clocks of this machine and the endpoint differ by {abs(ahead_s):.0f} s"
        return S3ClockError(call.what, where, why, "set this machine's clock", status=status, code=code)
    region = printable(reply.headers.get("x-amz-bucket-region", ""))
    if reply.error is not None:
        region = region or reply.error.details.get("Region", "")
    if status in (301, 302, 303, 307, 308) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        why = "the endpoint sends us elsewhere" if status < 400 else describe(reply)
        hint = f"the bucket is in region {region}" if region else "the region or the endpoint is wrong"
        return S3BackendError(call.what, where, why, hint, status=status, code=code)
    if code == "InvalidObjectState" and reply.error is not None:
        tier = reply.error.details.get("StorageClass") or printable(reply.headers.get("x-amz-storage-class", ""))
        why = f"the object lies in the archive tier {tier or 'of the provider'}"
        return S3ObjectError(
            call.what, where, why, "restore it there to the standard tier first", status=status, code=code
        )
    if code in _FATAL or status in (401, 403):
        why = f"{_FATAL[code]} ({describe(reply)})" if code in _FATAL else describe(reply)
        hint = _HINTS.get(code, "").format(id=where.partition(":")[0])
        if abs(ahead_s) > CLOCK_TOLERANCE_S:
            hint = f"the endpoint's clock differs by {ahead_s:.0f} s"
        return S3BackendError(call.what, where, why, hint, status=status, code=code)
    return S3Error(call.what, where, describe(reply), status=status, code=code)


def describe(reply: Reply) -> str:
    """The answer in words."""
    if reply.error is None or not reply.error.code:
        return f"HTTP status {reply.status}"
    message = f": {reply.error.message}" if reply.error.message else ""
    return f"{reply.error.code}{message} (HTTP status {reply.status})"


def retry_after(headers: Mapping[str, str], now: float) -> float:
    """Seconds that the header asks for, 0 without one; it may also be a date."""
    text = headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text[:6])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now) if text else 0.0
    except (ValueError, OverflowError):
        return 0.0
