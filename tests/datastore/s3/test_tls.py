"""Certificates: the system's authorities, or the pinned leaf (R4)."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
import trio

from core import dial
from core.errors import UsageError
from datastore.s3.client import S3Client
from datastore.s3.endpoint import ContentMd5
from datastore.s3.errors import S3BackendError, S3CertificateError, S3UnavailableError
from datastore.s3.link import RetryPolicy
from tests.datastore.s3.conftest import IMPATIENT
from tests.support.certificates import Certificate, make_certificate
from tests.support.s3_emulator import S3Emulator
from tests.support.s3_service import BUCKET

OTHER = ":".join(["00"] * 32)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls") / "server.pem")


@pytest.fixture
def server(certificate: Certificate) -> Iterator[S3Emulator]:
    with S3Emulator(tls=certificate.context()) as emulator:
        yield emulator


@pytest.fixture
def trusted(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's authorities vouch for the certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.path))


async def works(emulator: S3Emulator, **changes: object) -> None:
    async with S3Client.open(emulator.endpoint(**changes), BUCKET, policy=IMPATIENT) as client:
        body = b"x" * 1_000_000
        await client.put("st1/a", [body[:12], memoryview(body)[12:]])
        fetched = await client.get("st1/a")
        assert fetched is not None
        assert fetched.data == body


@pytest.mark.usefixtures("trusted")
async def test_a_valid_chain_is_enough(server: S3Emulator) -> None:
    await works(server)


@pytest.mark.usefixtures("trusted")
async def test_a_valid_chain_is_accepted_whatever_the_fingerprint(server: S3Emulator) -> None:
    await works(server, fingerprint=OTHER)


@pytest.mark.usefixtures("trusted")
async def test_with_fingerprint_only_a_mismatch_is_fatal_in_spite_of_a_valid_chain(
    server: S3Emulator, certificate: Certificate
) -> None:
    with pytest.raises(S3CertificateError, match=f"fingerprint is {certificate.fingerprint}, not the configured one"):
        await works(server, fingerprint=OTHER, fingerprint_only=True)
    assert server.requests() == []
    await works(server, fingerprint=certificate.fingerprint, fingerprint_only=True)


async def test_the_pinned_leaf_is_accepted_without_a_chain(server: S3Emulator, certificate: Certificate) -> None:
    await works(server, fingerprint=certificate.fingerprint.upper())


async def test_another_leaf_gets_no_byte_of_a_request(server: S3Emulator) -> None:
    with pytest.raises(S3CertificateError, match="not the configured one; 'fleece s3 endpoint check'"):
        await works(server, fingerprint=OTHER)
    assert server.requests() == []


async def test_without_fingerprint_an_unknown_certificate_is_fatal_without_retries(server: S3Emulator) -> None:
    async with S3Client.open(server.endpoint(), BUCKET) as client:
        with pytest.raises(S3CertificateError, match=r"self.signed certificate") as raised:
            await client.get("st1/a")
        assert isinstance(raised.value, S3BackendError)
        assert client.link.counters.totals().requests == {}
    assert server.requests() == []


@pytest.mark.usefixtures("trusted")
async def test_a_certificate_for_another_name_is_not_accepted(server: S3Emulator) -> None:
    with pytest.raises(S3CertificateError, match="Hostname mismatch"):
        await works(server, endpoint="localhost")


async def test_a_server_without_tls_is_waited_for_like_one_that_is_away(
    s3_emulator: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "CONNECT_TIMEOUT_S", 0.2)
    policy = RetryPolicy(patience_s=0.2, base_s=0.01, cap_s=0.02)
    async with S3Client.open(s3_emulator.endpoint(allow_http=False), BUCKET, policy=policy) as client:
        with pytest.raises(S3UnavailableError, match="no connection within"):
            await client.get("st1/a")


async def test_faults_over_tls_are_survived(server: S3Emulator, certificate: Certificate) -> None:
    server.plan("PUT", "lost")
    server.plan("GET", "cut", times=2)
    await works(server, fingerprint=certificate.fingerprint)


def test_fingerprint_only_without_fingerprint_makes_no_sense(server: S3Emulator) -> None:
    with pytest.raises(UsageError, match="needs a fingerprint"):
        server.endpoint(fingerprint_only=True)


@pytest.mark.parametrize("tls", [True, False])
async def test_through_a_proxy_certificates_are_compared_as_ever(
    certificate: Certificate, s3_emulator: S3Emulator, tls: bool
) -> None:
    asked: list[bytes] = []

    async def proxy(stream: trio.SocketStream) -> None:
        head = await stream.receive_some()
        asked.append(head.split(b" ")[1])
        target = await trio.open_tcp_stream("127.0.0.1", int(asked[-1].rpartition(b":")[2]))
        await stream.send_all(b"HTTP/1.1 200 Connection established\r\n\r\n")

        async def copy(one: trio.SocketStream, other: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while data := await one.receive_some():
                    await other.send_all(data)

        async with target, trio.open_nursery() as nursery:
            nursery.start_soon(copy, target, stream)
            await copy(stream, target)
            nursery.cancel_scope.cancel()

    with S3Emulator(tls=certificate.context()) as server:
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, proxy, listeners)
            place = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
            if tls:
                await works(server, proxy=place, fingerprint=certificate.fingerprint)
                with pytest.raises(S3CertificateError):
                    await works(server, proxy=place, fingerprint=OTHER)
                assert set(asked) == {b"127.0.0.1:%d" % server.port}
            else:
                await works(s3_emulator, proxy=place)
                assert set(asked) == {b"127.0.0.1:%d" % s3_emulator.port}
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("tls", "setting", "put", "batch"),
    [
        (True, ContentMd5.AUTO, False, True),  # the connection protects the body, and the signature its SHA-256
        (False, ContentMd5.AUTO, True, True),
        (True, ContentMd5.ALWAYS, True, True),
        (False, ContentMd5.NEVER, False, True),  # S3 does not take a batch of deletes without
    ],
)
async def test_which_requests_have_an_md5(
    certificate: Certificate, s3_emulator: S3Emulator, tls: bool, setting: ContentMd5, put: bool, batch: bool
) -> None:
    """R10."""
    with S3Emulator(tls=certificate.context()) as server:
        emulator = server if tls else s3_emulator
        changes = {"content_md5": setting, "fingerprint": certificate.fingerprint if tls else None}
        async with S3Client.open(emulator.endpoint(**changes), BUCKET, policy=IMPATIENT) as client:
            await client.put("st1/a", [b"fleece"])
            await client.copy("st1/a", "st1/b")
            await client.delete_many(["st1/a"])
        sent = [(one.operation, one.header("content-md5") is not None) for one in emulator.requests()]
        assert sent == [("PUT", put), ("COPY", False), ("POST", batch)]
