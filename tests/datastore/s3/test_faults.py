"""What goes wrong between us and an endpoint: every planned fault is met, and ends in recovery or one clear error."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from datastore.s3 import wire
from datastore.s3.client import S3Client
from datastore.s3.counters import Method
from datastore.s3.endpoint import ContentMd5, Endpoint, Quirk
from datastore.s3.errors import (
    S3AnswerError,
    S3BackendError,
    S3ClockError,
    S3Error,
    S3ObjectError,
    S3ThrottledError,
    S3UnavailableError,
    S3UnknownOutcomeError,
)
from datastore.s3.link import EndpointLink, RetryPolicy
from datastore.s3.objects import Outcome
from tests.datastore.s3.conftest import IMPATIENT, Told
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_faults import ALWAYS, Kind
from tests.support.s3_service import BUCKET
from tests.support.waiting import PATIENCE_S, cancelled_when, until

KEY = "st1/a"


async def get(client: S3Client) -> object:
    fetched = await client.get(KEY)
    return None if fetched is None else bytes(fetched.data)


async def head(client: S3Client) -> object:
    info = await client.head(KEY)
    return None if info is None else info.size


async def put(client: S3Client) -> object:
    return (await client.put(KEY, [b"fleece"], if_absent=True)).outcome


async def copy(client: S3Client) -> object:
    return await client.copy(KEY, "st1/copy")


async def delete(client: S3Client) -> object:
    await client.delete(KEY)
    return None


async def delete_many(client: S3Client) -> object:
    return await client.delete_many([KEY, "st1/b"])


async def page(client: S3Client) -> object:
    return [found.key for found in (await client.page("st1/")).objects]


Call = Callable[[S3Client], Awaitable[object]]
#: operation at the emulator, the call, and what it gives when KEY is there
CALLS = [
    pytest.param("GET", get, b"fleece", id="get"),
    pytest.param("HEAD", head, 6, id="head"),
    pytest.param("PUT", put, Outcome.DUPLICATE, id="put"),
    pytest.param("COPY", copy, True, id="copy"),
    pytest.param("DELETE", delete, None, id="delete"),
    pytest.param("POST", delete_many, [], id="delete-many"),
    pytest.param("LIST", page, [KEY], id="list"),
]
WITH_BODY = [call for call in CALLS if call.id in ("get", "copy", "delete-many", "list")]
BUT_HEAD = [call for call in CALLS if call.id != "head"]
CHANGING = {"PUT": Method.PUT, "COPY": Method.COPY, "DELETE": Method.DELETE, "POST": Method.POST}
PASSING: list[tuple[Kind, dict[str, Any]]] = [
    ("answer", {"status": 408}),
    ("answer", {"status": 429}),
    ("answer", {"status": 500, "code": "InternalError"}),
    ("answer", {"status": 502}),
    ("answer", {"status": 503, "code": "SlowDown"}),
    ("answer", {"status": 504}),
    ("answer", {"status": 400, "code": "RequestTimeout"}),
    ("answer", {"status": 400, "code": "ThrottlingException"}),
    ("answer", {"status": 409, "code": "OperationAborted"}),
    ("answer", {"status": 409, "code": "ConditionalRequestConflict"}),
    ("reset", {}),
    ("lost", {}),
    ("lie", {"status": 500, "code": "InternalError"}),
]


@pytest.fixture(autouse=True)
def stored(s3_emulator: S3Emulator) -> None:
    s3_emulator.bucket.put(KEY, b"fleece")


@pytest.mark.parametrize(("operation", "call", "expected"), CALLS)
@pytest.mark.parametrize(("kind", "fields"), PASSING, ids=lambda value: str(value))
async def test_what_passes_is_tried_again(
    emulated: S3Client,
    s3_emulator: S3Emulator,
    operation: str,
    call: Call,
    expected: object,
    kind: Kind,
    fields: dict[str, Any],
) -> None:
    if operation == "HEAD" and fields.get("status") in (400, 409):
        fields = {"status": 500}  # an answer to HEAD has no code
    s3_emulator.plan(operation, kind, times=2, **fields)
    assert await call(emulated) == expected
    assert len(s3_emulator.requests(operation)) == 3
    assert sum(emulated.link.counters.totals().requests.values()) == 3


async def test_every_attempt_has_a_time_and_a_signature_of_its_own(s3_emulator: S3Emulator) -> None:
    """R11: the signature of a request that waits for long is not accepted any more."""
    s3_emulator.plan("PUT", "answer", times=3, status=503, code="SlowDown")
    clock = iter(range(100_000))

    def now() -> float:
        return s3_emulator.now() + next(clock)

    async with EndpointLink.open(s3_emulator.endpoint(), policy=IMPATIENT, now=now) as link:
        await S3Client(link, BUCKET).put("st1/new", [b"body"], if_absent=True)
    sent = s3_emulator.requests("PUT")
    assert [one.status for one in sent] == [503, 503, 503, 200]
    assert len({one.header("x-amz-date") for one in sent}) == 4
    assert len({one.header("authorization") for one in sent}) == 4


@pytest.mark.parametrize(("operation", "call", "expected"), WITH_BODY)
@pytest.mark.parametrize("kind", ["cut", "stall"])
async def test_an_answer_that_breaks_off_is_asked_for_again(
    emulated: S3Client,
    s3_emulator: S3Emulator,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    call: Call,
    expected: object,
    kind: Kind,
) -> None:
    monkeypatch.setattr(wire, "INACTIVITY_TIMEOUT_S", 0.2)
    s3_emulator.plan(operation, kind)
    assert await call(emulated) == expected


@pytest.mark.parametrize(("operation", "call", "expected"), CALLS)
async def test_silence_is_waited_for_only_so_long(
    emulated: S3Client,
    s3_emulator: S3Emulator,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    call: Call,
    expected: object,
) -> None:
    monkeypatch.setattr(wire, "INACTIVITY_TIMEOUT_S", 0.2)
    s3_emulator.plan(operation, "deaf")
    assert await call(emulated) == expected


async def test_an_attempt_has_an_end_although_something_moves_and_a_large_body_has_more_time(
    s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R12: here the inactivity time-out of a minute does not come into it."""
    monkeypatch.setattr("datastore.s3.link.ATTEMPT_TIMEOUT_S", 0.4)
    async with S3Client.open(s3_emulator.endpoint(), BUCKET, policy=IMPATIENT) as client:
        s3_emulator.plan("GET", "deaf")
        with trio.fail_after(PATIENCE_S):
            assert await get(client) == b"fleece"
        assert len(s3_emulator.requests("GET")) >= 2
        waiting = s3_emulator.plan("PUT", "delay", seconds=PATIENCE_S)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.put, "st1/large", [bytes(100 * 1024)])
            await until(lambda: waiting.met > 0)
            await trio.sleep(0.5)  # longer than the others may take, and far from a second for each KiB
            waiting.released.set()
        assert [one.status for one in s3_emulator.requests("PUT")] == [200]


@pytest.mark.parametrize(("operation", "call", "expected"), CALLS)
@pytest.mark.parametrize("kind", ["lost", "reset", "answer"])
async def test_after_eight_answers_or_all_patience_it_is_over(
    s3_emulator: S3Emulator, told: Told, operation: str, call: Call, expected: object, kind: Kind
) -> None:
    s3_emulator.plan(operation, kind, times=ALWAYS, status=500, code="InternalError")
    policy = RetryPolicy(base_s=0.001, cap_s=0.002, patience_s=60 if kind == "answer" else 0.1)
    async with EndpointLink.open(s3_emulator.endpoint(), policy=policy, unknown=told.append) as link:
        with pytest.raises(S3UnavailableError) as raised:
            await call(S3Client(link, BUCKET))
    sent = len(s3_emulator.requests(operation))
    assert sent == 8 if kind == "answer" else sent >= 1
    if operation in CHANGING:
        assert type(raised.value) is S3UnknownOutcomeError
        assert [outcome.method for outcome in told] == [CHANGING[operation]] * sent
    else:
        assert type(raised.value) is S3UnavailableError
        assert told == []


async def test_connections_that_fail_are_made_again_more_than_eight_times(
    emulated: S3Client, s3_emulator: S3Emulator
) -> None:
    s3_emulator.plan("GET", "reset", times=12)
    assert await get(emulated) == b"fleece"
    assert len(s3_emulator.requests("GET")) == 13


async def test_an_endpoint_that_is_away_is_waited_for(s3_emulator: S3Emulator) -> None:
    endpoint = s3_emulator.endpoint()
    s3_emulator.close()
    policy = RetryPolicy(patience_s=0.3, base_s=0.01, cap_s=0.02)
    async with S3Client.open(endpoint, BUCKET, policy=policy) as client:
        with pytest.raises(S3UnavailableError, match=r"emulator:bucket/st1/a: .*Connection refused") as raised:
            await client.put(KEY, [b"x"])
        assert not isinstance(raised.value, S3UnknownOutcomeError), "nothing was ever sent"
        assert client.link.counters.totals().requests == {}, "nothing reached it"


async def test_a_storm_halves_the_gate_and_ends_in_a_throttle_error(
    emulated: S3Client, s3_emulator: S3Emulator
) -> None:
    s3_emulator.plan("GET", "answer", status=503, code="SlowDown", times=ALWAYS)
    with pytest.raises(S3ThrottledError) as raised:
        await emulated.get(KEY)
    assert (raised.value.status, raised.value.code) == (503, "SlowDown")
    assert emulated.link.gate.limit == 1
    s3_emulator.faults.clear()
    for _ in range(50):
        await emulated.head(KEY)
    assert emulated.link.gate.limit == 2


async def test_many_requests_get_through_a_storm(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("PUT", "answer", status=503, code="SlowDown", times=30)
    async with trio.open_nursery() as nursery:
        for number in range(60):
            nursery.start_soon(emulated.put, f"st1/{number:02}", [b"x"])
    assert len(s3_emulator.bucket.objects) == 61


async def test_retry_after_is_respected(s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    s3_emulator.plan("GET", "answer", status=503, code="SlowDown", headers={"retry-after": "7"})
    s3_emulator.plan("GET", "answer", status=503, skip=0, times=2, code="SlowDown")
    async with EndpointLink.open(s3_emulator.endpoint(), chance=lambda: 1.0) as link:
        monkeypatch.setattr(trio, "sleep", sleep)
        await S3Client(link, BUCKET).get(KEY)
    assert slept == [7.0, 1.0, 2.0]


async def test_waiting_longer_than_patience_is_not_begun(s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("GET", "answer", status=503, code="SlowDown", headers={"retry-after": "3600"})
    async with S3Client.open(s3_emulator.endpoint(), BUCKET) as client:
        with pytest.raises(S3ThrottledError):
            await client.get(KEY)
    assert len(s3_emulator.requests("GET")) == 1


async def test_configured_codes_mean_slower(s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("GET", "answer", status=403, code="RateLimitExceeded")
    endpoint = s3_emulator.endpoint(throttle_codes=("403/RateLimitExceeded",))
    async with S3Client.open(endpoint, BUCKET, policy=IMPATIENT) as client:
        assert await get(client) == b"fleece"
        assert client.link.gate.limit == 4


@pytest.mark.parametrize(
    "code",
    ["NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled"],
)
@pytest.mark.parametrize(("operation", "call", "expected"), BUT_HEAD)
async def test_backend_failures_are_never_a_missing_object(
    emulated: S3Client, s3_emulator: S3Emulator, operation: str, call: Call, expected: object, code: str
) -> None:
    s3_emulator.plan(operation, "answer", status=404 if code == "NoSuchBucket" else 403, code=code)
    with pytest.raises(S3BackendError) as raised:
        await call(emulated)
    assert raised.value.code == code
    assert len(s3_emulator.requests(operation)) == 1


@pytest.mark.parametrize("call", [get, head, delete])
async def test_a_404_without_code_is_confirmed(emulated: S3Client, s3_emulator: S3Emulator, call: Call) -> None:
    s3_emulator.plan("*", "answer", status=404, key=KEY)
    assert await call(emulated) is None
    assert [request.operation for request in s3_emulator.requests()][1:] == ["HEAD-BUCKET"]


@pytest.mark.parametrize("call", [get, head, copy])
async def test_a_404_without_code_from_a_bucket_that_is_gone_is_a_failure(
    emulated: S3Client, s3_emulator: S3Emulator, call: Call
) -> None:
    s3_emulator.plan("*", "answer", status=404, times=2)
    with pytest.raises(S3BackendError, match="no such bucket"):
        await call(emulated)


async def test_an_archived_object_is_named_with_its_tier(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.bucket.objects[KEY].storage_class = "DEEP_ARCHIVE"
    with pytest.raises(S3ObjectError, match="archive tier DEEP_ARCHIVE; restore it"):
        await emulated.get(KEY)
    info = await emulated.head(KEY)
    assert info is not None
    assert info.storage_class == "DEEP_ARCHIVE"


@pytest.mark.parametrize("status", [301, 307])
async def test_redirects_are_not_followed_but_explained(
    emulated: S3Client, s3_emulator: S3Emulator, status: int
) -> None:
    headers = {"location": "http://127.0.0.1:1/", "x-amz-bucket-region": "eu-west-7"}
    s3_emulator.plan("GET", "answer", status=status, headers=headers)
    with pytest.raises(S3BackendError, match="the bucket is in region eu-west-7"):
        await emulated.get(KEY)


async def test_a_wrong_region_is_explained(s3_emulator: S3Emulator) -> None:
    async with S3Client.open(s3_emulator.endpoint(region="eu-west-7"), BUCKET) as client:
        with pytest.raises(S3BackendError, match="the bucket is in region test-region-1"):
            await client.get(KEY)


@pytest.mark.parametrize("offset", [-3600.0, 3600.0])
@pytest.mark.parametrize("call", [get, head, put])
async def test_a_wrong_clock_is_corrected_once(
    emulated: S3Client, s3_emulator: S3Emulator, offset: float, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    s3_emulator.clock_offset_s = offset
    await call(emulated)
    assert [request.status == 403 for request in s3_emulator.requests()] == [True, False]
    assert emulated.link.clock_offset_s == pytest.approx(offset, abs=30)
    assert "signing with its time" in caplog.text
    await call(emulated)
    assert len(s3_emulator.requests()) == 3, "the correction stays"


async def test_a_clock_that_cannot_be_corrected_is_a_plain_error(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.clock_offset_s = 3600
    s3_emulator.plan("GET", "date", seconds=-7200, times=2)
    with pytest.raises(S3ClockError, match=r"differ by 3[56][0-9]{2} s; set this machine's clock"):
        await emulated.get(KEY)
    assert len(s3_emulator.requests()) == 2


async def test_a_wrong_date_in_a_good_answer_is_only_noted(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("GET", "date", seconds=7200)
    assert await get(emulated) == b"fleece"
    assert emulated.link.clock_offset_s == pytest.approx(7200, abs=30)
    assert await get(emulated) == b"fleece"
    assert emulated.link.clock_offset_s == pytest.approx(0, abs=30)


@pytest.mark.parametrize(
    ("operation", "call", "headers", "why"),
    [
        ("GET", get, {"etag": None}, "no ETag"),
        ("GET", get, {"content-encoding": "gzip"}, "encoded as 'gzip'"),
        ("HEAD", head, {"content-length": None}, "how long the object is"),
        ("PUT", put, {"etag": None}, "no ETag"),
    ],
)
async def test_answers_that_no_server_should_give_end_in_an_error(
    emulated: S3Client,
    s3_emulator: S3Emulator,
    operation: str,
    call: Call,
    headers: dict[str, str | None],
    why: str,
) -> None:
    s3_emulator.bucket.delete(KEY) if operation == "PUT" else None
    s3_emulator.plan(operation, "headers", headers=headers, times=1 if operation == "PUT" else ALWAYS)
    if operation == "PUT":  # it was stored: the second attempt finds it
        assert await call(emulated) is Outcome.DUPLICATE
        return
    with pytest.raises(S3AnswerError, match=why):
        await call(emulated)


async def test_a_put_answered_with_another_good_status_is_not_believed(
    emulated: S3Client, s3_emulator: S3Emulator
) -> None:
    s3_emulator.plan("PUT", "answer", status=204, times=ALWAYS)
    with pytest.raises(S3Error, match="HTTP status 204"):
        await emulated.put(KEY, [b"x"])


async def test_an_error_inside_a_good_answer_counts(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("COPY", "answer", status=200, code="InternalError")
    s3_emulator.plan("COPY", "answer", status=200, code="AccessDenied", skip=0)
    with pytest.raises(S3BackendError, match="AccessDenied"):
        await emulated.copy(KEY, "st1/b")
    assert "st1/b" not in s3_emulator.bucket.objects


@pytest.mark.parametrize("kind", ["truncate", "corrupt"])
async def test_xml_that_is_damaged_is_asked_for_again(emulated: S3Client, s3_emulator: S3Emulator, kind: Kind) -> None:
    s3_emulator.plan("LIST", kind, times=3)
    assert await page(emulated) == [KEY]


async def test_a_listing_that_turns_in_a_circle_ends(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.bucket.page_size = 1
    s3_emulator.bucket.put("st1/b", b"")
    first = await emulated.page("st1/")
    real = s3_emulator.bucket.page
    s3_emulator.bucket.page = lambda prefix, token: (real(prefix, token)[0], first.token)  # type: ignore[method-assign]
    with pytest.raises(S3AnswerError, match="turns in a circle"):
        await emulated.page("st1/", first.token)


async def test_a_failed_page_is_asked_for_from_its_own_token(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.bucket.page_size = 2
    keys = [f"st1/{number}" for number in range(6)]
    for key in keys:
        s3_emulator.bucket.put(key, b"")
    s3_emulator.plan("LIST", "answer", status=503, skip=2, times=2)
    found = [entry.key async for listed in emulated.pages("st1/") for entry in listed.objects]
    assert found == [*keys, KEY]
    targets = [request.request for request in s3_emulator.requests("LIST")]
    assert targets[2] == targets[3] == targets[4] != targets[1]


async def test_partial_failures_are_told_by_key_and_retried_once(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    keys = [f"st1/{number}" for number in range(5)]
    for key in keys:
        s3_emulator.bucket.put(key, b"")
    failed = {keys[1]: "AccessDenied", keys[2]: "InternalError", keys[3]: "SlowDown"}
    s3_emulator.plan("POST", "answer", failed_keys=failed)
    s3_emulator.plan("POST", "answer", failed_keys={keys[3]: "InternalError"})
    failures = await emulated.delete_many(keys)
    assert [(failure.key, failure.code) for failure in failures] == [
        (keys[1], "AccessDenied"),
        (keys[3], "InternalError"),
    ]
    assert sorted(s3_emulator.bucket.objects) == [keys[1], keys[3], KEY]
    assert len(s3_emulator.requests("POST")) == 2


async def test_put_if_absent_is_done_without_where_it_is_unknown(
    emulated: S3Client, s3_emulator: S3Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    s3_emulator.knows_if_none_match = False
    assert (await emulated.put("st1/b", [b"x"], if_absent=True)).outcome is Outcome.NEW
    assert (await emulated.put("st1/b", [b"y"], if_absent=True)).outcome is Outcome.NEW
    assert [request.header("if-none-match") for request in s3_emulator.requests("PUT")] == ["*", None, None]
    assert caplog.text.count("skip-if-none-match-header") == 1


async def test_multi_delete_is_done_without_where_it_is_unknown(
    emulated: S3Client, s3_emulator: S3Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    s3_emulator.knows_multi_delete = False
    keys = [f"st1/{number}" for number in range(20)]
    for key in keys:
        s3_emulator.bucket.put(key, b"")
    s3_emulator.plan("DELETE", "answer", key=keys[3], status=400, code="InvalidRequest")
    failures = await emulated.delete_many(keys)
    assert [(failure.key, failure.code) for failure in failures] == [(keys[3], "InvalidRequest")]
    assert await emulated.delete_many([keys[3]]) == []
    assert list(s3_emulator.bucket.objects) == [KEY]
    assert len(s3_emulator.requests("POST")) == 1
    assert "delete-objects-via-delete-object" in caplog.text


async def test_configured_quirks_are_respected_from_the_first_request(s3_emulator: S3Emulator) -> None:
    quirks = frozenset({Quirk.SKIP_IF_NONE_MATCH, Quirk.DELETE_ONE_BY_ONE})
    async with S3Client.open(s3_emulator.endpoint(quirks=quirks), BUCKET) as client:
        await client.put(KEY, [b"x"], if_absent=True)
        await client.delete_many([KEY])
    assert [request.operation for request in s3_emulator.requests()] == ["PUT", "DELETE"]
    assert s3_emulator.requests("PUT")[0].header("if-none-match") is None


async def test_a_bucket_with_object_lock_gets_md5(s3_emulator: S3Emulator) -> None:
    s3_emulator.bucket.object_lock = "GOVERNANCE"
    link_endpoint = s3_emulator.endpoint()
    async with EndpointLink.open(link_endpoint, policy=IMPATIENT) as link:
        monkey = EndpointSetting(link, ContentMd5.NEVER)
        client = S3Client(link, BUCKET)
        with pytest.raises(S3Error, match="Content-MD5"):
            await client.put("st1/b", [b"x"])
        monkey.set(ContentMd5.AUTO)
        assert await client.object_lock() == "GOVERNANCE"
        assert link.md5_buckets == {BUCKET}
        assert (await client.put("st1/b", [b"x"])).outcome is Outcome.NEW
        assert (await client.put("st1/.cnt/ns/a/.namespace", [], if_absent=True)).outcome is Outcome.NEW


async def test_that_a_bucket_wants_md5_is_learned_with_the_first_marker(s3_emulator: S3Emulator) -> None:
    """A marker has no content, and PBS sends no content-md5 with it."""
    s3_emulator.bucket.object_lock = "GOVERNANCE"
    async with EndpointLink.open(s3_emulator.endpoint(), policy=IMPATIENT) as link:
        assert (await S3Client(link, BUCKET).put("st1/m", [], if_absent=True)).outcome is Outcome.NEW


class EndpointSetting:
    """Changes `content-md5` of an open link."""

    def __init__(self, link: EndpointLink, value: ContentMd5) -> None:
        self._link = link
        self.set(value)

    def set(self, value: ContentMd5) -> None:
        from dataclasses import replace

        self._link.endpoint = replace(self._link.endpoint, content_md5=value)


async def test_a_body_that_was_damaged_on_the_way_is_sent_again(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("PUT", "damage")
    outcome = await emulated.put("st1/b", [b"fleece"], if_absent=True)
    assert outcome.outcome is Outcome.NEW
    assert s3_emulator.bucket.objects["st1/b"].data == b"fleece"


async def test_a_body_that_is_damaged_each_time_is_an_error(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("PUT", "damage", times=ALWAYS)
    with pytest.raises(S3AnswerError, match="not the MD5 of what was sent"):
        await emulated.put("st1/b", [b"fleece"], if_absent=True)
    assert len(s3_emulator.requests("PUT")) == 3


async def test_a_truncated_object_is_never_taken_for_whole(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("GET", "cut", times=2)
    assert await get(emulated) == b"fleece"


@pytest.mark.parametrize("operation", ["PUT", "DELETE", "POST", "COPY"])
@pytest.mark.parametrize("kind", ["deaf", "delay"])
async def test_a_cancelled_change_has_an_unknown_outcome(
    emulated: S3Client, s3_emulator: S3Emulator, told: Told, operation: str, kind: Kind
) -> None:
    fault = s3_emulator.plan(operation, kind, seconds=60)
    call = {"PUT": put, "DELETE": delete, "POST": delete_many, "COPY": copy}[operation]
    async with cancelled_when(lambda: fault.met) as scope:
        await call(emulated)
    assert scope.cancelled_caught
    keys = {"PUT": [KEY], "DELETE": [KEY], "POST": [KEY, "st1/b"], "COPY": ["st1/copy"]}[operation]
    assert [(outcome.method, list(outcome.keys)) for outcome in told] == [(CHANGING[operation], keys)]
    s3_emulator.cut_connections()
    with trio.fail_after(PATIENCE_S):
        await emulated.head(KEY)  # its place in the gate and its connection are free


async def test_a_cancelled_read_is_nothing_to_tell(emulated: S3Client, s3_emulator: S3Emulator, told: Told) -> None:
    fault = s3_emulator.plan("GET", "deaf")
    async with cancelled_when(lambda: fault.met) as scope:
        await emulated.get(KEY)
    assert scope.cancelled_caught
    assert told == []


async def test_a_delete_that_comes_late_was_told_of_although_its_retry_succeeded(
    emulated: S3Client, s3_emulator: S3Emulator, told: Told
) -> None:
    fault = s3_emulator.plan("POST", "late", seconds=300)
    assert await emulated.delete_many([KEY]) == []
    assert [(outcome.method, list(outcome.keys)) for outcome in told] == [(Method.POST, [KEY])]
    assert (await emulated.put(KEY, [b"again"], if_absent=True)).outcome is Outcome.NEW
    assert await emulated.head(KEY) is not None
    fault.released.set()
    await until(lambda: KEY not in s3_emulator.bucket.objects)
    assert await emulated.head(KEY) is None


async def test_the_secret_is_in_no_log_and_no_error(
    s3_emulator: S3Emulator, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = s3_emulator.secret
    texts = []
    endpoints: list[Endpoint] = [
        s3_emulator.endpoint(),
        s3_emulator.endpoint(secret=secret + "x"),
        s3_emulator.endpoint(region="eu-west-7"),
    ]
    s3_emulator.plan("PUT", "answer", status=500, skip=1, times=ALWAYS)
    for endpoint in endpoints:
        texts.append(repr(endpoint))
        async with EndpointLink.open(endpoint, policy=IMPATIENT) as link:
            client = S3Client(link, BUCKET)
            texts.append(repr(vars(link)))
            for call in (get, put, put, delete_many, page):
                try:
                    await call(client)
                except S3Error as error:
                    texts += [str(error), repr(error), repr(error.__cause__), repr(error.__context__)]
    captured = capfd.readouterr()
    everything = "\n".join([*texts, caplog.text, captured.out, captured.err])
    assert "SignatureDoesNotMatch" in everything
    assert secret not in everything


async def test_bytes_without_end_are_cut_off(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    s3_emulator.plan("GET", "answer", status=500, headers={"content-length": str(2 << 30)}, times=ALWAYS)
    with pytest.raises(S3Error, match=f"{2 << 30} bytes, at most {1 << 20} are accepted"):
        await emulated.get(KEY)
