"""Webhooks: what is sent, to whom, and what becomes of the secret."""

import json
from pathlib import Path

import pytest

from agent.monitoring import delivery
from agent.monitoring.delivery import deliver
from agent.monitoring.errors import DeliveryError
from agent.monitoring.webhook import send_webhook
from core.errors import FleeceError
from tests.support.certificates import make_certificate
from tests.support.peers import DROP, HANG, WebPeer, answer, listening, taken_port

from .conftest import HOSTILE, a_message, webhook


async def test_the_document_is_sent_as_json() -> None:
    peer = WebPeer()
    async with listening(peer):
        await send_webhook(webhook(f'url = "http://127.0.0.1:{peer.port}/a/b?c=d"'), a_message(host="h"), 60)
    head = peer.requests[0].partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert head[0] == "POST /a/b?c=d HTTP/1.1"
    assert f"Host: 127.0.0.1:{peer.port}" in head
    assert "Content-Type: application/json" in head
    found = json.loads(peer.bodies[0])
    assert (found["kind"], found["job"], found["host"], found["state"]) == ("failure", "night", "h", "failed")
    assert found["result"]["guests"][1]["guest"] == HOSTILE


async def test_a_template_a_method_and_headers_are_used() -> None:
    peer = WebPeer()
    async with listening(peer):
        text = (
            f'url = "http://127.0.0.1:{peer.port}"\nmethod = "PUT"\ncontent-type = "text/plain"\nbody = "$job: $kind"\n'
            'headers = { Title = "Backup", Priority = "high" }'
        )
        await send_webhook(webhook(text), a_message(), 60)
    assert peer.requests[0].startswith(b"PUT / HTTP/1.1\r\n")
    assert b"\r\nTitle: Backup\r\n" in peer.requests[0]
    assert peer.bodies == [b"night: failure"]


async def test_the_secret_is_in_the_request_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("T0/B1/xyz zy\nmore\n")
    peer = WebPeer([answer(403, b"T0/B1/xyz zy is wrong")])
    async with listening(peer):
        section = webhook(
            f'url = "http://127.0.0.1:{peer.port}/hook/$secret"\nsecret-file = "{tmp_path}/secret"\n'
            'headers = { Authorization = "Bearer $secret" }'
        )
        with pytest.raises(DeliveryError, match=r"/hook/\$secret: the server answers 403") as raised:
            await send_webhook(section, a_message(), 60)
    assert b"POST /hook/T0/B1/xyz%20zy HTTP/1.1" in peer.requests[0]
    assert b"\r\nAuthorization: Bearer T0/B1/xyz zy\r\n" in peer.requests[0]
    assert "xyz" not in repr(raised.value)
    assert not raised.value.temporary
    for wrong in (b"", b"\n", b"a\x00b", "ü".encode(), b"x" * 5000):
        (tmp_path / "secret").write_bytes(wrong)
        with pytest.raises(FleeceError) as refused:
            await send_webhook(section, a_message(), 60)
        assert "xxx" not in str(refused.value)


async def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hidden\n")
    other = WebPeer()
    async with listening(other):
        peer = WebPeer([answer(307, b"", f"location: http://127.0.0.1:{other.port}/")])
        async with listening(peer):
            section = webhook(
                f'url = "http://127.0.0.1:{peer.port}/"\nsecret-file = "{tmp_path}/secret"\n'
                'headers = { X = "$secret" }'
            )
            with pytest.raises(DeliveryError, match="307, a redirect, and none is followed") as raised:
                await send_webhook(section, a_message(), 60)
    assert not raised.value.temporary
    assert other.requests == []


@pytest.mark.parametrize(
    ("reply", "words", "temporary"),
    [
        (answer(500), "500", True),
        (answer(429), "429", True),
        (answer(404), "404", False),
        (DROP, "without an answer", True),
        (b"SSH-2.0-x\r\n\r\n", "illegal", False),
        (b"HTTP/1.1 503 busy\r\ncontent-length: 99999999\r\n\r\n", "503", True),
    ],
)
async def test_what_servers_answer_is_an_error_that_tells_whether_it_may_pass(
    reply: bytes, words: str, temporary: bool
) -> None:
    peer = WebPeer([reply])
    async with listening(peer):
        with pytest.raises(DeliveryError, match=words) as raised:
            await send_webhook(webhook(f'url = "http://127.0.0.1:{peer.port}/"'), a_message(), 60)
    assert raised.value.temporary == temporary


@pytest.mark.parametrize("rest", [b"content-length: 99999999\r\n\r\n", b"content-length: 9\r\n\r\nhalf", b"\r\n"])
async def test_what_was_taken_is_not_sent_again_because_of_what_else_the_server_says(rest: bytes) -> None:
    peer = WebPeer([b"HTTP/1.1 200 ok\r\n" + rest])
    async with listening(peer):
        await send_webhook(webhook(f'url = "http://127.0.0.1:{peer.port}/"'), a_message(), 2)
    assert len(peer.requests) == 1


async def test_a_server_that_hangs_and_one_that_is_gone(tmp_path: Path) -> None:
    peer = WebPeer([HANG])
    async with listening(peer):
        section = webhook(f'url = "http://127.0.0.1:{peer.port}/"')
        with pytest.raises(DeliveryError, match="no answer in 1 s") as raised:
            await send_webhook(section, a_message(), 1)
        assert raised.value.temporary
    with taken_port() as port, pytest.raises(DeliveryError) as gone:
        await send_webhook(webhook(f'url = "http://127.0.0.1:{port}/"'), a_message(), 60)
    assert gone.value.temporary


async def test_a_certificate_is_known_by_its_fingerprint_or_not_accepted(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path / "server.pem")
    peer = WebPeer()
    async with listening(peer, certificate.context()):
        url = f'url = "https://127.0.0.1:{peer.port}/"'
        with pytest.raises(DeliveryError) as raised:
            await send_webhook(webhook(url), a_message(), 60)
        assert not raised.value.temporary
        assert peer.requests == []
        await send_webhook(webhook(f'{url}\nfingerprint = "{certificate.fingerprint}"'), a_message(), 60)
    assert len(peer.requests) == 1


async def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PAUSES_S", (0.0, 0.0))
    said: list[str] = []
    peer = WebPeer([answer(503), DROP, answer(200)])
    async with listening(peer):
        section = webhook(f'url = "http://127.0.0.1:{peer.port}/"')
        await deliver(section, a_message(), said.append)
        assert len(peer.requests) == 3
        assert [line.endswith("tried again in 0 s") for line in said] == [True, True]
        peer.answers = [answer(503)]
        with pytest.raises(DeliveryError, match="503"):
            await deliver(section, a_message(), said.append)
        assert len(peer.requests) == 6
        with pytest.raises(DeliveryError, match="503"):
            await deliver(section, a_message(), said.append, hurried=True)
        assert len(peer.requests) == 7
        peer.answers = [answer(404)]
        with pytest.raises(DeliveryError, match="404"):
            await deliver(section, a_message(), said.append)
        assert len(peer.requests) == 8


async def test_a_template_that_gives_no_json_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("{$job}")
    peer = WebPeer()
    async with listening(peer):
        section = webhook(f'url = "http://127.0.0.1:{peer.port}/"\ntemplate = "{tmp_path}/t"')
        with pytest.raises(FleeceError, match="it gives no JSON"):
            await send_webhook(section, a_message(), 60)
    assert peer.requests == []
