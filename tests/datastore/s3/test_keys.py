"""Object keys, out and back in."""

from pathlib import Path

import pytest

from core.errors import UsageError
from datastore.names import Namespace
from datastore.s3.keys import ChunkKey, MetaKey, MetaKind, StoreKeys, check_key

DIGEST = bytes.fromhex("bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8")
KEYS = StoreKeys("st1")
TIME = "2025-07-14T14:20:02Z"


def test_keys_are_those_of_pbs() -> None:
    assert KEYS.chunk(DIGEST) == f"st1/.chunks/bb9f/{DIGEST.hex()}"
    assert KEYS.bad_chunk(DIGEST, 3) == f"st1/.chunks/bb9f/{DIGEST.hex()}.3.bad"
    assert KEYS.meta(f"ns/a/vm/100/{TIME}/drive-scsi0.img.fidx") == (
        f"st1/.cnt/ns/a/vm/100/{TIME}/drive-scsi0.img.fidx"
    )
    assert KEYS.namespace_marker(Namespace.parse("a/b")) == "st1/.cnt/ns/a/ns/b/.namespace"
    assert KEYS.in_use == "st1/.in-use"


def test_every_prefix_ends_in_a_slash() -> None:
    prefixes = [KEYS.everything, KEYS.chunks, KEYS.metadata, KEYS.meta_prefix("vm/10")]
    assert prefixes == ["st1/", "st1/.chunks/", "st1/.cnt/", "st1/.cnt/vm/10/"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (KEYS.chunk(DIGEST), ChunkKey(DIGEST)),
        (KEYS.bad_chunk(DIGEST, 9), ChunkKey(DIGEST, 9)),
        ("st1/.cnt/vm/1/owner", MetaKey(MetaKind.GROUP, "vm/1/owner")),
        ("st1/.cnt/ns/a/ns/b/ct/1/notes", MetaKey(MetaKind.GROUP, "ns/a/ns/b/ct/1/notes")),
        ("st1/.cnt/ns/a/.namespace", MetaKey(MetaKind.NAMESPACE, "ns/a/.namespace")),
        (f"st1/.cnt/host/h/{TIME}/.protected", MetaKey(MetaKind.SNAPSHOT, f"host/h/{TIME}/.protected")),
        (f"st1/.cnt/ns/ns/host/h/{TIME}/a.didx", MetaKey(MetaKind.SNAPSHOT, f"ns/ns/host/h/{TIME}/a.didx")),
    ],
)
def test_keys_of_each_shape_are_understood(key: str, expected: object) -> None:
    assert KEYS.parse(key) == expected


@pytest.mark.parametrize(
    "key",
    [
        "",
        "st1",
        "st1/",
        "st10/.cnt/vm/1/owner",
        "/st1/.cnt/vm/1/owner",
        "st1/../s1/.cnt/vm/1/owner",
        "st1/.cnt/vm/../owner",
        "st1/.cnt/vm//owner",
        "st1/.cnt//vm/1/owner",
        "st1/.cnt/vm/1/./owner",
        "st1/.cnt/vm/1/owner/",
        "st1/.cnt/vm/1/owner\n",
        "st1/.cnt/vm/1/owner\0",
        "st1/.cnt/vm/-1/owner",
        "st1/.cnt/pc/1/owner",
        "st1/.cnt/vm/1/password",
        "st1/.cnt/ns/../vm/1/owner",
        "st1/.cnt/ns/vm/1/owner",
        "st1/.cnt/.namespace",
        "st1/.cnt/" + "ns/a/" * 8 + ".namespace",
        "st1/.cnt/vm/1/2025-07-14T14:20:02/a.blob",
        f"st1/.cnt/vm/1/{TIME}/.blob",
        f"st1/.cnt/vm/1/{TIME}/..blob",
        f"st1/.cnt/vm/1/{TIME}/a.tmp_fidx",
        f"st1/.cnt/vm/1/{TIME}/a/b.blob",
        "st1/.cnt/vm/1/2025-13-14T14:20:02Z/a.blob",
        f"st1/.chunks/bb9e/{DIGEST.hex()}",
        f"st1/.chunks/BB9F/{DIGEST.hex().upper()}",
        f"st1/.chunks/bb9f/{DIGEST.hex()}.10.bad",
        f"st1/.chunks/bb9f/{DIGEST.hex()}.bad",
        f"st1/.chunks/bb9f/{DIGEST.hex()}\n",
        f"st1/.chunks/{DIGEST.hex()}",
        "st1/.fleece/live-1",
        "st1/.in-use",
    ],
)
def test_a_listed_key_of_another_shape_is_foreign(key: str) -> None:
    assert KEYS.parse(key) is None


def test_every_key_that_pbs_wrote_is_understood_and_made_again(golden: Path) -> None:
    keys = StoreKeys("golds3")
    listed = [line.rpartition(" ")[0] for line in (golden / "s3/keys.txt").read_text().splitlines()]
    assert len(listed) == 128
    unknown = []
    for key in listed:
        match keys.parse(key):
            case ChunkKey(digest, None):
                assert keys.chunk(digest) == key
            case MetaKey(_, path):
                assert keys.meta(path) == key
            case _:
                unknown.append(key)
    assert unknown == ["golds3/.in-use"]


@pytest.mark.parametrize("path", ["", "/vm/1/owner", "vm/../owner", "vm//owner", "vm/1/", "./vm"])
def test_paths_that_are_no_plain_relative_ones_make_no_key(path: str) -> None:
    with pytest.raises(UsageError, match="component"):
        KEYS.meta(path)


def test_the_whole_key_may_have_1024_bytes() -> None:
    assert check_key("é" * 512)
    with pytest.raises(UsageError, match="it has 1025 bytes, 1 to 1024 are allowed"):
        check_key("é" * 512 + "a")
    name = "a" * (1024 - len("st1/.cnt/"))
    assert len(KEYS.meta(name)) == 1024
    with pytest.raises(UsageError, match="1025 bytes"):
        KEYS.meta(name + "a")


def test_a_store_needs_a_name_that_datastores_may_have() -> None:
    with pytest.raises(UsageError):
        StoreKeys("a/b")
