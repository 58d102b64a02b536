"""Signatures of snapshots that a mount opens."""

import logging
from pathlib import Path

import pytest

from datastore.codec import ChunkCodec, CryptKey
from datastore.manifest import Manifest
from datastore.names import MANIFEST_NAME, Snapshot
from fusefs.opened import open_snapshot
from repository.archive import open_cache
from repository.local import LocalRepository, open_local
from tests.fusefs.mounts import CONF, FIRST, KEY, SECOND, write

_OTHER = CryptKey.from_raw(bytes(32))


async def _read(repo: LocalRepository, key: CryptKey | None, *snapshots: Snapshot) -> None:
    unchecked: set[str] = set()
    async with open_cache(1 << 20) as cache:
        for snapshot in snapshots:
            async with open_snapshot(repo, key, snapshot, cache, unchecked) as opened:
                assert bytes(await (await opened.content("note.conf.blob")).read(0, 1 << 20)) == CONF


def _sign(store: Path, snapshot: Snapshot, key: CryptKey | None) -> None:
    """Sign the manifest with `key`, or say only that it had been."""
    path = store / str(snapshot) / MANIFEST_NAME
    manifest = Manifest.parse(path.read_bytes(), where="x")
    manifest = manifest.with_unprotected({"key-fingerprint": (key or KEY).fingerprint_text})
    path.write_bytes(bytes(manifest.encode() if key is None else manifest.encode(ChunkCodec(key))))


async def test_a_signature_of_another_key_is_told_once_for_each_key(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repo = await open_local(store)
    snapshots = [await write(repo, "host/signed", time, {"note.conf.blob": CONF}) for time in (FIRST, SECOND)]
    for snapshot in snapshots:
        _sign(store, snapshot, KEY)
    with caplog.at_level(logging.WARNING):
        await _read(repo, KEY, *snapshots)
        await _read(repo, None, *snapshots)
        assert caplog.messages == []
        await _read(repo, _OTHER, *snapshots)
    assert caplog.messages == [
        f"the signature of {snapshots[0]} was not checked: it was made with the key {KEY.fingerprint_text[:23]}, "
        f"given is {_OTHER.fingerprint_text[:23]}"
    ]
    repo.close()


async def test_a_signature_that_was_removed_is_told(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    repo = await open_local(store)
    snapshot = await write(repo, "host/signed", FIRST, {"note.conf.blob": CONF})
    _sign(store, snapshot, None)
    with caplog.at_level(logging.WARNING):
        await _read(repo, KEY, snapshot)
    assert caplog.messages == [f"{snapshot} has no signature, although it was made with a key: it may be altered"]
    repo.close()
