"""Verify in parts, for buckets where every byte that is read costs money (R45).

- `full` reads everything, and is the only one that records `ok`;
- `listing` compares chunks with the bucket's listing, and reads only what looks wrong;
- `sample=5%` reads that share of the chunks, others each time;
- `budget=50GiB`, `budget=10000` (chunks) reads so much, and goes on there the next time, until all had their turn.
"""

import hashlib
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Final, Self

from core.errors import FleeceError, FormatError, UsageError
from core.limits import in_cpu_thread, in_io_thread
from core.progress import Progress
from core.units import parse_size
from datastore.codec import ChunkCodec
from datastore.digests import DigestSet
from datastore.errors import LockedError, SnapshotNotFoundError
from datastore.files import make_folders, read_file, replace_file, store_errors, temporary_path
from datastore.manifest import ManifestFile
from datastore.names import ArchiveKind, Snapshot, archive_kind
from datastore.s3.listing import compare_listing
from datastore.s3.opening import S3Datastore
from datastore.store import Datastore
from datastore.upid import Upid
from repository.interface import Reader, Repository
from repository.local import LocalRepository
from repository.locate import check_index, load_readable
from repository.users import record_users
from repository.verify import VerifyOptions, VerifyResult, verify

_PERCENT: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,4})?)%?")
_CURSOR: Final = ".fleece/verify-cursor"
_DIGEST_SIZE: Final = 32
_SPACE: Final = 1 << 64


class Mode(Enum):
    """How much of the chunks is read."""

    FULL = "full"
    LISTING = "listing"
    SAMPLE = "sample"
    BUDGET = "budget"


@dataclass(frozen=True, slots=True)
class VerifyMode:
    """A mode with its figure."""

    mode: Mode = Mode.FULL
    percent: float = 100.0  #: of `sample`
    chunks: int | None = None  #: of `budget`, as the next
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `full`, `listing`, `sample=PERCENT` or `budget=SIZE|CHUNKS`.

        Raises:
            UsageError: another form.
        """
        name, equals, value = text.partition("=")
        if not equals and name in (Mode.FULL.value, Mode.LISTING.value):
            return cls(Mode(name))
        if name == Mode.SAMPLE.value and (match := _PERCENT.fullmatch(value)) and 0 < float(match[1]) <= 100:
            return cls(Mode.SAMPLE, percent=float(match[1]))
        if name == Mode.BUDGET.value and value:
            if value.isascii() and value.isdecimal() and int(value[:16]) > 0:
                return cls(Mode.BUDGET, chunks=int(value[:16]))
            if not value.isdecimal() and (size := parse_size(value)) > 0:
                return cls(Mode.BUDGET, bytes=size)
        hint = "full, listing, sample=5%, budget=50GiB or budget=10000 (chunks)"
        raise UsageError("use the mode of verification", repr(text), "there is no such mode", hint)

    def __str__(self) -> str:
        match self.mode:
            case Mode.SAMPLE:
                return f"sample={self.percent:g}%"
            case Mode.BUDGET:
                return f"budget={self.chunks if self.bytes is None else f'{self.bytes} bytes'}"
            case _:
                return str(self.mode.value)


async def verify_by(
    mode: VerifyMode,
    repository: Repository,
    snapshots: Sequence[Snapshot],
    codec: ChunkCodec,
    progress: Progress | None = None,
    options: VerifyOptions | None = None,
    *,
    upid: Upid | None = None,
) -> list[VerifyResult]:
    """Verify `snapshots` in a mode; as `verify`. In all modes but `full` a snapshot without errors is not recorded.

    Raises:
        UsageError: the repository does not know this mode.
        FleeceError: as `verify`.
    """
    progress = Progress() if progress is None else progress
    options = VerifyOptions() if options is None else options
    if mode.mode is not Mode.FULL:
        progress.log(f"mode {mode}: not every chunk is read, so what is found to be sound is not recorded as verified")
    if mode.mode is Mode.LISTING:
        return await _by_listing(repository, snapshots, progress, options, upid)
    if mode.mode is Mode.SAMPLE:
        options = replace(options, part=sample(mode.percent))
    elif mode.mode is Mode.BUDGET:
        return await _by_budget(mode, repository, snapshots, codec, progress, options, upid)
    return await verify(repository, snapshots, codec, progress, options, upid=upid)


def sample(percent: float, seed: bytes | None = None) -> Callable[[bytes], bool]:
    """Chooses `percent` of all digests, with every seed others."""
    key = secrets.token_bytes(16) if seed is None else seed
    limit = int(percent / 100 * _SPACE)

    def chosen(digest: bytes) -> bool:
        return int.from_bytes(hashlib.blake2b(digest, digest_size=8, key=key).digest(), "big") < limit

    return chosen


# The budget.


async def _by_budget(
    mode: VerifyMode,
    repository: Repository,
    snapshots: Sequence[Snapshot],
    codec: ChunkCodec,
    progress: Progress,
    options: VerifyOptions,
    upid: Upid | None,
) -> list[VerifyResult]:
    store = _store(repository, mode)
    after = await in_io_thread(_read_cursor, store.base)
    wanted = await _chunks_of(repository, snapshots, progress)
    average = await in_io_thread(_average, store)
    first, last, count, around = await in_cpu_thread(_window, wanted, after, mode, average)
    if count:
        progress.log(f"{count} of {len(wanted)} chunks are read, from {first.hex()[:16]} to {last.hex()[:16]}")

    def part(digest: bytes) -> bool:
        return first <= digest or digest <= last if around else bool(count) and first <= digest <= last

    results = await verify(repository, snapshots, codec, progress, replace(options, part=part), upid=upid)
    if count and len(results) == len(snapshots):
        # Cut off by a limit, the same part has its turn once more.
        await in_io_thread(_write_cursor, store, last)
    return results


def _window(wanted: DigestSet, after: bytes, mode: VerifyMode, average: int | None) -> tuple[bytes, bytes, int, bool]:
    """The chunks whose turn it is: first and last, how many, and whether it goes on at the beginning of all."""
    first = last = b""
    count = spent = 0
    around = False
    for lap in (0, 1):  # behind the cursor, then from the beginning up to it
        for digest, size in wanted.ascending():
            if (digest > after) is (lap == 1):
                continue
            cost = min(size, average) if average is not None else size
            if mode.chunks is not None and count >= mode.chunks:
                return first, last, count, around
            if mode.bytes is not None and count and spent + cost > mode.bytes:
                return first, last, count, around
            first, last = first or digest, digest
            around = around or (lap == 1 and first > after)
            count += 1
            spent += cost
    return first, last, count, around


def _average(store: Datastore) -> int | None:
    """Bytes of a stored chunk on average, as of the last garbage collection."""
    from datastore.gc_status import read_status

    try:
        status = read_status(store.base)
    except FleeceError:
        return None
    return status.disk_bytes // status.disk_chunks if status is not None and status.disk_chunks else None


def _read_cursor(base: Path) -> bytes:
    """The digest that was read last; empty: begin with the first. A damaged note is none."""
    with store_errors("read", base / _CURSOR):
        try:
            digest = bytes.fromhex(read_file(base / _CURSOR, limit=4096).decode("ascii").strip())
        except (FileNotFoundError, ValueError):
            return b""
    return digest if len(digest) == _DIGEST_SIZE else b""


def _write_cursor(store: Datastore, digest: bytes) -> None:
    with store_errors("write", store.base / _CURSOR):
        make_folders(store.base, ".fleece/tmp", store.owner)
        temporary = temporary_path(store.base / ".fleece/tmp/verify-cursor.txt")
        replace_file(store.base / _CURSOR, (f"{digest.hex()}\n".encode(),), store.owner, temporary=temporary)


# The listing.


async def _by_listing(
    repository: Repository,
    snapshots: Sequence[Snapshot],
    progress: Progress,
    options: VerifyOptions,
    upid: Upid | None,
) -> list[VerifyResult]:
    store = _store(repository, VerifyMode(Mode.LISTING))
    if not isinstance(store, S3Datastore) or not isinstance(repository, LocalRepository):
        why = "its chunks lie in a folder, which has no listing to compare with"
        raise UsageError("verify by listing", repository.name, why, "full, sample and budget work there")
    why_not = await repository.why_not_recording() if options.record else "not wanted"
    if why_not and options.record:
        progress.warn(f"results are not recorded, and nothing is repaired: {why_not}")
    results = {snapshot: VerifyResult(snapshot) for snapshot in snapshots}
    wanted = await _chunks_of(repository, snapshots, progress, results)
    report = await compare_listing(store, wanted, progress, change=not why_not)
    progress.log(
        f"{report.listed} of {len(wanted)} chunks are listed, {report.compared} of them compared with the cache's copy"
    )
    if report.repaired:
        progress.warn(f"{len(report.repaired)} chunks were missing or wrong, and are repaired from the cache")
    if report.bad:
        for digest, why in list(report.bad.items())[:20]:
            progress.log(f"chunk {digest.hex()}: {why}")
        if not why_not:
            upid = Upid.new("verify", repository.name) if upid is None else upid
            await record_users(repository, repository, report.bad, (), progress, upid)
        for snapshot, lines in (await _users_among(repository, snapshots, report.bad)).items():
            results[snapshot].errors += lines
    return [results[snapshot] for snapshot in snapshots]


async def _users_among(
    repository: Repository, snapshots: Sequence[Snapshot], bad: dict[bytes, str]
) -> dict[Snapshot, list[str]]:
    lines = {}
    for snapshot in snapshots:
        try:
            chunks = await _chunks_of(repository, [snapshot], Progress())
        except (SnapshotNotFoundError, LockedError):
            continue
        used = [digest for digest in bad if digest in chunks]
        if used:
            lines[snapshot] = [f"{len(used)} chunks: {bad[used[0]]}, the first one: {used[0].hex()}"]
    return lines


# Both.


def _store(repository: Repository, mode: VerifyMode) -> Datastore:
    if not isinstance(repository, LocalRepository):
        why = "the server verifies by itself, and has no such mode"
        raise UsageError(f"verify by {mode.mode.value}", repository.name, why)
    return repository.store


async def _chunks_of(
    repository: Repository,
    snapshots: Sequence[Snapshot],
    progress: Progress,
    results: Mapping[Snapshot, VerifyResult] | None = None,
) -> DigestSet:
    """Every chunk that one of `snapshots` uses.

    What is wrong with manifests and files goes into `results`; None: others look at them, and tell.
    """
    found = DigestSet()
    for snapshot in snapshots:
        result = VerifyResult(snapshot)
        try:
            async with repository.reader(snapshot) as reader:
                manifest, _ = await load_readable(reader, ChunkCodec())
                for entry in manifest.files:
                    try:
                        await _add_chunks(reader, entry, found)
                    except FleeceError as error:
                        result.errors.append(str(error))
        except SnapshotNotFoundError:
            result.skipped = "removed meanwhile"
        except LockedError as error:
            result.skipped = f"locked ({error.why})"
        except FleeceError as error:
            result.errors.append(str(error))
        for line in result.errors:
            progress.warn(f"not looked at: {line}")
        if results is not None:
            results[snapshot].errors += result.errors
            results[snapshot].skipped = result.skipped
    return found


async def _add_chunks(reader: Reader, entry: ManifestFile, found: DigestSet) -> None:
    """Add the chunks of one file of a snapshot to `found`; a blob must be there, in the right size."""
    if archive_kind(entry.filename) is ArchiveKind.BLOB:
        size = len(await reader.read_blob(entry.filename, limit=entry.size))
        if size != entry.size:
            where = f"{reader.snapshot}/{entry.filename}"
            raise FormatError("verify", where, f"wrong size ({size} != {entry.size})")
        return
    index = await reader.open_index(entry.filename, size=entry.size)
    await check_index(index, entry)
    await in_io_thread(found.add_index, index)
