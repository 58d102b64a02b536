"""The requests that a real PBS sent, sent again by Fleece: the same lines and headers, but where it must differ."""

import json
from pathlib import Path
from typing import Any

import pytest

from datastore.s3.client import S3Client
from datastore.s3.endpoint import ContentMd5
from tests.datastore.s3.conftest import IMPATIENT
from tests.support.s3_emulator import Logged, S3Emulator

#: The only bucket of the transcripts that objects were written to.
GOLDEN_BUCKET = "s3xbucket"
#: What depends on keys, host and time.
VOLATILE = ("host", "x-amz-date", "authorization")


@pytest.fixture(scope="module")
def recorded(golden: Path) -> list[dict[str, Any]]:
    """All requests of PBS, whatever was answered."""
    return [
        request
        for operation in json.loads((golden / "s3/requests.json").read_text())
        for request in operation["requests"]
        if "request" in request
    ]


def kind(request: dict[str, Any]) -> str:
    method, target = request["request"].split(" ", 1)
    if "x-amz-copy-source" in request["headers"]:
        return "COPY"
    if "list-type" in target:
        return "LIST"
    return str(method)


async def send(client: S3Client, request: dict[str, Any], body: bytes) -> None:
    """What Fleece does where PBS sent `request`."""
    from urllib.parse import parse_qs, unquote

    target = request["request"].split(" ", 1)[1]
    path, _, query = target.partition("?")
    key = unquote(path).removeprefix(f"/{GOLDEN_BUCKET}/")
    match kind(request):
        case "PUT":
            await client.put(key, [body], if_absent="if-none-match" in request["headers"])
        case "COPY":
            source = unquote(request["headers"]["x-amz-copy-source"]).removeprefix(f"{GOLDEN_BUCKET}/")
            await client.copy(source, key)
        case "LIST":
            fields = parse_qs(query, strict_parsing=True)
            await client.page(fields["prefix"][0], fields.get("continuation-token", [None])[0])
        case "GET" if path == "/":
            await client.list_buckets()
        case "GET":
            await client.get(key)
        case "HEAD":
            await client.head_bucket()
        case "DELETE":
            await client.delete(key)
        case "POST":
            from xml.etree import ElementTree

            root = ElementTree.fromstring(request["body"])
            await client.delete_many([element.text or "" for element in root.iter() if element.tag.endswith("Key")])
        case other:
            raise AssertionError(other)


def expected(request: dict[str, Any], sent: Logged) -> dict[str, str]:
    """PBS's headers, with those changed in which Fleece differs on purpose."""
    headers = {name: value for name, value in request["headers"].items() if name not in VOLATILE}
    if "content-type" in headers or kind(request) == "COPY":
        headers["content-type"] = "application/octet-stream"  # what PBS sends since client 1.3
    if kind(request) == "POST":  # with <Quiet>
        for name in ("content-length", "content-md5", "x-amz-content-sha256"):
            headers[name] = dict(sent.headers)[name]
    return headers


async def test_fleece_sends_what_pbs_sent(recorded: list[dict[str, Any]]) -> None:
    with S3Emulator(buckets=(GOLDEN_BUCKET,)) as emulator:
        endpoint = emulator.endpoint(content_md5=ContentMd5.ALWAYS)
        async with S3Client.open(endpoint, GOLDEN_BUCKET, policy=IMPATIENT) as client:
            seen: dict[str, int] = {}
            for request in recorded:
                if not request["request"].split(" ", 1)[1].startswith(("/ ", f"/{GOLDEN_BUCKET}")):
                    continue
                body: str = request.get("body", "")
                whole = len(body.encode()) == request["body_length"]
                if kind(request) == "POST" and not whole:
                    continue
                # Where the recorder kept no body, one of the same length: only what follows from it differs.
                data = body.encode() if whole else bytes(request["body_length"])
                before = len(emulator.requests())
                await send(client, request, data)
                sent = emulator.requests()[before]
                assert sent.request == request["request"]
                headers = expected(request, sent)
                if not whole:
                    for name in ("x-amz-content-sha256", "content-md5"):
                        if name in headers:
                            headers[name] = dict(sent.headers)[name]
                ours = {name: value for name, value in sent.headers if name not in VOLATILE}
                assert ours == headers, request["request"]
                signed = request["headers"]["authorization"].partition("SignedHeaders=")[2].split(",")[0].split(";")
                ours_signed = (sent.header("authorization") or "").partition("SignedHeaders=")[2].split(",")[0]
                extra = {"content-type"} if kind(request) == "COPY" else set()
                assert set(ours_signed.split(";")) == set(signed) | extra
                seen[kind(request)] = seen.get(kind(request), 0) + 1
        assert seen.keys() == {"PUT", "COPY", "LIST", "GET", "HEAD", "DELETE", "POST"}
        assert sum(seen.values()) > 200
