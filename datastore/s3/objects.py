"""Objects as answers describe them, and what an answer must have to be believed."""

import base64
import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Final, NamedTuple

from core.buffers import Buffer
from datastore.s3.calls import Reply, UnusableAnswerError
from datastore.s3.xml import parse_copy, parse_error

_MD5_ETAG: Final = re.compile(r"[0-9a-f]{32}")


class Outcome(Enum):
    """What a PUT did."""

    NEW = "new"  #: the object was written
    DUPLICATE = "duplicate"  #: put-if-absent found one, and left it as it was


class PutOutcome(NamedTuple):
    """What became of an object that was sent."""

    outcome: Outcome
    etag: str  #: without quotes; empty for a duplicate


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What the headers say of an object."""

    size: int  #: bytes
    etag: str  #: without quotes
    last_modified: float  #: Unix seconds by the endpoint's clock, 0 if it does not say
    storage_class: str  #: empty: standard


@dataclass(frozen=True, slots=True)
class Fetched:
    """An object that was read."""

    data: Buffer  #: drop it soon: the memory is used again
    info: ObjectInfo


def etag(reply: Reply) -> str:
    """The ETag without quotes; empty if there is none."""
    return reply.headers.get("etag", "").removeprefix("W/").strip('"')


def info(reply: Reply) -> ObjectInfo:
    """The object's headers."""
    try:
        modified = parsedate_to_datetime(reply.headers["last-modified"]).timestamp()
    except (KeyError, ValueError, OverflowError):
        modified = 0.0
    size = int(reply.headers["content-length"])
    return ObjectInfo(size, etag(reply), modified, reply.headers.get("x-amz-storage-class", ""))


def check_object(reply: Reply) -> None:
    """Raise `UnusableAnswerError` unless the headers say what R15 needs."""
    if "content-length" not in reply.headers:
        raise UnusableAnswerError("the answer does not say how long the object is")
    if not etag(reply):
        raise UnusableAnswerError("the answer has no ETag")


def check_put(reply: Reply) -> None:
    """Raise `UnusableAnswerError` unless the object was stored for certain."""
    refuse_error_in(reply)
    if reply.body:
        raise UnusableAnswerError("the answer has a body where none is due")
    if not etag(reply):
        raise UnusableAnswerError("the answer has no ETag")


def damaged(reply: Reply) -> bool:
    """True if the ETag is an MD5, and not that of the body (R10). With keys of a KMS it only looks like one."""
    tag = etag(reply)
    if not reply.md5 or _MD5_ETAG.fullmatch(tag) is None:
        return False
    if reply.headers.get("x-amz-server-side-encryption", "").startswith("aws:kms"):
        return False
    return base64.b64decode(reply.md5).hex() != tag


def check_copy(reply: Reply) -> None:
    """Raise unless the object was copied for certain."""
    refuse_error_in(reply)
    parse_copy(reply.body)


def refuse_error_in(reply: Reply) -> None:
    """Some servers begin a good answer and then find out that it is none."""
    error = parse_error(reply.body)
    if error is not None:
        raise UnusableAnswerError(f"{error.code}: {error.message}", error)


def checked_xml(body: Buffer) -> None:
    """Raise `UnusableAnswerError` if the body is an error."""
    if parse_error(body) is not None:
        raise UnusableAnswerError("an error with a good status")
