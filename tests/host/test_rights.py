"""What jobs do with the rights that the agent's unit leaves them, with the real programs they work with."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.apt import AptRoot, codename
from tests.support.boot_sectors import say
from tests.support.cache import Unavailable, cached
from tests.support.guest import SmallGuest

from .conftest import CONFIG, HypervisorHost

pytestmark = pytest.mark.vm
#: Each installs packages in the VM, or boots a guest within a guest: minutes on a busy machine.
LONG_S = 1700

JOB_DROP_IN = "/etc/systemd/system/fleece-job@.service.d/rights.conf"
#: What docs/agent.md names for a sendmail that becomes another user.
BECOME = (
    "[Service]\nCapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_KILL\nSystemCallFilter=@setuid\nNoNewPrivileges=no\n"
)
#: What it names for a QEMU of a test boot that shall be nobody, in a network of its own.
NOBODY = (
    "[Service]\nCapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_KILL CAP_SYS_ADMIN\n"
    "SystemCallFilter=@setuid\nRestrictNamespaces=net\n"
)
POSTFIX = "postfix postfix/main_mailer_type select Local only\npostfix postfix/mailname string fleece-vm\n"
MAILBOX = "/var/mail/nobody"
MSMTP = "account default\nhost 127.0.0.1\nport 25\nauth off\ntls off\n"


#: What programs do that jobs start: those that end with who started them, the tools of a test boot, and mailers.
PROGRAMS = """#!/bin/sh
set -e
setpriv --pdeathsig TERM -- true
setpriv --no-new-privs --pdeathsig KILL -- prlimit --core=0 --as=20000000000 --nofile=1024 -- true
python3 -c 'import socket; assert socket.if_nameindex()'
! python3 -c 'import os; os.setgid(65534)' 2>/dev/null
test -r /proc/1/environ
touch /run/done
"""


def test_programs_that_jobs_start_can_do_what_they_do(host: HypervisorHost) -> None:
    host.vm.write("/usr/local/bin/programs", PROGRAMS, 0o755)
    host.vm.write(JOB_DROP_IN, "[Service]\nExecStart=\nExecStart=/usr/local/bin/programs\n")
    host.vm.check("systemctl daemon-reload; systemctl start fleece-job@night; test -e /run/done")


def until_known(host: HypervisorHost, *jobs: str) -> None:
    """Let the agent read its configuration; a job that is new to it waits for its next time, so the clock must wait."""
    # The clock of a VM that is put back to an instant may jump, on which the watchdog starts the agent anew.
    host.vm.until("systemctl reload fleece-agent")
    for job in jobs:
        host.vm.until(f"grep -q '\"{job}\"' /var/lib/fleece/agent/schedule.json")


def notify(host: HypervisorHost, how: str = "", at: str = "fleece-vm") -> None:
    """Each run of a job tells `nobody` by mail from now on; `how` has more settings."""
    section = f'\n[notify.one]\ntype = "mail"\nto = "nobody@{at}"\nfrom = "fleece@{at}"\non = "always"\n'
    host.vm.write("/etc/fleece/fleece.toml", f"{CONFIG}{section}{how}\n")


def mails(host: HypervisorHost, count: int) -> str:
    """The mailbox, when it has so many mails."""
    host.vm.until(f"test $(grep -c '^Subject: .fleece. fleece-vm: job night is done' {MAILBOX}) = {count}")
    return host.vm.check(f"cat {MAILBOX}")


@pytest.mark.long
@pytest.mark.timeout(LONG_S)
def test_mails_leave_by_the_mailers_that_hosts_have(host: HypervisorHost) -> None:
    vm = host.vm
    host.add("postfix", "msmtp", settings=POSTFIX)
    vm.write("/etc/msmtprc", MSMTP)
    notify(host)
    vm.check("date -s '2026-03-02 03:00:01 UTC'; systemctl reload fleece-agent")
    text = mails(host, 1)
    assert "\nReturn-Path: <fleece@fleece-vm>\n" in text
    assert "(Postfix, from userid 0)" in text
    vm.until('test $(grep -c \'"event": "end"\' /var/lib/fleece/jobs/night/history.jsonl) = 2')
    notify(host, 'sendmail = "/usr/bin/msmtp"')
    host.run_job()
    mails(host, 2)
    notify(host, 'smtp = "127.0.0.1:25"')
    host.run_job()
    mails(host, 3)
    assert host.runs() == ["ok"] * 4


@pytest.mark.long
@pytest.mark.timeout(LONG_S)
def test_mails_leave_by_exim(host: HypervisorHost) -> None:
    vm = host.vm
    # It becomes a user of its own, which it may not: that is told, and the job is done all the same.
    host.add("exim4-daemon-light")
    notify(host)
    host.run_job()
    log = vm.check("fleece job log night")
    assert "notification one failed: cannot send a mail by /usr/sbin/sendmail: " in log
    assert 'smtp = "127.0.0.1:25"' in log
    # Its server takes it, and so does its sendmail with the drop-in of the documentation. Both go on at once.
    vm.check("rm -f /var/log/exim4/mainlog")
    notify(host, 'smtp = "127.0.0.1:25"', at="localhost")
    host.run_job()
    vm.until("grep -q Completed /var/log/exim4/mainlog && test $(exim4 -bpc) = 0")
    vm.check("rm -f /var/log/exim4/mainlog")
    notify(host, at="localhost")
    vm.write(JOB_DROP_IN, BECOME)
    vm.check("systemctl daemon-reload")
    host.run_job()
    vm.until("grep -q Completed /var/log/exim4/mainlog && test $(exim4 -bpc) = 0")
    assert host.runs() == ["ok"] * 4


@pytest.mark.long
@pytest.mark.timeout(LONG_S)
def test_a_backup_is_booted_by_a_job(host: HypervisorHost, guest: SmallGuest, tmp_path: Path) -> None:
    vm = host.vm
    vm.write("/var/lib/sector.raw", say(serial="\nsmall login: "))
    vm.put(linux_disk(guest, tmp_path), "/var/lib/linux.raw")
    for name in ("sector", "linux"):
        given = f"--backup-type vm --backup-id {name} -q"
        vm.check(f"fleece backup drive-disk0.img:/var/lib/{name}.raw {given}", timeout_s=600)
    # Tells who QEMU is, and runs it.
    vm.write(
        "/usr/local/bin/qemu-noted",
        '#!/bin/sh\necho "$(id -u) $(grep CapEff /proc/self/status) $(readlink /proc/self/ns/net)" >>/run/noted/who\n'
        'exec qemu-system-x86_64 "$@"\n',
        0o755,
    )
    vm.check("install -d -m 777 /run/noted; install -m 666 /dev/null /run/noted/who")
    jobs = "".join(
        f'[job.{name}]\ntype = "test-boot"\nschedule = "04:00"\ngroup-filter = ["group:vm/{name}"]\n'
        f'memory = "{memory}"\nwait = ["{sign}"]\ntimeout = "12m"\n{more}'
        for name, memory, sign, more in (
            ("linux", "256M", r"serial:/Linux version \\d/", ""),
            ("sector", "64M", "serial", 'qemu = "/usr/local/bin/qemu-noted"\n'),
        )
    )
    vm.write("/etc/fleece/fleece.toml", CONFIG + jobs)
    # TCG writes code and runs it, which the unit forbids to those that map memory for both at once.
    until_known(host, "linux", "sector")
    vm.check("date -s '2026-03-02 04:00:01 UTC'; systemctl reload fleece-agent")
    vm.until('grep -q \'"event": "end"\' /var/lib/fleece/jobs/linux/history.jsonl', timeout_s=900)
    vm.until('grep -q \'"event": "end"\' /var/lib/fleece/jobs/sector/history.jsonl')
    vm.until('grep -c \'"event": "end"\' /var/lib/fleece/jobs/night/history.jsonl | grep -q 2')
    booted = _machine(host, "linux")
    assert (booted["alive"], booted["sign"], booted["accel"]) == (True, "serial", "tcg"), booted
    assert _machine(host, "sector")["alive"]
    # It is root, which has no capabilities left.
    assert {(user, int(capable, 16)) for user, _, capable, _ in who(host)} == {("0", 0)}
    # With the drop-in of the documentation it is nobody, without capabilities and network.
    vm.write(JOB_DROP_IN, NOBODY)
    vm.check("systemctl daemon-reload; echo -n >/run/noted/who")
    host.run_job("sector")
    assert _machine(host, "sector")["alive"]
    network = vm.check("readlink /proc/1/ns/net").strip()
    assert {(user, int(capable, 16)) for user, _, capable, _ in who(host)} == {("65534", 0)}
    assert network not in {net for *_, net in who(host)}


def who(host: HypervisorHost) -> list[list[str]]:
    """User, "CapEff:", capabilities and network of each QEMU that was noted."""
    lines = [line.split() for line in host.vm.check("cat /run/noted/who").splitlines()]
    assert lines
    return lines


def linux_disk(guest: SmallGuest, folder: Path) -> Path:
    """A disk that a BIOS boots a Linux from: SYSLINUX in its boot sector, kernel and initramfs as files of FAT."""

    def build(target: Path) -> None:
        AptRoot.open("apt-release", (codename(),)).unpack(["syslinux", "mtools", "dosfstools"], target)

    try:
        tools = cached("syslinux-1", build)
    except Unavailable as reason:
        pytest.skip(str(reason))  # the boot loader comes from the distribution, which may be out of reach
    disk, words = folder / "linux.raw", folder / "syslinux.cfg"
    words.write_text("DEFAULT l\nLABEL l\nKERNEL vmlinuz\nAPPEND initrd=initrd.gz console=ttyS0 no_timer_check\n")
    path = f"{tools}/usr/bin:{tools}/usr/sbin:{tools}/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    copy = ["mcopy", "-i", str(disk), str(guest.kernel), str(guest.initrd), str(words), "::"]
    for line in (["mkfs.vfat", "-C", str(disk), str(32 << 10)], copy, ["syslinux", "--install", str(disk)]):
        done = subprocess.run(
            line, env={**os.environ, "PATH": path, "MTOOLS_SKIP_CHECK": "1"}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done
    return disk


def _machine(host: HypervisorHost, job: str) -> dict[str, Any]:
    """What the last run of a job of type test-boot says of its only machine."""
    lines = host.vm.check(f"cat /var/lib/fleece/jobs/{job}/history.jsonl").splitlines()
    (machine,) = json.loads(lines[-1])["result"]["machines"]
    return dict(machine)


DOMAIN = """<domain type='qemu'><name>web</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
<emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/var/lib/libvirt/images/a.qcow2'/>
<target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/var/lib/libvirt/images/b.raw'/>
<target dev='vdb' bus='virtio'/></disk><memballoon model='none'/></devices></domain>
"""
LIBVIRT_CONFIG = """\
default-repository = "main"
[repository.main]
path = "/backup/main"
[job.domains]
type = "backup"
schedule = "03:00"
vm = ["libvirt:*"]
"""


@pytest.mark.long
@pytest.mark.timeout(LONG_S)
def test_domains_of_libvirt_are_backed_up_by_a_job(host: HypervisorHost) -> None:
    vm = host.vm
    vm.check("systemctl stop vm-web")
    host.add("libvirt-daemon-system", "python3-libvirt")
    vm.write("/root/web.xml", DOMAIN)
    # No scratch folder is named: what it is by itself must do.
    vm.write("/etc/fleece/fleece.toml", LIBVIRT_CONFIG + "[vm.web]\nlibvirt = 'web'\nscratch-beside-disks = true\n")
    vm.check(
        "cd /var/lib/libvirt/images && qemu-img create -q -f qcow2 a.qcow2 8M && truncate -s 8M b.raw\n"
        "yes one | dd of=b.raw bs=64k count=40 iflag=fullblock conv=notrunc status=none\n"
        "virsh -q define /root/web.xml && virsh -q start web --paused"
    )
    until_known(host, "domains")
    vm.check("date -s '2026-03-02 03:00:01 UTC'; systemctl reload fleece-agent")
    vm.until('grep -q \'"event": "end"\' /var/lib/fleece/jobs/domains/history.jsonl')
    assert host.runs("domains") == ["ok"], vm.check("fleece job log domains")
    for device in ("virtio-disk0", "virtio-disk1"):
        words = f'qemu-io -d /machine/peripheral/{device}/virtio-backend "write -P 7 1M 64k"'
        command = json.dumps({"execute": "human-monitor-command", "arguments": {"command-line": words}})
        assert json.loads(vm.check(f"virsh qemu-monitor-command web '{command}'"))["return"] == ""
    vm.check("sleep 1; systemctl start fleece-job@domains")
    assert host.runs("domains") == ["ok"] * 2, vm.check("fleece job log domains")
    log = vm.check("fleece job log domains")
    assert log.count(", incremental, read 4.00 MiB") == 2, log
    vm.check("virsh -q destroy web; mkdir /run/restored; fleece restore vm/web/latest --all /run/restored -q")
    vm.check("cd /var/lib/libvirt/images && cmp b.raw /run/restored/drive-vdb.img")
    vm.check("cd /var/lib/libvirt/images && qemu-img compare -f qcow2 -F raw a.qcow2 /run/restored/drive-vda.img")
    assert vm.run("ls -A /var/lib/fleece/tmp; find /run/fleece -type s").out == ""


LOOK_INTO = """#!/bin/sh
[ "$1" = job-end ] || exit 0
exec >/run/seen 2>/run/said
fleece ls vm/disk/latest drive-disk0.img
fleece restore vm/disk/latest drive-disk0.img/raw/etc/hostname -
fleece index build --images -q >&2
fleece find /etc/hostname vm/disk/latest --images --output json
"""


@pytest.mark.long
@pytest.mark.timeout(LONG_S)
def test_images_and_a_machine_that_is_off_are_read_by_a_job(host: HypervisorHost) -> None:
    # Both are served by qemu-nbd, which ends with the job.
    vm = host.vm
    archives = 'archives = ["data.img:/var/lib/data.qcow2"]\nbackup-id = "images"\n'
    vm.write("/etc/fleece/fleece.toml", f'{CONFIG}{archives}[vm.web.disks]\ndisk0 = "/var/lib/web.raw"\n')
    vm.check(
        "systemctl stop vm-web; head -c 5M /dev/urandom >/root/data\n"
        "qemu-img convert -O qcow2 /root/data /var/lib/data.qcow2"
    )
    host.run_job()
    assert host.runs() == ["ok"] * 2, vm.check("fleece job log night")
    assert vm.run("fleece restore host/images/latest data.img - -q | cmp - /root/data").code == 0
    assert len(host.snapshots()) == 2
    assert vm.run("fleece restore vm/100/latest drive-disk0.img - -q | cmp - /var/lib/web.raw").code == 0


@pytest.mark.long
@pytest.mark.timeout(LONG_S)
def test_files_of_a_disk_image_are_seen_by_a_hook_and_in_a_mount(host: HypervisorHost) -> None:
    vm = host.vm
    vm.check(
        "mkdir -p /root/part/etc /mnt/backup; echo guest-of-old >/root/part/etc/hostname\n"
        "mke2fs -q -t ext4 -d /root/part /var/lib/part.raw 16M\n"
        "fleece backup drive-disk0.img:/var/lib/part.raw --backup-type vm --backup-id disk -q"
    )
    vm.write("/etc/fleece/hook", LOOK_INTO, 0o755)
    host.run_job()
    seen = vm.check("cat /run/seen")
    assert host.runs() == ["ok"] * 2, seen + vm.check("cat /run/said")
    volume, content, found = seen.split("\n", 2)
    assert volume.split() == ["raw", str(16 << 20), "ext4"]
    assert content == "guest-of-old"
    assert [entry["path"] for entry in json.loads(found)] == ["/raw/etc/hostname"], found
    unit = vm.check("systemd-escape --path /mnt/backup").strip()
    vm.check(f"systemctl start fleece-mount@{unit}")
    folder = "/mnt/backup/vm/disk/latest/drive-disk0.img.d"
    assert vm.check(f"cat {folder}/raw/etc/hostname") == "guest-of-old\n"
    assert "ext4" in vm.check(f"cat {folder}/VOLUMES")
    vm.check(f"systemctl stop fleece-mount@{unit}")
    vm.until("! pgrep -f '[d]iskfs.worker'")
