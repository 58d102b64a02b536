"""The Debian VM that other tests stand on."""

import pytest

from tests.support.debian_vm import DebianVm
from tests.support.guest import GuestError

pytestmark = pytest.mark.vm


def test_lines_files_and_states(debian_vm: DebianVm) -> None:
    vm = debian_vm
    assert vm.check("systemctl is-system-running").strip() == "running"
    done = vm.run("echo out; echo err >&2; cat; exit 3", given=b"given")
    assert (done.code, done.out, done.err) == (3, "out\ngiven", "err\n")
    with pytest.raises(GuestError, match="exit code 1"):
        vm.check("false")
    slow = vm.start_line("until test -e /run/go; do sleep 0.1; done; echo gone")
    content = bytes(range(256)) * 10_000  # more than one piece
    vm.write("/var/tmp/new/file", content, mode=0o600)
    assert vm.read("/var/tmp/new/file") == content
    assert vm.check("stat -c '%a %s' /var/tmp/new/file").split() == ["600", str(len(content))]
    vm.unpack({"a/b": b"x"}, "/run/unpacked")
    vm.check("touch /run/go")
    assert slow.wait().out == "gone\n"
    vm.until("test -e /run/unpacked/a/b")
    vm.restore("started")
    assert vm.run("ls /var/tmp/new /run/unpacked").code == 2


def test_the_kernel_has_nbd_fuse_and_loop_devices(debian_vm: DebianVm) -> None:
    vm = debian_vm
    vm.check("rmmod nbd && modprobe nbd nbds_max=3 && modprobe loop && test -c /dev/fuse")
    assert vm.check("ls -d /dev/nbd?").split() == ["/dev/nbd0", "/dev/nbd1", "/dev/nbd2"]
    vm.check("truncate -s 4M /var/tmp/a && qemu-nbd -f raw -c /dev/nbd0 /var/tmp/a")
    vm.until("test -e /sys/block/nbd0/pid")
    vm.check("qemu-nbd -d /dev/nbd0")


@pytest.mark.long
def test_it_starts_anew_and_keeps_what_is_on_its_disk(debian_vm: DebianVm) -> None:
    vm = debian_vm
    vm.check("echo kept >/var/tmp/kept; sync; echo gone >/run/gone")
    vm.reboot()
    vm.crash()
    assert vm.run("cat /var/tmp/kept /run/gone").out == "kept\n"
