import pytest

from core.errors import UsageError
from fusefs.helper import command_line
from fusefs.options import MountOptions


def test_an_fstab_line_becomes_a_call_of_the_command() -> None:
    # What mount(8) makes of: /backup/store /mnt fuse.fleece ns=a/b,keyfile=/etc/k,cache=64M,_netdev 0 0
    arguments = ["/backup/store", "/mnt", "-t", "fuse.fleece", "-o", "rw,ns=a/b,keyfile=/etc/k,cache=64M,_netdev"]
    assert command_line(arguments) == [
        "mount", "--ns=a/b", "--keyfile=/etc/k", "--repo=/backup/store",
        "-o", "fsname=/backup/store,rw,cache=64M,_netdev", "--", "/mnt",
    ]  # fmt: skip


def test_one_archive_is_named_by_two_options() -> None:
    arguments = ["store", "/mnt", "-o", "snapshot=vm/100/latest,archive=drive-scsi0.img"]
    assert command_line(arguments) == [
        "mount", "--repo=store", "-o", "fsname=store", "--", "vm/100/latest", "drive-scsi0.img", "/mnt",
    ]  # fmt: skip


def test_a_rehearsal_does_nothing() -> None:
    assert command_line(["store", "/mnt", "-f"]) is None


def test_a_mountpoint_that_looks_like_an_option_stays_a_mountpoint() -> None:
    command = command_line(["--", "store", "--foreground"])
    assert command == ["mount", "--repo=store", "-o", "fsname=store", "--", "--foreground"]


def test_the_source_in_proc_mounts_is_the_one_of_fstab_unless_an_option_says_otherwise() -> None:
    command = command_line(["/a,b", "/mnt", "-o", 'ro,context="x,y"'])
    assert command is not None
    assert MountOptions.parse(command[command.index("-o") + 1]) == MountOptions(source="/a,b", fuse=('context="x,y"',))
    command = command_line(["/a,b", "/mnt", "-o", "fsname=other"])
    assert command is not None
    assert MountOptions.parse(command[command.index("-o") + 1]).source == "other"


@pytest.mark.parametrize(
    "arguments",
    [[], ["store"], ["store", ""], ["a", "b", "c"], ["store", "/mnt", "-x"], ["store", "/mnt", "-N", "1"],
     ["store", "/mnt", "-o", "snapshot=vm/100/latest"]],
)  # fmt: skip
def test_other_calls_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match=r"mount\.fleece"):
        command_line(arguments)
