import pytest

from core.errors import UsageError
from datastore.filters import GroupFilter, passes
from datastore.names import Group

GROUPS = ("ct/1", "host/web-1", "vm/100", "vm/101", "vm/900")


def chosen(*texts: str) -> list[str]:
    filters = [GroupFilter.parse(text) for text in texts]
    return [name for name in GROUPS if passes(filters, Group.parse(name))]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), list(GROUPS)),
        (("type:vm", "exclude:group:vm/100", "exclude:regex:^vm/9"), ["vm/101"]),
        (("exclude:regex:^vm/9", "exclude:group:vm/100", "type:vm"), ["vm/101"]),
        (("include:type:vm",), ["vm/100", "vm/101", "vm/900"]),
        (("exclude:type:vm",), ["ct/1", "host/web-1"]),
        (("group:ct/1", "group:vm/100"), ["ct/1", "vm/100"]),
        (("regex:0",), ["vm/100", "vm/101", "vm/900"]),
        ((r"regex:^vm/10[01]$",), ["vm/100", "vm/101"]),
        ((r"regex:1\z",), ["ct/1", "host/web-1", "vm/101"]),
        ((r"regex:^(?<kind>host|ct)/",), ["ct/1", "host/web-1"]),
        ((r"regex:(?i)WEB",), ["host/web-1"]),
    ],
)
def test_a_group_passes_if_an_include_matches_and_no_exclude(texts: tuple[str, ...], expected: list[str]) -> None:
    assert chosen(*texts) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "vm/100", "type:", "type:qemu", "group:vm", "group:vm/..", "group:vm/100/x", "kind:vm", "exclude:", "regex",
        "exclude:include:type:vm", "regex:(", "regex:[", r"regex:(a)\1", "regex:(?=a)", "regex:(?!a)", "regex:(?<=a)",
        "regex:(?<!a)", "regex:(?P=a)", "regex:(?>a)", "regex:a++", "regex:[[:alpha:]]", "regex:" + "a" * 2000,
        "regex:a(?i)b", r"regex:a\Z", r"regex:\pL",
    ],
)  # fmt: skip
def test_what_is_no_filter_or_not_the_same_for_pbs_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        GroupFilter.parse(text)


@pytest.mark.parametrize("text", [r"regex:\\1", r"regex:[(?=]", r"regex:\(\?=", r"regex:a\+\+", "regex:a?b+"])
def test_what_only_looks_foreign_is_accepted(text: str) -> None:
    GroupFilter.parse(text)


@pytest.mark.parametrize("text", ["type:vm", "exclude:group:vm/100", "exclude:regex:^a", "regex:x:y"])
def test_a_filter_is_written_as_it_was_read(text: str) -> None:
    assert str(GroupFilter.parse(text)) == text
    assert str(GroupFilter.parse(f"include:{text}" if "exclude" not in text else text)) == text
