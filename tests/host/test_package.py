"""The Debian package: what it brings, and what becomes of a host that is at work."""

import json
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.support.cache import ROOT

from .conftest import HypervisorHost

pytestmark = pytest.mark.vm

with (ROOT / "pyproject.toml").open("rb") as _file:
    ROOMS = sorted({name.split(".")[0] for name in tomllib.load(_file)["tool"]["setuptools"]["packages"]})
#: Imports every module that is in the package, so that each library it needs is there.
IMPORT_ALL = """
import importlib, pathlib, sys
import numpy, pyfuse3, pydantic, qemu.qmp, httpx, h2, isal, zstandard, cryptography, siphashc, trio_asyncio, nbd
import dissect.btrfs, dissect.extfs, dissect.fat, dissect.ntfs, dissect.xfs
home = next(pathlib.Path(path) for path in sys.path if path.startswith("/usr/lib/fleece"))
count = 0
for room in sys.argv[1:]:
    for path in sorted((home / room).rglob("*.py")):
        if path.name == "nbdkit_plugin.py":  # for nbdkit's Python, which is Debian's
            continue
        name = ".".join(path.relative_to(home).with_suffix("").parts).removesuffix(".__init__")
        assert importlib.import_module(name).__file__.startswith("/usr/lib/fleece/"), name
        count += 1
    for path in (home / room).glob("*.so"):
        importlib.import_module(f"{room}.{path.name.split('.')[0]}")
        count += 1
print(count)
"""


def test_it_brings_all_that_is_needed(bare_host: HypervisorHost) -> None:
    vm = bare_host.vm
    vm.write("/root/all.py", IMPORT_ALL)
    line = f"PYTHONPATH=/nonsense /usr/lib/fleece/bin/python3 -I /root/all.py {' '.join(ROOMS)}"
    assert int(vm.check(line)) > 150
    vm.check("dpkg --verify fleece && test -z \"$(find /usr/lib/fleece -name '*.py' -newermt '2100-01-01')\"")
    assert vm.check("systemctl is-enabled fleece-agent; systemctl is-active fleece-agent").split() == [
        "enabled", "active",
    ]  # fmt: skip
    assert vm.run("systemctl is-enabled fleece-serve.socket fleece-serve.service").out.split() == ["disabled"] * 2
    folders = "/etc/fleece /run/fleece /var/lib/fleece /var/lib/fleece/secrets /var/lib/fleece/jobs"
    assert vm.check(f"stat -c '%a %U %G' {folders}").splitlines() == [
        "755 root root", "755 root root", "755 root root", "700 root root", "2755 root fleece",
    ]  # fmt: skip
    doctor = json.loads(vm.run("fleece doctor --output json").out)
    assert [check for check in doctor["checks"] if check["state"] == "failed"] == []


def test_upgrade_removal_and_purge_beside_a_running_backup(host: HypervisorHost, tmp_path: Path) -> None:
    vm = host.vm
    before = host.qemu()
    newer = _newer(host.package, tmp_path)
    vm.put(newer, "/root/newer.deb")
    # The backup is held behind its instant, started by the agent that makes up for the time it missed.
    vm.check(
        "touch /run/hold; systemctl stop fleece-agent; date -s '2026-03-02 04:00 UTC'; systemctl start fleece-agent"
    )
    vm.until("test -e /run/in-backup")
    assert host.qemu()["roots"] != before["roots"]
    vm.check("rm -f /run/in-backup; echo 'keyfile' >/var/lib/fleece/secrets/key")
    said = vm.check("DEBIAN_FRONTEND=noninteractive dpkg --force-unsafe-io -i /root/newer.deb 2>&1", timeout_s=600)
    assert vm.check("dpkg-query -W -f '${Version}' fleece") == "0.1.0~test2", said
    assert vm.check("cat /etc/fleece/fleece.toml").startswith("default-repository")
    # It was ended, nothing of it is left, and it is being run again by the new version.
    vm.until("test -e /run/in-backup")
    assert host.runs() == ["ok", "interrupted", "running"]
    assert vm.check("test -e /run/fleece-upgrade || echo gone") == "gone\n"
    vm.check("rm /run/hold")
    vm.until("tail -n1 /var/lib/fleece/jobs/night/history.jsonl | grep -q '\"ok\"'")
    assert len(host.snapshots()) == 2
    # The dirty bitmap that the interrupted backup had set aside counts on: nothing was written, so nothing was read.
    (guest,) = json.loads(vm.check("tail -n1 /var/lib/fleece/jobs/night/history.jsonl"))["result"]["guests"]
    assert (guest["reasons"], guest["new"]) == ([], guest["read"]), guest

    vm.check("touch /run/hold; systemctl start --no-block fleece-job@night")
    vm.until("test -e /run/in-backup")
    vm.check("dpkg -r fleece", timeout_s=600)
    after = host.qemu()
    assert (after["nodes"], after["roots"], after["exports"]) == (before["nodes"], before["roots"], [])
    assert len([name for name in after["bitmaps"] if not name.startswith("fleece-size-")]) == 1
    assert vm.run("pgrep -fa [/]usr/lib/fleece/bin; ls -d /usr/lib/fleece /usr/bin/fleece").out == ""
    vm.check("test -e /etc/fleece/fleece.toml && test -e /var/lib/fleece/jobs/night/history.jsonl")
    assert len(host.snapshots()) == 2

    said = vm.check("dpkg -P fleece 2>&1")
    assert "/var/lib/fleece stays" in said
    assert vm.run("find /etc/fleece /run/fleece /var/lib/fleece -not -type d -not -name '.*' | sort").out.split() == [
        "/etc/fleece/hook", "/var/lib/fleece/datastores.toml", "/var/lib/fleece/secrets/key",
    ]  # fmt: skip
    assert len(host.snapshots()) == 2
    assert vm.check("ls /backup/main/.chunks | wc -l").strip() == "65536"
    assert vm.run("systemctl list-unit-files --no-legend 'fleece-[!t]*'").out == ""


@pytest.mark.long
def test_lintian_has_nothing_to_say(package: Path, tmp_path: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed")
    # It knows no zstd.
    subprocess.run(["dpkg-deb", "-R", str(package), str(tmp_path / "all")], check=True)
    subprocess.run(["dpkg-deb", "-Zgzip", "-z1", "-b", str(tmp_path / "all"), str(tmp_path)], check=True)
    (again,) = tmp_path.glob("*.deb")
    done = subprocess.run(["lintian", "--no-cfg", str(again)], capture_output=True, text=True, timeout=250)
    assert done.stdout == ""


def _newer(package: Path, folder: Path) -> Path:
    """The same package as another version."""
    tree = folder / "newer"
    subprocess.run(["dpkg-deb", "-R", str(package), str(tree)], check=True)
    control = (tree / "DEBIAN/control").read_text()
    (tree / "DEBIAN/control").write_text(control.replace("~test1", "~test2"))
    target = folder / "newer.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "-b", str(tree), str(target)], check=True)
    return target
