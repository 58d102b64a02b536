"""Verify of a bucket: what stops it, and its modes that read less than everything."""

import os
from pathlib import Path

import pytest

from core.errors import FleeceError, UsageError
from core.progress import Progress
from datastore.names import Group
from datastore.s3.counters import Counters, Method, Work
from repository.local import LocalRepository
from repository.verify import verify
from repository.verify_modes import Mode, VerifyMode, sample, verify_by
from tests.support.rgw import RunningRgw
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_faults import ALWAYS
from tests.support.s3_stores import s3_store
from tests.support.snapshots import CHUNK, CODEC, write_snapshot

GROUP = Group.parse("vm/100")
IMAGE = os.urandom(30 * CHUNK)
DIGESTS = [CODEC.digest(IMAGE[offset : offset + CHUNK]) for offset in range(0, len(IMAGE), CHUNK)]
LISTING = VerifyMode(Mode.LISTING)


def bad_keys(emulator: S3Emulator) -> list[str]:
    return [key for key in emulator.bucket.objects if key.endswith(".bad")]


@pytest.mark.parametrize("damage", ["missing", "wrong"])
async def test_more_than_twenty_bad_chunks_in_a_row_stop_it_and_change_nothing(
    store_folder: Path, s3_emulator: S3Emulator, damage: str
) -> None:
    """It is another bucket, or a provider with a problem (R43)."""
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        for digest in DIGESTS:
            await store.s3.chunks.cache.drop(digest)
            if damage == "missing":
                s3_emulator.bucket.delete(store.keys.chunk(digest))
            else:
                s3_emulator.bucket.put(store.keys.chunk(digest), b"nonsense")
        before = set(s3_emulator.bucket.objects)
        with pytest.raises(FleeceError, match="21 chunks in a row are missing or wrong"):
            await verify(repo, [snapshot], CODEC)
        assert set(s3_emulator.bucket.objects) == before
        assert s3_emulator.requests("COPY") == []


async def test_a_few_bad_chunks_are_set_aside_once_the_others_are_known_to_be_sound(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        wrong = [*DIGESTS[:3], *DIGESTS[-3:]]
        for digest in wrong:
            await store.s3.chunks.cache.drop(digest)
            s3_emulator.bucket.put(store.keys.chunk(digest), b"nonsense")
        before = len(s3_emulator.requests())
        (result,) = await verify(repo, [snapshot], CODEC)
        assert len(result.errors) == 6
        assert sorted(bad_keys(s3_emulator)) == sorted(store.keys.bad_chunk(digest, 0) for digest in wrong)
        reads = [one for one in s3_emulator.requests("GET") if one.key == store.keys.chunk(wrong[0])]
        assert len({one.connection for one in reads}) > 1, "the last look is over a new connection"
        others = {one.connection for one in s3_emulator.requests()[before:] if one.key == store.keys.chunk(DIGESTS[9])}
        assert reads[-1].connection not in others
        verification = (await repo.snapshot(snapshot)).verification
        assert verification is not None
        assert verification["state"] == "failed"


async def test_a_damaged_snapshot_whose_manifest_is_busy_has_failed_and_is_not_skipped(
    store_folder: Path, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.locks.MANIFEST_WAIT_S", 0.0)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE[: 2 * CHUNK]})
        await store.s3.chunks.cache.drop(DIGESTS[0])
        s3_emulator.bucket.put(store.keys.chunk(DIGESTS[0]), b"nonsense")
        async with store.locks.manifest(snapshot):
            (result,) = await verify(repo, [snapshot], CODEC)
        assert (result.state, result.skipped) == ("failed", "")
        assert DIGESTS[0].hex() in result.errors[0]
        assert "could not be recorded" in result.errors[-1]
        assert bad_keys(s3_emulator) == [], "while the snapshot still counts as sound nothing of it is set aside"


async def test_a_hard_limit_ends_it_with_a_warning_and_nothing_is_recorded(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    counters = Counters(limit_requests=10)
    async with s3_store(store_folder, s3_emulator.endpoint(), counters=counters) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        progress = Progress()
        assert await verify(repo, [snapshot], CODEC, progress) == []
        assert [text for text in progress.warnings if "its limit of 10 requests is reached" in text]
        assert (await repo.snapshot(snapshot)).verification is None
        assert 10 <= sum(counters.totals(Work.VERIFY).requests.values()) <= 10 + 16


async def test_a_listing_costs_one_request_and_finds_what_is_gone_or_too_short(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        other = await write_snapshot(repo, Group.parse("vm/200"), 1000, {"disk.img.fidx": os.urandom(2 * CHUNK)})
        before = len(s3_emulator.requests())
        results = await verify_by(LISTING, repo, [snapshot, other], CODEC)
        assert [result.errors for result in results] == [[], []]
        assert [one.operation for one in s3_emulator.requests()[before:]] == ["LIST"]
        assert (await repo.snapshot(snapshot)).verification is None, "only a full run says ok"
        healed, short, lost, long = DIGESTS[:4]
        flipped = DIGESTS[4]
        s3_emulator.bucket.delete(store.keys.chunk(healed))
        s3_emulator.bucket.delete(store.keys.chunk(lost))
        body = s3_emulator.bucket.objects[store.keys.chunk(flipped)].data
        s3_emulator.bucket.put(store.keys.chunk(flipped), body[:-1] + bytes([body[-1] ^ 1]))
        for digest, data in ((short, b"x"), (long, bytes(CHUNK + 100))):
            s3_emulator.bucket.put(store.keys.chunk(digest), data)
        for digest in (short, lost, long):
            await store.s3.chunks.cache.drop(digest)
        one, two = await verify_by(LISTING, repo, [snapshot, other], CODEC)
        assert (len(one.errors), two.errors) == (1, [])
        assert one.errors[0].startswith("3 chunks: ")
        assert s3_emulator.bucket.objects[store.keys.chunk(flipped)].data == body
        assert store.keys.chunk(healed) in s3_emulator.bucket.objects
        assert not Path(store.s3.chunks.path(lost)).exists()
        assert bad_keys(s3_emulator) == []
        verification = (await repo.snapshot(snapshot)).verification
        assert verification is not None
        assert verification["state"] == "failed"
        assert (await repo.snapshot(other)).verification is None


@pytest.mark.rgw
async def test_a_listing_of_a_real_gateway(store_folder: Path, rgw: RunningRgw) -> None:
    counters = Counters()
    async with s3_store(store_folder, rgw.endpoint(), rgw.make_bucket(), counters=counters) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        (result,) = await verify_by(LISTING, repo, [snapshot], CODEC)
        assert result.errors == []
        assert counters.totals(Work.VERIFY).requests == {Method.LIST: 1}
        await store.client.delete(store.keys.chunk(DIGESTS[0]))
        await store.client.put(store.keys.chunk(DIGESTS[1]), [b"nonsense, but of some length"])
        await store.client.delete(store.keys.chunk(DIGESTS[2]))
        await store.s3.chunks.cache.drop(DIGESTS[2])
        (result,) = await verify_by(LISTING, repo, [snapshot], CODEC)
        assert len(result.errors) == 1
        assert result.errors[0].startswith("1 chunks: it is not in the bucket")
        await write_snapshot(repo, GROUP, 2000, {"disk.img.fidx": IMAGE})
        (result,) = await verify(repo, [GROUP.at(2000)], CODEC)
        assert result.errors == []


@pytest.mark.parametrize("damage", ["manifest", "index", "no index", "blob"])
async def test_a_listing_says_of_no_snapshot_that_cannot_be_restored_that_it_is_sound(
    store_folder: Path, s3_emulator: S3Emulator, damage: str
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        files = {"disk.img.fidx": IMAGE[:CHUNK], "vm.conf.blob": b"memory: 1"}
        snapshot = await write_snapshot(repo, GROUP, 1000, files)
        sound = await write_snapshot(repo, Group.parse("vm/200"), 1000, {"disk.img.fidx": IMAGE[:CHUNK]})
        name = {"manifest": "index.json.blob", "blob": "vm.conf.blob"}.get(damage, "disk.img.fidx")
        path = store.base / snapshot.path / name
        data = path.read_bytes()
        path.unlink()
        if damage == "manifest":
            path.write_bytes(data[:-1])
        elif damage == "index":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        one, two = await verify_by(LISTING, repo, [snapshot, sound], CODEC)
        assert (one.state, two.errors) == ("failed", [])
        assert name in one.errors[0] or damage == "manifest"


async def test_a_listing_skips_what_is_locked(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE[:CHUNK]})
        async with store.locks.snapshot(snapshot, shared=False):
            (result,) = await verify_by(LISTING, repo, [snapshot], CODEC)
        assert result.skipped.startswith("locked")


async def test_a_listing_without_recording_changes_nothing(store_folder: Path, s3_emulator: S3Emulator) -> None:
    from repository.verify import VerifyOptions

    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        s3_emulator.bucket.delete(store.keys.chunk(DIGESTS[0]))
        (result,) = await verify_by(LISTING, repo, [snapshot], CODEC, options=VerifyOptions(record=False))
        assert len(result.errors) == 1
        assert store.keys.chunk(DIGESTS[0]) not in s3_emulator.bucket.objects
        assert Path(store.s3.chunks.path(DIGESTS[0])).stat().st_size
        assert (await repo.snapshot(snapshot)).verification is None


async def test_a_listing_of_another_bucket_stops_it(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        for digest in DIGESTS:
            s3_emulator.bucket.delete(store.keys.chunk(digest))
        with pytest.raises(FleeceError, match="more than 20 chunks in a row"):
            await verify_by(LISTING, repo, [snapshot], CODEC)
        assert Path(store.s3.chunks.path(DIGESTS[0])).exists()
        assert s3_emulator.requests()[-1].operation == "LIST"


def chunks_read(emulator: S3Emulator, since: int) -> list[str]:
    return [one.key.rpartition("/")[2] for one in emulator.requests()[since:] if one.operation == "GET"]


async def test_a_budget_goes_on_where_the_last_run_ended_until_all_had_their_turn(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        runs = []
        for _ in range(4):
            before = len(s3_emulator.requests())
            (result,) = await verify_by(VerifyMode.parse("budget=8"), repo, [snapshot], CODEC)
            assert result.errors == []
            runs.append(chunks_read(s3_emulator, before))
        ordered = sorted(digest.hex() for digest in DIGESTS)
        assert [sorted(run) for run in runs[:3]] == [ordered[:8], ordered[8:16], ordered[16:24]]
        assert sorted(runs[3]) == sorted(ordered[24:] + ordered[:2])
        assert (await repo.snapshot(snapshot)).verification is None
        (store_folder / ".fleece/verify-cursor").write_text("damaged")
        before = len(s3_emulator.requests())
        await verify_by(VerifyMode.parse(f"budget={5 * CHUNK}B"), repo, [snapshot], CODEC)
        assert sorted(chunks_read(s3_emulator, before)) == ordered[:5]
        s3_emulator.bucket.put(store.keys.chunk(bytes.fromhex(ordered[6])), b"nonsense")
        await store.s3.chunks.cache.drop(bytes.fromhex(ordered[6]))
        (result,) = await verify_by(VerifyMode.parse("budget=8"), repo, [snapshot], CODEC)
        assert len(result.errors) == 1
        verification = (await repo.snapshot(snapshot)).verification
        assert verification is not None
        assert verification["state"] == "failed"


async def test_a_budget_looks_at_snapshots_of_which_no_chunk_is_known(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE[:CHUNK]})
        manifest = store.base / snapshot.path / "index.json.blob"
        manifest.write_bytes(manifest.read_bytes()[:-1])
        results = await verify_by(VerifyMode(Mode.BUDGET, chunks=10), repo, [snapshot], CODEC)
        assert [result.state for result in results] == ["failed"]


async def test_a_budget_that_was_cut_off_has_its_turn_once_more(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        s3_emulator.plan("GET", "answer", status=403, code="AccessDenied", times=ALWAYS)
        with pytest.raises(FleeceError):
            await verify_by(VerifyMode.parse("budget=8"), repo, [snapshot], CODEC)
        assert not (store_folder / ".fleece/verify-cursor").exists()


async def test_a_sample_reads_its_share_and_records_only_damage(store_folder: Path, s3_emulator: S3Emulator) -> None:
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        repo = LocalRepository(store, "test")
        snapshot = await write_snapshot(repo, GROUP, 1000, {"disk.img.fidx": IMAGE})
        before = len(s3_emulator.requests())
        (result,) = await verify_by(VerifyMode.parse("sample=50%"), repo, [snapshot], CODEC)
        assert result.errors == []
        assert 3 <= len(chunks_read(s3_emulator, before)) <= 27
        assert (await repo.snapshot(snapshot)).verification is None


def test_a_sample_is_a_share_of_all_digests_and_another_one_each_time() -> None:
    digests = [CODEC.digest(b"%d" % number) for number in range(4000)]
    one, two = (set(filter(sample(25.0, seed), digests)) for seed in (b"1", b"2"))
    assert abs(len(one) - 1000) < 150
    assert abs(len(one & two) - 250) < 100
    assert set(filter(sample(100.0), digests)) == set(digests)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", VerifyMode()),
        ("listing", LISTING),
        ("sample=5", VerifyMode(Mode.SAMPLE, percent=5.0)),
        ("sample=0.5%", VerifyMode(Mode.SAMPLE, percent=0.5)),
        ("budget=100", VerifyMode(Mode.BUDGET, chunks=100)),
        ("budget=2GiB", VerifyMode(Mode.BUDGET, bytes=2 << 30)),
    ],
)
def test_modes_are_read(text: str, expected: VerifyMode) -> None:
    assert VerifyMode.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "fast", "full=1", "sample", "sample=0", "sample=101", "budget=", "budget=0", "x=1"]
)
def test_what_is_no_mode_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        VerifyMode.parse(text)
