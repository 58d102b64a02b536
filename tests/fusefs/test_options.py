from pathlib import Path

import pytest

from core.errors import UsageError
from fusefs.options import DEFAULT_CACHE_SIZE, MountOptions, split_options


def test_without_options_the_cache_has_its_default_and_the_user_owns_all() -> None:
    assert MountOptions.parse() == MountOptions(DEFAULT_CACHE_SIZE, None, None, None, None, ())


def test_sizes_owners_log_and_what_libfuse_knows_are_read() -> None:
    options = MountOptions.parse("cache=64M,uid=1000", "gid=100,allow_other,context=a:b,log=/var/log/m.log")
    assert options == MountOptions(64 << 20, 1000, 100, None, Path("/var/log/m.log"), ("allow_other", "context=a:b"))


def test_the_later_of_two_values_wins() -> None:
    assert MountOptions.parse("uid=1,fsname=a", "uid=2,fsname=b").uid == 2
    assert MountOptions.parse("fsname=a,context=c", "fsname=b,context=d") == MountOptions(
        source="b", fuse=("context=d",)
    )


def test_what_fstab_and_mount_add_is_accepted_and_not_passed_on() -> None:
    options = MountOptions.parse(
        "rw,defaults,_netdev,nofail,noauto,x-systemd.automount,x-gvfs-name=a,X-mount.mkdir,X-b=c,comment=b,user,noatime,"
    )
    assert options == MountOptions()


@pytest.mark.parametrize(
    "text",
    ["nonsense", "uid=root", "uid=-1", "uid", "allow_other=1", "cache=1M", "cache=x", "log=", "uid=4294967295",
     "max_read=65536"],
)  # fmt: skip
def test_unknown_options_and_impossible_values_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        MountOptions.parse(f"ro,{text}")
    assert text.partition("=")[0] in str(caught.value) or text.partition("=")[2] in str(caught.value)


def test_a_quoted_value_may_hold_commas() -> None:
    assert list(split_options('context="a,b",ro')) == [("context", "a,b"), ("ro", None)]
    with pytest.raises(UsageError, match="not closed"):
        list(split_options('context="a'))


def test_a_value_with_commas_stays_quoted_for_the_kernel() -> None:
    assert MountOptions.parse('context="u:r:t:s0:c1,c2",ro').fuse == ('context="u:r:t:s0:c1,c2"',)
