"""The client, on the emulator and on a real gateway."""

import os
from collections import Counter
from contextlib import aclosing
from dataclasses import replace

import pytest
import trio

from core.errors import UsageError
from datastore.s3.client import S3Client
from datastore.s3.errors import S3BackendError, S3Error
from datastore.s3.objects import Outcome
from datastore.s3.pacing import TokenBucket
from datastore.s3.xml import Listed
from tests.datastore.s3.conftest import IMPATIENT, Place
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_service import BUCKET

MD5_OF_FLEECE = "c38f411cd15551d4881d7f08b16f38ad"


async def listed(client: S3Client, prefix: str) -> list[Listed]:
    return [found async for page in client.pages(prefix) for found in page.objects]


async def fill(client: S3Client, count: int) -> list[str]:
    """`count` small objects below `many/`, in byte order."""
    keys = [f"many/{number:05}" for number in range(count)]
    rest = iter(keys)

    async def worker() -> None:
        for key in rest:
            await client.put(key, [b"x"])

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(worker)
    return keys


async def test_what_is_put_is_read_back(client: S3Client) -> None:
    outcome = await client.put("st1/a", [b"fl", memoryview(b"ee"), bytearray(b"ce")])
    assert outcome == (Outcome.NEW, MD5_OF_FLEECE)
    fetched = await client.get("st1/a")
    assert fetched is not None
    assert fetched.data == b"fleece"
    assert fetched.info == await client.head("st1/a")
    assert (fetched.info.size, fetched.info.etag) == (6, MD5_OF_FLEECE)
    assert fetched.info.storage_class in ("", "STANDARD")


@pytest.mark.parametrize("size", [0, 1, 100_000, (4 << 20) + 12])
async def test_bodies_of_all_sizes(client: S3Client, size: int) -> None:
    body = os.urandom(size)
    await client.put("st1/a", [body[:12], memoryview(body)[12:]])
    fetched = await client.get("st1/a")
    assert fetched is not None
    assert fetched.data == body


async def test_put_replaces_and_put_if_absent_does_not(client: S3Client) -> None:
    assert (await client.put("st1/a", [b"first"], if_absent=True)).outcome is Outcome.NEW
    assert (await client.put("st1/a", [b"second"], if_absent=True)).outcome is Outcome.DUPLICATE
    fetched = await client.get("st1/a")
    assert fetched is not None
    assert fetched.data == b"first"
    assert (await client.put("st1/a", [b"third"])).outcome is Outcome.NEW
    fetched = await client.get("st1/a")
    assert fetched is not None
    assert fetched.data == b"third"


async def test_of_eight_writers_one_writes(client: S3Client) -> None:
    outcomes: list[Outcome] = []

    async def writer(number: int) -> None:
        body = [bytes([number]) * 100_000]
        outcomes.append((await client.put("st1/race", body, if_absent=True)).outcome)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(writer, number)
    assert sorted(outcome.value for outcome in outcomes) == ["duplicate"] * 7 + ["new"]


async def test_absent_objects_are_absent(client: S3Client) -> None:
    assert await client.get("st1/absent") is None
    assert await client.head("st1/absent") is None
    assert await client.copy("st1/absent", "st1/b") is False
    await client.delete("st1/absent")
    assert await listed(client, "st1/") == []


async def test_copy_then_delete_renames(client: S3Client) -> None:
    await client.put("st1/a:b c", [b"body"])
    assert await client.copy("st1/a:b c", "st1/a:b c.0.bad") is True
    await client.delete("st1/a:b c")
    [found] = await listed(client, "st1/")
    assert (found.key, found.size) == ("st1/a:b c.0.bad", 4)


async def test_every_printable_character_survives_in_keys(client: S3Client) -> None:
    letters = [chr(code) for code in range(0x20, 0x7F)] + ["é", "€", "\U0001d11e"]
    keys = [f"st1/a{letter}z" for letter in letters if letter != "/"] + ["st1/a/z"]
    for key in keys:
        assert (await client.put(key, [key.encode()], if_absent=True)).outcome is Outcome.NEW
        fetched = await client.get(key)
        assert fetched is not None
        assert fetched.data == key.encode(), key
    found = await listed(client, "st1/")
    assert [entry.key for entry in found] == sorted(keys, key=str.encode)
    # Also as prefix, as source of a copy and in the XML of a batch.
    for key in keys[:40:7] + keys[-3:]:
        assert [entry.key for entry in await listed(client, key)] == [key]
        assert await client.copy(key, key + ".copy")
    assert await client.delete_many([*keys, *(key + ".copy" for key in keys[:40:7] + keys[-3:])]) == []
    assert await listed(client, "st1/") == []


async def test_a_prefix_with_a_slash_is_a_folder(client: S3Client) -> None:
    for group in ("1", "10", "100"):
        await client.put(f"st1/.cnt/vm/{group}/owner", [b"root@pam\n"])
    assert [entry.key for entry in await listed(client, "st1/.cnt/vm/10/")] == ["st1/.cnt/vm/10/owner"]


async def test_listings_tell_size_time_and_etag(client: S3Client) -> None:
    await client.put("st1/a", [b"fleece"])
    [found] = await listed(client, "st1/")
    info = await client.head("st1/a")
    assert info is not None
    assert (found.size, found.etag) == (6, MD5_OF_FLEECE)
    assert int(found.last_modified) == int(info.last_modified)
    assert client.link.clock_offset_s is not None


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001])
async def test_pages_have_all_keys_in_order(client: S3Client, count: int) -> None:
    keys = await fill(client, count)
    await client.put("manz", [b"other"])
    pages = [page async for page in client.pages("many/")]
    assert [entry.key for page in pages for entry in page.objects] == keys
    assert all(page.token for page in pages[:-1])
    assert len(pages) in (1 + count // 1001, 1 + count // 1000)
    for start in range(0, count, 1000):
        assert await client.delete_many(keys[start : start + 1000]) == []
    assert await listed(client, "many/") == []


async def test_a_listing_goes_on_behind_a_token(client: S3Client) -> None:
    keys = await fill(client, 1001)
    async with aclosing(client.pages("many/")) as pages:
        async for page in pages:
            token = page.token
            break
    rest = [entry.key async for page in client.pages("many/", token=token) for entry in page.objects]
    assert rest == keys[1000:]


async def test_ten_thousand_keys(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    keys = [f"many/{number:05}" for number in range(10_000)]
    for key in keys:
        s3_emulator.bucket.put(key, b"")
    assert [entry.key for entry in await listed(emulated, "many/")] == keys
    assert len(s3_emulator.requests("LIST")) == 10
    s3_emulator.bucket.empty_last_page = True
    assert [entry.key for entry in await listed(emulated, "many/")] == keys
    assert len(s3_emulator.requests("LIST")) == 10 + 11


async def test_no_keys_no_request(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    assert await emulated.delete_many([]) == []
    assert s3_emulator.requests() == []


async def test_more_than_a_thousand_keys_are_refused_before_sending(
    emulated: S3Client, s3_emulator: S3Emulator
) -> None:
    with pytest.raises(ValueError, match="1001 keys"):
        await emulated.delete_many([f"k{number}" for number in range(1001)])
    assert s3_emulator.requests() == []


async def test_keys_that_are_too_long_are_refused_before_sending(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    long = "é" * 513
    for send in (emulated.get, emulated.head, emulated.delete):
        with pytest.raises(UsageError, match="1026 bytes"):
            await send(long)
    with pytest.raises(UsageError, match="1026 bytes"):
        await emulated.put(long, [b""])
    with pytest.raises(UsageError, match="1026 bytes"):
        await emulated.copy("a", long)
    with pytest.raises(UsageError, match="1026 bytes"):
        await emulated.delete_many(["a", long])
    assert s3_emulator.requests() == []


async def test_buckets_are_listed_and_asked_for(client: S3Client, place: Place) -> None:
    await client.head_bucket()
    assert place.bucket in [bucket.name for bucket in await client.list_buckets()]
    assert await client.versioning() == ""
    assert await client.object_lock() == ""


async def test_a_bucket_that_is_not_there_is_a_backend_failure_everywhere(place: Place) -> None:
    async with S3Client.open(place.endpoint, "no-such-bucket", policy=IMPATIENT) as client:
        for call in (client.get, client.head, client.delete):
            with pytest.raises(S3BackendError):
                await call("st1/a")
        with pytest.raises(S3BackendError, match="bucket"):
            await client.head_bucket()
        with pytest.raises(S3BackendError, match="the bucket does not exist"):
            await client.put("st1/a", [b"x"], if_absent=True)
        with pytest.raises(S3BackendError):
            await client.copy("st1/a", "st1/b")
        with pytest.raises(S3BackendError, match="the bucket does not exist"):
            await client.delete_many(["st1/a"])
        with pytest.raises(S3BackendError, match="the bucket does not exist"):
            await client.page("st1/")


async def test_wrong_keys_are_a_backend_failure_without_retries(place: Place) -> None:
    wrong = (
        (replace(place.endpoint, secret="wrong"), "SignatureDoesNotMatch"),
        (replace(place.endpoint, access_key="AK"), "InvalidAccessKeyId"),
    )
    for endpoint, code in wrong:
        async with S3Client.open(endpoint, place.bucket) as client:
            with pytest.raises(S3BackendError) as raised:
                await client.get("st1/a")
            assert raised.value.code == code
            assert client.link.counters.pbs()["s3-get"] == 1
            # A HEAD is refused without a word; a listing tells why.
            with pytest.raises(S3BackendError) as raised:
                await client.head_bucket()
            assert raised.value.code == code


async def test_new_keys_are_used_from_then_on(place: Place) -> None:
    async with S3Client.open(replace(place.endpoint, secret="revoked"), place.bucket) as client:
        with pytest.raises(S3BackendError):
            await client.put("st1/a", [b"x"])
        client.link.use_keys(place.endpoint.access_key, place.endpoint.secret)
        assert (await client.put("st1/a", [b"x"])).outcome is Outcome.NEW


async def test_objects_over_the_limit_are_not_read(client: S3Client) -> None:
    await client.put("st1/a", [b"x" * 1001])
    assert await client.get("st1/a", limit=1001) is not None
    with pytest.raises(S3Error, match="1001 bytes, at most 1000 are accepted"):
        await client.get("st1/a", limit=1000)


async def test_a_fresh_read_uses_a_connection_of_its_own(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    await emulated.put("st1/a", [b"x"])
    await emulated.get("st1/a")
    await emulated.get("st1/a", fresh=True)
    await emulated.get("st1/a", fresh=True)
    await emulated.get("st1/a")
    connections = [request.connection for request in s3_emulator.requests()]
    assert len(set(connections)) == 3
    assert connections[0] == connections[1] == connections[4]


async def test_virtual_host_style(monkeypatch: pytest.MonkeyPatch) -> None:
    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):  # type: ignore[no-untyped-def]
            assert host == b"bucket.s3.test-region-1.example.org"
            return await trio.socket.getaddrinfo("127.0.0.1", port, family, type, proto, flags)

        async def getnameinfo(self, sockaddr, flags):  # type: ignore[no-untyped-def]
            raise AssertionError(sockaddr)

    trio.socket.set_custom_hostname_resolver(Resolver())
    with S3Emulator(path_style=False) as emulator:
        endpoint = emulator.endpoint(endpoint="{{bucket}}.s3.{{region}}.example.org")
        async with S3Client.open(endpoint, BUCKET, policy=IMPATIENT) as client:
            await client.head_bucket()
            await client.put("st1/a", [b"x"])
            assert [entry.key for entry in await listed(client, "st1/")] == ["st1/a"]
            assert emulator.requests("PUT")[0].request == "PUT /st1/a"
            assert emulator.requests("PUT")[0].header("host") == f"bucket.s3.test-region-1.example.org:{emulator.port}"


async def test_connections_are_kept_and_no_more_than_the_limit(emulated: S3Client, s3_emulator: S3Emulator) -> None:
    await fill(emulated, 200)
    assert len({request.connection for request in s3_emulator.requests()}) <= 8


class Taken:
    """In the place of a token bucket."""

    def __init__(self) -> None:
        self.count = 0

    async def take(self) -> None:
        self.count += 1


async def test_every_put_and_copy_takes_a_put_token_and_every_request_one_of_all(
    emulated: S3Client, s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts, requests = Taken(), Taken()
    monkeypatch.setattr(emulated.link, "_puts", puts)
    monkeypatch.setattr(emulated.link, "_requests", requests)
    s3_emulator.plan("PUT", "answer", status=503, code="SlowDown", times=2)
    await emulated.put("st1/a", [b"x"])
    await emulated.copy("st1/a", "st1/b")
    await emulated.get("st1/a")
    await emulated.delete_many(["st1/a"])
    assert puts.count == 3 + 1
    assert requests.count == 3 + 3


async def test_bytes_that_come_and_go_are_taken_from_the_configured_rates(
    s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: Counter[tuple[float, float]] = Counter()

    async def take(self: TokenBucket, count: float = 1.0) -> None:
        taken[self._rate, self._burst] += int(count)

    monkeypatch.setattr(TokenBucket, "take", take)
    body = bytes(range(256)) * 4096
    s3_emulator.bucket.put("st1/a", body)
    incoming, outgoing = (1e9, 2e9), (3e9, 4e9)
    limits = {"rate_in": 1e9, "burst_in": 2e9, "rate_out": 3e9, "burst_out": 4e9}
    async with S3Client.open(s3_emulator.endpoint(**limits), BUCKET) as client:
        await client.get("st1/a")
        assert len(body) < taken[incoming] < len(body) + 2000
        assert 0 < taken[outgoing] < 2000
        taken.clear()
        await client.put("st1/b", [body])
        assert len(body) < taken[outgoing] < len(body) + 4000
        assert 0 < taken[incoming] < 2000


async def test_counters_have_every_request_and_byte(emulated: S3Client) -> None:
    await emulated.put("st1/a", [b"fleece"])
    await emulated.get("st1/a")
    await emulated.head("st1/a")
    await emulated.copy("st1/a", "st1/b")
    await emulated.page("st1/")
    await emulated.delete("st1/a")
    counted = emulated.link.counters.pbs()
    requests = {name: counted[name] for name in counted if name not in ("s3-upload", "s3-download")}
    assert requests == {"s3-get": 2, "s3-put": 2, "s3-post": 0, "s3-head": 1, "s3-delete": 1}
    assert counted["s3-upload"] == 6
    assert counted["s3-download"] > 6
