"""Domains with a guest that writes, and libvirt at work on their disks between two backups and while one reads.

After each backup the disks are compared byte by byte with the snapshot.
"""

import hashlib
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.fleece_command import FleeceCommand
from tests.support.guest import GuestControl, SmallGuest
from tests.support.libvirtd import Libvirtd, fleece_inside, libvirtd
from tests.support.qemu_binaries import backports_qemu, distribution_qemu

libvirt = pytest.importorskip("libvirt", reason="needs python3-libvirt, which `make setup` installs")
pytestmark = [
    pytest.mark.guest,
    pytest.mark.long,
    pytest.mark.parametrize("started_libvirtd", ["distribution", "newer"], indirect=True),
]

#: A guest agent of a few lines: it notes what it is told, and answers what libvirt asks.
AGENT = r"""
exec 3<>$(ls /dev/vport*p1 | head -n 1)
while :; do
  # Before libvirt has opened the other side there is nothing to be read.
  read -r line <&3 || { sleep 0.1; continue; }
  id=$(echo "$line" | sed -n 's/.*"id": *\([0-9]*\).*/\1/p')
  case "$line" in
  *guest-sync-delimited*) printf '\377{"return": %s}\n' $id >&3;;
  *guest-sync*) echo "{\"return\": $id}" >&3;;
  *fsfreeze-freeze*) echo "$line" >>/tmp/told; touch /tmp/frozen; echo '{"return": 2}' >&3;;
  *fsfreeze-thaw*) n=0; [ -e /tmp/frozen ] && n=2; rm -f /tmp/frozen; echo thaw $n >>/tmp/told
     echo "{\"return\": $n}" >&3;;
  *) echo '{"return": {}}' >&3;;
  esac
done
"""


@dataclass
class Running:
    """The domain `web` with its guest."""

    host: Libvirtd
    fleece: FleeceCommand
    domain: Any
    guest: GuestControl
    clock: int = 1_767_200_000

    async def write(self, disk: str, at_mib: int, mib: int, letter: str) -> None:
        """Write as the guest."""
        blocks = f"bs=64k seek={at_mib * 16} count={mib * 16} iflag=fullblock conv=notrunc oflag=direct"
        await self.guest.check(f"tr '\\0' {letter} </dev/zero | dd of=/dev/{disk} {blocks}")

    async def backup(self, *options: str) -> dict[str, tuple[str, str | None, int]]:
        """Mode, reason and bytes read of each disk."""
        self.clock += 3600
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.clock))
        done = await self.fleece.run("vm", "backup", "web", "--backup-time", when, *options)
        assert done.code == 0, done
        return {
            name.removeprefix("drive-").removesuffix(".img"): (one["mode"], one["reason"], one["read"])
            for name, one in done.archives.items()
            if name.endswith(".img")
        }

    async def compare(self, target: str, format: str = "qcow2") -> None:
        """The newest snapshot has what the disk has now."""
        disks = re.findall(r"<disk.*?</disk>", self.domain.XMLDesc(0), re.DOTALL)
        element = next(disk for disk in disks if f"<target dev='{target}'" in disk)
        path = element.split("source file='")[1].split("'")[0]
        self.domain.suspend()
        try:
            restored, now = self.host.disks / "restored.raw", self.host.disks / "now.raw"
            done = await self.fleece.run("restore", "vm/web/latest", f"drive-{target}.img", restored, "--force")
            assert done.code == 0, done.err
            line = [distribution_qemu().img, "convert", "-U", "-f", format, "-O", "raw", path, str(now)]
            await trio.run_process(line)
            assert _digest(restored) == _digest(now)
        finally:
            self.domain.resume()

    async def job_ready(self, target: str) -> None:
        """Wait until a block job has copied all there was."""
        with trio.fail_after(60):
            while not self._is_ready(self.domain.blockJobInfo(target, 0)):  # noqa: ASYNC110 - libvirt must be asked
                await trio.sleep(0.1)

    @staticmethod
    def _is_ready(job: dict[str, int]) -> bool:
        return not job or job["cur"] == job["end"] > 0

    async def no_job(self, target: str) -> None:
        """Wait until none is left."""
        with trio.fail_after(60):
            while self.domain.blockJobInfo(target, 0):  # noqa: ASYNC110 - libvirt must be asked
                await trio.sleep(0.1)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
async def web(
    host: Libvirtd, fleece: FleeceCommand, pair: tuple[Path, Path], guest: SmallGuest
) -> AsyncIterator[Running]:
    disks = host.disk_xml("vda", pair[0], "qcow2"), host.disk_xml("sda", pair[1])
    channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
    domain = host.define(host.domain_xml("web", *disks, guest=guest, more=channel), paused=False)
    control = await GuestControl.connect(host.disks / "web.ctl")
    await control.ready()
    running = Running(host, fleece, domain, control)
    try:
        yield running
    finally:
        await running.guest.aclose()


def snapshot(name: str, file: Path) -> str:
    return (
        f"<domainsnapshot><name>{name}</name><disks><disk name='vda' snapshot='external'><source file='{file}'/></disk>"
        "<disk name='sda' snapshot='no'/></disks></domainsnapshot>"
    )


async def test_what_libvirt_does_between_two_backups_never_makes_one_wrong(web: Running) -> None:
    domain, disks = web.domain, web.host.disks
    await web.write("vda", 0, 4, "A")
    assert {one[0] for one in (await web.backup("--no-freeze")).values()} == {"full"}
    await web.write("vda", 12, 1, "B")
    assert (await web.backup("--no-freeze"))["vda"] == ("incremental", None, 4 << 20)
    await web.compare("vda")

    # Written before the overlay was made: only in the bitmap that stays behind.
    await web.write("vda", 16, 1, "C")
    domain.snapshotCreateXML(snapshot("s1", disks / "a.s1"), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
    await web.write("vda", 20, 1, "D")
    after = await web.backup("--no-freeze")
    assert after["vda"][0] == "full"
    assert after["sda"][0] == "incremental"
    await web.compare("vda")

    await web.write("vda", 8, 1, "E")
    domain.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    await web.job_ready("vda")
    await web.write("vda", 4, 1, "F")
    domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    await web.no_job("vda")
    await web.write("vda", 0, 1, "G")
    await web.backup("--no-freeze")
    await web.compare("vda")

    await web.write("vda", 2, 1, "H")
    copy = f"<disk type='file'><source file='{disks}/copy.qcow2'/><driver type='qcow2'/></disk>"
    domain.blockCopy("vda", copy, {}, libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
    await web.job_ready("vda")
    await web.write("vda", 6, 1, "I")
    domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    await web.no_job("vda")
    await web.backup("--no-freeze")
    await web.compare("vda")
    await web.write("vda", 6, 1, "J")
    assert (await web.backup("--no-freeze"))["vda"] == ("incremental", None, 4 << 20)
    await web.compare("vda")


async def test_a_save_and_restore_keeps_the_bitmaps_of_qcow2(web: Running) -> None:
    await web.write("vda", 0, 4, "A")
    await web.backup("--no-freeze")
    await web.write("vda", 8, 1, "B")
    saved = web.host.disks / "web.save"
    await web.guest.aclose()
    web.domain.save(str(saved))
    web.host.connection.restore(str(saved))
    web.guest = await GuestControl.connect(web.host.disks / "web.ctl")
    await web.write("vda", 16, 1, "C")
    again = await web.backup("--no-freeze")
    assert again["vda"] == ("incremental", None, 8 << 20)
    assert again["sda"][0] == "full"
    await web.compare("vda")


async def test_what_libvirt_is_asked_for_while_a_backup_reads(web: Running) -> None:
    domain, disks = web.domain, web.host.disks
    await web.write("vda", 0, 8, "A")
    async with web.fleece.start("vm", "backup", "web", "--no-freeze", stop_at="finish") as running:
        await running.stopped()
        assert domain.blockInfo("vda")[0] == 24 << 20
        assert domain.blockStats("sda")
        in_bytes = libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES
        refused(lambda: domain.blockResize("vda", 48 << 20, in_bytes), "Permission conflict")
        copy = f"<disk type='file'><source file='{disks}/copy.raw'/><driver type='raw'/></disk>"
        transient = libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        refused(lambda: domain.blockCopy("sda", copy, {}, transient), "root block node")
        refused(lambda: domain.save(str(disks / "web.save")), "unexpectedly failed|Bad address")
        assert domain.isActive()
        domain.checkpointCreateXML(
            "<domaincheckpoint><name>c1</name><disks><disk name='vda' checkpoint='bitmap'/>"
            "<disk name='sda' checkpoint='no'/></disks></domaincheckpoint>",
            0,
        )
        assert [one.getName() for one in domain.listAllCheckpoints()] == ["c1"]
        domain.suspend()
        domain.resume()
        await web.write("vda", 4, 1, "B")
        running.go_on()
        outcome = await running.ended()
    assert outcome.code == 0, outcome.err
    web.clock = int(time.time())
    assert (await web.backup("--no-freeze"))["vda"] == ("incremental", None, 4 << 20)
    await web.compare("vda")
    assert "c1" in web.host.bitmaps(domain)


async def test_an_overlay_that_is_made_while_a_backup_reads_stays_the_disk(web: Running) -> None:
    domain = web.domain
    await web.write("vda", 0, 8, "A")
    async with web.fleece.start("vm", "backup", "web", "--no-freeze", stop_at="finish") as running:
        await running.stopped()
        overlay = web.host.disks / "a.s1"
        domain.snapshotCreateXML(snapshot("s1", overlay), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY)
        await web.write("vda", 4, 1, "B")
        running.go_on()
        outcome = await running.ended()
    assert outcome.code in (0, 3), outcome.err
    assert not [node for node in web.host.nodes(domain) if node.startswith("fleece-")]
    await web.write("vda", 8, 1, "C")
    web.clock = int(time.time())
    assert (await web.backup("--no-freeze"))["vda"][0] == "full"
    await web.compare("vda")
    assert str(overlay) in domain.XMLDesc(0)


async def test_a_domain_that_is_destroyed_fails_its_backup_and_leaves_nothing(web: Running) -> None:
    await web.write("vda", 0, 20, "A")  # QEMU 10 reads no holes: something must be left to be read
    async with web.fleece.start("vm", "backup", "web", "--no-freeze", stop_at="read:1") as running:
        await running.stopped()
        web.domain.destroy()
        running.go_on()
        outcome = await running.ended()
    assert outcome.code == 1
    assert not list((web.fleece.home / "scratch").glob("*.raw"))
    cleaned = await web.fleece.json("vm", "cleanup", "web")
    assert cleaned == {"done": []}


def refused(work: Callable[[], object], why: str) -> None:
    with pytest.raises(libvirt.libvirtError, match=why):
        work()


# -- the guest agent --------------------------------------------------------------------------------------------------


async def agent_answers(web: Running, agent: str = AGENT) -> None:
    for line in agent.strip().splitlines():
        quoted = line.replace("'", "'\\''")
        await web.guest.check(f"printf '%s\\n' '{quoted}' >>/tmp/agent")
    await web.guest.check("sh /tmp/agent >/tmp/agent.log 2>&1 &")
    with trio.fail_after(60):
        while "state='connected'" not in web.domain.XMLDesc(0):  # noqa: ASYNC110 - libvirt must be asked
            await trio.sleep(0.1)
    web.domain.agentSetResponseTimeout(60, 0)  # a shell on a busy machine may need more than the 5 s of a real agent


async def told(web: Running) -> list[str]:
    lines = (await web.guest.check("cat /tmp/told; rm -f /tmp/told")).splitlines()
    return [line for line in lines if line]


async def test_the_guest_is_frozen_for_the_instant_by_libvirt(web: Running) -> None:
    await agent_answers(web)
    done = await web.fleece.run("vm", "backup", "web")
    assert done.code == 0, done.err
    assert 0 < done.document["frozen-s"] < 10
    freeze, thaw = await told(web)
    assert '"guest-fsfreeze-freeze"' in freeze
    assert thaw == "thaw 2"

    done = await web.fleece.run("vm", "backup", "web", "--freeze-mount", "/data", "--freeze-mount", "/srv")
    assert done.code == 0, done.err
    freeze, thaw = await told(web)
    assert "guest-fsfreeze-freeze-list" in freeze
    assert '["/data","/srv"]' in freeze.replace(" ", "")


async def test_a_killed_backup_leaves_no_guest_frozen(web: Running) -> None:
    await agent_answers(web)
    async with web.fleece.start("vm", "backup", "web", stop_at="command:blockdev-reopen:1") as running:
        await running.stopped()
        await running.kill()
    with trio.fail_after(60):
        while (await web.guest.run("test -e /tmp/frozen"))[0] == 0:  # noqa: ASYNC110 - the guest must be asked
            await trio.sleep(0.2)
    assert "thaw 2" in await told(web)
    # One that is frozen all the same, by whomever, is thawed.
    await web.guest.check("touch /tmp/frozen")
    cleaned = await web.fleece.json("vm", "cleanup", "web")
    assert "the guest was still frozen by an earlier run; it has been thawed" in cleaned["done"]


async def test_a_guest_that_is_frozen_too_late_is_thawed_when_libvirt_hears_of_it(web: Running) -> None:
    slow = "touch /tmp/asked; while [ ! -e /tmp/go ]; do sleep 0.2; done; "
    await agent_answers(web, AGENT.replace("touch /tmp/frozen; echo", f"{slow}touch /tmp/frozen; echo", 1))
    # For ever, as libvirt waits by itself; that it says so to -2 only, and waits 5 s for the synchronization before it
    # then, is more than a shell on a busy machine can do.
    web.domain.agentSetResponseTimeout(100_000, 0)
    done = await web.fleece.run("vm", "backup", "web", timeout_s=180)
    assert done.code == 3, done.err
    warnings = done.document["warnings"]
    assert any("the agent has not answered the order to freeze" in one for one in warnings), warnings
    assert (await web.guest.run("test -e /tmp/asked && test ! -e /tmp/frozen"))[0] == 0
    await web.guest.check("touch /tmp/go")
    with trio.fail_after(180):
        while "thaw 2" not in await told(web):  # noqa: ASYNC110 - the guest must be asked
            await trio.sleep(0.5)
    assert (await web.guest.run("test -e /tmp/frozen"))[0] != 0


async def test_an_agent_that_talks_nonsense_costs_a_warning(web: Running) -> None:
    nonsense = "head -c 3000000 /dev/zero | tr '\\0' x >&3; echo >&3; echo '{\"return\": {\"a\": [' >&3"
    await agent_answers(web, AGENT.replace("echo '{\"return\": 2}' >&3", nonsense, 1))
    done = await web.fleece.run("vm", "backup", "web", "--pause", "without-agent", timeout_s=180)
    assert done.code == 3, done.err
    assert done.document["warnings"]
    assert web.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    await web.compare("vda")


# -- libvirtd itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [False, True], ids=["in order", "killed"])
async def test_libvirtd_is_started_again_while_a_backup_reads(web: Running, kill: bool) -> None:
    await web.write("vda", 0, 8, "A")
    async with web.fleece.start("vm", "backup", "web", "--no-freeze", stop_at="finish") as running:
        await running.stopped()
        await trio.to_thread.run_sync(lambda: web.host.restart(kill=kill))
        web.domain = web.host.connection.lookupByName("web")
        await web.write("vda", 4, 1, "B")
        running.go_on()
        outcome = await running.ended()
    assert outcome.code == 0, outcome.err
    assert not [node for node in web.host.nodes(web.domain) if node.startswith("fleece-")]
    web.clock = int(time.time())
    assert (await web.backup("--no-freeze"))["vda"] == ("incremental", None, 4 << 20)
    await web.compare("vda")


async def test_a_domain_migrates_between_two_backups(
    web: Running, started_libvirtd: Libvirtd, request: pytest.FixtureRequest
) -> None:
    newer = "newer" in request.node.callspec.id
    qemu = backports_qemu() if newer else distribution_qemu()
    flags = (
        libvirt.VIR_MIGRATE_LIVE
        | libvirt.VIR_MIGRATE_PERSIST_DEST
        | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
        | libvirt.VIR_MIGRATE_UNSAFE
    )
    await web.write("vda", 0, 8, "A")
    await web.backup("--no-freeze")
    await web.write("vda", 12, 1, "B")
    with libvirtd(qemu, host="other", newer=newer) as other:
        config = web.fleece.config
        where = {"migrate_uri": f"tcp:127.0.0.1:{_free_port()}"}
        async with web.fleece.start("vm", "backup", "web", "--no-freeze", stop_at="finish") as running:
            await running.stopped()
            with pytest.raises(libvirt.libvirtError):
                await trio.to_thread.run_sync(lambda: web.domain.migrate3(other.connection, where, flags))
            assert web.domain.isActive()
            running.go_on()
            assert (await running.ended()).code == 0
        await web.write("vda", 16, 1, "C")
        await web.guest.aclose()
        where = {"migrate_uri": f"tcp:127.0.0.1:{_free_port()}"}
        web.domain = await trio.to_thread.run_sync(lambda: web.domain.migrate3(other.connection, where, flags))
        config.write_text(config.read_text().replace(web.host.uri, other.uri))
        web.clock = int(time.time())
        after = await web.backup("--no-freeze")
        assert after["vda"] == ("incremental", None, 4 << 20), "its bitmap is in the image"
        assert after["sda"][:2] == ("full", "VM migrated since the previous backup, without its dirty bitmaps")
        await web.compare("vda")
        assert (await web.backup("--no-freeze"))["sda"] == ("incremental", None, 0)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_the_disks_of_a_domain_are_connected_as_files(web: Running, request: pytest.FixtureRequest) -> None:
    if "newer" not in request.node.callspec.id:
        pytest.skip("QEMU 7.2 has no frozen views for others, which test_cycle.py looks at")
    await web.write("vda", 0, 8, "A")
    await web.backup("--no-freeze")
    await web.write("vda", 12, 1, "B")
    folder = web.host.disks / "f"
    folder.mkdir()
    held = await web.fleece.json("nbd", "connect", "web", "--no-freeze", "--changed", "--files", folder)
    await web.write("vda", 12, 4, "C")
    image = await trio.to_thread.run_sync((folder / "drive-vda.img").read_bytes)
    assert image[12 << 20 : 13 << 20] == b"B" * (1 << 20)
    assert image[13 << 20 : 16 << 20] == bytes(3 << 20)
    regions = await web.fleece.json("nbd", "regions", folder / "drive-vda.img")
    assert regions == [{"offset": 12 << 20, "length": 4 << 20}]
    assert held["source"]["qmp"] == f"libvirt+{web.host.uri}#web"
    await web.fleece.json("nbd", "disconnect", "--all")
    assert not [node for node in web.host.nodes(web.domain) if node.startswith("fleece-")]
    assert (await web.backup("--no-freeze"))["vda"] == ("incremental", None, 4 << 20)
    await web.compare("vda")


# -- TPM --------------------------------------------------------------------------------------------------------------


def test_the_state_of_a_tpm_comes_back_with_the_domain(
    host: Libvirtd, store_folder: Path, pair: tuple[Path, Path]
) -> None:
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    domain = host.define(host.domain_xml("web", host.disk_xml("vda", pair[0], "qcow2"), more=tpm))
    home = host.disks / "h"
    home.mkdir()
    (home / "fleece.toml").write_text(f'[vm.web]\nlibvirt = "web"\nscratch = "{home}/s"\nscratch-beside-disks = true\n')
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "FLEECE_STATE_DIR": str(home / "state"),
        "FLEECE_RUN_DIR": str(home / "run"),
        "FLEECE_CONFIG": str(home / "fleece.toml"),
        "FLEECE_REPOSITORY": str(store_folder),
        # libvirtd listens elsewhere than the one of the machine would.
        "LIBVIRT_DEFAULT_URI": host.uri,
    }

    def inside(*words: str) -> str:
        done = host.inside(words, environment)
        assert done.returncode in (0, 3), done
        return done.stdout

    state = f"/var/lib/libvirt/swtpm/{domain.UUIDString()}/tpm2/tpm2-00.permall"
    before = inside("sha256sum", state).split()[0]
    inside(*fleece_inside(), "vm", "backup", "web")
    domain.destroy()
    uuid = domain.UUIDString()
    domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_TPM)
    assert host.inside(["test", "-e", state], environment).returncode == 1
    inside(*fleece_inside(), "vm", "restore", "vm/web/latest", str(host.disks / "back"), "--libvirt")
    assert inside("sha256sum", state).split()[0] == before
    again = host.connection.lookupByName("web")
    assert again.UUIDString() == uuid
    again.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    assert again.isActive(), "swtpm of another user can read its state"
