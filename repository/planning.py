"""What a backup of a disk will read, and why: the base it may count on, and the state of each chunk.

Used by the backup itself and by `--dry-run`, so that both say the same.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from core.disks import DiskSource, Extent, ExtentState
from core.errors import FleeceError, SourceError
from datastore.codec import ChunkCodec
from datastore.errors import KeyNeededError
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest
from datastore.names import ArchiveKind, Group, Snapshot, archive_kind, complete_archive_name
from repository.interface import FIXED_CHUNK_SIZE, Repository
from repository.report import Mode

_BITS: Final = {ExtentState.CLEAN: 1, ExtentState.ZERO: 2, ExtentState.DATA: 4}


@dataclass(frozen=True, slots=True)
class Base:
    """What the previous snapshot gives to the backup of one disk."""

    index: ArchiveIndex | None  #: CLEAN chunks are taken from here; None for a full read
    reason: str  #: why everything is read, in words; empty if `index` is there


class Run(NamedTuple):
    """Neighbouring chunks `first` .. `last - 1` of one state."""

    first: int
    last: int
    state: ExtentState


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """What is to be done with each chunk of a disk."""

    size: int  #: of the disk, bytes
    runs: tuple[Run, ...]  #: all chunks in order; neighbours differ in state
    dirty: int  #: bytes of extents that are not CLEAN

    @property
    def count(self) -> int:
        """Number of chunks."""
        return -(-self.size // FIXED_CHUNK_SIZE)

    def chunks(self, state: ExtentState) -> int:
        """Number of chunks in `state`."""
        return sum(run.last - run.first for run in self.runs if run.state is state)

    def length(self, state: ExtentState) -> int:
        """Bytes of the chunks in `state`."""
        return sum(
            min(run.last * FIXED_CHUNK_SIZE, self.size) - run.first * FIXED_CHUNK_SIZE
            for run in self.runs
            if run.state is state
        )


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What the next backup of a disk would do; sizes are bytes."""

    name: str  #: archive name without type extension
    size: int
    mode: Mode
    reason: str | None  #: why everything is read, None if incremental
    read: int  #: would be read from the source
    dirty: int | None  #: changed by the dirty bitmap, None without one

    def to_json(self) -> dict[str, Any]:
        """The plan as `--dry-run --output json` prints it."""
        return {
            "name": self.name,
            "size": self.size,
            "mode": self.mode.value,
            "reason": self.reason,
            "read": self.read,
            "dirty": self.dirty,
        }


def map_chunks(extents: Iterable[Extent], size: int) -> ChunkMap:
    """The state of every chunk of a disk of `size` bytes.

    A chunk is CLEAN or ZERO only if all of it is; a short last chunk is never ZERO, because its digest is not the zero
    chunk's. What no extent covers is read.
    """
    count = -(-size // FIXED_CHUNK_SIZE)
    seen = bytearray(count)  # bits of the states that occur in each chunk
    covered = dirty = 0
    for offset, length, state in extents:
        end = offset + length
        if offset != covered or length < 1 or end > size:
            raise SourceError("map", f"a disk of {size} bytes", f"its extents have a gap, or overlap, at {covered}")
        covered = end
        bit = _BITS[state]
        if state is not ExtentState.CLEAN:
            dirty += length
        first, last = offset // FIXED_CHUNK_SIZE, -(-end // FIXED_CHUNK_SIZE)
        if last - first > 2:
            seen[first + 1 : last - 1] = bytes([bit]) * (last - first - 2)
        seen[first] |= bit
        seen[last - 1] |= bit
    if covered != size:
        raise SourceError("map", f"a disk of {size} bytes", f"its extents end at {covered}")
    if size % FIXED_CHUNK_SIZE and seen[-1] == _BITS[ExtentState.ZERO]:
        seen[-1] = _BITS[ExtentState.DATA]
    return ChunkMap(size, tuple(_runs(seen)), dirty)


def _runs(seen: bytearray) -> Iterable[Run]:
    plain = seen.translate(bytes(bit if bit in (1, 2) else 4 for bit in range(256)))
    states = {bit: state for state, bit in _BITS.items()}
    first, count = 0, len(plain)
    while first < count:
        bit = plain[first]
        # The next chunk of another state, found by C code: disks have long runs.
        others = [at for other in states if other != bit and (at := plain.find(other, first)) >= 0]
        last = min(others, default=count)
        yield Run(first, last, states[bit])
        first = last


async def choose_base(
    source: DiskSource,
    codec: ChunkCodec,
    previous: Snapshot | None,
    manifest: bytes | None,
    open_index: Callable[[str], Awaitable[ArchiveIndex | None]],
) -> Base:
    """Whether the CLEAN chunks of `source` may be taken from the snapshot `previous`, and why not.

    Args:
        source: the disk; its plan names the snapshot its bitmap counts from.
        codec: mode and key of the new backup; they must be those of the old one.
        previous: the newest finished snapshot of the group, None if there is none that is good.
        manifest: its manifest blob as stored.
        open_index: gives one of its indexes, compared with the manifest, or None.
    """
    plan = source.plan
    name = complete_archive_name(source.name)
    # Opened in any case: its chunks become known chunks, which a full read need not upload again.
    index = await open_index(name)
    if plan.base is None:
        return Base(None, plan.reason or "no dirty bitmap")
    if previous is None or manifest is None or previous.ctime < plan.base:
        return Base(None, "previous snapshot gone or failed verification")
    if previous.ctime > plan.base:
        return Base(None, f"a newer snapshot ({previous.time}) than the dirty bitmap's")
    where = str(previous)
    try:
        parsed = Manifest.parse(manifest, where=where, key=codec.key)
    except KeyNeededError:
        return Base(None, "key changed")
    except FleeceError as error:
        return Base(None, f"manifest of {where} is unreadable ({error.why})")
    try:
        entry = parsed.file(name)
    except FleeceError:
        return Base(None, "disk is not in the previous snapshot")
    if parsed.fingerprint != (codec.key.fingerprint if codec.key is not None else None):
        return Base(None, "key changed")
    if codec.key is not None and parsed.signature is None:
        # Its index may be anybody's, and this backup would sign what it says.
        return Base(None, "the signature of the previous snapshot was removed")
    if entry.crypt_mode is not codec.mode:
        return Base(None, f"crypt mode changed from {entry.crypt_mode.value} to {codec.mode.value}")
    if entry.size != source.size:
        return Base(None, "size changed")
    if index is None or index.csum != entry.csum or index.size != entry.size:
        return Base(None, "index of the previous snapshot is missing or damaged")
    if index.kind is not ArchiveKind.FIXED or index.span(0)[1] != min(FIXED_CHUNK_SIZE, index.size):
        return Base(None, "chunk size changed")
    return Base(index, "")


async def plan_disk(source: DiskSource, base: Base) -> tuple[DiskPlan, ChunkMap]:
    """What a backup of `source` on `base` does; asks the source for its extents, which it allows once.

    Raises:
        SourceError: a disk of zero bytes, or its map cannot be read.
    """
    check_size(source)
    incremental = base.index is not None
    chunks = map_chunks(await source.extents(incremental=incremental), source.size)
    plan = DiskPlan(
        source.name,
        source.size,
        Mode.INCREMENTAL if incremental else Mode.FULL,
        None if incremental else base.reason,
        chunks.length(ExtentState.DATA),
        chunks.dirty if incremental else None,
    )
    return plan, chunks


async def plan_disks(
    repository: Repository, group: Group, sources: Sequence[DiskSource], codec: ChunkCodec
) -> list[DiskPlan]:
    """`--dry-run`: what a backup of `sources` into `group` would read, and why. Writes nothing.

    Raises:
        SourceError: as `plan_disk`.
        FleeceError: the repository cannot be read.
    """
    previous = await repository.latest(group)
    if previous is not None:
        info = await repository.snapshot(previous)
        if info.verification is not None and info.verification.get("state") == "failed":
            previous = None  # a session would not use it either
    if previous is None:

        async def nothing(name: str) -> None:
            return None

        return [
            (await plan_disk(source, await choose_base(source, codec, None, None, nothing)))[0] for source in sources
        ]
    plans = []
    async with repository.reader(previous) as reader:
        manifest = await reader.manifest()

        async def open_index(name: str) -> ArchiveIndex | None:
            try:
                listed = Manifest.parse(manifest, where=str(previous)).file(name)
                return await reader.open_index(name, size=listed.size)
            except FleeceError:
                return None

        for source in sources:
            base = await choose_base(source, codec, previous, manifest, open_index)
            plans.append((await plan_disk(source, base))[0])
    return plans


def check_size(source: DiskSource) -> None:
    """Refuse a disk that no index can describe.

    Raises:
        SourceError: it has zero bytes.
    """
    name = complete_archive_name(source.name)
    if archive_kind(name) is not ArchiveKind.FIXED:
        raise SourceError("back up", source.name, "the name of a disk image ends in .img")
    if source.size < 1:
        raise SourceError("back up", source.name, "it has 0 bytes", "an empty file or device cannot be backed up")
