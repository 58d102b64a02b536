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
class StoredVersion:
    """One version of an object of a bucket with versioning."""

    id: str
    modified: float
    stored: StoredObject | None  #: None: a delete marker


@dataclass
class FakeBucket:
    """Objects by key. Not locked: the emulator does that."""

    objects: dict[str, StoredObject] = field(default_factory=dict)
    versioning: str = ""  #: `Enabled` keeps what is deleted or replaced, `Suspended` what was kept so far
    object_lock: str = ""  #: `GOVERNANCE`: PUTs need content-md5, deletes keep the data
    page_size: int = 1000
    empty_last_page: bool = False  #: a full last page is followed by an empty one, as on RGW
    versions: dict[str, list[StoredVersion]] = field(default_factory=dict)  #: newest first
    locked: set[str] = field(default_factory=set)  #: ids of versions that nobody may delete yet
    _ordered: list[str] = field(default_factory=list)
    _count: int = -1

    def put(self, key: str, data: bytes, now: float | None = None) -> StoredObject:
        """Store an object as an upload does."""
        if key not in self.objects:
            self._count = -1
        stored = StoredObject(data, hashlib.md5(data).hexdigest(), time.time() if now is None else now)
        self._keep(key, stored, stored.last_modified)
        self.objects[key] = stored
        return stored

    def delete(self, key: str, now: float | None = None) -> bool:
        """Delete an object; False if there is none."""
        self._keep(key, None, time.time() if now is None else now)
        if self.objects.pop(key, None) is None:
            return False
        self._count = -1
        return True

    def _keep(self, key: str, stored: StoredObject | None, now: float) -> None:
        """Put a version on top, or a delete marker; the one of the id `null` there is but once."""
        if not self.versioning and not self.object_lock:
            return
        known = self.versions.setdefault(key, [])
        if not known and (before := self.objects.get(key)) is not None:  # from before versioning was on
            known.append(StoredVersion("null", before.last_modified, before))
        id = "null"
        if self.versioning == "Suspended":
            known[:] = [version for version in known if version.id != id]
        else:
            id = f"v{sum(map(len, self.versions.values()))}+/{now:.6f}"
        known.insert(0, StoredVersion(id, now, stored))

    def delete_version(self, key: str, id: str) -> bool:
        """Delete one version for good, and what is below becomes the current one; False if it is locked."""
        if id in self.locked:
            return False
        known = [version for version in self.versions.get(key, ()) if version.id != id]
        self.versions[key] = known
        self._count = -1
        self.objects.pop(key, None)
        if known and known[0].stored is not None:
            self.objects[key] = known[0].stored
        return True

    def version_listing(self, prefix: str, key_marker: str, id_marker: str) -> bytes:
        """The answer to ListObjectVersions: what comes behind the marked version, or behind all of the marked key."""
        found = [
            (key, version, number == 0)
            for key in sorted(self.versions, key=str.encode)
            if key.startswith(prefix) and key.encode() >= key_marker.encode()
            for number, version in enumerate(self.versions[key])
        ]
        at_marker = [number for number, (key, version, _) in enumerate(found) if key == key_marker]
        if at_marker:
            exactly = [number for number in at_marker if found[number][1].id == id_marker]
            found = found[(exactly or at_marker)[-1] + 1 :]
        parts = ['<?xml version="1.0" encoding="UTF-8"?>\n', f'<ListVersionsResult xmlns="{XMLNS}">']
        page = found[: self.page_size]
        for key, version, latest in page:
            name = "Version" if version.stored is not None else "DeleteMarker"
            size = f"<Size>{version.stored.listed_size}</Size>" if version.stored is not None else ""
            parts.append(
                f"<{name}><Key>{xml_text(key)}</Key><VersionId>{xml_text(version.id)}</VersionId>"
                f"<IsLatest>{'true' if latest else 'false'}</IsLatest>"
                f"<LastModified>{iso(version.modified)}</LastModified>{size}</{name}>"
            )
        more = len(found) > len(page)
        parts.append(f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>")
        if more:
            key, version, _ = page[-1]
            parts.append(f"<NextKeyMarker>{xml_text(key)}</NextKeyMarker>")
            parts.append(f"<NextVersionIdMarker>{xml_text(version.id)}</NextVersionIdMarker>")
        return "".join([*parts, "</ListVersionsResult>"]).encode()

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


def delete_xml(
    deleted: Sequence[str],
    failed: Mapping[str, str],
    quiet: bool,
    versions: Mapping[tuple[str, str], str] | None = None,
) -> bytes:
    """The answer to a multi-object delete; `versions` has the codes of versions that were refused."""
    parts = [f'<?xml version="1.0" encoding="UTF-8"?>\n<DeleteResult xmlns="{XMLNS}">']
    if not quiet:
        parts += [f"<Deleted><Key>{xml_text(key)}</Key></Deleted>" for key in deleted]
    for key, code in failed.items():
        parts.append(f"<Error><Key>{xml_text(key)}</Key><Code>{code}</Code><Message>planned</Message></Error>")
    for (key, id), code in (versions or {}).items():
        where = f"<Key>{xml_text(key)}</Key><VersionId>{xml_text(id)}</VersionId>"
        parts.append(f"<Error>{where}<Code>{code}</Code><Message>it is locked</Message></Error>")
    return "".join([*parts, "</DeleteResult>"]).encode()
