"""The XML that S3 speaks: answers read without trust, request bodies written with everything escaped.

Answers come from outside: UTF-8 only, no document type and so no entities, sizes checked before (R15).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from core.buffers import Buffer
from core.errors import FormatError

#: Bytes of the longest XML answer that is read.
MAX_XML_SIZE: Final = 16 << 20
#: Keys in one request that deletes (R16).
MAX_DELETE_KEYS: Final = 1000
_NAMESPACE: Final = "http://s3.amazonaws.com/doc/2006-03-01/"
#: Characters kept of a server's message, and of its other words.
_MAX_MESSAGE: Final = 300
_MAX_WORD: Final = 64


class Listed(NamedTuple):
    """One object of a listing."""

    key: str
    size: int  #: bytes
    last_modified: float  #: Unix seconds by the server's clock
    etag: str  #: without quotes; MD5 in hex for most objects
    storage_class: str  #: empty if the server does not say


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing, at most 1000 objects in the order of their keys."""

    objects: list[Listed]
    token: str | None  #: what continues the listing; None on the last page


class Version(NamedTuple):
    """One version of an object, or a delete marker."""

    key: str
    id: str
    is_latest: bool  #: the current one
    is_marker: bool  #: it says that the object was deleted
    modified: float  #: Unix seconds by the server's clock
    size: int  #: bytes, 0 for a marker


@dataclass(frozen=True, slots=True)
class VersionPage:
    """One page of a listing of versions, in the order of their keys, the newest version of each first."""

    versions: list[Version]
    following: tuple[str, str] | None  #: key and version that continue the listing; None on the last page


class Bucket(NamedTuple):
    """One bucket of the account."""

    name: str
    created: str  #: as the server writes it; may be empty


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The body of an answer that refuses."""

    code: str
    message: str
    details: dict[str, str]  #: the other fields: `Region`, `StorageClass`, `RequestId`, ...


class DeleteFailure(NamedTuple):
    """One key that a batch did not delete."""

    key: str
    code: str
    message: str
    version: str = ""  #: id, if one version was to be deleted


def parse_error(body: Buffer) -> ErrorBody | None:
    """The code and message of a refusal; None if `body` is no readable error."""
    if not body:
        return None
    try:
        root = _parse(body)
    except FormatError:
        return None
    if _name(root) != "Error":
        return None
    fields = {_name(child): (child.text or "").strip() for child in root}
    code, message = fields.pop("Code", ""), fields.pop("Message", "")
    details = {name: printable(text) for name, text in fields.items()}
    return ErrorBody(printable(code), printable(message, _MAX_MESSAGE), details)


def printable(text: str, limit: int = _MAX_WORD) -> str:
    """The beginning of a server's own words, without what would steer a terminal or break a line of a log."""
    return "".join(character if character.isprintable() else " " for character in text[:limit])


def parse_page(body: Buffer) -> Page:
    """Read one answer to ListObjectsV2.

    Raises:
        FormatError: anything else.
    """
    root = _root(body, "ListBucketResult")
    objects, truncated, token = [], None, None
    for child in root:
        name = _name(child)
        if name == "Contents":
            objects.append(_listed(child))
        elif name == "IsTruncated":
            truncated = _is_true(child)
        elif name == "NextContinuationToken":
            token = child.text or ""
    if truncated is None:
        truncated = bool(token)  # who does not say so, but gives a token, has more
    if truncated and not token:
        raise _wrong("truncated, but without a token to go on with")
    return Page(objects, token if truncated else None)


def parse_versions(body: Buffer) -> VersionPage:
    """Read one answer to ListObjectVersions.

    Raises:
        FormatError: anything else.
    """
    versions, truncated, key, version = [], False, "", ""
    for child in _root(body, "ListVersionsResult"):
        name = _name(child)
        if name in ("Version", "DeleteMarker"):
            versions.append(_version(child))
        elif name == "IsTruncated":
            truncated = _is_true(child)
        elif name == "NextKeyMarker":
            key = child.text or ""
        elif name == "NextVersionIdMarker":
            version = child.text or ""
    if truncated and not key:
        raise _wrong("truncated, but without a key to go on with")
    return VersionPage(versions, (key, version) if truncated else None)


def parse_buckets(body: Buffer) -> list[Bucket]:
    """Read the answer to the list of buckets.

    Raises:
        FormatError: anything else.
    """
    found = []
    for child in _root(body, "ListAllMyBucketsResult"):
        if _name(child) == "Buckets":
            for bucket in child:
                fields = _fields(bucket)
                found.append(Bucket(printable(fields.get("Name", "")), printable(fields.get("CreationDate", ""))))
    return found


def parse_copy(body: Buffer) -> str:
    """The ETag of a finished copy, empty if the answer has none.

    Raises:
        FormatError: anything else.
    """
    return _fields(_root(body, "CopyObjectResult")).get("ETag", "").strip('"')


def parse_delete(body: Buffer) -> list[DeleteFailure]:
    """The keys that a batch did not delete.

    Raises:
        FormatError: anything else.
    """
    failures = []
    for child in _root(body, "DeleteResult"):
        if _name(child) == "Error":
            fields = _fields(child)
            code, message = printable(fields.get("Code", "")), printable(fields.get("Message", ""), _MAX_MESSAGE)
            failures.append(DeleteFailure(fields.get("Key", ""), code, message, fields.get("VersionId", "")))
    return failures


def parse_text(body: Buffer, root: str, path: Sequence[str]) -> str:
    """The text of the first element at `path` below `root`; empty if there is none.

    Raises:
        FormatError: another root, or no XML.
    """
    element: ElementTree.Element | None = _root(body, root)
    for name in path:
        element = next((child for child in element if _name(child) == name), None) if element is not None else None
    return (element.text or "").strip() if element is not None else ""


def delete_body(keys: Sequence[str]) -> bytes:
    """The body that deletes `keys` and answers only about failures."""
    objects = "".join(f"<Object><Key>{_escaped(key)}</Key></Object>" for key in keys)
    return f'<Delete xmlns="{_NAMESPACE}">{objects}<Quiet>true</Quiet></Delete>'.encode()


def delete_versions_body(versions: Sequence[tuple[str, str]]) -> bytes:
    """The body that deletes versions (key, id) and answers only about failures."""
    objects = "".join(
        f"<Object><Key>{_escaped(key)}</Key><VersionId>{_escaped(id)}</VersionId></Object>" for key, id in versions
    )
    return f'<Delete xmlns="{_NAMESPACE}">{objects}<Quiet>true</Quiet></Delete>'.encode()


def _escaped(text: str) -> str:
    # Line ends would be normalised by the reader.
    return escape(text, {"\r": "&#13;", "\n": "&#10;"})


def _parse(body: Buffer) -> ElementTree.Element:
    if len(body) > MAX_XML_SIZE:
        raise _wrong(f"{len(body)} bytes")
    data = bytes(body)
    # The parser is told to read UTF-8 whatever the declaration says, but a byte order mark or a NUL behind the first
    # `<` would still make it read UTF-16. Without those a document type cannot hide, and without one there are no
    # entities but the five of XML.
    if b"\0" in data or b"<!DOCTYPE" in data or not _is_utf8(data):
        raise _wrong("not plain UTF-8 without a document type")
    try:
        parser = ElementTree.XMLParser(encoding="utf-8")
        parser.feed(data)
        return parser.close()
    except (ElementTree.ParseError, ValueError) as error:
        raise _wrong(str(error)) from error


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _root(body: Buffer, name: str) -> ElementTree.Element:
    root = _parse(body)
    if _name(root) != name:
        raise _wrong(f"<{_name(root)[:40]}> where <{name}> is due")
    return root


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _is_true(element: ElementTree.Element) -> bool:
    # A listing that is taken for whole although it is not would lose what it lacks: only a plain "no" is one.
    return (element.text or "").strip().lower() not in ("", "false", "0")


def _fields(element: ElementTree.Element) -> dict[str, str]:
    return {_name(child): child.text or "" for child in element}


def _listed(element: ElementTree.Element) -> Listed:
    fields = _fields(element)
    try:
        size = int(fields["Size"])
        modified = parse_iso(fields["LastModified"])
        key = fields["Key"]
    except (KeyError, ValueError, OverflowError) as error:
        raise _wrong(f"an object of the listing lacks or garbles {printable(str(error))}") from error
    if size < 0:
        raise _wrong(f"an object of {size} bytes")
    return Listed(key, size, modified, fields.get("ETag", "").strip('"'), fields.get("StorageClass", ""))


def _version(element: ElementTree.Element) -> Version:
    fields = _fields(element)
    is_marker = _name(element) == "DeleteMarker"
    try:
        size = 0 if is_marker else int(fields["Size"])
        modified = parse_iso(fields["LastModified"])
        key, id, latest = fields["Key"], fields["VersionId"], fields["IsLatest"].strip()
    except (KeyError, ValueError, OverflowError) as error:
        raise _wrong(f"a version of the listing lacks or garbles {printable(str(error))}") from error
    if size < 0 or latest not in ("true", "false") or not id:
        raise _wrong(f"a version of {size} bytes, of the id {printable(id)!r}, {printable(latest)} the latest")
    return Version(key, id, latest == "true", is_marker, modified, size)


def parse_iso(text: str) -> float:
    """Unix seconds of an ISO 8601 time; without a zone it is UTC.

    Raises:
        ValueError: another form.
        OverflowError: a time before or after all times.
    """
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def batches(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """`keys` in pieces of at most `MAX_DELETE_KEYS`."""
    for start in range(0, len(keys), MAX_DELETE_KEYS):
        yield keys[start : start + MAX_DELETE_KEYS]


def _wrong(why: str) -> FormatError:
    return FormatError("read", "an XML answer", why)
