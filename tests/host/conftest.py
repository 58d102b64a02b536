"""A hypervisor host with the Debian package of Fleece, systemd, a datastore and a virtual machine."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.apt import AptRoot, codename
from tests.support.cache import ROOT, Unavailable
from tests.support.debian_vm import DebianVm

#: Waits where a test says so: `hold` lets the next backup stop behind its instant, with QEMU's nodes in place.
HOOK = """#!/bin/sh
echo "$*" >>/var/log/hook
if [ "$1" = post-restart ] && [ -e /run/hold ]; then
    echo $$ >/run/in-backup
    while [ -e /run/hold ]; do sleep 0.1; done
    rm -f /run/in-backup
fi
"""
CONFIG = """\
default-repository = "main"
hook = "/etc/fleece/hook"
scratch = "/var/lib/scratch"
[repository.main]
path = "/backup/main"
[vm.web]
id = "100"
qmp = "/run/web.qmp"
scratch-beside-disks = true
[job.night]
type = "backup"
schedule = "03:00"
vm = ["web"]
"""
QEMU = (
    "qemu-system-x86_64 -nodefaults -no-user-config -display none -machine q35 -accel tcg -m 64 -S"
    " -qmp unix:/run/web.qmp,server=on,wait=off -qmp unix:/run/own.qmp,server=on,wait=off"
    " -blockdev driver=raw,node-name=fmt0,file.driver=file,file.filename=/var/lib/web.raw"
    " -device virtio-blk-pci,drive=fmt0,id=disk0"
)
#: Prints what QEMU has, as JSON.
LOOK = """
import json, socket
s = socket.socket(socket.AF_UNIX)
s.connect("/run/own.qmp")
f = s.makefile("rw")
f.readline()
def do(command):
    f.write(json.dumps({"execute": command}) + "\\n")
    f.flush()
    while "return" not in (answer := json.loads(f.readline())):
        assert "error" not in answer, answer
    return answer["return"]
do("qmp_capabilities")
nodes = do("query-named-block-nodes")
print(json.dumps({
    "nodes": sorted(node["node-name"] for node in nodes if not node["node-name"].startswith("#")),
    "roots": [block["inserted"]["node-name"] for block in do("query-block") if "inserted" in block],
    "exports": [export["id"] for export in do("query-block-exports")],
    "bitmaps": [one["name"] for node in nodes for one in node.get("dirty-bitmaps", ()) if "name" in one],
}))
"""


@dataclass(frozen=True)
class HypervisorHost:
    """A Debian with the package installed; `vm` has all that a Debian VM can."""

    vm: DebianVm
    package: Path  #: the package, on this machine

    def add(self, *packages: str, settings: str = "") -> None:
        """Install packages of the distribution; `settings` answer their questions (debconf-set-selections).

        Skips the test where they cannot be fetched.
        """
        with tempfile.TemporaryDirectory(prefix="fleece-debs-") as name:
            status, target = Path(name, "status"), Path(name, "archives")
            status.write_bytes(self.vm.read("/var/lib/dpkg/status"))
            target.mkdir()
            try:
                apt = AptRoot.open("apt-release", (codename(),))
                found = apt.download_for(status, packages, codename(), target)
            except Unavailable as reason:
                pytest.skip(str(reason))  # the packages come from the distribution, which may be out of reach
            self.vm.check("rm -rf /var/tmp/debs")
            self.vm.unpack({path.name: path for path in found}, "/var/tmp/debs")
        if settings:
            self.vm.check("debconf-set-selections", given=settings.encode())
        line = "apt-get -o Dpkg::Options::=--force-unsafe-io -y --no-install-recommends install /var/tmp/debs/*.deb"
        self.vm.check(f"DEBIAN_FRONTEND=noninteractive {line}", timeout_s=900)

    def run_job(self, job: str = "night") -> None:
        """Run a job once by its unit, which has the rights of the agent; returns when it is over, however it ended."""
        self.vm.run(f"systemctl start fleece-job@{job}", timeout_s=900)

    def qemu(self) -> dict[str, Any]:
        """Block nodes with names, roots, exports and bitmaps of the virtual machine `web`."""
        found: dict[str, Any] = json.loads(self.vm.check("python3 /root/look.py"))
        return found

    def runs(self, job: str = "night") -> list[str]:
        """How the runs of a job ended, the oldest first; `running` for one that has not."""
        text = self.vm.run(f"cat /var/lib/fleece/jobs/{job}/history.jsonl").out
        events = [json.loads(line) for line in text.splitlines()]
        ends = {event["run"]: event["state"] for event in events if event["event"] == "end"}
        return [ends.get(event["run"], "running") for event in events if event["event"] == "start"]

    def snapshots(self) -> list[str]:
        """Times of the finished snapshots of `web`."""
        found = self.vm.run("cd /backup/main/vm/100 && ls -d */index.json.blob").out
        return [line.split("/")[0] for line in found.split()]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package of this checkout."""
    folder = tmp_path_factory.mktemp("deb")
    line = [sys.executable, str(ROOT / "scripts/build_deb.py"), "--output", str(folder)]
    # As it is released but for the compression, which the VM undoes in a third of the time.
    line += ["--version", "0.1.0~test1", "--compression", "zstd", "--level", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def installed(started_debian_vm: DebianVm, package: Path) -> HypervisorHost:
    """The host as it was right after the package was installed."""
    vm = started_debian_vm
    vm.restore("started")
    vm.put(package, "/root/fleece.deb")
    # There is no network, and what a disk would keep does not matter.
    vm.check("apt-get -o Dpkg::Options::=--force-unsafe-io -y install /root/fleece.deb", timeout_s=600)
    vm.write("/root/look.py", LOOK)
    vm.save("installed")
    return HypervisorHost(vm, package)


@pytest.fixture(scope="session")
def prepared(installed: HypervisorHost) -> HypervisorHost:
    """The host with a datastore in memory, a virtual machine that runs, and a job that has backed it up once."""
    vm = installed.vm
    vm.restore("installed")
    vm.write("/etc/fleece/hook", HOOK, 0o755)
    vm.write("/etc/fleece/fleece.toml", CONFIG)
    vm.check(
        "mkdir -p /backup /var/lib/scratch && mount -t tmpfs backup /backup && date -s '2026-03-01 12:00 UTC'\n"
        "truncate -s 8M /var/lib/web.raw && yes fleece | head -c 3M | dd of=/var/lib/web.raw conv=notrunc\n"
        f"systemd-run --unit=vm-web {QEMU}\n"
        "fleece datastore create /backup/main && fleece job run night -q && systemctl reload fleece-agent",
        timeout_s=600,
    )
    vm.save("prepared")
    return installed


@pytest.fixture
def bare_host(installed: HypervisorHost) -> HypervisorHost:
    """The host right after the installation."""
    installed.vm.restore("installed")
    return installed


@pytest.fixture
def host(prepared: HypervisorHost) -> HypervisorHost:
    """The host in use: it is noon, the job `night` of the virtual machine `web` is due at three."""
    prepared.vm.restore("prepared")
    return prepared
