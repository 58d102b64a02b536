"""The content of the S3 emulator: buckets in memory, and the XML that describes them."""

import base64
import bisect
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"
#: Tokens have the characters that need care in a query.
_TOKEN_START = "a+/="


@dataclass
class StoredObject:
    """One object; `last_modified` (Unix seconds) may be set by a test."""

    data: bytes
    etag: str  #: without quotes
    last_modified: float
    storage_class: str = "STANDARD"
    size: int = -1  #: what listings say, if it is not the length

    @property
    def listed_size(self) -> int:
        return len(self.data) if self.size < 0 else self.size


@dataclass
class FakeBucket:
    """Objects by key. Not locked: the emulator does that."""

    objects: dict[str, StoredObject] = field(default_factory=dict)
    versioning: str = ""  #: `Enabled` keeps what is deleted or replaced
    object_lock: str = ""  #: `GOVERNANCE`: PUTs need content-md5, deletes keep the data
    page_size: int = 1000
    empty_last_page: bool = False  #: a full last page is followed by an empty one, as on RGW
    old_versions: int = 0  #: kept by versioning or object lock
    _ordered: list[str] = field(default_factory=list)
    _count: int = -1

    def put(self, key: str, data: bytes, now: float | None = None) -> StoredObject:
        """Store an object as an upload does."""
        if key in self.objects:
            self._keep()
        else:
            self._count = -1
        stored = StoredObject(data, hashlib.md5(data).hexdigest(), time.time() if now is None else now)
        self.objects[key] = stored
        return stored

    def delete(self, key: str) -> bool:
        """Delete an object; False if there is none."""
        if self.objects.pop(key, None) is None:
            return False
        self._count = -1
        self._keep()
        return True

    def _keep(self) -> None:
        if self.versioning == "Enabled" or self.object_lock:
            self.old_versions += 1

    def keys(self) -> list[str]:
        """All keys in byte order."""
        if self._count != len(self.objects):
            self._ordered = sorted(self.objects, key=str.encode)
            self._count = len(self._ordered)
        return self._ordered

    def page(self, prefix: str, token: str | None) -> tuple[list[str], str | None]:
        """Keys of one page, and the token of the next.

        Raises:
            ValueError: no token of ours.
        """
        after = None
        if token is not None:
            if not token.startswith(_TOKEN_START):
                raise ValueError(token)
            after = base64.b64decode(token[len(_TOKEN_START) :], validate=True).decode()
        ordered = self.keys()
        if after is None:
            start = bisect.bisect_left(ordered, prefix.encode(), key=str.encode)
        else:
            start = bisect.bisect_right(ordered, after.encode(), key=str.encode)
        page = []
        for key in ordered[start : start + self.page_size]:
            if not key.startswith(prefix):
                break
            page.append(key)
        full = len(page) == self.page_size
        following = start + len(page)
        more = full and following < len(ordered) and ordered[following].startswith(prefix)
        if more or (full and self.empty_last_page):
            return page, _TOKEN_START + base64.b64encode(page[-1].encode()).decode()
        return page, None

    def listing(self, prefix: str, token: str | None) -> bytes:
        """The answer to ListObjectsV2."""
        keys, following = self.page(prefix, token)
        parts = ['<?xml version="1.0" encoding="UTF-8"?>\n', f'<ListBucketResult xmlns="{XMLNS}">']
        parts.append(f"<Prefix>{xml_text(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount>")
        for key in keys:
            stored = self.objects[key]
            parts.append(
                f"<Contents><Key>{xml_text(key)}</Key><LastModified>{iso(stored.last_modified)}</LastModified>"
                f"<ETag>&quot;{stored.etag}&quot;</ETag><Size>{stored.listed_size}</Size>"
                f"<StorageClass>{stored.storage_class}</StorageClass></Contents>"
            )
        parts.append(f"<IsTruncated>{'true' if following else 'false'}</IsTruncated>")
        if following:
            parts.append(f"<NextContinuationToken>{following}</NextContinuationToken>")
        return "".join([*parts, "</ListBucketResult>"]).encode()


def xml_text(text: str) -> str:
    """`text` escaped."""
    return escape(text, {"\r": "&#13;", "\n": "&#10;"})


def iso(seconds: float) -> str:
    """As in listings, with milliseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03}Z"


def error_xml(code: str, message: str, details: Mapping[str, str]) -> bytes:
    """The body of a refusal."""
    more = "".join(f"<{name}>{xml_text(value)}</{name}>" for name, value in details.items())
    text = f"<Error><Code>{code}</Code><Message>{xml_text(message)}</Message>{more}<RequestId>0</RequestId></Error>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()


def delete_xml(deleted: Sequence[str], failed: Mapping[str, str], quiet: bool) -> bytes:
    """The answer to a multi-object delete."""
    parts = [f'<?xml version="1.0" encoding="UTF-8"?>\n<DeleteResult xmlns="{XMLNS}">']
    if not quiet:
        parts += [f"<Deleted><Key>{xml_text(key)}</Key></Deleted>" for key in deleted]
    for key, code in failed.items():
        parts.append(f"<Error><Key>{xml_text(key)}</Key><Code>{code}</Code><Message>planned</Message></Error>")
    return "".join([*parts, "</DeleteResult>"]).encode()
