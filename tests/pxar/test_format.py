import pytest

from pxar.create_report import shown_path
from pxar.errors import ArchiveError
from pxar.format import (
    FORMAT_VERSION,
    HASHED_NAMES,
    HEADER,
    MAX_PRELUDE,
    PRELUDE,
    VERSION_ITEM,
    Short,
    item_name,
    name_fault,
    read_beginning,
    shown,
)
from pxar.goodbye import siphash24


def test_every_item_number_is_the_hash_of_its_name() -> None:
    assert len(HASHED_NAMES) == 23
    for number, name in HASHED_NAMES.items():
        assert siphash24(f"__PROXMOX_FORMAT_{name}__".encode()) == number


def test_items_have_names_for_people() -> None:
    names = [item_name(number) for number in HASHED_NAMES]
    assert names[:4] == ["FORMAT_VERSION", "PRELUDE", "ENTRY", "ENTRY_V1"]
    assert {"PAYLOAD", "PAYLOAD_REF", "GOODBYE", "PAYLOAD_TAIL_MARKER"} <= set(names)
    assert item_name(1) == "0x0000000000000001"


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0", b"x" * 4097])
def test_names_that_no_file_has(name: bytes) -> None:
    assert name_fault(name)


@pytest.mark.parametrize("name", [b"a", b"...", b".a", b"\xff\n", b"x" * 4096])
def test_names_that_files_have(name: bytes) -> None:
    assert name_fault(name) is None


def test_names_are_shown_without_what_a_terminal_acts_on() -> None:
    assert shown(b"a\x1b[2J\xff\n") == "'a\\x1b[2J\\xff\\n'"
    assert len(shown(b"x" * 4000)) == 102


def test_no_two_names_look_the_same() -> None:
    names = [b"\x9b", "\x9b".encode(), b"\\x9b", b"\xad", "\xad".encode(), b"\\u009b", b"\n", b"\\n", "\u202e".encode()]
    names += [b"\\\\n", "\U000e0001".encode(), b"\xed\xb2\x9b", b"\\"]
    for show in (shown, shown_path):
        texts = {show(name) for name in names}
        assert len(texts) == len(names)
        assert all(text.isprintable() for text in texts)
    assert (shown(b"\x9b"), shown("\x9b".encode())) == ("'\\x9b'", "'\\u009b'")


def version(number: int) -> bytes:
    return VERSION_ITEM[:16] + number.to_bytes(8, "little")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (version(0), "version 0"),
        (version(3), "version 3"),
        (HEADER.pack(FORMAT_VERSION, 25) + bytes(40), "FORMAT_VERSION of 25 bytes"),
        (version(1) + HEADER.pack(PRELUDE, 16), "PRELUDE in version 1"),
        (version(2) + HEADER.pack(PRELUDE, 15), "PRELUDE of 15 bytes"),
        (version(2) + HEADER.pack(PRELUDE, 17 + MAX_PRELUDE), "PRELUDE of 16777233 bytes"),
    ],
)
def test_beginnings_that_no_writer_makes(data: bytes, message: str) -> None:
    with pytest.raises(ArchiveError, match=f"cannot read archive root.pxar: at byte .*{message}"):
        read_beginning(data, where="root.pxar")


def test_a_beginning_that_is_not_all_there_asks_for_more() -> None:
    whole = version(2) + HEADER.pack(PRELUDE, 20) + b"abcd"
    for length in range(len(whole)):
        with pytest.raises(Short) as short:
            read_beginning(whole[:length], where="")
        assert length < short.value.needed <= len(whole)
    assert read_beginning(whole, where="") == (2, b"abcd", 44)
