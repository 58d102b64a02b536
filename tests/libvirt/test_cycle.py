"""Domains of a real libvirtd, backed up and restored; the test writes to their disks as their guests would."""

import hashlib
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.fleece_command import FleeceCommand
from tests.support.libvirtd import Libvirtd

pytestmark = pytest.mark.qemu

MIB = 1 << 20
VDA = "/machine/peripheral/virtio-disk0/virtio-backend"
SDA = "scsi0-0-0-0"


def defined(host: Libvirtd, pair: tuple[Path, Path], *, start: bool = True) -> Any:
    """The domain `web` with a qcow2 disk of 24 MiB and a raw one of 10 MiB."""
    disks = host.disk_xml("vda", pair[0], "qcow2"), host.disk_xml("sda", pair[1])
    more = "<graphics type='vnc' passwd='Geheim1' listen='127.0.0.1'/><interface type='user'/>"
    return host.define(host.domain_xml("web", *disks, more=more), start=start)


def pattern(*runs: tuple[int, int]) -> str:
    """SHA-256 of a disk made of (byte, MiB) runs."""
    digest = hashlib.sha256()
    for byte, length in runs:
        digest.update(bytes([byte]) * (length * MIB))
    return digest.hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_a_domain_is_backed_up_restored_beside_itself_and_backed_up_when_it_is_off(
    host: Libvirtd, fleece: FleeceCommand, pair: tuple[Path, Path]
) -> None:
    domain = defined(host, pair)
    host.write(domain, VDA, "write -P 0x11 0 8M")
    host.write(domain, SDA, "write -P 0x22 0 10M")
    before = host.nodes(domain)

    first = await fleece.run("vm", "backup", "web")
    assert first.code == 0, first.err
    images = {name: archive for name, archive in first.archives.items() if name.endswith(".img")}
    assert {(name, disk["mode"], disk["reason"]) for name, disk in images.items()} == {
        ("drive-vda.img", "full", "first backup of this group"),
        ("drive-sda.img", "full", "first backup of this group"),
    }
    assert set(first.archives) - set(images) == {"domain.xml", "domain-live.xml", "qemu-command.json"}
    assert host.nodes(domain) == before, "nothing is left in QEMU"
    assert domain.listAllCheckpoints() == [], "the bitmaps are none of libvirt's checkpoints"

    host.write(domain, VDA, "write -P 0x33 12M 1M")
    shown = await fleece.json("vm", "show", "web")
    assert [(disk["name"], disk["device"], disk["next"]) for disk in shown["disks"]] == [
        ("drive-vda.img", "virtio-disk0", {"mode": "incremental", "reason": None, "bytes": 4 * MIB}),
        ("drive-sda.img", "scsi0-0-0-0", {"mode": "incremental", "reason": None, "bytes": 0}),
    ]
    second = await fleece.run("vm", "backup", "--libvirt", "web", "--connect", host.uri)
    assert second.code == 0, second.err
    assert second.archives["drive-vda.img"]["read"] == 4 * MIB
    assert second.archives["drive-sda.img"]["read"] == 0
    assert second.document["snapshot"].startswith("vm/web/")

    refused = await fleece.run("nbd", "connect", "--libvirt", "web", "--connect", host.uri, "--files", host.disks)
    assert "whose frozen views give wrong data to readers of any kind" in refused.error["why"], "its QEMU is 7.2"
    refused = await fleece.run("vm", "restore", "vm/web/latest", host.disks / "x", "--libvirt", "--connect", host.uri)
    assert refused.code == 1
    assert "it runs" in refused.error["why"]
    assert not (host.disks / "x").exists(), "nothing is written if it cannot be finished"

    words = ("--libvirt", "--connect", host.uri, "--name", "web2", "--start")
    restored = await fleece.run("vm", "restore", "vm/web/latest", host.disks / "y", *words)
    assert restored.code in (0, 3), restored.err
    (definition,) = restored.document["definitions"]
    twin = host.connection.lookupByName("web2")
    assert twin.isActive()
    assert twin.UUIDString() == definition["uuid"] != domain.UUIDString()
    xml, old = ElementTree.fromstring(twin.XMLDesc(2)), ElementTree.fromstring(domain.XMLDesc(2))
    assert [source.get("file") for source in xml.findall("devices/disk/source")] == [
        str(host.disks / "y/drive-vda.raw"),
        str(host.disks / "y/drive-sda.raw"),
    ]
    address = "devices/interface/mac"
    assert xml.find(address).get("address") != old.find(address).get("address")  # type: ignore[union-attr]
    text = (host.disks / "y/domain.xml").read_text() + (host.disks / "y/domain-live.xml").read_text()
    assert "Geheim1" not in text, "passwords stay out of backups"
    twin.destroy()
    assert sha256(host.disks / "y/drive-vda.raw") == pattern((0x11, 8), (0, 4), (0x33, 1), (0, 11))
    assert sha256(host.disks / "y/drive-sda.raw") == pattern((0x22, 10))

    domain.destroy()
    off = await fleece.run("vm", "backup", "web")
    assert off.code == 0, off.err
    assert {name: archive["mode"] for name, archive in off.archives.items() if name.endswith(".img")} == {
        "drive-vda.img": "full",
        "drive-sda.img": "full",
    }
    assert off.archives["drive-vda.img"]["new"] == 0, "the same bytes as when it ran"
    await replaced(host, fleece, domain, pair)


async def replaced(host: Libvirtd, fleece: FleeceCommand, domain: Any, pair: tuple[Path, Path]) -> None:
    """The domain itself is replaced only by force, and keeps its UUID."""
    uuid = domain.UUIDString()
    line = ("vm", "restore", "vm/web/latest", host.disks / "z", "--libvirt", "--connect", host.uri)
    refused = await fleece.run(*line)
    assert refused.code == 1
    assert "--force replaces it" in refused.error["hint"]
    done = await fleece.run(*line, "--format", "qcow2", "--force")
    assert done.code in (0, 3), done.err
    again = host.connection.lookupByName("web")
    assert again.UUIDString() == uuid
    assert f"{host.disks}/z/drive-vda.qcow2" in again.XMLDesc(0)
    assert str(pair[0]) not in again.XMLDesc(0)


async def test_what_a_killed_backup_has_left_is_removed_through_libvirt(
    host: Libvirtd, fleece: FleeceCommand, pair: tuple[Path, Path]
) -> None:
    domain = defined(host, pair)
    before = host.nodes(domain)
    async with fleece.start("vm", "backup", "web", stop_at="finish") as running:
        await running.stopped()
        assert any(node.startswith("fleece-") for node in host.nodes(domain))
        await running.kill()
    words = ("--libvirt", "web", "--connect", host.uri, "--scratch", fleece.home / "scratch")
    left = await fleece.run("vm", "cleanup", *words)
    assert left.code == 0, left.err
    assert "removed the block nodes" in left.document["done"]
    assert host.nodes(domain) == before
    assert not list((fleece.home / "scratch").glob("*.raw"))


async def test_a_disk_that_is_unplugged_during_a_backup_is_let_go_at_its_end(
    host: Libvirtd, fleece: FleeceCommand, pair: tuple[Path, Path]
) -> None:
    domain = defined(host, pair)
    async with fleece.start("vm", "backup", "web", stop_at="finish") as running:
        await running.stopped()
        domain.detachDeviceFlags(host.disk_xml("sda", pair[1]), 1)
        assert "libvirt-1-format" in host.nodes(domain), "a view of it is still being read"
        running.go_on()
        outcome = await running.ended()
    assert outcome.code in (0, 3), outcome.err
    assert host.nodes(domain) == ["libvirt-2-format"], "nobody else would ever close the image"


async def test_a_domain_that_libvirt_is_at_work_on_is_refused_with_the_reason(
    host: Libvirtd, fleece: FleeceCommand, pair: tuple[Path, Path]
) -> None:
    domain = defined(host, pair)
    domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{host.disks}/nbd'/>"
        f"<disks><disk name='vda' backup='yes' type='file'><scratch file='{host.disks}/scratch'/></disk>"
        "<disk name='sda' backup='no'/></disks></domainbackup>",
        None,
    )
    refused = await fleece.run("vm", "backup", "web")
    assert refused.code == 1
    assert "a backup of libvirt's own runs" in refused.error["why"]
    assert "virsh domjobinfo" in refused.error["hint"]
    domain.abortJob()

    copy = f"<disk type='file'><source file='{host.disks}/copy.raw'/><driver type='raw'/></disk>"
    domain.blockCopy("sda", copy, {}, 4)  # VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    refused = await fleece.run("vm", "backup", "web")
    assert refused.code == 1
    assert re.search(r"the block job 'copy-sda-.*' \(mirror\) works on it", refused.error["why"])
    assert not [node for node in host.nodes(domain) if node.startswith("fleece-")]


async def test_efi_variables_go_along_whether_the_domain_runs_or_not(
    host: Libvirtd, fleece: FleeceCommand, pair: tuple[Path, Path]
) -> None:
    # Nothing of it is run: the domain stays paused.
    code, variables = host.disks / "code.fd", host.disks / "vars.fd"
    code.write_bytes(bytes(4 << 20))
    variables.write_bytes(b"EFI!" * 32768)
    system = f"<loader readonly='yes' type='pflash'>{code}</loader><nvram>{variables}</nvram>"
    xml = host.domain_xml("web", host.disk_xml("vda", pair[0], "qcow2"), system=system)
    domain = host.define(xml)
    done = await fleece.run("vm", "backup", "web")
    assert done.code == 0, done.err
    assert "efivars.fd" in done.archives
    words = ("--libvirt", "--connect", host.uri, "--name", "web2", "--trust", "--start")
    domain.destroy()
    done = await fleece.run("vm", "restore", "vm/web/latest", host.disks / "y", *words)
    assert done.code in (0, 3), done.err
    twin = host.connection.lookupByName("web2")
    assert f"<nvram>{host.disks}/y/efivars.fd</nvram>" in twin.XMLDesc(0)
    assert (host.disks / "y/efivars.fd").read_bytes() == b"EFI!" * 32768
    twin.destroy()
    off = await fleece.run("vm", "backup", "web")
    assert off.code == 0, off.err
    assert "efivars.fd" in off.archives


def test_nothing_is_left_of_libvirtd_itself(host: Libvirtd) -> None:
    """The fixture's own promise: everything it starts is below one process."""
    own, its = Path("/proc/self/ns"), Path(f"/proc/{host.pid}/ns")
    assert all((own / kind).readlink() != (its / kind).readlink() for kind in ("mnt", "pid"))
