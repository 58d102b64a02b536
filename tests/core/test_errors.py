import pytest

from core.errors import (
    BusyError,
    ExitCode,
    FleeceError,
    FormatError,
    NotFoundError,
    SourceError,
    TargetError,
    UsageError,
    os_reason,
)


def test_message_says_what_where_why_and_what_to_do() -> None:
    error = FleeceError("read index", "vm/100/x/drive.img.fidx", "4176 bytes", "run 'fleece verify vm/100'")
    assert str(error) == "cannot read index vm/100/x/drive.img.fidx: 4176 bytes; run 'fleece verify vm/100'"


def test_message_without_a_hint_ends_with_the_reason() -> None:
    assert str(FleeceError("open", "store", "not there")) == "cannot open store: not there"


@pytest.mark.parametrize("kind", [FleeceError, FormatError, NotFoundError, BusyError, SourceError, TargetError])
def test_failures_end_with_exit_code_1(kind: type[FleeceError]) -> None:
    assert kind("do", "it", "no").exit_code is ExitCode.FAILED


def test_wrong_usage_ends_with_exit_code_2() -> None:
    assert UsageError("do", "it", "no").exit_code is ExitCode.USAGE


def test_callers_may_catch_the_builtin_they_expect() -> None:
    with pytest.raises(ValueError):
        raise FormatError("read", "x", "bad magic")
    with pytest.raises(LookupError):
        raise NotFoundError("find", "x", "not there")


def test_reason_of_the_operating_system_leaves_out_the_path() -> None:
    assert os_reason(PermissionError(13, "Permission denied", "/secret/path")) == "Permission denied"
    assert os_reason(OSError("odd")) == "odd"
