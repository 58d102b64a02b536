from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pxar.format as f
from pxar.errors import ArchiveError, EncodeError
from pxar.metadata import (
    NO_PERMISSIONS,
    Acl,
    DefaultAcl,
    Metadata,
    Stat,
    encode_metadata,
    metadata_end,
    parse_metadata,
    parse_stat,
)
from tests.pxar.strategies import metadata as any_metadata

PLAIN = Metadata(Stat(0o100644))


def wrapped(kind: int, content: bytes) -> bytes:
    return f.HEADER.pack(kind, 16 + len(content)) + content


@settings(deadline=None)
@given(any_metadata(0o100000))
def test_metadata_come_back(metadata: Metadata) -> None:
    data = encode_metadata(metadata)
    assert Metadata.parse(data) == metadata
    assert parse_stat(data) == metadata.stat
    following = wrapped(f.PAYLOAD, b"content")
    assert parse_metadata(b"12345" + data + following, 5) == (metadata, 5 + len(data))
    assert metadata_end(data + following, 0) == metadata_end(data, 0) == len(data)


@settings(deadline=None)
@given(any_metadata(0o040000), st.data())
def test_metadata_that_are_not_all_there_ask_for_more(metadata: Metadata, data: st.DataObject) -> None:
    encoded = encode_metadata(metadata) + f.HEADER.pack(f.GOODBYE, 40)
    length = data.draw(st.integers(0, len(encoded) - 17))
    try:
        end = metadata_end(encoded[:length], 0)
    except f.Short as short:
        needed = short.needed
    else:
        assert end == length  # a whole number of attributes: nothing says that one is missing
        return
    assert length < needed <= len(encoded)
    with pytest.raises(ArchiveError, match="cut off"):
        parse_metadata(encoded[:length])


def test_times_before_1970_and_of_either_form() -> None:
    data = encode_metadata(Metadata(Stat(0o100600, 0x420000, 1000, 1001, -2, 500_000_000)))
    assert parse_stat(data) == Stat(0o100600, 0x420000, 1000, 1001, -2, 500_000_000)
    old = wrapped(f.ENTRY_V1, f.ENTRY_V1_CONTENT.pack(0o100600, 3, 4, 5, 1_700_000_000_123_456_789))
    assert Metadata.parse(old).stat == Stat(0o100600, 3, 4, 5, 1_700_000_000, 123_456_789)


def test_items_come_in_the_order_of_the_format() -> None:
    metadata = Metadata(
        Stat(0o040755),
        ((b"user.a", b"1"), (b"user.b", b"")),
        Acl(((2, 6), (3, 4)), ((50, 5),), 4, DefaultAcl(7, 5, 0, NO_PERMISSIONS), ((1002, 7),), ((50, 1),)),
        bytes(20),
        7,
    )
    data = encode_metadata(metadata)
    kinds, at = [], 0
    while at < len(data):
        kind, size = f.HEADER.unpack_from(data, at)
        kinds.append(f.item_name(kind))
        at += size
    assert kinds == [
        "ENTRY", "XATTR", "XATTR", "ACL_USER", "ACL_USER", "ACL_GROUP", "ACL_GROUP_OBJ", "ACL_DEFAULT",
        "ACL_DEFAULT_USER", "ACL_DEFAULT_GROUP", "FCAPS", "QUOTA_PROJID",
    ]  # fmt: skip


def test_attributes_are_read_in_any_order() -> None:
    data = encode_metadata(PLAIN)
    data += wrapped(f.QUOTA_PROJID, (9).to_bytes(8, "little")) + wrapped(f.FCAPS, b"c") + wrapped(f.XATTR, b"user.x\0v")
    assert Metadata.parse(data) == Metadata(PLAIN.stat, ((b"user.x", b"v"),), fcaps=b"c", projid=9)


FIXED = [
    (f.ACL_USER, 16), (f.ACL_GROUP, 16), (f.ACL_GROUP_OBJ, 8), (f.ACL_DEFAULT, 32),
    (f.ACL_DEFAULT_USER, 16), (f.ACL_DEFAULT_GROUP, 16), (f.QUOTA_PROJID, 8),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "size"), FIXED)
@pytest.mark.parametrize("read", [parse_metadata, metadata_end])
def test_attributes_of_one_size_have_no_other(kind: int, size: int, read: Callable[[bytes, int], object]) -> None:
    entry = encode_metadata(PLAIN)
    read(entry + wrapped(kind, bytes(size)), 0)
    for wrong in (0, size - 1, size + 1, 2 * size):
        with pytest.raises(ArchiveError, match=rf"at byte 56: {f.item_name(kind)} of {16 + wrong} bytes"):
            read(entry + wrapped(kind, bytes(wrong)), 0)


@pytest.mark.parametrize(
    ("kind", "size"), [(f.ACL_GROUP_OBJ, 8), (f.ACL_DEFAULT, 32), (f.FCAPS, 9), (f.QUOTA_PROJID, 8)]
)
@pytest.mark.parametrize("read", [parse_metadata, metadata_end])
def test_some_attributes_are_there_once(kind: int, size: int, read: Callable[[bytes, int], object]) -> None:
    with pytest.raises(ArchiveError, match=f"a second {f.item_name(kind)}"):
        read(encode_metadata(PLAIN) + 2 * wrapped(kind, bytes(size)), 0)


@pytest.mark.parametrize("kind", [f.XATTR, f.FCAPS])
@pytest.mark.parametrize("read", [parse_metadata, metadata_end])
def test_long_attributes_have_a_limit(kind: int, read: Callable[[bytes, int], object]) -> None:
    entry = encode_metadata(PLAIN)
    read(entry + wrapped(kind, bytes(65791)), 0)
    with pytest.raises(ArchiveError, match="65808 bytes, the limit is 65807"):
        read(entry + wrapped(kind, bytes(65792)), 0)
    with pytest.raises(ArchiveError, match="of 15 bytes"):
        read(entry + f.HEADER.pack(kind, 15), 0)


@pytest.mark.parametrize("read", [parse_metadata, metadata_end])
def test_what_else_is_no_metadata(read: Callable[[bytes, int], object]) -> None:
    entry = encode_metadata(PLAIN)
    with pytest.raises(ArchiveError, match="XATTR without the NUL"):
        read(entry + wrapped(f.XATTR, b"user.a"), 0)
    with pytest.raises(ArchiveError, match="SYMLINK where an ENTRY must be"):
        read(wrapped(f.SYMLINK, bytes(40)), 0)
    for size in (0, 39, 41):
        with pytest.raises(ArchiveError, match=f"ENTRY of {16 + size} bytes, it has 56"):
            read(wrapped(f.ENTRY, bytes(size)), 0)
    with pytest.raises(ArchiveError, match="ENTRY_V1 of 56 bytes, it has 48"):
        read(wrapped(f.ENTRY_V1, bytes(40)), 0)


def test_a_billion_nanoseconds_are_no_part_of_a_second() -> None:
    data = wrapped(f.ENTRY, f.ENTRY_CONTENT.pack(0o100644, 0, 0, 0, 0, 10**9, 0))
    with pytest.raises(ArchiveError, match="1000000000 nanoseconds"):
        Metadata.parse(data)


def test_the_metadata_of_one_entry_have_a_limit() -> None:
    many = wrapped(f.XATTR, b"user.a\0" + bytes(65000))
    with pytest.raises(ArchiveError, match="more than 67108864 bytes"):
        metadata_end(encode_metadata(PLAIN) + many * 1040, 0)


def test_something_behind_the_metadata_is_noticed() -> None:
    with pytest.raises(ArchiveError, match="at byte 56: something else follows"):
        Metadata.parse(encode_metadata(PLAIN) + f.HEADER.pack(f.GOODBYE, 40))


@pytest.mark.parametrize(
    "metadata",
    [
        Metadata(Stat(-1)),
        Metadata(Stat(0, uid=1 << 32)),
        Metadata(Stat(0, mtime_ns=10**9)),
        Metadata(Stat(0), projid=1 << 64),
        Metadata(Stat(0), ((b"user.\0", b""),)),
        Metadata(Stat(0), ((b"user.a", bytes(65785)),)),
        Metadata(Stat(0), fcaps=bytes(65792)),
        Metadata(Stat(0), ((b"user.a", bytes(65000)),) * 1040),
    ],
)
def test_what_does_not_fit_is_not_encoded(metadata: Metadata) -> None:
    with pytest.raises(EncodeError):
        encode_metadata(metadata)
