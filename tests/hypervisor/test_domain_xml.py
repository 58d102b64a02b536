"""Descriptions of libvirt's domains, written by hand: what is read of them, and what hostile ones cannot do."""

from collections.abc import Sequence
from xml.etree import ElementTree

import pytest

from core.errors import FormatError
from hypervisor.domain_address import DomainAddress, is_elsewhere
from hypervisor.domain_rewrite import NewDisk, NewDomain, Rewritten, rewrite
from hypervisor.domain_xml import MAX_SIZE, parse_domain, without_secrets

UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
OTHER = "00000000-0000-4000-8000-000000000001"
DISKS = """
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/><source file='/img/a.qcow2' index='2'/>
 <backingStore type='file'><format type='raw'/><source file='/img/base.raw'/></backingStore>
 <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/b'/>
 <target dev='vdb' bus='virtio'/><shareable/></disk>
<disk type='network' device='disk'><driver name='qemu' type='raw'/><auth username='a'>
 <secret type='ceph' uuid='x'/></auth><source protocol='rbd' name='pool/image'><host name='10.0.0.1'/></source>
 <target dev='vdc' bus='virtio'/></disk>
<disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='fast' volume='vol1'/><target dev='vdd'/>
</disk>
<disk type='nvme' device='disk'><driver name='qemu' type='raw'/><source type='pci' managed='yes' namespace='1'/>
 <target dev='vde' bus='virtio'/></disk>
<disk type='dir' device='floppy'><driver name='qemu' type='fat'/><source dir='/etc'/><target dev='fda'/>
 <readonly/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='/iso/x.iso'/><target dev='sda'/>
 <readonly/></disk>
<disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>
<disk type='file' device='disk'><source file='/img/luks.qcow2'><encryption format='luks'><secret type='passphrase'
 uuid='x'/></encryption></source><driver name='qemu' type='qcow2'/><target dev='vdf'/></disk>
<disk type='file' device='disk'><source file='/img/ro.raw'/><target dev='vdg'/><readonly/></disk>
<disk type='file' device='disk'><target dev='vdh'/></disk>
"""


def domain(devices: str = "", *, more: str = "", system: str = "", kind: str = "kvm", name: str = "web") -> str:
    return f"""<domain type='{kind}' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>{name}</name><uuid>{UUID}</uuid><os><type arch='x86_64' machine='q35'>hvm</type>{system}</os>
<devices>{devices}</devices>{more}</domain>"""


# -- reading ----------------------------------------------------------------------------------------------------------


def test_disks_of_every_kind_are_told_apart() -> None:
    found = {disk.target: disk for disk in parse_domain(domain(DISKS)).disks}
    assert {target: (disk.kind, disk.source) for target, disk in found.items()} == {
        "vda": ("file", "/img/a.qcow2"),
        "vdb": ("block", "/dev/vg/b"),
        "vdc": ("other", "network"),
        "vdd": ("volume", "fast/vol1"),
        "vde": ("other", "nvme"),
        "fda": ("other", "dir"),
        "sda": ("file", "/iso/x.iso"),
        "sdb": ("empty", ""),
        "vdf": ("file", "/img/luks.qcow2"),
        "vdg": ("file", "/img/ro.raw"),
        "vdh": ("empty", ""),
    }
    assert [target for target, disk in found.items() if disk.is_disk] == ["vda", "vdb", "vdc", "vdd", "vde", "vdf"]
    assert [target for target, disk in found.items() if disk.shareable] == ["vdb"]
    assert [target for target, disk in found.items() if disk.encrypted] == ["vdf"]
    assert (found["vda"].alias, found["vda"].format, found["vda"].archive) == ("virtio-disk0", "qcow2", "drive-vda.img")


def test_firmware_tpm_agent_and_owner_are_found() -> None:
    found = parse_domain(
        domain(
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
            "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>",
            system="<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader><nvram>/n/web.fd</nvram>",
            more="<seclabel type='dynamic' model='apparmor'><label>x</label></seclabel>"
            "<seclabel type='dynamic' model='dac'><label>+64055:+64055</label></seclabel>",
        )
    )
    assert (found.name, found.uuid, found.nvram, found.has_agent, found.owner) == (
        "web",
        UUID,
        "/n/web.fd",
        True,
        64055,
    )
    assert found.tpm is not None
    assert (found.tpm.version, found.tpm.source) == ("2.0", None)


FIRMWARE = "<loader readonly='yes' type='pflash' format='qcow2'>/usr/share/OVMF/OVMF_CODE.qcow2</loader>"


@pytest.mark.parametrize(
    ("system", "format"),
    [
        ("<loader>/usr/share/OVMF/OVMF_CODE.fd</loader><nvram>/n/web.fd</nvram>", "raw"),
        (f"{FIRMWARE}<nvram>/n/web.fd</nvram>", "qcow2"),
        (f"{FIRMWARE}<nvram format='raw'>/n/web.fd</nvram>", "raw"),
        ("<nvram format='qcow2'>/n/web.fd</nvram>", "qcow2"),
        ("<nvram format='x&quot; y'>/n/web.fd</nvram>", "raw"),
        ("", "raw"),
    ],
)
def test_the_format_of_the_efi_variables_is_that_of_the_firmware(system: str, format: str) -> None:
    assert parse_domain(domain(system=system)).nvram_format == format
    root, _ = rewritten(domain(DISKS, system=system), nvram="/new/vars")
    assert [(one.text, one.get("format", "raw")) for one in root.findall("os/nvram")] == (
        [("/new/vars", format)] if system else []
    )


def test_a_name_is_kept_to_the_letter_and_a_part_of_a_file_is_told() -> None:
    sliced = "<disk type='file'><source file='/a'><slices><slice type='storage' offset='0' size='9'/></slices></source>"
    found = parse_domain(domain(sliced + "<target dev='vda'/></disk>", name=" web "))
    assert found.name == " web "
    assert found.disks[0].sliced


BOMB = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;'>]>" + domain("&b;")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no xml",
        "<domain>",
        "<network><name>web</name></network>",
        domain()[:-4],
        domain().replace("web", ""),
        domain(name="../../etc"),
        domain(name="a\nb"),
        domain(name="x" * 300),
        domain(name="  "),
        domain().replace(UUID, "../x"),
        BOMB,
        "<!DOCTYPE d SYSTEM 'file:///etc/passwd'>" + domain(),
        domain("<disk type='file'><target dev='../x'/></disk>"),
        domain("<disk type='file'><target/></disk>"),
        domain("<disk type='file'><target dev='vda'/></disk>" * 2),
        domain("".join(f"<disk><target dev='v{number}'/></disk>" for number in range(4097))),
        "<domain>" + "<a>" * 100 + "</a>" * 100 + "</domain>",
        "<domain>" + "<a/>" * 60_000 + "</domain>",
        domain("x" * (MAX_SIZE + 1)),
    ],
)
def test_what_describes_no_domain_is_a_clear_error(text: str) -> None:
    with pytest.raises(FormatError):
        parse_domain(text)


def test_another_encoding_hides_no_document_type() -> None:
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        with pytest.raises(FormatError):
            parse_domain(BOMB.encode(encoding))


def test_secrets_are_masked_and_the_rest_is_kept() -> None:
    stored = without_secrets(
        domain(
            DISKS + "<graphics type='vnc' passwd='Geheim1'/>",
            system="<cmdline>root=/dev/vda systemd.set_credential=x:Geheim2</cmdline>",
            more="<qemu:commandline><qemu:arg value='-object'/><qemu:arg value='secret,id=s,data=Geheim3'/>"
            "<qemu:env name='TOKEN' value='Geheim4'/></qemu:commandline>"
            "<sysinfo type='fwcfg'><entry name='opt/x'>Geheim5</entry></sysinfo>"
            "<sysinfo type='smbios'><oemStrings><entry>io.systemd.credential:a=Geheim6</entry></oemStrings></sysinfo>",
        )
    ).decode()
    assert "Geheim" not in stored
    assert parse_domain(stored).disks == parse_domain(domain(DISKS)).disks
    assert "root=/dev/vda" in stored
    assert "id=s" in stored


# -- writing ----------------------------------------------------------------------------------------------------------


def rewritten(
    text: str,
    disks: Sequence[str] = ("vda",),
    *,
    trusted: bool = False,
    new_identity: bool = False,
    nvram: str | None = None,
    live: str | None = None,
) -> tuple[ElementTree.Element, Rewritten]:
    new = [NewDisk(f"drive-{target}.img", f"/new/{target}.raw", "file", "raw") for target in disks]
    wanted = NewDomain(
        name="web2",
        uuid=OTHER,
        new_identity=new_identity,
        disks=new,
        nvram=nvram,
        trusted=trusted,
        exists=lambda path: path == "/iso/x.iso",
    )
    result = rewrite(text.encode(), wanted, where="vm/web/latest", live=None if live is None else live.encode())
    return ElementTree.fromstring(result.xml), result


def test_disks_point_to_where_they_were_restored_and_others_go() -> None:
    root, result = rewritten(domain(DISKS), ("vda", "vdc"))
    found = {target.get("dev"): disk for disk in root.findall("devices/disk") for target in disk.findall("target")}
    assert set(found) == {"vda", "vdc", "fda", "sda", "sdb"}
    for name in ("vda", "vdc"):
        disk = found[name]
        assert disk.get("type") == "file"
        assert [source.attrib for source in disk.findall("source")] == [{"file": f"/new/{name}.raw"}]
        assert disk.find("backingStore") is None
        assert disk.find("auth") is None
        driver = disk.find("driver")
        assert driver is not None
        assert driver.get("type") == "raw"
    driver = found["vda"].find("driver")
    assert driver is not None
    assert driver.get("cache") == "none", "what else the driver says stays"
    assert result.disks == {"vda": "drive-vda.img", "vdc": "drive-vdc.img"}
    assert not [disk for disk in (found["fda"], found["sda"]) if disk.find("source") is not None]
    assert (root.findtext("name"), root.findtext("uuid"), root.get("id")) == ("web2", OTHER, None)
    assert any("vdb" in warning for warning in result.warnings)


def test_a_restored_disk_has_nothing_that_libvirt_takes_for_its_former_kind_only() -> None:
    one = (
        "<disk type='block' device='lun' rawio='yes' sgio='filtered'><driver name='qemu' type='raw'/>"
        "<source dev='/dev/a'/><target dev='vda' bus='scsi'/></disk>"
        "<disk type='file'><driver name='qemu' type='qcow2' cache='none' discard_no_unref='on'><metadata_cache>"
        "<max_size unit='bytes'>9</max_size></metadata_cache></driver><source file='/b'/><target dev='vdb'/></disk>"
    )
    root, _ = rewritten(domain(one), ("vda", "vdb"))
    first, second = root.findall("devices/disk")
    assert first.attrib == {"type": "file", "device": "disk"}
    driver = second.find("driver")
    assert driver is not None
    assert (driver.attrib, list(driver)) == ({"name": "qemu", "type": "raw", "cache": "none"}, [])


def test_a_disk_that_was_plugged_in_only_then_is_taken_from_the_running_description() -> None:
    one = "<disk type='file'><source file='/img/a'/><target dev='vda' bus='virtio'/></disk>"
    two = "<disk type='file'><source file='/img/b'/><target dev='vdb' bus='virtio'/></disk>"
    root, result = rewritten(domain(one), ("vda", "vdb"), live=domain(one + two))
    assert [source.get("file") for source in root.findall("devices/disk/source")] == ["/new/vda.raw", "/new/vdb.raw"]
    assert result.warnings == []


def test_a_disk_with_a_name_of_its_own_is_matched_where_only_one_is_left() -> None:
    one = "<disk type='file'><source file='/img/a'/><target dev='vda' bus='virtio'/></disk>"
    _, result = rewritten(domain(one), ("system",))
    assert result.disks == {"vda": "drive-system.img"}
    assert "taken for vda" in result.warnings[0]
    with pytest.raises(FormatError, match=r"no disk for drive-system\.img, drive-data\.img"):
        rewritten(domain(one), ("system", "data"))


REACHING = (
    "<emulator>/home/evil/qemu</emulator>"
    "<disk type='file' device='cdrom'><source file='/iso/x.iso'/><target dev='sda'/><readonly/></disk>"
    "<disk type='file'><source file='/etc/shadow'/><target dev='vdz' bus='virtio'/></disk>"
    "<filesystem type='mount'><source dir='/'/><target dir='host'/></filesystem>"
    "<hostdev mode='subsystem' type='pci'><source/></hostdev>"
    "<interface type='ethernet'><script path='/tmp/evil.sh'/></interface>"
    "<interface type='direct'><source dev='eth0'/></interface>"
    "<serial type='file'><source path='/etc/cron.d/x'/></serial>"
    "<channel type='unix'><source mode='bind' path='/run/evil'/><target name='x'/></channel>"
    "<console type='dev'><source path='/dev/sda'/></console>"
    "<rng model='virtio'><backend model='random'>/etc/shadow</backend></rng>"
    "<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
    "<shmem name='x'/><memory model='nvdimm'><source><path>/etc/shadow</path></source></memory>"
    "<input type='passthrough' bus='virtio'><source evdev='/dev/input/event1'/></input>"
    "<smartcard mode='host'/>"
    # What libvirt writes as root, opens or lets a guest read beside a device that harms nobody.
    "<serial type='pty'><log file='/etc/cron.d/x' append='off'/></serial>"
    "<channel type='unix'><log file='/etc/x'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
    "<console type='null'><log file='/etc/x'/></console>"
    "<interface type='bridge'><source bridge='br0'/><rom bar='on' file='/etc/shadow'/></interface>"
    "<graphics type='egl-headless'><gl rendernode='/dev/dri/card0'/></graphics>"
    "<graphics type='dbus' address='unix:path=/run/evil'/><graphics type='spice'><gl rendernode='/dev/x'/></graphics>"
    "<video><model type='virtio'><acceleration rendernode='/dev/sda'/></model></video>"
    "<rng model='virtio'><backend model='random'>/dev/random</backend><backend model='random'>/etc/x</backend></rng>"
    "<tpm><backend type='emulator'/><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
    # Relative to `/`, where libvirt and QEMU are at home.
    "<disk type='file' device='cdrom'><source file='etc/shadow'/><target dev='sdb'/><readonly/></disk>"
    "<disk type='block' device='floppy'><source dev='etc/x'/><target dev='fda'/></disk>"
    "<disk type='file' device='cdrom'><source/><source file='/etc/x'/><target dev='sdc'/></disk>"
    "<interface type='bridge'><source bridge='br1'/><rom file='etc/passwd'/></interface>"
    "<graphics type='spice'><gl enable='yes' rendernode='etc/shadow'/></graphics>"
)


def test_what_reaches_into_the_host_is_left_out_and_said() -> None:
    text = domain(
        "<disk type='file'><source file='/img/a'/><target dev='vda' bus='virtio'/></disk>" + REACHING,
        system="<loader>/tmp/evil.fd</loader><nvram template='/etc/shadow'>/etc/passwd</nvram>"
        "<nvram>/etc/group</nvram><varstore path='/etc/x'/><kernel>/etc/shadow</kernel>",
        more="<qemu:commandline><qemu:arg value='-drive'/><qemu:arg value='file=/etc/shadow'/></qemu:commandline>"
        "<sysinfo type='fwcfg'><entry name='opt/x' file='/etc/shadow'/></sysinfo><launchSecurity type='sev'/>",
    )
    root, result = rewritten(text, nvram="/new/efivars.fd")
    for word in ("etc/", "/tmp", "evil", "/dev/", "/run", "/iso", "eth0", "hostdev", "filesystem", "launchSecurity"):
        assert word not in result.xml, word
    assert root.findtext("os/nvram") == "/new/efivars.fd"
    said = " ".join(result.warnings)
    for part in (
        "<hostdev>",
        "<filesystem>",
        "<commandline>",
        "<kernel>",
        "<loader>",
        "<interface>",
        "other end of <serial>",
        "log of <serial>",
        "<rom> of <interface>",
        "<graphics>",
        "<varstore>",
        "drive sdb is empty; it had etc/shadow",
    ):
        assert part in said, part

    root, result = rewritten(text, trusted=True)
    assert root.find("devices/hostdev") is not None
    assert root.findtext("devices/emulator") == "/home/evil/qemu"
    assert "/etc/shadow" in result.xml
    assert "vdz" not in result.xml, "a disk that was not restored is never another file of the host"


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    "more", ["<devices><disk><source file='/etc/x'/><target dev='vdz'/></disk></devices>", "<os><nvram>/x</nvram></os>"]
)
def test_a_second_part_of_a_kind_that_libvirt_would_join_to_the_first_is_refused(more: str, trusted: bool) -> None:
    one = "<disk type='file'><source file='/img/a'/><target dev='vda' bus='virtio'/></disk>"
    for text, live in ((domain(one, more=more), None), (domain(one), domain(one, more=more))):
        with pytest.raises(FormatError, match=r"more than one <(os|devices)>"):
            rewritten(text, live=live, trusted=trusted)


@pytest.mark.parametrize("said", ["readonly='no'", ""])
def test_nobody_writes_to_the_firmware_of_the_host(said: str) -> None:
    one = "<disk type='file'><source file='/img/a'/><target dev='vda' bus='virtio'/></disk>"
    text = domain(one, system=f"<loader {said} type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>")
    root, result = rewritten(text)
    assert [loader.get("readonly") for loader in root.findall("os/loader")] == ["yes"]
    assert "may write to its <loader>" in result.warnings[0]


def test_usual_devices_stay_without_trust() -> None:
    usual = (
        "<emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='pci' model='pcie-root'/>"
        "<disk type='file'><source file='/img/a'/><target dev='vda' bus='virtio'/></disk>"
        "<interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/>"
        "<target dev='vnet3'/></interface><interface type='bridge'><source bridge='br0'/></interface>"
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        "<channel type='spicevmc'><target name='com.redhat.spice.0'/></channel><serial type='pty'/>"
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm><graphics type='spice' autoport='yes'/>"
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng><video/><memballoon/>"
    )
    loader = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader><nvram>/old.fd</nvram>"
    root, result = rewritten(domain(usual, system=loader), nvram="/new/efivars.fd")
    assert result.warnings == []
    assert len(root.findall("devices/interface")) == 2
    assert root.find("devices/interface/target") is None
    assert root.findtext("os/loader") == "/usr/share/OVMF/OVMF_CODE.fd"
    mac = root.find("devices/interface/mac")
    assert mac is not None
    root, _ = rewritten(domain(usual), new_identity=True)
    assert root.find("devices/interface/mac") is None


@pytest.mark.parametrize("path", ["/usr/share/../../etc/shadow", "/usr/share/x/../../lib/y", "usr/share/x"])
def test_firmware_is_taken_only_from_where_it_is_installed(path: str) -> None:
    one = "<disk type='file'><source file='/img/a'/><target dev='vda' bus='virtio'/></disk>"
    root, _ = rewritten(domain(one, system=f"<loader>{path}</loader>"))
    assert root.find("os/loader") is None


def test_a_domain_of_another_hypervisor_is_refused() -> None:
    with pytest.raises(FormatError, match="not QEMU's"):
        rewritten(domain(kind="xen"))


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["/run/vm.qmp", "libvirt", "libvirt+", "libvirt+#web", "libvirt+qemu:///system#"])
def test_a_path_is_no_address_of_a_domain(text: str) -> None:
    assert DomainAddress.parse(text) is None


def test_libvirt_of_another_host_is_known_by_its_address() -> None:
    here = ("qemu:///system", "qemu:///session", "qemu+unix:///system?socket=/run/x", "test:///default")
    there = ("qemu+ssh://other/system", "qemu+tcp://127.0.0.1/system", "qemu://[::1]:16509/system", "qemu+ssh://[x/s")
    assert [is_elsewhere(uri) for uri in (*here, *there)] == [False] * len(here) + [True] * len(there)


def test_an_address_goes_round() -> None:
    address = DomainAddress("qemu+unix:///system?socket=/run/x", "a#b")
    assert DomainAddress.parse(str(address)) == address
