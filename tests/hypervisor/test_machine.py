"""Machines from stored configurations: what is taken over, what is not, and that QEMU starts what comes of it."""

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import FormatError, UsageError
from hypervisor.machine import (
    Backing,
    Channels,
    Device,
    Firmware,
    Kernel,
    Machine,
    command_line,
    from_command_line,
    from_domain_xml,
    from_files,
    from_qemu_server_conf,
    start_script,
)
from hypervisor.nbd_address import NbdAddress
from tests.support.qemu_binaries import QemuBinary, backports_qemu, distribution_qemu

STOCK: Final = (
    "/usr/bin/qemu-system-x86_64 -name guest=web,debug-threads=on -nodefaults -machine pc-q35-7.2,usb=off,smm=on "
    "-cpu host,migratable=on,+topoext,hv-relaxed=on -m size=3072M,slots=4,maxmem=8G -smp 4,sockets=1,cores=2,threads=2 "
    "-uuid 6d9ab5f2-6b6a-4c43-8c55-ff0000000001 -rtc base=localtime,driftfix=slew "
    "-drive if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.secboot.fd "
    "-drive if=pflash,unit=1,format=raw,file=/var/lib/vars.fd -global driver=cfi.pflash01,property=secure,value=on "
    "-device pcie-root-port,id=rp1,chassis=1,port=16,bus=pcie.0,addr=2.0,multifunction=on "
    "-device virtio-scsi-pci,id=scsi0,bus=rp1,addr=0,num_queues=4 "
    "-blockdev driver=file,filename=/images/a.qcow2,node-name=f0 -blockdev driver=qcow2,file=f0,node-name=fmt0 "
    "-device scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=3,drive=fmt0,id=disk0,bootindex=2,serial=S-1 "
    "-drive file=/images/b.raw,if=none,id=drive1,format=raw -device virtio-blk-pci,drive=drive1,bootindex=1,iothread=i "
    "-drive if=none,id=cd,media=cdrom,file=/iso/x.iso -device ide-cd,drive=cd "
    "-netdev tap,id=n0,script=/etc/evil -device virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01,romfile=/etc/passwd "
    "-chardev socket,id=tpm,path=/run/tpm -tpmdev emulator,id=t0,chardev=tpm -device tpm-crb,tpmdev=t0 "
    "-vga std -device qemu-xhci,id=usb -device usb-tablet,bus=usb.0 -qmp unix:/run/q,server=on,wait=off"
)  # fmt: skip


def from_text(text: str, archives: Sequence[str]) -> Machine:
    return from_command_line(json.dumps(shlex.split(text)).encode(), archives)


def test_a_command_line_of_stock_qemu_is_understood() -> None:
    machine = from_text(STOCK, ["drive-disk0.img", "drive-drive1.img"])
    assert (machine.name, machine.type, machine.memory, machine.cpus) == ("web", "pc-q35-7.2", 3 << 30, 4)
    assert machine.topology == {"sockets": 1, "cores": 2, "threads": 2}
    assert (machine.cpu, machine.cpu_flags) == ("host", ("migratable=on", "+topoext", "hv-relaxed=on"))
    assert (machine.efi, machine.secure_boot, machine.tpm, machine.local_time) == (True, True, "tpm-crb", True)
    assert machine.uuid == "6d9ab5f2-6b6a-4c43-8c55-ff0000000001"
    first, second = machine.disks
    assert (first.archive, first.device.driver, first.boot) == ("drive-disk0.img", "scsi-hd", 2)
    assert first.device.properties == {
        "bus": "scsi0.0", "channel": "0", "scsi-id": "0", "lun": "3", "id": "disk0", "serial": "S-1",
    }  # fmt: skip
    assert (second.archive, second.device, second.boot) == ("drive-drive1.img", Device("virtio-blk-pci"), 1)
    assert [one.driver for one in machine.controllers] == ["pcie-root-port", "virtio-scsi-pci", "qemu-xhci"]
    assert machine.cards == (Device("virtio-net-pci", {"mac": "52:54:00:00:00:01"}),)
    assert (machine.display, machine.others) == (Device("VGA"), (Device("usb-tablet", {"bus": "usb.0"}),))
    for part in ("-netdev tap,id=n0,script=/etc/evil", "property romfile of device virtio-net-pci", "device ide-cd"):
        assert part in machine.left_out
    assert machine.warnings == ()


def test_drives_without_a_device_have_the_names_that_qemu_gives_them() -> None:
    machine = from_text(
        "qemu-system-x86_64 -hda /a -drive if=virtio,file=/b -drive if=virtio,file=/c,,d,id=named",
        ["drive-named.img", "drive-virtio0.img", "drive-ide0-hd0.img"],
    )
    assert [(disk.device.driver, disk.archive) for disk in machine.disks] == [
        ("ide-hd", "drive-ide0-hd0.img"), ("virtio-blk-pci", "drive-virtio0.img"),
        ("virtio-blk-pci", "drive-named.img"),
    ]  # fmt: skip
    assert machine.type == "pc"


def test_json_devices_and_nodes_as_libvirt_writes_them() -> None:
    words = [
        "/usr/bin/qemu-system-x86_64", "-blockdev", '{"driver":"file","filename":"/x/y.qcow2","node-name":"s"}',
        "-blockdev", '{"node-name":"fmt","driver":"qcow2","file":"s"}',
        "-device", '{"driver":"virtio-blk-pci","drive":"fmt","id":"virtio-disk0","bootindex":1,"write-cache":"on"}',
    ]  # fmt: skip
    (disk,) = from_command_line(words, ["drive-virtio-disk0.img"]).disks
    assert (disk.device, disk.boot) == (Device("virtio-blk-pci", {"id": "virtio-disk0"}), 1)


def test_archives_under_another_name_are_paired_by_order_and_rest_is_added() -> None:
    text = "qemu-system-x86_64 -drive if=none,id=a,file=/a -device virtio-blk-pci,drive=a,id=one"
    renamed = from_text(text, ["drive-system.img"])
    assert [disk.archive for disk in renamed.disks] == ["drive-system.img"]
    assert renamed.disks[0].device.driver == "virtio-blk-pci"
    assert "no disk of the configuration is called like drive-system.img: taken for one" in renamed.warnings
    more = from_text(text, ["drive-one.img", "drive-late.img"])
    assert [disk.archive for disk in more.disks] == ["drive-one.img", "drive-late.img"]
    fewer = from_text(text, [])
    assert fewer.disks == ()
    assert "disk one, which is not in the backup" in fewer.left_out


PROXMOX: Final = """#a remark: not=an option
agent: 1
args: -chardev file,id=x,path=/etc/shadow
bios: ovmf
boot: order=scsi1;virtio0
cores: 2
cpu: x86-64-v2-AES
efidisk0: local:vm-100-disk-9,efitype=4m,pre-enrolled-keys=1,size=528K
hostpci0: 0000:01:00
ide2: local:iso/x.iso,media=cdrom
machine: pc-q35-9.0+pve1
memory: 4096
name: web
net0: virtio=BC:24:11:00:00:01,bridge=vmbr0,firewall=1
ostype: win11
scsi0: local:vm-100-disk-0,iothread=1,size=32G,ssd=1
scsi1: local:vm-100-disk-1,size=32G
scsihw: virtio-scsi-single
smbios1: uuid=6d9ab5f2-6b6a-4c43-8c55-ff0000000001,manufacturer=QUNNRQ==,base64=1
sockets: 2
tpmstate0: local:vm-100-disk-8,version=v2.0
virtio0: local:vm-100-disk-2,size=1G

[before-update]
memory: 1
"""


def test_a_configuration_of_proxmox_ve_is_understood() -> None:
    archives = [f"drive-{name}.img" for name in ("efidisk0", "scsi0", "scsi1", "tpmstate0-backup", "virtio0")]
    machine = from_qemu_server_conf(PROXMOX, archives)
    assert (machine.name, machine.type, machine.memory, machine.cpus) == ("web", "pc-q35-9.0+pve1", 4 << 30, 4)
    assert [(disk.archive, disk.device.driver, disk.boot) for disk in machine.disks] == [
        ("drive-scsi0.img", "scsi-hd", None), ("drive-scsi1.img", "scsi-hd", 0),
        ("drive-virtio0.img", "virtio-blk-pci", 1),
    ]  # fmt: skip
    assert (machine.efi, machine.secure_boot, machine.tpm, machine.local_time) == (True, True, "tpm-tis", True)
    assert (machine.efi_archive, machine.tpm_archive) == ("drive-efidisk0.img", "drive-tpmstate0-backup.img")
    # On another board the firmware for Secure Boot stands still; Proxmox VE takes the plain one there as well.
    other = from_qemu_server_conf(PROXMOX.replace("pc-q35-9.0+pve1", "pc-i440fx-9.0"), archives)
    assert (other.efi, other.secure_boot, other.type) == (True, False, "pc-i440fx-9.0")
    assert machine.smbios == {"manufacturer": "ACME"}
    assert machine.cpu is None
    assert machine.cards[0].properties["mac"] == "BC:24:11:00:00:01"
    assert "args: -chardev file,id=x,path=/etc/shadow" in machine.left_out
    assert "hostpci0: 0000:01:00" in machine.left_out


DOMAIN: Final = """<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name><uuid>6d9ab5f2-6b6a-4c43-8c55-ff0000000001</uuid>
  <memory unit='GiB'>2</memory><vcpu placement='static'>2</vcpu>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <firmware><feature enabled='yes' name='secure-boot'/></firmware>
    <loader readonly='yes' type='pflash' secure='yes'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader>
    <nvram>/etc/passwd</nvram></os>
  <cpu mode='custom'><model>Skylake-Server</model><feature policy='disable' name='mpx'/></cpu>
  <clock offset='localtime'/>
  <devices>
    <emulator>/bin/evil</emulator>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='pci' index='1' model='pcie-root-port'><target chassis='1' port='0x10'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x0' multifunction='on'/></controller>
    <controller type='scsi' index='0' model='virtio-scsi'>
      <address type='pci' domain='0' bus='0x01' slot='0x00' function='0x0'/></controller>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/etc/shadow'/>
      <target dev='sda' bus='scsi'/><serial>ABC</serial><boot order='2'/>
      <address type='drive' controller='0' bus='0' target='0' unit='1'/></disk>
    <disk type='file' device='disk'><source file='/b'/><target dev='vda' bus='virtio'/><boot order='1'/></disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br0'/><script path='/bin/evil'/>
      <model type='e1000e'/></interface>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <hostdev mode='subsystem' type='pci'/>
    <filesystem type='mount'><source dir='/'/></filesystem>
    <video><model type='virtio'/></video>
  </devices>
  <qemu:commandline><qemu:arg value='-incoming'/><qemu:arg value='exec:evil'/></qemu:commandline>
</domain>"""


def test_a_domain_of_libvirt_is_understood() -> None:
    machine = from_domain_xml(DOMAIN, ["drive-vda.img", "drive-scsi0-0-0-1.img"])
    assert (machine.name, machine.type, machine.memory, machine.cpus) == ("web", "pc-q35-7.2", 2 << 30, 2)
    assert (machine.efi, machine.secure_boot, machine.tpm, machine.local_time) == (True, True, "tpm-crb", True)
    assert [(disk.archive, disk.device.driver, disk.boot) for disk in machine.disks] == [
        ("drive-scsi0-0-0-1.img", "scsi-hd", 2), ("drive-vda.img", "virtio-blk-pci", 1),
    ]  # fmt: skip
    assert machine.cards[0].driver == "e1000e"
    assert (machine.cpu, machine.cpu_flags) == ("Skylake-Server", ("-mpx",))
    assert {"<hostdev>", "<filesystem>", "<commandline>"} <= set(machine.left_out)


@pytest.mark.parametrize(
    "text",
    [
        "<!DOCTYPE d [<!ENTITY a 'b'>]><domain>&a;</domain>", "<domain", "<other/>", "", "<domain>" + "<a>" * 5000,
        "<domain>" + "<a>" * 500 + "</a>" * 500 + "</domain>", "\0", "<domain>" + " " * (1 << 20) + "</domain>",
    ],
)  # fmt: skip
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="cannot read the domain's XML"):
        from_domain_xml(text, [])


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"[" * 100_000, b'"-m"', b"[" + b'"-S",' * 10001 + b'"-S"]'])
def test_what_is_no_command_line_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"qemu-command\.json"):
        from_command_line(data, [])


def test_a_long_line_of_a_configuration_is_read_in_no_time() -> None:
    # Were it looked through again from each of its spaces, that took hours.
    value = f"a{' ' * (4_000_000)}b"
    machine = from_qemu_server_conf(f"name: web \ntags: {value}\nonboot:  \n", [])
    assert (machine.name, list(machine.left_out)) == ("web", ["line onboot:  "])


def test_the_configuration_of_a_snapshot_is_found_or_a_plain_machine_made() -> None:
    archives = ["drive-scsi0.img", "drive-scsi1.img", "drive-virtio0.img"]
    proxmox = {"qemu-server.conf": PROXMOX.encode(), "qemu-command.json": b"[]"}
    assert from_files(proxmox, archives).name == "web"
    plain = from_files({}, ["drive-a.img"])
    assert [(disk.device.driver, disk.archive) for disk in plain.disks] == [("ide-hd", "drive-a.img")]
    assert plain.warnings == ("the backup has no configuration of a machine that can be read: a plain one is made",)
    broken = from_files({"qemu-command.json": b"no", "efivars.fd": bytes(4)}, ["drive-a.img"])
    assert broken.efi
    assert len(broken.warnings) == 2


# -- the way back -----------------------------------------------------------------------------------------------------


def qemu(of: str) -> QemuBinary:
    return distribution_qemu() if of == "distribution" else backports_qemu()


def backings(folder: Path, archives: Sequence[str]) -> dict[str, Backing]:
    result = {}
    for number, archive in enumerate(archives):
        (folder / archive).write_bytes(bytes(1 << 20))
        result[archive] = Backing.file(folder / archive, f"disk{number}")
    return result


def asked(line: Sequence[str], *commands: str) -> list[Any]:
    """Start QEMU without letting the guest run, and ask it."""
    words = [json.dumps({"execute": one}) for one in ("qmp_capabilities", *commands, "quit")]
    done = subprocess.run(
        [*line, "-S", "-qmp", "stdio"], input="\n".join(words), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(row) for row in done.stdout.splitlines()]
    return [one["return"] for one in answers if "return" in one][1:-1]


MACHINES: Final[dict[str, tuple[Callable[[str, Sequence[str]], Machine], str, list[str]]]] = {
    "stock": (from_text, STOCK, ["drive-disk0.img", "drive-drive1.img"]),
    "proxmox": (from_qemu_server_conf, PROXMOX, ["drive-scsi0.img", "drive-scsi1.img", "drive-virtio0.img"]),
    "proxmox-pc": (
        from_qemu_server_conf,
        "net0: e1000=BC:24:11:00:00:01\nide0: a:b\nide1: a:c\nsata3: a:d\nscsi9: a:e\nscsihw: virtio-scsi-pci\n",
        ["drive-ide0.img", "drive-ide1.img", "drive-sata3.img", "drive-scsi9.img"],
    ),
    "libvirt": (from_domain_xml, DOMAIN, ["drive-scsi0-0-0-1.img", "drive-vda.img"]),
}


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("name", "of"),
    [
        *((name, "distribution") for name in MACHINES),
        ("stock", "backports"),
        *(pytest.param(name, "backports", marks=pytest.mark.long) for name in MACHINES if name != "stock"),
    ],
)
def test_qemu_starts_the_machine_with_every_disk_at_its_place(tmp_path: Path, name: str, of: str) -> None:
    read, text, archives = MACHINES[name]
    machine = read(text, archives)
    known = {"q35", "pc", "pc-q35-7.2"}  # neither QEMU has the versions of Proxmox VE
    line = command_line(
        machine, backings(tmp_path, archives), program=qemu(of).system, accel=["tcg"], network="user", memory=64 << 20,
        known_types=known, channels=Channels(agent=tmp_path / "agent", serial=tmp_path / "serial"),
    )  # fmt: skip
    blocks, pci = asked(line, "query-block", "query-pci")
    there = {one["qdev"]: one["inserted"]["file"] for one in blocks if one.get("inserted")}
    for disk in machine.disks:
        own = disk.device.id or disk.archive.removeprefix("drive-").removesuffix(".img")
        (place,) = [qdev for qdev in there if own in qdev.split("/")]
        assert there[place].endswith(disk.archive)
    if name == "proxmox-pc":  # as Proxmox VE has it: a guest calls the card ens18
        assert [one["slot"] for one in pci[0]["devices"] if one["class_info"]["class"] == 0x200] == [18]


@pytest.mark.qemu
def test_twenty_disks_of_each_kind_find_a_controller(tmp_path: Path) -> None:
    kinds = ["ide-hd", "scsi-hd", "usb-storage", "nvme", "virtio-blk-pci"]
    words = ["qemu-system-x86_64", "-machine", "q35"]
    archives = []
    for number, driver in enumerate(kinds * 4):
        words += [
            "-drive",
            f"if=none,id=d{number},file=/x",
            "-device",
            f"{driver},drive=d{number},bus=gone.0,id=i{number}",
        ]
        archives.append(f"drive-i{number}.img")
    machine = from_command_line(words, archives)
    line = command_line(
        machine, backings(tmp_path, archives), program=distribution_qemu().system, accel=["tcg"], memory=64 << 20
    )
    (blocks,) = asked(line, "query-block")
    assert len([one for one in blocks if one.get("inserted")]) == 20


def test_the_boot_order_is_that_of_the_configuration_then_that_of_the_disks(tmp_path: Path) -> None:
    archives = ["drive-scsi0.img", "drive-scsi1.img", "drive-virtio0.img"]
    line = command_line(from_qemu_server_conf(PROXMOX, archives), backings(tmp_path, archives))
    order = {}
    for word in line:
        if "bootindex=" in word:
            properties = dict(part.split("=") for part in word.split(",")[1:])
            order[properties["id"]] = properties["bootindex"]
    assert order == {"scsi0": "3", "scsi1": "1", "virtio0": "2"}


def test_a_start_script_says_what_was_left_out_and_quotes_everything(tmp_path: Path) -> None:
    folder = tmp_path / "a 'b' $(touch x), c"
    folder.mkdir()
    archives = ["drive-disk0.img", "drive-drive1.img"]
    machine = from_text(STOCK, archives)
    script = start_script(
        machine, backings(folder, archives), folder=folder, tpm_state=folder / "tpm", network="br0",
        firmware=Firmware(Path("/code.fd"), Backing.file(folder / "vars.fd", "fleece-fw-vars")),
        remarks=["two\nlines; rm -rf /"],
    )  # fmt: skip
    remarks, _, rest = script.partition("set -eu\n")
    assert all(line.startswith("#") for line in remarks.splitlines())
    assert "#   -netdev tap,id=n0,script=/etc/evil" in remarks
    # A shell takes it apart as it was put together.
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for program in ("qemu-system-x86_64", "swtpm"):
        (bin_folder / program).write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
        (bin_folder / program).chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", script, "start", "-display", "gtk"], capture_output=True, cwd=tmp_path, timeout=60,
        env={"PATH": f"{bin_folder}:/usr/bin:/bin"},
    )  # fmt: skip
    words = done.stdout.decode().split("\0")
    assert (done.returncode, done.stderr, rest.count("\n") > 20) == (0, b"", True)
    assert f"dir={folder}/tpm" in words
    assert words[-3:-1] == ["-display", "gtk"]
    assert "bridge,id=fleece-net0,br=br0" in words
    nodes = [json.loads(word) for word in words if word.startswith("{")]
    assert {str(folder / archive) for archive in archives} <= {node["file"]["filename"] for node in nodes}
    assert not (tmp_path / "x").exists()


def test_nbd_exports_and_kernels_are_the_callers(tmp_path: Path) -> None:
    machine = from_text("qemu-system-x86_64 -kernel /etc/shadow -append root=/dev/vda", ["drive-a.img"])
    assert machine.direct_kernel
    disks = {"drive-a.img": Backing.nbd(NbdAddress.unix("/run/s", "x"), "d0")}
    assert "/etc/shadow" not in command_line(machine, disks)
    line = command_line(machine, disks, kernel=Kernel(tmp_path / "vmlinuz"))
    assert line[line.index("-append") + 1] == "root=/dev/vda"
    with pytest.raises(UsageError, match="unix sockets"):
        Backing.nbd(NbdAddress.parse("nbd://host/x"), "d0")
    with pytest.raises(UsageError, match="bridge"):
        command_line(machine, disks, network="tap,script=/x")


# -- hostile ----------------------------------------------------------------------------------------------------------

OPTIONS: Final = [
    "-chardev", "-drive", "-device", "-incoming", "-netdev", "-fsdev", "-object", "-blockdev", "-machine", "-cpu", "-m",
    "-smp", "-name", "-uuid", "-smbios", "-global", "-rtc", "-bios", "-pflash", "-hda", "-nic", "-net", "-vga",
    "-append", "-kernel", "-set", "-readconfig", "-fw_cfg", "-mon", "-usbdevice", "--device", "-sandbox", "-runas",
    "-D",
    "-virtfs",
]  # fmt: skip
PIECES: Final = [
    "/etc/shadow", "driver=", "virtio-blk-pci", "scsi-hd", "ide-hd", "nvme", "drive=", "id=", "file=", "path=",
    "script=",
    "exec:evil", "romfile=", ",", ",,", "=", "json:", '{"driver":"file","filename":"/etc/shadow"}', "fleece-qmp", "on",
    "bus=", "pcie.0", "addr=", "1f.0", "if=none", "if=virtio", "if=pflash", "secret", "mac=", "52:54:00:00:00:01", "\n",
    "e1000", "VGA", "guest=", "type=1", "serial=", "$(evil)", "`evil`", "'", "\\", "pc-q35-7.2", "vhost=on", "\x1b[2J",
    "pcie-root-port", "virtio-scsi-pci", "chassis=", "bootindex=", "9" * 30, "-", "é", "vgamem_mb=", "x" * 300,
]  # fmt: skip
VALUE = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
WORDS = st.lists(st.tuples(st.sampled_from(OPTIONS), VALUE), max_size=12).map(
    lambda pairs: ["qemu-system-x86_64", *(word for pair in pairs for word in pair)]
)
#: What `command_line` itself may say.
ALLOWED: Final = {
    "-nodefaults", "-no-user-config", "-name", "-machine", "-accel", "-cpu", "-m", "-smp", "-uuid", "-smbios", "-rtc",
    "-global", "-blockdev", "-device", "-display", "-append", "-kernel",
}  # fmt: skip


def check_harmless(machine: Machine) -> None:
    disks = {disk.archive: Backing.file(Path("/ours"), f"d{n}") for n, disk in enumerate(machine.disks)}
    line = command_line(machine, disks)
    flags = {"-nodefaults", "-no-user-config"}
    position = 1
    while position < len(line):
        option = line[position]
        assert option in ALLOWED, line
        position += 1 if option in flags else 2
        if option in flags:
            continue
        value = line[position - 1]
        if option == "-blockdev":
            assert json.loads(value)["file"]["filename"] == "/ours"
        else:
            assert not set(value) & set("/\\{}'\"$`\n\x1b"), line
            assert "exec:" not in value.partition("guest=")[0]
    devices = [line[n + 1] for n, word in enumerate(line) if word == "-device"]
    for one in devices:
        _, *pairs = one.split(",")
        names = [pair.partition("=")[0] for pair in pairs]
        assert len(names) == len(set(names)), one
        assert not {"romfile", "netdev", "chardev", "fsdev", "hostdev", "host", "memdev"} & set(names), one
    script = start_script(machine, disks, folder=Path("/ours.d"))
    words = shlex.split(script, comments=True)
    assert set(line[1:]) <= set(words)
    assert all(row.startswith(("#", "set -eu", "mkdir", "exec", "    ")) for row in script.splitlines())
    for text in (*machine.left_out, *machine.warnings):
        assert text.isprintable()


@settings(max_examples=40, deadline=None)
@given(WORDS, st.lists(st.sampled_from(["drive-a.img", "drive-b.img", "drive-virtio0.img"]), unique=True))
def test_no_command_line_brings_anything_of_the_host_along(words: list[str], archives: list[str]) -> None:
    check_harmless(from_command_line(words, archives))


CONF_KEYS: Final = [
    "scsi0",
    "virtio1",
    "sata9",
    "net0",
    "args",
    "machine",
    "cpu",
    "boot",
    "bios",
    "memory",
    "vga",
    "smbios1",
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CONF_KEYS), VALUE)))
def test_no_configuration_of_proxmox_ve_does_either(pairs: list[tuple[str, str]]) -> None:
    check_harmless(from_qemu_server_conf("\n".join(f"{key}: {value}" for key, value in pairs), ["drive-scsi0.img"]))


XML_PIECES: Final = [piece for piece in PIECES if not set(piece) & set("<>&'\"\x1b\\")]
XML_VALUE = st.lists(st.sampled_from(XML_PIECES), max_size=4).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(XML_VALUE, min_size=12, max_size=12))
def test_no_domain_does_either(values: list[str]) -> None:
    a, b, c, d, e, f, g, h, i, j, k, m = values
    check_harmless(
        from_domain_xml(
            f"<domain><name>{a}</name><uuid>{b}</uuid><memory unit='{c}'>{d}</memory><vcpu>{e}</vcpu>"
            f"<os><type arch='{f}' machine='{g}'/><cmdline>root=1</cmdline></os><cpu><model>{h}</model></cpu><devices>"
            f"<disk><target dev='{i}' bus='scsi'/><serial>{j}</serial><address type='drive' unit='{k}'/></disk>"
            f"<disk><target dev='{m}' bus='{k}'/></disk><controller type='scsi' index='{d}' model='{k}'/>"
            f"<interface><mac address='{j}'/><model type='{k}'/></interface></devices></domain>",
            ["drive-a.img"],
        )
    )
