"""Who uses the chunks that verify set aside.

Every such snapshot is recorded as failed, so that no backup builds on it.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Final

import trio

from core.errors import FleeceError
from core.limits import in_cpu_thread
from core.progress import Progress
from datastore.codec import ChunkCodec
from datastore.errors import LockedError, SnapshotNotFoundError
from datastore.index import ArchiveIndex
from datastore.index_file import DIGEST_SIZE
from datastore.names import ArchiveKind, Snapshot, archive_kind
from datastore.upid import Upid
from repository.interface import Repository, VerifyRecorder
from repository.locate import load_readable

#: Looks at a snapshot that somebody locks, and seconds between them.
_MAX_TRIES: Final = 20
_PAUSE_S: Final = 0.5


async def record_users(
    repository: Repository,
    recorder: VerifyRecorder,
    digests: Collection[bytes],
    failed: Iterable[Snapshot],
    progress: Progress,
    upid: Upid,
) -> dict[Snapshot, list[str]]:
    """Find every finished snapshot that uses one of `digests`, and record it as failed.

    Looks again until there is no new one: a backup that ends meanwhile may have taken such a chunk over from a snapshot
    that was not recorded yet. One that is still running finds out itself at its end.

    Args:
        repository: where the snapshots lie.
        recorder: takes the results.
        digests: the chunks.
        failed: snapshots that are recorded as failed already; they are not looked at.
        progress: warned of every user, and of what cannot be looked at.
        upid: of the run, goes into the manifests.

    Returns:
        lines for people, by snapshot.
    """
    looked_at = set(failed)
    busy: Counter[Snapshot] = Counter()
    lines: dict[Snapshot, list[str]] = {}
    while new := [one for one in await _finished(repository) if one not in looked_at]:
        for snapshot in new:
            looked_at.add(snapshot)
            try:
                used = await _uses(repository, snapshot, digests)
                if not used:
                    continue
                line = f"uses {len(used)} chunks that were found corrupt, the first one: {used[0].hex()}"
                if snapshot not in lines:
                    progress.warn(f"{snapshot} {line}")
                lines[snapshot] = [line]
                await recorder.record_verification(snapshot, "failed", str(upid))
            except LockedError as error:
                busy[snapshot] += 1
                if busy[snapshot] < _MAX_TRIES:
                    looked_at.remove(snapshot)  # being protected, or just finished: that takes no time
                    await trio.sleep(_PAUSE_S)
                else:
                    progress.warn(f"{snapshot} not looked at: {error.why}")
            except SnapshotNotFoundError:
                continue  # removed meanwhile
            except FleeceError as error:
                progress.warn(f"{snapshot} not looked at: {error}")
    return lines


async def _finished(repository: Repository) -> list[Snapshot]:
    found: list[Snapshot] = []
    for ns in await repository.namespaces():
        try:
            found += [info.snapshot for info in await repository.snapshots(ns)]
        except SnapshotNotFoundError:
            continue  # the namespace was removed meanwhile
    return found


async def _uses(repository: Repository, snapshot: Snapshot, digests: Collection[bytes]) -> list[bytes]:
    """Which of `digests` a snapshot uses."""
    wanted = set(digests)
    used: set[bytes] = set()
    async with repository.reader(snapshot) as reader:
        manifest, _ = await load_readable(reader, ChunkCodec())
        for entry in manifest.files:
            if archive_kind(entry.filename) is not ArchiveKind.BLOB:
                index = await reader.open_index(entry.filename)
                used |= await in_cpu_thread(_found_in, index, wanted)
    return sorted(used)


def _found_in(index: ArchiveIndex, wanted: set[bytes]) -> set[bytes]:
    packed = index.digests
    step = DIGEST_SIZE
    return {digest for at in range(0, len(packed), step) if (digest := bytes(packed[at : at + step])) in wanted}
