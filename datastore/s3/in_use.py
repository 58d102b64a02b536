"""The marker `.in-use`: which installation deletes objects of the store (R34).

Two installations that collect garbage in one bucket delete what the other one has just uploaded. So whoever deletes
asks first whether the marker still is its own.
"""

import json
import platform
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self

import trio

from datastore.errors import StoreError
from datastore.s3.client import S3Client
from datastore.s3.keys import StoreKeys
from datastore.s3.xml import printable

#: Bytes of a marker that are read.
_LIMIT: Final = 1 << 16
#: Seconds for which an answer counts, so that pruning many groups asks once.
_GOOD_FOR_S: Final = 60.0


class ForeignStoreError(StoreError):
    """Another installation uses the store, so that nothing of it may be deleted."""


@dataclass(frozen=True, slots=True)
class InUseMarker:
    """What the marker says."""

    hostname: str  #: the only thing that PBS writes
    instance: str | None  #: UUID of Fleece's cache folder; None if PBS wrote it
    since: str | None  #: RFC 3339

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a marker; one that is damaged belongs to somebody unknown."""
        try:
            document = json.loads(data)
            fleece = document.get("fleece") or {}
            hostname, instance, since = document.get("hostname", ""), fleece.get("instance"), fleece.get("since")
            return cls(
                printable(str(hostname)),
                instance if isinstance(instance, str) else None,
                printable(since) if isinstance(since, str) else None,
            )
        except (ValueError, AttributeError, RecursionError):
            return cls("", None, None)

    def __str__(self) -> str:
        name = self.hostname or "an unknown host"
        return f"{name} (Fleece, since {self.since})" if self.instance else name


class InUse:
    """The marker of one store.

    Args:
        client: the bucket.
        keys: of the store.
        instance: gives our UUID.
    """

    def __init__(self, client: S3Client, keys: StoreKeys, instance: Callable[[], Awaitable[str]]) -> None:
        self._client, self._keys, self._instance = client, keys, instance
        self._good_until = 0.0
        self.overridden = False  #: delete whatever the marker says

    async def read(self) -> InUseMarker | None:
        """The marker; None if there is none.

        Raises:
            S3Error: as `S3Client.get`.
        """
        found = await self._client.get(self._keys.in_use, limit=_LIMIT)
        return None if found is None else InUseMarker.parse(bytes(found.data))

    async def put_back(self, marker: InUseMarker | None) -> None:
        """Make the marker what `read` gave.

        Raises:
            S3Error: as `S3Client.put`.
        """
        if marker is None:
            await self.give_back()
            return
        document: dict[str, object] = {"hostname": marker.hostname}
        if marker.instance is not None:
            document["fleece"] = {"instance": marker.instance, "since": marker.since}
        await self._write(document)

    async def take(self) -> None:
        """Make the marker ours.

        Raises:
            S3Error: as `S3Client.put`.
        """
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        document = {"hostname": platform.node(), "fleece": {"instance": await self._instance(), "since": since}}
        await self._write(document)

    async def _write(self, document: Mapping[str, object]) -> None:
        await self._client.put(self._keys.in_use, [json.dumps(document, separators=(",", ":")).encode()])

    async def give_back(self) -> None:
        """Remove the marker.

        Raises:
            S3Error: as `S3Client.delete`.
        """
        await self._client.delete(self._keys.in_use)

    async def is_ours(self, marker: InUseMarker) -> bool:
        """True if we may delete objects; a marker of PBS counts as ours if it names this host."""
        if marker.instance is None:
            return marker.hostname == platform.node()
        return marker.instance == await self._instance()

    async def check(self, what: str, *, fresh: bool = False) -> None:
        """See to it that nobody else uses the store; a marker that is gone is written again.

        Args:
            what: is about to be done.
            fresh: ask even if we have asked within the last minute.

        Raises:
            ForeignStoreError: another installation uses it.
            S3Error: the endpoint cannot be asked.
        """
        if self.overridden or (not fresh and trio.current_time() < self._good_until):
            return
        marker = await self.read()
        if marker is None:
            await self.take()
        elif not await self.is_ours(marker):
            raise ForeignStoreError(
                what,
                f"{self._client.bucket}/{self._keys.store}",
                f"it is in use by {marker}, and nothing that another installation has stored may be deleted",
                "stop using it there, then 'fleece datastore create --reuse --overwrite-in-use' takes it over",
            )
        self._good_until = trio.current_time() + _GOOD_FOR_S
