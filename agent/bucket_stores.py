"""Datastores in buckets as the commands for datastores see them: made, looked at, refreshed, given up."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from agent.registry import Datastore, S3Place
from core.errors import FleeceError, FormatError, UsageError
from core.limits import in_io_thread
from core.units import format_size

if TYPE_CHECKING:
    from agent.invocation import Invocation
    from core.progress import Progress
    from datastore.s3.opening import S3Datastore
    from repository.interface import Repository


def named_bucket(invocation: "Invocation", name: str, what: str) -> Datastore:
    """The registered datastore in a bucket that `name` (or the path of its cache) means.

    Raises:
        NotFoundError: there is none of that name.
        UsageError: it lies in a folder.
    """
    from agent.repositories import local_store

    store = local_store(name, invocation.config, invocation.registry)
    if store.bucket is None:
        raise UsageError(what, repr(name), "the datastore lies in a folder, not in a bucket")
    return replace(store.bucket, sync_level=store.sync_level)


async def create(
    invocation: "Invocation", datastore: Datastore, progress: "Progress", *, reuse: bool, overwrite_in_use: bool
) -> None:
    """Set the datastore up, in its bucket and its cache folder; the caller registers it.

    One that is taken over knows the bucket's snapshots and chunks then.

    Raises:
        FleeceError: as `datastore.s3.lifecycle.create_store`.
    """
    from datastore.s3.lifecycle import create_store

    use = invocation.s3
    await create_store(
        use.settings(datastore),
        reuse=reuse,
        overwrite_in_use=overwrite_in_use,
        progress=progress,
        counters=use.counters,
        policy=use.policy(attended=True),
    )


async def give_up(
    invocation: "Invocation", datastore: Datastore, progress: "Progress", *, destroy: bool, overwrite_in_use: bool
) -> None:
    """Take the mark of this host off the bucket; with `destroy` delete every object and the cache.

    Without `destroy` a bucket that is out of reach, or somebody else's by now, does not matter, but is a warning.

    Raises:
        FleeceError: as `datastore.s3.lifecycle.destroy_store`.
    """
    from datastore.errors import LockedError
    from datastore.s3.lifecycle import destroy_store

    use = invocation.s3
    try:
        await destroy_store(
            use.settings(datastore),
            data=destroy,
            override=overwrite_in_use,
            progress=progress,
            counters=use.counters,
            policy=use.policy(attended=True),
        )
    except LockedError:
        raise
    except FleeceError as error:
        if destroy:
            raise
        progress.warn(f"the bucket stays marked as in use: {error}")


def maintenance(path: Path) -> str | None:
    """Why a datastore in a bucket cannot be written to now: `s3-refresh`, `incomplete` (needs one), `missing`, or None.

    Raises:
        FleeceError: its folder cannot be looked at.
    """
    from datastore.s3.state import CacheState, is_refreshing

    if not path.is_dir():
        return "missing"
    if is_refreshing(path):
        return "s3-refresh"
    state = CacheState.read(path)
    return None if state is not None and state.complete else "incomplete"


#: Methods as PBS counts them: LIST is a GET, COPY a PUT.
#: Seconds that a bucket has to answer in the status.
_ANSWER_S: Final = 15.0
_COUNTED: Final = ("get", "put", "post", "head", "delete")
#: What each of these is for people, and the command that ends it.
MAINTENANCE: Final = {
    "s3-refresh": ("it is being refreshed from the bucket", ""),
    "incomplete": ("its metadata is incomplete", "fleece datastore refresh {name}"),
    "missing": ("its cache is gone", "fleece datastore create {name} --s3 ... --reuse --overwrite-in-use"),
    "unusable": ("its cache cannot be looked at", ""),
}


def maintenance_words(mode: str | None, name: str) -> str:
    """The same for people; nothing for None."""
    if mode is None:
        return ""
    words, command = MAINTENANCE[mode]
    return f"{words}: '{command.format(name=name)}'" if command else words


def listed_maintenance(path: Path) -> str | None:
    """As `maintenance`, for a list that must not end at one bad folder."""
    try:
        return maintenance(path)
    except FleeceError:
        return "unusable"


def backend_document(place: S3Place) -> dict[str, Any]:
    """Where the objects lie, as PBS names it."""
    return {
        "type": "s3",
        "endpoint": place.endpoint,
        "bucket": place.bucket,
        "max-cache-size": place.max_cache_size,
    }


@dataclass(frozen=True, slots=True)
class BucketStatus:
    """What the status of a datastore in a bucket has besides: where it lies, and what of its chunks is here."""

    name: str
    endpoint: str
    bucket: str
    maintenance: str | None
    limit: int | None  #: bytes of cached chunks, as configured
    known: int  #: chunks that are in the bucket, as far as this host knows
    cached: int  #: of them kept here
    cached_bytes: int
    counts: Mapping[str, int]  #: requests and bytes of all that used it, by PBS's names (`s3-get`)
    #: Why the bucket cannot be used just now, so that only what is kept here can be; None: it can.
    trouble: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Its part of the document."""
        return {
            "backend": {"type": "s3", "endpoint": self.endpoint, "bucket": self.bucket, "max-cache-size": self.limit},
            "maintenance": self.maintenance,
            "state": "ok" if self.trouble is None else "degraded",
            "state-reason": self.trouble,
            "cache": {
                "known-chunks": self.known,
                "cached-chunks": self.cached,
                "cached-bytes": self.cached_bytes,
            },
            "requests": {name.removeprefix("s3-"): self.counts[f"s3-{name}"] for name in _COUNTED},
            "uploaded": self.counts["s3-upload"],
            "downloaded": self.counts["s3-download"],
        }

    def rows(self) -> list[tuple[str, str]]:
        """The same for people."""
        limit = "" if self.limit is None else f" of at most {format_size(self.limit)}"
        requests = ", ".join(f"{self.counts[f's3-{name}']} {name.upper()}" for name in _COUNTED)
        sent, received = format_size(self.counts["s3-upload"]), format_size(self.counts["s3-download"])
        return [
            ("bucket", f"{self.bucket} of endpoint {self.endpoint}"),
            ("degraded", "" if self.trouble is None else f"only what the cache has can be read: {self.trouble}"),
            ("cache", f"{self.cached} of {self.known} chunks, {format_size(self.cached_bytes)}{limit}"),
            ("requests so far", requests),
            ("traffic so far", f"{sent} sent, {received} received"),
            ("maintenance", maintenance_words(self.maintenance, self.name)),
        ]


async def bucket_status(repository: "Repository") -> BucketStatus | None:
    """What is special about a repository in a bucket; None for others. The bucket is asked for one small object.

    Raises:
        FleeceError: the cache cannot be read.
    """
    from datastore.s3.opening import S3Datastore
    from repository.local import LocalRepository

    if not isinstance(repository, LocalRepository) or not isinstance(repository.store, S3Datastore):
        return None
    store = repository.store
    status = await in_io_thread(_bucket_status, store)
    return replace(status, trouble=await _trouble(store))


async def _trouble(store: "S3Datastore") -> str | None:
    """Why the bucket cannot be used; None if it answers."""
    with trio.move_on_after(_ANSWER_S):
        try:
            await store.s3.chunks.in_use.read()
        except FleeceError as error:
            return error.why
        return None
    return f"no answer within {_ANSWER_S:.0f} s"


def _bucket_status(store: "S3Datastore") -> BucketStatus:
    from datastore.s3.counter_file import CounterValues

    known = cached = size = 0
    for file in store.s3.chunks.files.scan(0, 1 << 16):
        known += 1
        cached += file.size > 0
        size += file.size
    settings = store.settings
    mode = maintenance(store.base)
    try:
        counts = store.s3.counter_file.read().counts
    except FormatError:  # it begins anew with the next requests
        counts = CounterValues.empty().counts
    return BucketStatus(
        settings.name, settings.endpoint.id, settings.bucket, mode, settings.cache_limit, known, cached, size, counts
    )


def parse_cache_size(text: str | None) -> int | None:
    """Bytes of `--max-cache-size`.

    Raises:
        UsageError: no size.
    """
    from core.units import parse_size

    return None if text is None else parse_size(text)
