"""The units of systemd/ under a real systemd: the agent, jobs of timers, the server, mounts."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cache import ROOT
from tests.support.debian_vm import DebianVm
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk

from .conftest import HypervisorHost

pytestmark = pytest.mark.vm

LAST_RUN_IS_OVER = 'tail -n1 /var/lib/fleece/jobs/night/history.jsonl | grep -q \'"event": "end"\''
LAST_RUN_IS_GOOD = 'tail -n1 /var/lib/fleece/jobs/night/history.jsonl | grep -q \'"state": "ok"\''
DROP_IN = "[Service]\nWatchdogSec=10\nTimeoutAbortSec=2\nRestartSec=1\n"
#: Asks the server for its version without logging in; prints the status.
ASK = """
import socket, ssl
context = ssl._create_unverified_context()
with context.wrap_socket(socket.create_connection(("127.0.0.1", 8007), timeout=100)) as connection:
    connection.sendall(b"GET /api2/json/version HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    print(connection.makefile("rb").readline().decode())
"""


def test_the_agent_reloads_and_a_watchdog_kill_in_mid_backup_is_made_good(host: HypervisorHost) -> None:
    vm, before = host.vm, host.qemu()
    vm.write("/etc/systemd/system/fleece-agent.service.d/quick.conf", DROP_IN)
    vm.check("systemctl daemon-reload && systemctl restart fleece-agent")
    vm.until("systemctl show fleece-agent -p StatusText | grep -q 'Next: night at 2026-03-02 03:00:00'")
    vm.check("sed -i s/03:00/04:00/ /etc/fleece/fleece.toml && systemctl reload fleece-agent")
    vm.until("systemctl show fleece-agent -p StatusText | grep -q 'Next: night at 2026-03-02 04:00:00'")
    vm.check("sed -i s/04:00/25:00/ /etc/fleece/fleece.toml && systemctl reload fleece-agent")
    vm.until("systemctl show fleece-agent -p StatusText | grep -q 'old configuration is in use'")
    vm.check("sed -i s/25:00/04:00/ /etc/fleece/fleece.toml && systemctl reload fleece-agent && touch /run/hold")
    # Its time comes because the clock is set; the agent would look at it within a minute.
    vm.check("date -s '2026-03-02 04:00:01 UTC'; systemctl reload fleece-agent")
    vm.until("test -e /run/in-backup")
    assert host.qemu()["roots"] != before["roots"]
    # It hangs: systemd kills it with all it has begun, and nothing of the backup is cleaned up.
    vm.check("rm -f /run/in-backup; kill -STOP $(systemctl show fleece-agent -P MainPID)")
    vm.until("journalctl -q -u fleece-agent | grep -q 'Watchdog timeout'")
    vm.until("test -e /run/in-backup")
    vm.check("rm /run/hold")
    vm.until(LAST_RUN_IS_OVER)
    assert host.runs() == ["ok", "running", "warnings"]  # of the second it is not known how it ended; the third says so
    assert len(host.snapshots()) == 2
    after = host.qemu()
    assert (after["nodes"], after["roots"], after["exports"]) == (before["nodes"], before["roots"], [])
    assert len([name for name in after["bitmaps"] if not name.startswith("fleece-size-")]) == 1


@pytest.mark.long
def test_a_job_that_takes_more_memory_than_there_is_ends_alone(host: HypervisorHost) -> None:
    vm = host.vm
    vm.write("/etc/fleece/hook", "#!/bin/sh\nexec tail /dev/zero\n", 0o755)
    vm.write("/etc/systemd/system/fleece-agent.service.d/memory.conf", "[Service]\nMemoryMax=300M\nMemorySwapMax=0\n")
    vm.check("systemctl daemon-reload && systemctl restart fleece-agent")
    before = vm.check("systemctl show fleece-agent -P MainPID")
    vm.check("date -s '2026-03-02 03:00:01 UTC'; systemctl reload fleece-agent")
    vm.until("journalctl -q -u fleece-agent | grep -q 'killed by the OOM killer'")
    vm.until(LAST_RUN_IS_OVER)
    assert host.runs() == ["ok", "failed"]
    assert vm.check("systemctl show fleece-agent -P MainPID") == before
    assert vm.check("systemctl is-active fleece-agent") == "active\n"


@pytest.mark.long
def test_mounts_of_both_kinds_show_backups_and_end_with_their_unit(host: HypervisorHost) -> None:
    vm = host.vm
    unit = vm.check("systemd-escape --path /mnt/backup").strip()
    image = "vm/100/latest/drive-disk0.img"
    vm.check(f"mkdir -p /mnt/backup /mnt/other && systemctl start fleece-mount@{unit}")
    vm.check(f"cmp /mnt/backup/{image} /var/lib/web.raw")
    # One that is killed comes back.
    vm.check(f"kill -9 $(systemctl show fleece-mount@{unit} -P MainPID)")
    vm.until(f"cmp /mnt/backup/{image} /var/lib/web.raw")
    # One that is in use ends, too.
    reader = vm.start_line(
        f"exec 3</mnt/backup/{image}; touch /run/reading; until ! mountpoint -q /mnt/backup; do sleep 0.2; done"
    )
    vm.until("test -e /run/reading")
    vm.check(f"systemctl stop fleece-mount@{unit} && ! mountpoint -q /mnt/backup")
    assert reader.wait().code == 0
    assert vm.check(f"systemctl show fleece-mount@{unit} -P Result").strip() == "success"
    # mount(8), from fstab, and the unit that systemd makes of it.
    vm.check("echo 'main /mnt/other fleece ro,noauto,_netdev 0 0' >>/etc/fstab && systemctl daemon-reload")
    vm.check(f"mount /mnt/other && cmp /mnt/other/{image} /var/lib/web.raw && umount /mnt/other")
    vm.check(f"systemctl start mnt-other.mount && cmp /mnt/other/{image} /var/lib/web.raw")
    vm.check("systemctl stop mnt-other.mount && ! mountpoint -q /mnt/other")
    vm.until("! pgrep -f '[u]sr/lib/fleece/bin/fleece mount|[a]gent.main mount'")


@pytest.mark.long
def test_the_server_is_started_by_a_connection_reloads_and_is_started_anew_by_the_watchdog(
    host: HypervisorHost,
) -> None:
    vm = host.vm
    vm.write("/root/ask.py", ASK)
    vm.write("/etc/systemd/system/fleece-serve.service.d/quick.conf", DROP_IN)
    vm.check("systemctl daemon-reload && systemctl start fleece-serve.socket")
    assert vm.check("systemctl is-active fleece-serve.service || true") == "inactive\n"
    assert "HTTP/1.1 " in vm.check("python3 /root/ask.py")
    assert vm.check("systemctl is-active fleece-serve.service") == "active\n"
    vm.check("systemctl reload fleece-serve")
    vm.until("journalctl -q -u fleece-serve | grep -q 'certificate was read again'")
    first = vm.check("systemctl show fleece-serve -P MainPID")
    vm.check(f"kill -STOP {first}")
    # Who comes meanwhile waits.
    asked = vm.start_line("python3 /root/ask.py")
    vm.until(f"test $(systemctl show fleece-serve -P MainPID) -ne {first.strip()}")
    vm.until("systemctl is-active fleece-serve.service")
    asked.wait()  # it may have been accepted by the one that hung
    assert "HTTP/1.1 " in vm.check("python3 /root/ask.py")
    vm.check("systemctl stop fleece-serve.socket fleece-serve.service")
    assert vm.check("systemctl show fleece-serve -P Result") == "success\n"
    assert vm.run("python3 /root/ask.py").code != 0


@pytest.mark.long
def test_a_timer_runs_its_job_and_makes_up_for_a_missed_time(host: HypervisorHost) -> None:
    vm = host.vm
    vm.write(
        "/etc/systemd/system/fleece-job@night.timer.d/when.conf", "[Timer]\nOnCalendar=\nOnCalendar=*-*-* 03:00 UTC\n"
    )
    vm.check(
        "systemctl disable --now fleece-agent; systemctl daemon-reload; systemctl enable --now fleece-job@night.timer"
    )
    vm.check("date -s '2026-03-02 03:00:01 UTC'")
    vm.until('test $(grep -c \'"event": "end"\' /var/lib/fleece/jobs/night/history.jsonl) = 2')
    # A timer that elapses while its service is still active starts nothing.
    vm.until("systemctl show fleece-job@night -P ActiveState | grep -q inactive")
    vm.check(
        "systemctl stop fleece-job@night.timer; date -s '2026-03-05 12:00 UTC'; systemctl start fleece-job@night.timer"
    )
    vm.until('test $(grep -c \'"event": "end"\' /var/lib/fleece/jobs/night/history.jsonl) = 3')
    assert host.runs() == ["ok"] * 3
    vm.until("systemctl show fleece-job@night -P ActiveState | grep -q inactive")
    # One that is stopped in the middle cleans up.
    vm.check("touch /run/hold; systemctl start --no-block fleece-job@night")
    vm.until("test -e /run/in-backup")
    vm.check("systemctl stop fleece-job@night")
    assert host.runs()[-1] == "interrupted"
    assert host.qemu()["roots"] == ["fmt0"]


@pytest.mark.long
def test_a_job_that_a_loss_of_power_cut_off_is_run_again_at_the_next_start(host: HypervisorHost) -> None:
    vm = host.vm
    vm.check(
        "touch /run/hold; systemctl stop fleece-agent; date -s '2026-03-02 04:00 UTC'; systemctl start fleece-agent"
    )
    vm.until("test -e /run/in-backup && sync")
    vm.crash()
    assert vm.check("stat -c '%a' /run/fleece").strip() == "755"
    # Store and virtual machine are gone with the memory they were in: it begins and fails.
    vm.until(LAST_RUN_IS_OVER)
    assert host.runs()[-1] == "failed"
    assert vm.check("systemctl is-active fleece-agent") == "active\n"


@pytest.mark.long
def test_a_real_guest_agent_freezes_for_the_instant(
    distribution: QemuBinary, tmp_path: Path, store_folder: Path
) -> None:
    disk = tmp_path / "data.raw"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(disk)], check=True)
    (tmp_path / "fleece.toml").write_text(f'scratch = "{tmp_path}"\n[vm.debian]\nscratch-beside-disks = true\n')
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(tmp_path),
        "FLEECE_REPOSITORY": str(store_folder),
    }
    for name in ("STATE", "RUN"):
        environment[f"FLEECE_{name}_DIR"] = str(tmp_path / name)
    environment["FLEECE_CONFIG"] = str(tmp_path / "fleece.toml")

    def fleece(*arguments: str) -> str:
        line = [sys.executable, "-m", "agent.main", *arguments]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with DebianVm.start(distribution, disks=[VmDisk(disk, "data")]) as vm:
        vm.check("mkdir -p /data && mount /dev/vdb /data")
        vm.until("systemctl is-active qemu-guest-agent")
        # Not on the disk yet, but for the freeze.
        vm.check("head -c 3000000 /dev/urandom >/data/new")
        expected = vm.check("sha256sum </data/new").split()[0]
        given = ("--qmp", str(vm.fleece_qmp), "--guest-agent", str(vm.guest_agent), "--id", "debian")
        report = json.loads(fleece("vm", "backup", *given, "--include", "data", "--output", "json"))
        assert (report["frozen-s"] > 0, report["warnings"]) == (True, [])
        vm.check("touch /data/thawed /root/thawed")
    fleece("restore", report["snapshot"], "drive-data.img", str(tmp_path / "restored.raw"))
    line = ["debugfs", "-R", f"dump /new {tmp_path}/new", str(tmp_path / "restored.raw")]
    subprocess.run(line, check=True, capture_output=True)
    assert hashlib.sha256((tmp_path / "new").read_bytes()).hexdigest() == expected
