"""How the frozen view behind `fleece nbd connect` is ordered: as that of a backup, of a socket or a domain."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent import libvirt_vm, nbd_offers
from agent.config import Config, VmSection
from agent.vm_settings import VmOptions, resolve_vm
from hypervisor.domain_address import DomainAddress
from hypervisor.libvirt_host import DomainState
from hypervisor.pause import Pause
from hypervisor.unix_socket import Peer

XML = (
    "<domain type='kvm'><name>web</name><uuid>6ba7b810-9dad-11d1-80b4-00c04fd430c8</uuid><devices>"
    "<disk type='file'><source file='/b'/><target dev='vda'/><alias name='virtio-disk0'/><shareable/></disk>"
    "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices></domain>"
)


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was ordered, in the end: the VM, and the options."""
    found: list[Any] = []

    @asynccontextmanager
    async def view(monitor: str, **options: Any) -> AsyncIterator[Any]:
        found.extend((monitor, options))
        yield SimpleNamespace(sources=[], warnings=[], instant=1.0, flavour=SimpleNamespace(value="stock"))

    async def peer(*_args: object, **_options: object) -> Peer:
        return Peer(1, 0, 0, 1)

    async def state(_address: DomainAddress) -> DomainState:
        return DomainState("web", "6ba7b810-9dad-11d1-80b4-00c04fd430c8", True, True, XML, XML)

    async def idle(_settings: object) -> None:
        found.append("looked for jobs")

    monkeypatch.setattr(nbd_offers, "frozen_view", view)
    monkeypatch.setattr(nbd_offers, "_check", peer)
    monkeypatch.setattr(nbd_offers, "check_idle", idle)
    monkeypatch.setattr(libvirt_vm, "domain_state", state)
    return found


async def test_mount_points_and_pause_are_those_of_the_configuration(ordered: list[Any]) -> None:
    written = {
        "qmp": "/run/web.qmp", "guest-agent": "/run/web.qga", "freeze-mounts": ["/srv"], "pause": "without-agent",
    }  # fmt: skip
    section = VmSection.model_validate(written)
    settings = resolve_vm(Config(vm={"web": section}), VmOptions("web"))
    async with nbd_offers.vm_offer(settings) as offer:
        assert offer.source["qmp"] == "/run/web.qmp"
    *_, monitor, options = ordered
    assert (monitor, options["mount_points"], options["pause"]) == ("/run/web.qmp", ["/srv"], Pause.WITHOUT_AGENT)
    assert options["guest_agent"] == Path("/run/web.qga")


async def test_a_domain_is_looked_up_and_reached_through_libvirt(ordered: list[Any]) -> None:
    settings = resolve_vm(Config(), VmOptions(libvirt="web", connect="qemu:///system"))
    address = "libvirt+qemu:///system#web"
    async with nbd_offers.vm_offer(settings) as offer:
        assert offer.source["qmp"] == address
    jobs, monitor, options = ordered
    assert (jobs, monitor, options["guest_agent"]) == ("looked for jobs", address, address)
    assert options["disks"].names == {"virtio-disk0": "vda"}, "called as in backups"
    assert options["disks"].shared == {"virtio-disk0"}
