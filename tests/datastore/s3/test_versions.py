"""Old versions in buckets with versioning: what goes, what must stay, and what a lying endpoint can do."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from core.errors import FormatError
from core.progress import Progress
from datastore.errors import StoreError
from datastore.names import Group
from datastore.s3.calls import Call
from datastore.s3.client import META_LIMIT, S3Client
from datastore.s3.counters import Method
from datastore.s3.endpoint import Endpoint, Quirk
from datastore.s3.errors import S3AnswerError
from datastore.s3.versions import PurgeReport, purge_versions, version_pages
from datastore.s3.xml import parse_versions
from repository.local import LocalRepository
from repository.locate import load_readable
from tests.support.s3_bucket import StoredVersion
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_stores import NAME, s3_place, s3_store
from tests.support.snapshots import CHUNK, CODEC, write_snapshot

DAY_S = 86400.0
GROUP = Group.parse("vm/100")
DISK = "disk.img.fidx"
OLD_OWNER = f"{NAME}/.cnt/vm/7/owner"


@pytest.fixture(params=["s3", pytest.param("rgw", marks=pytest.mark.rgw)])
def versioned_place(request: pytest.FixtureRequest) -> tuple[Endpoint, str]:
    return s3_place(request)


async def set_versioning(client: S3Client, state: str) -> None:
    body = (
        '<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Status>{state}</Status></VersioningConfiguration>"
    )
    call = Call(
        "set versioning of", Method.PUT, "PUT", client.bucket, query=[("versioning", None)], body=[body.encode()]
    )
    await client.link.send(call)


async def versions(client: S3Client) -> list[tuple[str, bool, bool]]:
    """Key, whether it is the latest, and whether it is a marker, of everything below the store."""
    return [
        (version.key, version.is_latest, version.is_marker)
        async for page in version_pages(client, f"{NAME}/")
        for version in page.versions
    ]


async def test_what_is_not_current_goes_and_the_store_stays_whole(
    store_folder: Path, versioned_place: tuple[Endpoint, str], monkeypatch: pytest.MonkeyPatch, s3_emulator: S3Emulator
) -> None:
    monkeypatch.setattr("datastore.local_chunks._ACCESS_TIME_WAIT_S", 0.02)
    endpoint, bucket = versioned_place
    async with s3_store(store_folder, endpoint, bucket) as store:
        if endpoint.port == s3_emulator.port:
            s3_emulator.bucket.versioning = "Enabled"
        else:
            await set_versioning(store.client, "Enabled")
        repo = LocalRepository(store, "test")
        assert await purge_versions(store, Progress()) == PurgeReport("Enabled")
        snapshots = [await write_snapshot(repo, GROUP, at, {DISK: bytes([at]) * CHUNK}) for at in (1, 2, 3)]
        before = len([one async for page in store.client.pages(f"{NAME}/") for one in page.objects])
        await repo.forget(snapshots[0])
        await repo.set_notes(snapshots[2], "the manifest is replaced")
        gone = [one for one in await versions(store.client) if not one[1] or one[2]]
        # The index and manifest of the first, each under a marker, and manifests that were replaced.
        assert sum(is_marker for _, _, is_marker in gone) == 2
        dry = await purge_versions(store, Progress(), dry_run=True)
        assert dry.markers == 2
        assert dry.versions == len(gone) - 2 >= 3
        assert dry.size > 0
        assert [one for one in await versions(store.client) if not one[1] or one[2]] == gone
        assert await purge_versions(store, Progress(), older_than_s=DAY_S) == PurgeReport("Enabled", kept=dry.versions)
        assert await purge_versions(store, Progress()) == dry
        left = await versions(store.client)
        assert [one for one in left if not one[1] or one[2]] == []
        assert len(left) == before - 2
        assert await purge_versions(store, Progress()) == PurgeReport("Enabled")
        async with repo.reader(snapshots[2]) as reader:
            manifest, _ = await load_readable(reader, CODEC)
            assert manifest.notes == "the manifest is replaced"


async def test_an_object_that_is_stored_again_below_a_marker_is_current_and_stays(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    fake = s3_emulator.bucket
    fake.versioning = "Enabled"
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        for content in (b"first", b"second"):
            await store.client.put(OLD_OWNER, [content])
            await store.client.delete(OLD_OWNER)
        await store.client.put(OLD_OWNER, [b"third"], if_absent=True)
        report = await purge_versions(store, Progress())
        assert (report.versions, report.markers) == (2, 2)
        assert [version.stored and version.stored.data for version in fake.versions[OLD_OWNER]] == [b"third"]
        found = await store.client.get(OLD_OWNER, limit=META_LIMIT)
        assert found is not None
        assert bytes(found.data) == b"third"


async def test_a_version_is_as_old_as_what_has_replaced_it(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """A chunk of last year that was deleted today has been deleted today."""
    fake = s3_emulator.bucket
    fake.versioning = "Enabled"
    now = s3_emulator.now()
    ages = {"vm/7": (300, 2), "vm/8": (300, 200), "vm/9": (300, 20)}
    for group, (stored, deleted) in ages.items():
        fake.put(f"{NAME}/.cnt/{group}/owner", b"x", now - stored * DAY_S)
        fake.delete(f"{NAME}/.cnt/{group}/owner", now - deleted * DAY_S)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        report = await purge_versions(store, Progress(), older_than_s=10 * DAY_S)
    assert (report.versions, report.markers, report.kept) == (2, 2, 1)
    assert [len(fake.versions[f"{NAME}/.cnt/{group}/owner"]) for group in ages] == [2, 0, 0]


async def test_a_marker_stays_as_long_as_a_version_below_it_does(store_folder: Path, s3_emulator: S3Emulator) -> None:
    """Without the marker the object would be there again."""
    fake = s3_emulator.bucket
    fake.versioning = "Enabled"
    keys = [f"{NAME}/.cnt/vm/{number}/owner" for number in (7, 8)]
    for key in keys:
        fake.put(key, b"x")
        fake.delete(key)
    fake.locked.add(fake.versions[keys[0]][1].id)
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        report = await purge_versions(store, Progress())
        assert (report.versions, report.markers, report.locked, report.failed) == (1, 1, 1, 0)
        assert [(one.key, one.code) for one in report.failures] == [(keys[0], "AccessDenied")]
        assert (len(fake.versions[keys[0]]), len(fake.versions[keys[1]])) == (2, 0)
        assert keys[0] not in fake.objects
        # Where batches are unknown, one by one.
        store.client.link.learn_quirk(Quirk.DELETE_ONE_BY_ONE)
        again = await purge_versions(store, Progress())
        assert (again.versions, again.markers, again.locked) == (0, 0, 1)
        fake.locked.clear()
        last = await purge_versions(store, Progress())
        assert (last.versions, last.markers, last.locked) == (1, 1, 0)
        assert fake.versions[keys[0]] == []


async def test_where_versioning_is_suspended_the_version_without_an_id_of_its_own_stays(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    """The next object gets the same id, and it would be that one that goes."""
    fake = s3_emulator.bucket
    fake.put(OLD_OWNER, b"before versioning")
    fake.versioning = "Enabled"
    fake.put(OLD_OWNER, b"with an id")
    fake.delete(OLD_OWNER)
    fake.versioning = "Suspended"
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        report = await purge_versions(store, Progress())
        assert (report.state, report.versions, report.kept, report.markers) == ("Suspended", 1, 1, 0)
        assert [version.id == "null" for version in fake.versions[OLD_OWNER]] == [False, True]
        fake.versioning = "Enabled"
        report = await purge_versions(store, Progress())
        assert (report.versions, report.markers) == (1, 1)


async def test_versions_of_others_and_buckets_without_versions_are_left_alone(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    fake = s3_emulator.bucket
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        fake.put(OLD_OWNER, b"x")
        assert await purge_versions(store, Progress()) == PurgeReport("")
        assert [one for one in s3_emulator.requests() if one.operation == "versions"] == []
        fake.versioning = "Enabled"
        foreign = [f"{NAME}/mine.txt", f"{NAME}2/.cnt/vm/7/owner", f"{NAME}/.cnt/../x"]
        for key in foreign:
            fake.put(key, b"x")
            fake.delete(key)
        report = await purge_versions(store, Progress())
        assert (report.versions, report.markers, report.strange) == (0, 0, 4)
        assert [len(fake.versions[key]) for key in foreign] == [2, 2, 2]
        fake.put(f"{NAME}/.in-use", b'{"hostname":"another"}')
        with pytest.raises(StoreError, match="in use by another"):
            await purge_versions(store, Progress())


async def test_pages_end_within_the_versions_of_one_key_and_batches_have_at_most_a_thousand(
    store_folder: Path, s3_emulator: S3Emulator
) -> None:
    fake = s3_emulator.bucket
    fake.versioning = "Enabled"
    fake.page_size = 7
    many, markers = 1203, 30
    fake.versions[OLD_OWNER] = [
        StoredVersion(f"v{number}", 1000.0 + many - number, fake.put("elsewhere", b"x")) for number in range(many)
    ]
    fake.objects[OLD_OWNER] = fake.objects["elsewhere"]
    for number in range(markers):
        fake.put(f"{NAME}/.cnt/vm/8{number}/owner", b"x")
        fake.delete(f"{NAME}/.cnt/vm/8{number}/owner")
    async with s3_store(store_folder, s3_emulator.endpoint()) as store:
        report = await purge_versions(store, Progress())
    assert (report.versions, report.markers, report.kept) == (many - 1 + markers, markers, 0)
    assert [version.id for version in fake.versions[OLD_OWNER]] == ["v0"]
    assert len(s3_emulator.requests("POST")) == 3


def listing(entries: Sequence[str], following: tuple[str, str] | None = None) -> bytes:
    more = ""
    if following is not None:
        more = f"<NextKeyMarker>{following[0]}</NextKeyMarker><NextVersionIdMarker>{following[1]}</NextVersionIdMarker>"
    text = "".join(entries) + f"<IsTruncated>{'true' if following else 'false'}</IsTruncated>{more}"
    return f"<ListVersionsResult>{text}</ListVersionsResult>".encode()


def entry(key: str, **changes: str) -> str:
    fields = {"Key": key, "VersionId": "v1", "IsLatest": "false", "LastModified": "2026-01-02T03:04:05Z", "Size": "1"}
    return f"<Version>{''.join(f'<{name}>{text}</{name}>' for name, text in {**fields, **changes}.items())}</Version>"


@pytest.mark.parametrize(
    "body",
    [
        b"<ListBucketResult/>",
        listing([entry("a", Size="-1")]),
        listing([entry("a", IsLatest="perhaps")]),
        listing([entry("a", VersionId="")]),
        listing([entry("a", LastModified="never")]),
        listing(["<Version><Key>a</Key></Version>"]),
        listing([], ("", "v1")),
        b'<!DOCTYPE x [<!ENTITY a "b">]>' + listing([]),
    ],
)
def test_listings_that_make_no_sense_are_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        parse_versions(body)


@pytest.mark.parametrize(
    "answers",
    [
        [listing([entry("p/a")], ("p/b", "v1")), listing([entry("p/c")], ("p/a", "v1"))],
        [listing([entry("p/a")], ("p/b", "v1"))] * 2,
        [listing([entry("elsewhere")])],
        [listing([], (f"p/{number:04}", "v1")) for number in range(25)],
    ],
    ids=["backwards", "circle", "not asked for", "empty"],
)
async def test_a_listing_that_does_not_end_is_given_up(
    emulated: S3Client, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch, answers: list[bytes]
) -> None:
    left = list(answers)

    def answer(*_marks: str) -> bytes:
        return left.pop(0) if left else answers[-1]

    monkeypatch.setattr(s3_emulator.bucket, "version_listing", answer)
    monkeypatch.setattr("datastore.s3.versions.MAX_EMPTY_PAGES", 20)
    with trio.fail_after(120), pytest.raises(S3AnswerError):
        async for _ in version_pages(emulated, "p/"):
            pass
