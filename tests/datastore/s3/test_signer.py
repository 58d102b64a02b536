"""Signatures, against vectors that botocore agreed with."""

import base64
import hashlib

import pytest

from datastore.s3.signer import EMPTY_SHA256, Signer, encode_path, encode_query, format_date, signing_key
from datastore.s3.xml import delete_body

ACCESS, SECRET, REGION = "AKIAFLEECEEXAMPLE", "fleece/secret+KEY", "eu-central-1"
HOST = "pbs-s3-bucket.s3.eu-central-1.amazonaws.com"
DATE = "20260102T030405Z"
ZERO = "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8"
CHUNK_KEY = f"my-s3-store/.chunks/bb9f/{ZERO}"
_DELETE = (
    '<Delete xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Object><Key>' + CHUNK_KEY + "</Key></Object></Delete>"
).encode()

VECTORS = [
    pytest.param(
        "PUT",
        f"/{CHUNK_KEY}",
        [],
        b"fleece",
        [("if-none-match", "*"), ("content-type", "application/octet-stream")],
        "content-length;content-md5;content-type;host;if-none-match;x-amz-content-sha256;x-amz-date",
        "484ee20d955aa833e0bd03c6741bb2870ea7b7cba6914b95876d810abc0482b2",
        "b9b31e86ce0c6e6b17f66661d135e29a353a04869a595e6520ca452522337ccd",
        id="put",
    ),
    pytest.param(
        "GET",
        "/my-s3-store/.cnt/ns/a/vm/100/2025-07-14T14:20:02Z/drive-scsi0.img.fidx",
        [],
        None,
        [],
        "host;x-amz-content-sha256;x-amz-date",
        "a05102314882b8b533e9cc2251a7c8a07b49b93c487dfdf5df4ea7ec671e0eaf",
        "ca14eb9a209067ea480ef4c220941a5f195d1af18735fa807429bd9234d03986",
        id="get",
    ),
    pytest.param(
        "GET",
        "/",
        [("list-type", "2"), ("prefix", "my-s3-store/.chunks/"), ("continuation-token", "a+b/c==")],
        None,
        [],
        "host;x-amz-content-sha256;x-amz-date",
        "a093e1144145d428deace629e94fe43f6df5ca3f43007120996064d1b5cf8185",
        "085e017105a853a6675ba1548fce5294c6d268f56d9d9f04812299f1d8a42b9c",
        id="list",
    ),
    pytest.param(
        "POST",
        "/",
        [("delete", None)],
        _DELETE,
        [],
        "content-length;content-md5;host;x-amz-content-sha256;x-amz-date",
        "e9f4eabbe18cd0d17785473c7beab5bb21ebecdc57bb5ba3d5745902d3d2bd9c",
        "a290f308d8ae21ccb4f97fdaef98fd0e8129f143a61383c77c645e72f29d9155",
        id="delete",
    ),
]


@pytest.mark.parametrize(("method", "path", "query", "body", "more", "names", "canonical", "signature"), VECTORS)
def test_published_requests_get_their_signatures(
    method: str,
    path: str,
    query: list[tuple[str, str | None]],
    body: bytes | None,
    more: list[tuple[str, str]],
    names: str,
    canonical: str,
    signature: str,
) -> None:
    sha256 = hashlib.sha256(body or b"").hexdigest()
    headers = [("host", HOST), ("x-amz-date", DATE), ("x-amz-content-sha256", sha256), *more]
    if body is not None:
        md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
        headers += [("content-length", str(len(body))), ("content-md5", md5)]
    signer = Signer(ACCESS, SECRET, REGION)
    text, signed = signer.canonical_request(method, encode_path(path), query, headers, sha256)
    assert signed == names
    assert hashlib.sha256(text.encode()).hexdigest() == canonical
    scope = f"20260102/{REGION}/s3/aws4_request"
    assert signer.authorization(method, encode_path(path), query, headers, sha256, DATE) == (
        f"AWS4-HMAC-SHA256 Credential={ACCESS}/{scope},SignedHeaders={names},Signature={signature}"
    )


def test_signing_key_is_that_of_the_day() -> None:
    expected = "01898d0709f49f22f6a8b9ddc28974ce2f43e070cf440ed914fcc6d9a2ae6829"
    assert signing_key(SECRET, "20260102", REGION).hex() == expected
    signer = Signer(ACCESS, SECRET, REGION)

    def sign(date: str) -> str:
        return signer.authorization("GET", "/", (), [("host", HOST)], EMPTY_SHA256, date)

    first, second = sign("20260102T235959Z"), sign("20260103T000000Z")
    assert "/20260102/" in first
    assert "/20260103/" in second
    assert sign("20260102T235959Z") == first


def test_body_that_deletes_is_the_published_one_but_for_quiet() -> None:
    quiet = b"<Quiet>true</Quiet>"
    assert delete_body([CHUNK_KEY]).replace(quiet, b"") == _DELETE


def test_paths_are_encoded_once_and_byte_by_byte() -> None:
    assert encode_path("/a b/c:d%2Fe+f~é€\U0001d11e") == "/a%20b/c%3Ad%252Fe%2Bf~%C3%A9%E2%82%AC%F0%9D%84%9E"


def test_a_parameter_without_value_goes_without_equals_sign() -> None:
    assert encode_query([("delete", None), ("prefix", "a/b=c&d")]) == "delete&prefix=a%2Fb%3Dc%26d"


def test_dates_are_utc() -> None:
    assert format_date(1767323045.9) == DATE
