"""What a check of an endpoint finds out, against the emulator with its peculiarities and a real gateway."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from core.errors import UsageError
from datastore.s3.endpoint import Quirk
from datastore.s3.link import RetryPolicy
from datastore.s3.probe import Mark, ProbeReport, probe, summary
from tests.datastore.s3.conftest import Place
from tests.support.s3_bucket import FakeBucket
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_faults import ALWAYS
from tests.support.s3_service import BUCKET
from tests.support.waiting import cancelled_when

QUICK = RetryPolicy(attempts=2, patience_s=2.0, base_s=0.01, cap_s=0.02)


def marks(report: ProbeReport) -> dict[str, Mark]:
    return {finding.name: finding.mark for finding in report.findings}


def text(report: ProbeReport, name: str) -> str:
    (found,) = [finding.text for finding in report.findings if finding.name == name]
    return found


async def test_a_good_endpoint_passes_and_nothing_is_left(place: Place) -> None:
    report = await probe(place.endpoint, place.bucket, store="st1", policy=QUICK)
    assert report.usable
    assert (report.put_if_absent, report.multi_delete) == (True, True)
    assert (report.versioning, report.object_lock) == ("", "")
    assert (report.quirks_to_set, report.quirks_to_drop) == ((), ())
    assert abs(report.clock_offset_s or 9) < 5
    assert set(marks(report).values()) == {Mark.OK}, summary(report)
    again = await probe(place.endpoint, place.bucket, policy=QUICK)
    assert [finding.name for finding in again.findings] == [finding.name for finding in report.findings]


async def test_it_sends_what_pbs_sends_and_stays_below_the_datastore(s3_emulator: S3Emulator) -> None:
    await probe(s3_emulator.endpoint(), BUCKET, store="st1", policy=QUICK)
    made = [(one.operation, one.key) for one in s3_emulator.requests()]
    simple = "st1/.s3-client-test"
    assert made[:4] == [("HEAD-BUCKET", ""), ("PUT", simple), ("GET", simple), ("DELETE", simple)]
    (put,) = [one for one in s3_emulator.requests("PUT") if one.key == simple]
    assert (put.size, put.header("if-none-match")) == (0, None)
    assert all(key.startswith(f"{simple}-") for operation, key in made[4:] if key), made
    assert s3_emulator.bucket.objects == {}


@pytest.mark.parametrize(
    ("peculiarity", "quirk", "finding"),
    [
        (lambda emulator: setattr(emulator, "knows_if_none_match", False), Quirk.SKIP_IF_NONE_MATCH, "put-if-absent"),
        (
            lambda emulator: setattr(emulator, "respects_if_none_match", False),
            Quirk.SKIP_IF_NONE_MATCH,
            "put-if-absent",
        ),
        (lambda emulator: setattr(emulator, "knows_multi_delete", False), Quirk.DELETE_ONE_BY_ONE, "multi-delete"),
        (
            lambda emulator: emulator.plan("POST", "answer", status=403, code="AccessDenied", times=ALWAYS),
            Quirk.DELETE_ONE_BY_ONE,
            "multi-delete",
        ),
        (
            lambda emulator: emulator.plan("POST", "answer", status=200, times=ALWAYS, code="", message=""),
            Quirk.DELETE_ONE_BY_ONE,
            "multi-delete",
        ),
    ],
    ids=["refuses if-none-match", "ignores if-none-match", "no multi-delete", "denied", "unusable answer"],
)
async def test_what_a_provider_cannot_do_becomes_a_quirk(
    s3_emulator: S3Emulator, peculiarity: Callable[[S3Emulator], object], quirk: Quirk, finding: str
) -> None:
    peculiarity(s3_emulator)
    report = await probe(s3_emulator.endpoint(), BUCKET, policy=QUICK)
    assert report.usable
    assert report.quirks_to_set == (quirk,)
    assert marks(report)[finding] is Mark.WARNING
    assert f"set the provider quirk {quirk.value}" in text(report, finding)
    assert s3_emulator.bucket.objects == {}
    configured = s3_emulator.endpoint(quirks=frozenset({quirk}))
    report = await probe(configured, BUCKET, policy=QUICK)
    assert report.quirks_to_set == ()
    assert marks(report)[finding] is Mark.NOTE


async def test_a_condition_refused_with_a_strange_code_is_told_from_a_put_that_is_refused(
    s3_emulator: S3Emulator,
) -> None:
    # The first PUT is PBS's own, the second one has the condition.
    s3_emulator.plan("PUT", "answer", status=400, code="InvalidArgument", skip=1)
    report = await probe(s3_emulator.endpoint(), BUCKET, policy=QUICK)
    assert report.quirks_to_set == (Quirk.SKIP_IF_NONE_MATCH,)
    s3_emulator.plan("PUT", "answer", status=400, code="InvalidArgument", skip=1, times=ALWAYS)
    report = await probe(s3_emulator.endpoint(), BUCKET, policy=QUICK)
    assert (report.usable, report.put_if_absent) == (False, None)
    assert s3_emulator.bucket.objects == {}


async def test_quirks_that_are_not_needed_are_named(s3_emulator: S3Emulator) -> None:
    report = await probe(s3_emulator.endpoint(quirks=frozenset(Quirk)), BUCKET, policy=QUICK)
    assert set(report.quirks_to_drop) == set(Quirk)


async def test_versions_locks_and_clocks_are_told(s3_emulator: S3Emulator) -> None:
    s3_emulator.bucket.versioning = "Enabled"
    s3_emulator.bucket.object_lock = "GOVERNANCE"
    s3_emulator.clock_offset_s = 400.0
    report = await probe(s3_emulator.endpoint(), BUCKET, policy=QUICK)
    assert report.usable
    assert (report.versioning, report.object_lock) == ("Enabled", "GOVERNANCE")
    assert report.clock_offset_s == pytest.approx(400, abs=3)
    assert "garbage collection refuses" in text(report, "clock")
    warned = {name for name, mark in marks(report).items() if mark is Mark.WARNING}
    assert warned == {"versioning", "object-lock", "clock"}
    document = report.to_json()
    assert (document["versioning"], document["object-lock"], document["usable"]) == ("Enabled", "GOVERNANCE", True)


async def test_questions_that_a_provider_refuses_are_only_notes(s3_emulator: S3Emulator) -> None:
    for name in ("versioning", "object-lock"):
        s3_emulator.plan(name, "answer", status=403, code="AccessDenied")
    report = await probe(s3_emulator.endpoint(), BUCKET, policy=QUICK)
    assert report.usable
    assert [name for name, mark in marks(report).items() if mark is Mark.NOTE] == ["versioning", "object-lock"]
    assert (report.versioning, report.object_lock) == (None, None)


@pytest.mark.parametrize(
    ("operation", "code", "finding"),
    [
        ("HEAD-BUCKET", "", "bucket"),
        ("PUT", "AccessDenied", "put"),
        ("GET", "AccessDenied", "get"),
        ("DELETE", "AccessDenied", "delete"),
        ("LIST", "AccessDenied", "list"),
    ],
)
async def test_rights_that_are_missing_are_failures_with_the_code(
    s3_emulator: S3Emulator, operation: str, code: str, finding: str
) -> None:
    s3_emulator.plan(operation, "answer", status=403, code=code)
    report = await probe(s3_emulator.endpoint(), BUCKET, policy=QUICK)
    assert not report.usable
    assert marks(report)[finding] is Mark.FAILED
    assert code in text(report, finding)


async def test_an_endpoint_that_is_away_is_a_finding(s3_emulator: S3Emulator) -> None:
    away = s3_emulator.endpoint()
    s3_emulator.close()
    report = await probe(away, BUCKET, policy=RetryPolicy(patience_s=0.1, base_s=0.01))
    assert [(finding.name, finding.mark) for finding in report.findings] == [("bucket", Mark.FAILED)]
    assert report.clock_offset_s is None


async def test_a_listing_that_lags_is_a_failure(s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBucket, "page", lambda *_: ([], None))
    report = await probe(s3_emulator.endpoint(), BUCKET, policy=QUICK)
    assert marks(report)["list"] is Mark.FAILED


async def test_a_probe_that_is_cancelled_leaves_nothing(s3_emulator: S3Emulator) -> None:
    fault = s3_emulator.plan("COPY", "deaf")
    async with cancelled_when(lambda: fault.met) as scope:
        await probe(s3_emulator.endpoint(), BUCKET, policy=QUICK)
    assert scope.cancelled_caught
    assert s3_emulator.bucket.objects == {}


async def test_names_that_cannot_be_are_refused_before_anything_is_sent(s3_emulator: S3Emulator) -> None:
    with pytest.raises(UsageError):
        await probe(s3_emulator.endpoint(), "Bucket")
    with pytest.raises(UsageError):
        await probe(s3_emulator.endpoint(), BUCKET, store="a/b")
    assert s3_emulator.requests() == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"secret": "wrong"}, "the secret key or the region is wrong"),
        ({"access_key": "AK"}, "does not know the access key"),
    ],
)
async def test_wrong_keys_are_told_from_a_bucket_that_is_not_there(
    place: Place, change: dict[str, str], says: str
) -> None:
    report = await probe(replace(place.endpoint, **change), place.bucket, policy=QUICK)  # type: ignore[arg-type]
    assert [(one.name, one.mark) for one in report.findings][:1] == [("bucket", Mark.FAILED)]
    assert says in text(report, "bucket")
    assert "s3 endpoint update" in text(report, "bucket")
    absent = await probe(place.endpoint, f"{place.bucket}-not-there", policy=QUICK)
    assert "the bucket does not exist" in text(absent, "bucket")
