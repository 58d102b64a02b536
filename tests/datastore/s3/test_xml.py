"""XML from outside."""

from pathlib import Path

import pytest

from core.errors import FormatError
from datastore.s3.xml import (
    MAX_XML_SIZE,
    batches,
    delete_body,
    delete_versions_body,
    parse_buckets,
    parse_copy,
    parse_delete,
    parse_error,
    parse_iso,
    parse_page,
    parse_text,
)

_HEAD = '<?xml version="1.0" encoding="UTF-8"?>'


def listing(inner: str) -> bytes:
    return (
        f'{_HEAD}<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inner}</ListBucketResult>'.encode()
    )


def entry(key: str = "k", size: object = 1, modified: str = "2026-01-02T03:04:05.250Z", more: str = "") -> str:
    return f"<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>{modified}</LastModified>{more}</Contents>"


def test_a_page_tells_of_each_object() -> None:
    more = "<ETag>&quot;abc&quot;</ETag><StorageClass>GLACIER</StorageClass>"
    page = parse_page(listing(entry("a&amp;b&lt;c", 2**31, more=more) + "<IsTruncated>false</IsTruncated>"))
    [found] = page.objects
    assert found == ("a&b<c", 2**31, 1767323045.25, "abc", "GLACIER")
    assert page.token is None


def test_storage_class_etag_and_is_truncated_may_be_missing() -> None:
    page = parse_page(listing(entry()))
    assert page.objects[0].storage_class == page.objects[0].etag == ""
    assert page.token is None


def test_a_truncated_page_has_a_token_or_is_wrong() -> None:
    token = "<NextContinuationToken>a+/=</NextContinuationToken>"
    assert parse_page(listing(f"<IsTruncated>true</IsTruncated>{token}")).token == "a+/="
    assert parse_page(listing(f"<IsTruncated>false</IsTruncated>{token}")).token is None
    for other in ("<IsTruncated>True</IsTruncated>", "<IsTruncated>1</IsTruncated>", ""):
        assert parse_page(listing(f"{other}{token}")).token == "a+/=", "what it lacks must not be taken for removed"
    with pytest.raises(FormatError, match="without a token"):
        parse_page(listing("<IsTruncated>true</IsTruncated>"))


@pytest.mark.parametrize(
    "inner",
    [
        "<Contents><Key>k</Key></Contents>",
        entry(size="many"),
        entry(size=-1),
        entry(modified="yesterday"),
        "<Contents/>",
    ],
)
def test_an_object_without_what_is_needed_is_an_error(inner: str) -> None:
    with pytest.raises(FormatError, match="cannot read an XML answer"):
        parse_page(listing(inner))


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<ListBucketResult>&b;</ListBucketResult>"
)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<",
        b"no xml",
        b"<ListBucketResult>",
        b"<Other/>",
        b"\xff\xfe<\x00",
        BOMB.encode(),
        BOMB.encode("utf-16"),
        BOMB.replace('version="1.0"', 'version="1.0" encoding="utf-16"').encode("utf-16-le"),
        BOMB.replace('version="1.0"', 'version="1.0" encoding="utf-7"').replace("<!", "+ADw-!").encode(),
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><ListBucketResult/>',
        b"<ListBucketResult>&undefined;</ListBucketResult>",
        b"<ListBucketResult>\x00</ListBucketResult>",
    ],
)
def test_what_is_no_plain_xml_is_refused(body: bytes) -> None:
    for parse in (parse_page, parse_buckets, parse_delete, parse_copy):
        with pytest.raises(FormatError):
            parse(body)
    assert parse_error(body) is None


def test_too_long_an_answer_is_not_parsed() -> None:
    with pytest.raises(FormatError, match=f"{MAX_XML_SIZE + 1} bytes"):
        parse_page(b" " * (MAX_XML_SIZE + 1))


def test_nesting_without_end_does_no_harm() -> None:
    deep = b"<ListBucketResult>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</ListBucketResult>"
    assert parse_page(deep).objects == []


def test_an_error_has_code_message_and_details() -> None:
    body = (
        f"{_HEAD}<Error><Code>InvalidObjectState</Code><Message>in\x1b the &lt;tier&gt;\n</Message>"
        "<StorageClass>GLACIER</StorageClass></Error>"
    )
    assert parse_error(body.encode()) is None  # an escape character is no XML
    error = parse_error(body.replace("\x1b", "").encode())
    assert error is not None
    assert (error.code, error.message, error.details) == (
        "InvalidObjectState",
        "in the <tier>",
        {"StorageClass": "GLACIER"},
    )


def test_messages_are_kept_short_and_on_one_line() -> None:
    error = parse_error(f"<Error><Code>X</Code><Message>a\nb{'c' * 9999}</Message></Error>".encode())
    assert error is not None
    assert error.message.startswith("a bc")
    assert len(error.message) == 300


def test_delete_answers_name_what_failed() -> None:
    body = (
        "<DeleteResult><Deleted><Key>a</Key></Deleted>"
        "<Error><Key>b</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"
    )
    assert parse_delete(body.encode()) == [("b", "AccessDenied", "no", "")]
    versioned = body.replace("</Key><Code>", "</Key><VersionId>v 1</VersionId><Code>")
    assert parse_delete(versioned.encode()) == [("b", "AccessDenied", "no", "v 1")]


def test_bodies_that_delete_versions_escape_keys_and_ids() -> None:
    from xml.etree import ElementTree

    versions = [("a&b", "v<1>"), ("f\r\ng", "é+/=")]
    root = ElementTree.fromstring(delete_versions_body(versions))
    space = "{http://s3.amazonaws.com/doc/2006-03-01/}"
    found = [(one.findtext(f"{space}Key"), one.findtext(f"{space}VersionId")) for one in root.iter(f"{space}Object")]
    assert found == versions
    assert root.findtext(f"{space}Quiet") == "true"


def test_delete_bodies_escape_keys() -> None:
    from xml.etree import ElementTree

    keys = ["a&b", "<c>", "d'\"e", "f\r\ng", "é€\U0001d11e"]
    root = ElementTree.fromstring(delete_body(keys))
    space = "{http://s3.amazonaws.com/doc/2006-03-01/}"
    assert [element.text for element in root.iter(f"{space}Key")] == keys
    assert root.findtext(f"{space}Quiet") == "true"


def test_batches_have_at_most_1000_keys() -> None:
    assert [len(batch) for batch in batches(["k"] * 2001)] == [1000, 1000, 1]
    assert list(batches([])) == []


def test_times_without_a_zone_are_utc() -> None:
    assert parse_iso("2026-01-02T03:04:05") == parse_iso("2026-01-02T03:04:05Z") == 1767323045.0


def test_text_of_an_element_deep_inside() -> None:
    body = b"<A xmlns='x'><B><C> text </C></B></A>"
    assert parse_text(body, "A", ["B", "C"]) == "text"
    assert parse_text(body, "A", ["B", "D"]) == parse_text(body, "A", ["D", "C"]) == ""


def test_answers_of_a_real_gateway_are_understood(golden: Path) -> None:
    import json

    kinds = {"ListBucketResult": parse_page, "ListAllMyBucketsResult": parse_buckets, "DeleteResult": parse_delete}
    seen: dict[str, int] = {}
    for operation in json.loads((golden / "s3/requests.json").read_text()):
        for request in operation["requests"]:
            answer = request.get("answer", "")
            for name, parse in kinds.items():
                if f"<{name}" in answer and answer.endswith(f"</{name}>"):
                    parse(answer.encode())
                    seen[name] = seen.get(name, 0) + 1
    assert seen.keys() == kinds.keys()


def test_words_of_a_server_steer_no_terminal_and_fill_no_log() -> None:
    """Whoever sees an error sees text: no C1 control of a terminal, no second line in a log."""
    evil = "a\u009b31m&#10;b\u202e" + "x" * 500
    error = parse_error(f"<Error><Code>{evil}</Code><Region>{evil}</Region><Message>{evil}</Message></Error>".encode())
    assert error is not None
    for text in (error.code, error.details["Region"], error.message):
        assert text.isprintable()
        assert len(text) <= 300
    [failure] = parse_delete(
        f"<DeleteResult><Error><Key>k</Key><Code>{evil}</Code><Message>{evil}</Message></Error></DeleteResult>".encode()
    )
    assert failure.code.isprintable()
    assert failure.message.isprintable()
    assert len(failure.code) <= 64
    [bucket] = parse_buckets(
        f"<ListAllMyBucketsResult><Buckets><Bucket><Name>{evil}</Name></Bucket></Buckets></ListAllMyBucketsResult>".encode()
    )
    assert bucket.name.isprintable()


@pytest.mark.parametrize("when", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59"])
def test_a_time_at_the_end_of_all_times_is_an_error_or_a_time(when: str) -> None:
    body = (
        "<ListBucketResult><Contents><Key>k</Key><Size>1</Size>"
        f"<LastModified>{when}</LastModified><ETag>e</ETag></Contents></ListBucketResult>"
    )
    try:
        page = parse_page(body.encode())
    except FormatError:
        return
    assert isinstance(page.objects[0].last_modified, float)
