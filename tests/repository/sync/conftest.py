"""Pairs of datastores."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from repository.local import LocalRepository, open_local
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_stores import s3_store
from tests.support.stores import StorePool


@dataclass
class Pair:
    """Where snapshots come from, and where they go to."""

    source: LocalRepository
    target: LocalRepository


@pytest.fixture
async def pair(store_pool: StorePool) -> AsyncIterator[Pair]:
    """Two local datastores."""
    folders = [store_pool.lend(), store_pool.lend()]
    source, target = [await open_local(folder, name=name) for folder, name in zip(folders, ("from", "to"), strict=True)]
    yield Pair(source, target)
    source.close()
    target.close()
    for folder in folders:
        store_pool.take_back(folder)


@pytest.fixture
async def bucket_pair(pair: Pair, s3_emulator: S3Emulator, store_folder: Path) -> AsyncIterator[Pair]:
    """A local datastore, and one in a bucket."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        yield Pair(pair.source, LocalRepository(store, "bucket"))
