"""Datastores in buckets for tests, without the cost of 65536 new folders each."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from datastore.files import Owner
from datastore.s3.counters import Counters
from datastore.s3.endpoint import Endpoint
from datastore.s3.link import RetryPolicy
from datastore.s3.opening import S3Datastore, S3Settings, open_store
from datastore.s3.state import CacheState
from tests.support.s3_service import BUCKET

#: Attempts as always, but without the waits that a real endpoint needs.
IMPATIENT = RetryPolicy(base_s=0.01, cap_s=0.02)
NAME = "s3store"


def s3_place(request: pytest.FixtureRequest) -> tuple[Endpoint, str]:
    """An endpoint and an empty bucket for a fixture with the parameters `s3` (the emulator) and `rgw`."""
    if request.param == "rgw":
        gateway = request.getfixturevalue("rgw")
        return gateway.endpoint(), gateway.make_bucket()
    return request.getfixturevalue("s3_emulator").endpoint(), BUCKET


def settings(base: Path, endpoint: Endpoint, bucket: str = BUCKET, **changes: Any) -> S3Settings:
    """A datastore whose cache is the folder `base`; nothing is spared for its age or for free space."""
    values: dict[str, Any] = {"name": NAME, "min_free": 0, "delete_guard_s": 0.0}
    return S3Settings(endpoint=endpoint, bucket=bucket, cache=base, **{**values, **changes})


def adopt_folder(wanted: S3Settings, *, complete: bool = True) -> None:
    """Make the empty local datastore in `wanted.cache` a cache of the bucket."""
    state = CacheState(wanted.name, wanted.bucket, wanted.endpoint.id, complete=complete)
    state.write(wanted.cache, Owner.of(wanted.cache))


@asynccontextmanager
async def s3_store(
    base: Path,
    endpoint: Endpoint,
    bucket: str = BUCKET,
    *,
    counters: Counters | None = None,
    policy: RetryPolicy = IMPATIENT,
    **changes: Any,
) -> AsyncIterator[S3Datastore]:
    """A datastore in a bucket, open; `base` is an empty local datastore, or a cache of it already."""
    wanted = settings(base, endpoint, bucket, **changes)
    if CacheState.read(base) is None:
        adopt_folder(wanted)
    async with open_store(wanted, counters=counters, policy=policy) as store:
        yield store
