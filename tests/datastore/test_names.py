import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import UsageError
from datastore.names import (
    MAX_NAMESPACE_DEPTH,
    ROOT,
    ArchiveKind,
    BackupType,
    Group,
    Namespace,
    Snapshot,
    archive_kind,
    check_archive_name,
    check_store_name,
    complete_archive_name,
    digest_from_hex,
    format_time,
    is_safe_id,
    is_time,
    parse_time,
    strip_archive_type,
)

HOSTILE = ["", ".", "..", "../x", "a/b", "/", "a\0b", "a\n", "\na", "a b", "-a", ".a", "é", "a\\b", "a:b", "١"]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_hostile_is_a_safe_id(text: str) -> None:
    assert not is_safe_id(text)
    for parse in (Group.parse, Snapshot.parse, check_archive_name, complete_archive_name, check_store_name):
        with pytest.raises(UsageError):
            parse(text)
    with pytest.raises(UsageError):
        Group.parse(f"vm/{text}")
    with pytest.raises(UsageError):
        check_archive_name(f"{text}.fidx" if text else ".fidx")
    if text:
        with pytest.raises(UsageError):
            Namespace.parse(text.replace("a/b", "a//b"))


@pytest.mark.parametrize("text", ["a", "_", "0", "100", "a.b-c_d", "A" * 300])
def test_ordinary_ids_are_safe(text: str) -> None:
    assert is_safe_id(text)
    assert Group.parse(f"host/{text}").id == text


@pytest.mark.parametrize(("name", "valid"), [("abc", True), ("ab", False), ("a" * 32, True), ("a" * 33, False)])
def test_datastores_have_names_of_3_to_32_characters(name: str, valid: bool) -> None:
    if valid:
        assert check_store_name(name) == name
    else:
        with pytest.raises(UsageError, match="3 to 32"):
            check_store_name(name)


# ---- archives ----


@pytest.mark.parametrize(
    ("short", "full", "kind"),
    [
        ("drive-scsi0.img", "drive-scsi0.img.fidx", ArchiveKind.FIXED),
        ("root.pxar", "root.pxar.didx", ArchiveKind.DYNAMIC),
        ("root.mpxar", "root.mpxar.didx", ArchiveKind.DYNAMIC),
        ("root.ppxar", "root.ppxar.didx", ArchiveKind.DYNAMIC),
        ("catalog.pcat1", "catalog.pcat1.didx", ArchiveKind.DYNAMIC),
        ("qemu-server.conf", "qemu-server.conf.blob", ArchiveKind.BLOB),
        ("index.json", "index.json.blob", ArchiveKind.BLOB),
        ("rsa-encrypted.key", "rsa-encrypted.key.blob", ArchiveKind.BLOB),
        ("client.log", "client.log.blob", ArchiveKind.BLOB),
    ],
)
def test_the_inner_ending_completes_a_name(short: str, full: str, kind: ArchiveKind) -> None:
    assert complete_archive_name(short) == complete_archive_name(full) == full
    assert archive_kind(full) is kind
    assert strip_archive_type(full) == strip_archive_type(short) == short


@pytest.mark.parametrize("name", ["x.txt", "x", "ximg", "x.fidx.bak"])
def test_other_endings_do_not_tell_the_type(name: str) -> None:
    with pytest.raises(UsageError, match="its ending is none of img, pxar"):
        complete_archive_name(name)
    with pytest.raises(UsageError, match=r"\.fidx, \.didx or \.blob"):
        archive_kind(name)


def test_only_the_last_ending_counts() -> None:
    assert archive_kind("x.didx.fidx") is ArchiveKind.FIXED
    assert archive_kind("fidx.blob") is ArchiveKind.BLOB


def test_digests_are_64_lower_case_hex_digits() -> None:
    assert digest_from_hex("0f" * 32) == b"\x0f" * 32
    for text in ("0F" * 32, "0f" * 31, "0f" * 33, "0f" * 32 + "\n", "zz" * 32, ""):
        with pytest.raises(UsageError):
            digest_from_hex(text)


# ---- times ----


@pytest.mark.parametrize(
    ("text", "ctime"),
    [
        ("1970-01-01T00:00:01Z", 1),
        ("2020-06-26T13:56:05Z", 1_593_179_765),
        ("2026-02-31T00:00:00Z", parse_time("2026-03-03T00:00:00Z")),
        ("2026-04-31T23:59:60Z", parse_time("2026-05-02T00:00:00Z")),
        ("9999-12-31T23:59:59Z", 253_402_300_799),
    ],
)
def test_times_are_utc_and_impossible_days_roll_over(text: str, ctime: int) -> None:
    assert parse_time(text) == ctime


@pytest.mark.parametrize(
    "text",
    [
        "1970-01-01T00:00:00Z",
        "1969-12-31T23:59:59Z",
        "2026-13-01T00:00:00Z",
        "2026-00-01T00:00:00Z",
        "2026-01-32T00:00:00Z",
        "2026-01-00T00:00:00Z",
        "2026-01-01T24:00:00Z",
        "2026-01-01T00:60:00Z",
        "2026-01-01T00:00:61Z",
        "2026-01-01T00:00:00",
        "2026-01-01 00:00:00Z",
        "2026-1-1T00:00:00Z",
        "2026-01-01T00:00:00Z\n",
        "٢٠٢٦-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
    ],
)
def test_what_is_no_backup_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="it is not of the form"):
        parse_time(text)


def test_the_form_of_a_time_may_hold_no_date() -> None:
    assert is_time("2026-13-45T99:99:99Z")
    assert not is_time("2026-13-45T99:99:99Z.tmp")


@settings(deadline=None)
@given(st.integers(1, 253_402_300_799))
def test_every_backup_time_has_one_name(ctime: int) -> None:
    text = format_time(ctime)
    assert len(text) == 20
    assert parse_time(text) == ctime
    assert Snapshot.parse(f"vm/1/{text}") == Group(BackupType.VM, "1").at(ctime)


# ---- namespaces ----


def test_namespaces_have_paths_with_ns_between() -> None:
    namespace = Namespace.parse("a/b/c")
    assert (namespace.path, str(namespace)) == ("ns/a/ns/b/ns/c", "a/b/c")
    assert Namespace.parse("") == ROOT
    assert (ROOT.path, str(ROOT)) == ("", "")


def test_namespaces_have_at_most_seven_levels_and_256_characters() -> None:
    assert len(Namespace.parse("/".join("abcdefg")).components) == MAX_NAMESPACE_DEPTH
    with pytest.raises(UsageError, match="more than 7 levels"):
        Namespace.parse("/".join("abcdefgh"))
    assert Namespace.parse("a" * 255)
    with pytest.raises(UsageError, match="longer than 256"):
        Namespace.parse("a" * 256)
    assert Namespace.parse("a" * 127 + "/" + "b" * 128)
    with pytest.raises(UsageError, match="longer than 256"):
        Namespace.parse("a" * 127 + "/" + "b" * 129)


@pytest.mark.parametrize("text", ["/a", "a/", "a//b", "a/../b", "a/.b", "a b"])
def test_namespaces_are_made_of_valid_components(text: str) -> None:
    with pytest.raises(UsageError, match="is no valid component"):
        Namespace.parse(text)


# ---- groups and snapshots ----


def test_paths_of_groups_and_snapshots() -> None:
    namespace = Namespace.parse("a/b")
    group = Group.parse("vm/100", namespace)
    snapshot = Snapshot.parse("vm/100/2026-01-02T03:04:05Z", namespace)
    assert (group.path, str(group)) == ("ns/a/ns/b/vm/100", "vm/100")
    assert snapshot.group == group
    assert snapshot.path == "ns/a/ns/b/vm/100/2026-01-02T03:04:05Z"
    assert str(snapshot) == "vm/100/2026-01-02T03:04:05Z"
    assert Group.parse("vm/100").path == "vm/100"


def test_an_impossible_date_keeps_its_folder() -> None:
    snapshot = Snapshot.parse("vm/100/2026-02-31T00:00:00Z")
    assert snapshot.path == "vm/100/2026-02-31T00:00:00Z"
    assert snapshot.ctime == parse_time("2026-03-03T00:00:00Z")


@pytest.mark.parametrize("text", ["vm", "vm/", "qemu/100", "VM/100", "vm/100/x", "vm//100", "/vm/100", "vm/../etc"])
def test_other_forms_are_no_group(text: str) -> None:
    with pytest.raises(UsageError, match="vm/ID, ct/ID or host/ID"):
        Group.parse(text)


def test_groups_are_listed_by_type_then_numbers_then_names() -> None:
    names = ["vm/abc", "vm/100", "vm/20", "host/b", "ct/9", "vm/007", "vm/7", "host/18446744073709551616", "host/5"]
    ordered = sorted((Group.parse(name) for name in names), key=lambda group: group.sort_key)
    assert [str(group) for group in ordered] == [
        "ct/9",
        "host/5",
        "host/18446744073709551616",  # no 64-bit number, so a name
        "host/b",
        "vm/007",
        "vm/7",
        "vm/20",
        "vm/100",
        "vm/abc",
    ]
