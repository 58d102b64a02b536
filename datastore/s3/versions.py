"""Old versions of a bucket with versioning: found and deleted for good.

With versioning a delete only puts a delete marker on top, and an overwritten object stays below the new one, so that
nothing that goes frees space. Here versions that are not current any more are deleted by their ids, and delete markers
that stand on nothing. A current version is never touched: an id that is not current never becomes it again, as long as
nobody removes what is above. The exception is the id `null`, which a bucket whose versioning is suspended gives to the
next object as well, so there such versions stay.
"""

import math
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from core.progress import Progress
from datastore.s3.calls import Call, Reply, UnusableAnswerError
from datastore.s3.client import S3Client
from datastore.s3.counters import Method
from datastore.s3.endpoint import Quirk
from datastore.s3.errors import S3AnswerError, S3BackendError, S3Error
from datastore.s3.keys import StoreKeys, check_key
from datastore.s3.objects import refuse_error_in
from datastore.s3.opening import S3Datastore
from datastore.s3.paging import MAX_EMPTY_PAGES
from datastore.s3.xml import (
    MAX_DELETE_KEYS,
    MAX_XML_SIZE,
    DeleteFailure,
    Version,
    VersionPage,
    delete_versions_body,
    parse_delete,
    parse_versions,
)

#: Pages in a row that speak of one key.
MAX_PAGES_OF_A_KEY: Final = 10_000
#: The id of what was stored while versioning was off or suspended.
_NULL: Final = "null"
#: What a version under object lock is refused with.
_LOCKED: Final = frozenset({"AccessDenied", "ObjectLocked"})
#: Refusals that a report tells one by one.
_TOLD: Final = 10


@dataclass(slots=True)
class PurgeReport:
    """What was deleted, or with a dry run what would be."""

    state: str = ""  #: `Enabled`, `Suspended`, or empty if the bucket never had versions
    versions: int = 0  #: old versions deleted
    size: int = 0  #: bytes of them
    markers: int = 0  #: delete markers deleted
    kept: int = 0  #: old versions that are not old enough, or cannot be told from current ones
    locked: int = 0  #: refused because of object lock or missing rights
    failed: int = 0  #: not deleted for other reasons
    strange: int = 0  #: entries that are not this datastore's, left alone
    failures: list[DeleteFailure] = field(default_factory=list)  #: the first of those refused


async def purge_versions(
    store: S3Datastore, progress: Progress, *, older_than_s: float = 0.0, dry_run: bool = False
) -> PurgeReport:
    """Delete what is not current any more of the datastore's objects.

    Cancelled, what was deleted is; the next run does the rest.

    Args:
        store: the datastore.
        progress: told how far it is.
        older_than_s: versions that were replaced or deleted less than so many seconds ago stay.
        dry_run: only look.

    Raises:
        StoreError: another installation uses the datastore.
        S3Error: the bucket cannot be asked, or does not tell of versions.
    """
    await store.s3.in_use.check("purge old versions of", fresh=True)
    state = await store.client.versioning()
    report = PurgeReport(state)
    if state:
        before = math.inf  # clocks are known to a second only
        if older_than_s > 0:
            before = time.time() + (store.client.link.clock_offset_s or 0.0) - older_than_s
        await _Purge(store.client, store.keys, report, before, progress, dry_run=dry_run).run()
    return report


class _Purge:
    """One run; the listing's order is relied on, newest first for each key, and where it is another, more stays."""

    def __init__(
        self,
        client: S3Client,
        keys: StoreKeys,
        report: PurgeReport,
        before: float,
        progress: Progress,
        *,
        dry_run: bool,
    ) -> None:
        self._client, self._keys, self._report, self._before = client, keys, report, before
        self._progress, self._dry_run = progress, dry_run
        self._versions: list[Version] = []  # to be deleted
        self._markers: list[Version] = []  # likewise, once the versions below them are gone
        self._refused: set[str] = set()  # keys of which a version stays since the last batch of markers
        # The key that the listing is at: what is above the next version, a marker on top, and whether versions stay.
        self._key = ""
        self._newer: Version | None = None
        self._top: Version | None = None
        self._stays = False

    async def run(self) -> None:
        # A page is worked on when the next one is there: a listing may not find its place any more if the version that
        # it goes on behind was deleted.
        page_before: list[Version] = []
        with self._progress.task("purge old versions", None, "entries") as task:
            async with aclosing(version_pages(self._client, self._keys.everything)) as pages:
                async for page in pages:
                    for version in page_before:
                        self._look_at(version)
                    page_before = page.versions
                    task.advance(len(page_before))
                    while len(self._versions) >= MAX_DELETE_KEYS or len(self._markers) >= MAX_DELETE_KEYS:
                        await self._flush()
            for version in page_before:
                self._look_at(version)
            self._finish_key()
            while self._versions or self._markers:
                await self._flush()

    def _look_at(self, version: Version) -> None:
        key = version.key
        if self._keys.parse(key) is None and key not in (self._keys.in_use, self._keys.check_object):
            self._report.strange += 1
            return
        if key != self._key:
            self._finish_key()
            self._key, self._newer, self._top, self._stays = key, None, None, False
        above, self._newer = self._newer, version
        if version.is_latest:
            # What comes below it is not current; a delete marker may go with all of that.
            self._top, self._stays = version, self._stays or not version.is_marker
        elif above is None or above.modified > self._before or not self._is_certain(version):
            # It was current until the one above it came.
            self._report.kept += 1
            self._stays = True
        else:
            self._versions.append(version)

    def _is_certain(self, version: Version) -> bool:
        return version.id != _NULL or self._report.state == "Enabled"

    def _finish_key(self) -> None:
        top, self._top = self._top, None
        if top is None or not top.is_marker or self._stays:
            return
        if top.modified <= self._before and self._is_certain(top):
            self._markers.append(top)

    async def _flush(self) -> None:
        """Delete a batch of versions, or, when there are none left, of markers."""
        if self._versions:
            batch, self._versions = self._versions[:MAX_DELETE_KEYS], self._versions[MAX_DELETE_KEYS:]
        else:
            batch = [marker for marker in self._markers[:MAX_DELETE_KEYS] if marker.key not in self._refused]
            self._markers = self._markers[MAX_DELETE_KEYS:]
            if not self._markers:
                self._refused = {key for key in self._refused if key == self._key}
        failures = [] if self._dry_run else await delete_versions(self._client, batch)
        missed = {(failure.key, failure.version) for failure in failures}
        for failure in failures:
            self._refused.add(failure.key)
            if failure.code in _LOCKED:
                self._report.locked += 1
            else:
                self._report.failed += 1
        self._report.failures += failures[: max(0, _TOLD - len(self._report.failures))]
        for version in batch:
            if (version.key, version.id) in missed:
                continue
            if version.is_marker:
                self._report.markers += 1
            else:
                self._report.versions += 1
                self._report.size += version.size


async def version_pages(client: S3Client, prefix: str) -> AsyncGenerator[VersionPage, None]:
    """All versions of objects whose keys begin with `prefix`, page by page, in byte order of keys.

    Raises:
        S3AnswerError: the listing does not lead on.
        S3Error: as `EndpointLink.send`.
    """
    following: tuple[str, str] | None = None
    empty = of_one_key = 0
    while True:
        page = await _version_page(client, prefix, following)
        empty = 0 if page.versions else empty + 1
        before, following = following, page.following
        of_one_key = of_one_key + 1 if before and following and before[0] == following[0] else 0
        backwards = before and following and following[0].encode() < before[0].encode()
        if backwards or empty > MAX_EMPTY_PAGES or of_one_key > MAX_PAGES_OF_A_KEY:
            where = client.link.where(client.bucket, prefix)
            why = "the listing does not lead on"
            raise S3AnswerError(
                "list the versions of", where, why, "does another server answer in between?", status=200
            )
        yield page
        if following is None:
            return


async def _version_page(client: S3Client, prefix: str, following: tuple[str, str] | None) -> VersionPage:
    query: list[tuple[str, str | None]] = [("prefix", prefix), ("versions", None)]
    if following is not None:
        query += [("key-marker", following[0]), ("version-id-marker", following[1])]
    call = Call("list the versions", Method.LIST, "GET", client.bucket, query=query, limit=MAX_XML_SIZE)
    pages: list[VersionPage] = []

    def check(reply: Reply) -> None:
        page = parse_versions(reply.body)
        if page.following is not None and page.following == following:
            raise UnusableAnswerError("the listing turns in a circle")
        if any(not version.key.startswith(prefix) for version in page.versions):
            raise UnusableAnswerError("the listing has keys that were not asked for")
        pages.append(page)

    await client.link.send(call, check)
    return pages[-1]


async def delete_versions(client: S3Client, versions: Sequence[Version]) -> list[DeleteFailure]:
    """Delete up to 1000 versions in one request, or one by one where the provider knows no other way.

    A version that is gone is fine. Nothing else can be hit, so it does not matter if a request that was given up is
    carried out later.

    Returns:
        what the endpoint refused to delete.

    Raises:
        S3Error: as `EndpointLink.send`.
    """
    if not versions:
        return []
    if Quirk.DELETE_ONE_BY_ONE in client.link.quirks:
        return [failure for version in versions for failure in await _delete_version(client, version)]
    body = delete_versions_body([(check_key(version.key), version.id) for version in versions])
    call = Call(
        "delete versions of",
        Method.POST,
        "POST",
        client.bucket,
        query=[("delete", None)],
        body=(body,),
        md5=True,
        limit=MAX_XML_SIZE,
    )
    asked = {(version.key, version.id) for version in versions}
    found: list[list[DeleteFailure]] = []

    def check(reply: Reply) -> None:
        refuse_error_in(reply)
        failures = parse_delete(reply.body)
        if any((failure.key, failure.version) not in asked for failure in failures):
            raise UnusableAnswerError("the answer speaks of versions that were not asked for")
        found.append(failures)

    await client.link.send(call, check)
    return found[-1]


async def _delete_version(client: S3Client, version: Version) -> list[DeleteFailure]:
    call = Call(
        "delete the version",
        Method.DELETE,
        "DELETE",
        client.bucket,
        check_key(version.key),
        query=[("versionId", version.id)],
        ok=frozenset({200, 202, 204}),
    )
    try:
        await client.link.send(call)
    except S3BackendError as error:
        if error.code not in _LOCKED:
            raise
        return [DeleteFailure(version.key, error.code, error.why, version.id)]
    except S3Error as error:
        return [DeleteFailure(version.key, error.code or "Unavailable", error.why, version.id)]
    return []
