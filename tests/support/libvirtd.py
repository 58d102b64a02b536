"""A real libvirtd for the whole of the system (`qemu:///system`), of which the machine notices nothing.

Its packages are unpacked in `.cache/libvirt`, never installed. It runs with mounts and process ids of its own: /usr is
the machine's with the packages' laid over it, what it writes to /etc, /var and /run goes to memory, and whatever it
starts ends with it. It listens in its own folder, where the disks of domains lie as well, and ends with the
block, or with the process that runs it. Its QEMUs run as a user of their own, with file owners as libvirt sets them
(its security model DAC). Only root can start one.

The bindings are the installed ones (Debian: python3-libvirt, which `make setup` installs).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

from tests.support.apt import AptRoot, codename
from tests.support.cache import ROOT, Unavailable, cached, once
from tests.support.guest import SmallGuest
from tests.support.qemu_binaries import QemuBinary

#: What the machine must not run as anyway: the user of QEMU and swtpm.
USER: Final = 61234
_PACKAGES: Final = ("libvirt-daemon", "libvirt-daemon-driver-qemu")
#: Instead of libvirt's own among those, where the newer one of the distribution's backports is wanted; without its
#: networks, which need a firewall.
_NEWER: Final = (
    "libvirt0", "libvirt-common", "libvirt-daemon", "libvirt-daemon-common", "libvirt-daemon-driver-interface",
    "libvirt-daemon-driver-nodedev", "libvirt-daemon-driver-nwfilter",
    "libvirt-daemon-driver-qemu", "libvirt-daemon-driver-secret", "libvirt-daemon-driver-storage",
)  # fmt: skip
_SWTPM: Final = ("swtpm", "swtpm-libs", "swtpm-tools", "libtpms0", "libjson-glib-1.0-0")
#: Seconds for a start on a busy machine, and of a life.
_PATIENCE_S: Final = 60
LIFETIME_S: Final = 1200
_SCRIPT: Final = f"""
set -e
packages=$1 state=$2
mkdir -p $state/own
mount -t tmpfs own $state/own
mount -t overlay -o lowerdir=$packages/usr:/usr usr /usr
for part in etc var; do
    mkdir $state/own/$part $state/own/$part.work
    mount -t overlay -o lowerdir=/$part,upperdir=$state/own/$part,workdir=$state/own/$part.work $part /$part
done
# Without /dev/kvm, which QEMU's user may not use: libvirt would look for QEMU's abilities anew at each start.
mkdir $state/own/dev $state/own/dev/shm $state/own/dev/pts
for node in null zero full random urandom tty; do
    touch $state/own/dev/$node
    mount --bind /dev/$node $state/own/dev/$node
done
mount --rbind /dev/shm $state/own/dev/shm
mount --rbind /dev/pts $state/own/dev/pts
ln -s pts/ptmx $state/own/dev/ptmx
ln -s /proc/self/fd $state/own/dev/fd
mount --rbind $state/own/dev /dev
mount -t tmpfs run /run
mkdir -p /run/lock /etc/libvirt /run/qemu
cp $state/qemu.conf /etc/libvirt/
echo "libvirt-qemu:x:{USER}:{USER}::/nonexistent:/usr/sbin/nologin" >>/etc/passwd
echo "libvirt-qemu:x:{USER}:" >>/etc/group
# What makes certificates for TPMs needs more packages; any bytes will do here.
echo "create_certs_tool = /run/certs" >/etc/swtpm_setup.conf
cat >/run/certs <<'END'
#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in --type) type=$2;; --dir) folder=$2;; esac
    shift
done
echo certificate >"$folder/$type.cert"
END
chmod 755 /run/certs
if [ -n "$3" ]; then
    mount --bind "$3" /run/qemu
    # Under its usual name, which is all that a restored definition may have.
    for tool in /run/qemu/bin/*; do
        name=$(basename $tool)
        printf '#!/bin/sh\nexec %s "$@"\n' $tool >/run/$name
        chmod 755 /run/$name
        mount --bind /run/$name /usr/bin/$name
    done
    # libvirt makes QEMU load all its modules, and QEMU aborts at the sight of those of another version.
    for folder in /usr/lib/*/qemu; do
        if [ -e /run/qemu/root$folder ]; then mount --bind /run/qemu/root$folder $folder; fi
    done
fi
if [ -n "$4" ]; then hostname "$4"; fi
exec 3<&0
{{ read -r _ <&3 || true; touch $state/ended; kill -KILL -1; }} & exec 3<&-
while [ ! -e $state/ended ]; do
    timeout --foreground -k 5 {LIFETIME_S} /usr/sbin/libvirtd --config $state/libvirtd.conf </dev/null & daemon=$!
    echo $daemon >$state/daemon
    wait $daemon || true
    rm $state/again || break
done
"""
_DAEMON_CONF: Final = """listen_tls = 0
unix_sock_dir = "{folder}"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{uuid}"
log_outputs = "3:file:{folder}/libvirtd.log"
"""
_QEMU_CONF: Final = """user = "libvirt-qemu"
group = "libvirt-qemu"
swtpm_user = "libvirt-qemu"
swtpm_group = "libvirt-qemu"
stdio_handler = "file"
remember_owner = 0
namespaces = []
cgroup_controllers = []
security_driver = "none"
"""


@once
def _packages() -> Path:
    """The unpacked packages.

    Raises:
        Unavailable: this is no Debian, its packages cannot be had, or the bindings are not installed.
    """
    release = codename()
    if not release:
        raise Unavailable("no libvirtd to test with: this is no Debian")
    try:
        import libvirt  # noqa: F401
    except ImportError as error:
        raise Unavailable("libvirt's Python bindings are missing: apt-get install python3-libvirt") from error

    def build(folder: Path) -> None:
        # Of its own: others that unpack at the same time must not find these packages among theirs.
        apt = AptRoot.open("apt-libvirt", (release,))
        apt.unpack_with_dependencies(_PACKAGES, release, folder)
        apt.unpack(_SWTPM, folder)

    try:
        return cached("libvirt", build)
    except Unavailable as reason:
        raise Unavailable(f"no libvirtd to test with: {reason}") from reason


@once
def _newer_packages() -> Path:
    """The unpacked packages of the distribution's backports.

    Raises:
        Unavailable: no APT source of this machine offers them.
    """
    release = codename()
    suite = f"{release}-backports"

    def build(folder: Path) -> None:
        apt = AptRoot.open("apt-backports", (release, suite))
        apt.latest("libvirt-daemon", suite)
        # Nothing of libvirt's own in two versions: it would load modules of the other one.
        shutil.copytree(
            _packages(), folder, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("libvirt", "doc")
        )
        apt.unpack([f"{package}/{suite}" for package in _NEWER], folder)

    try:
        return cached("libvirt-newer", build)
    except Unavailable as reason:
        raise Unavailable(f"no newer libvirtd to test with: {reason}") from reason


@dataclass
class Libvirtd:
    """One that runs."""

    folder: Path
    connection: Any
    pid: int  #: of the process that has its mounts
    emulator: str
    domains: dict[str, Any] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """How it is reached from the mounts of the machine."""
        return f"qemu+unix:///system?socket={self.folder}/libvirt-sock"

    @property
    def disks(self) -> Path:
        """A folder for images, which QEMU's user may enter."""
        return self.folder / "disks"

    def inside(self, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        """Run `command` with libvirtd's mounts, where `qemu:///system` is this one."""
        line = ["nsenter", "-t", str(self.pid), "-m", "-p", f"--wd={ROOT}", *command]
        return subprocess.run(
            line, env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )

    def define(self, xml: str, *, paused: bool = True, start: bool = True) -> Any:
        """Define a domain and start it, paused unless it is to run; it goes with libvirtd."""
        domain = self.connection.defineXML(xml)
        if start:
            domain.createWithFlags(1 if paused else 0)  # VIR_DOMAIN_START_PAUSED
        return domain

    def domain_xml(
        self,
        name: str,
        *disks: str,
        guest: SmallGuest | None = None,
        more: str = "",
        memory_mib: int = 192,
        attributes: str = "",
        system: str = "",
    ) -> str:
        """A domain with `disks` (see `disk_xml`), that boots `guest` if one is given, its console obeys at `ctl`."""
        boot = serial = ""
        if guest is not None:
            for path in (guest.kernel, guest.initrd):
                if not (self.folder / path.name).exists():  # libvirt changes its owner
                    shutil.copy(path, self.folder / path.name)
            kernel, initrd = self.folder / guest.kernel.name, self.folder / guest.initrd.name
            boot = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline>"
            serial = (
                "<serial type='null'/>"
                f"<serial type='unix'><source mode='bind' path='{self.disks}/{name}.ctl'/><target port='1'/></serial>"
            )
        return f"""<domain type='qemu'{attributes}>
<name>{name}</name><memory unit='MiB'>{memory_mib}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type>{boot}{system}</os><features><acpi/></features>
<devices><emulator>{self.emulator}</emulator>{"".join(disks)}
<controller type='scsi' model='virtio-scsi'/>{serial}{more}<memballoon model='none'/></devices></domain>"""

    def disk_xml(self, target: str, path: Path, format: str = "raw", more: str = "") -> str:
        """A disk: `vda` is of virtio-blk, `sda` of virtio-scsi."""
        bus = "virtio" if target.startswith("vd") else "scsi"
        return (
            f"<disk type='file' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>"
            f"<source file='{path}'/><target dev='{target}' bus='{bus}'/>{more}</disk>"
        )

    def monitor(self, domain: Any, command: str, **arguments: Any) -> Any:
        """What QEMU returns to a command."""
        import libvirt_qemu

        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, json.dumps(request), 0))
        assert "return" in answer, answer
        return answer["return"]

    def write(self, domain: Any, device: str, command: str) -> None:
        """Write as the guest would: `qemu-io` commands on the device of that path."""
        line = f'qemu-io -d {device} "{command}"'
        said = self.monitor(domain, "human-monitor-command", **{"command-line": line})
        assert not said, said

    def nodes(self, domain: Any) -> list[str]:
        """The block nodes that are Fleece's, or hold the format of a disk."""
        names = [node["node-name"] for node in self.monitor(domain, "query-named-block-nodes", flat=True)]
        return sorted(name for name in names if name.startswith("fleece-") or name.endswith("-format"))

    def bitmaps(self, domain: Any) -> list[str]:
        """Names of all dirty bitmaps."""
        nodes = self.monitor(domain, "query-named-block-nodes", flat=True)
        return sorted(bitmap["name"] for node in nodes for bitmap in node.get("dirty-bitmaps", []))

    def restart(self, *, kill: bool = False) -> None:
        """End libvirtd in order, or kill it, and start it again; the domains run on."""
        import libvirt

        (self.folder / "again").touch()
        inside = int((self.folder / "daemon").read_text())
        # libvirtd is below `timeout`, which hands a TERM on.
        name, number = ("KILL", "-P") if kill else ("TERM", "")
        line = f"pkill -{name} {number} {inside}" if kill else f"kill -{name} {inside}"
        subprocess.run(["nsenter", "-t", str(self.pid), "-m", "-p", "sh", "-c", line], check=True, timeout=30)
        with suppress(libvirt.libvirtError):
            self.connection.close()
        deadline = time.monotonic() + _PATIENCE_S
        while (self.folder / "again").exists():
            assert time.monotonic() < deadline, "libvirtd does not end"
            time.sleep(0.05)
        self.connection = _connected(libvirt, self.folder, None)

    def forget(self) -> None:
        """End and undefine all domains, for the next test."""
        import libvirt

        for domain in self.connection.listAllDomains():
            if domain.isActive():
                domain.destroy()
            flags = (
                libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
                | libvirt.VIR_DOMAIN_UNDEFINE_TPM
            )
            with suppress(libvirt.libvirtError):  # a transient one is gone by now
                domain.undefineFlags(flags)
        shutil.rmtree(self.disks)
        _open_folder(self.disks)


def _open_folder(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)  # whatever the umask


@contextmanager
def libvirtd(qemu: QemuBinary, *, host: str = "", newer: bool = False) -> Iterator[Libvirtd]:
    """A libvirtd while the block runs; skips where it cannot be.

    `newer` is the one of the distribution's backports, `host` the name of its host, if domains are to migrate to it.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can start a libvirtd with mounts of its own")
    try:
        packages = _newer_packages() if newer else _packages()
    except Unavailable as reason:
        pytest.skip(str(reason))
    import libvirt

    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    # In memory, where nobody waits for a disk; a short path, for sockets.
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path("/tmp")
    folder = Path(tempfile.mkdtemp(prefix="fleece-lv-", dir=parent))
    process = None
    try:
        folder.chmod(0o755)
        _open_folder(folder / "disks")
        (folder / "libvirtd.conf").write_text(_DAEMON_CONF.format(folder=folder, uuid=uuid4()))
        (folder / "qemu.conf").write_text(_QEMU_CONF)
        # QEMU's user may not be able to reach the folders above a program of the cache.
        above = "" if qemu.folder.parts[1] == "usr" else str(qemu.folder.parent)
        emulator = "/usr/bin/qemu-system-x86_64" if above else str(Path(qemu.system).resolve())
        line = [
            "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
            "--propagation", "private", "sh", "-c", _SCRIPT, "libvirtd", str(packages), str(folder), above, host,
        ]  # fmt: skip
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                line, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )
        connection = _connected(libvirt, folder, process)
        running = Libvirtd(folder, connection, _first_child(process.pid), emulator)
        try:
            yield running
        finally:
            with suppress(libvirt.libvirtError):
                connection.close()
    finally:
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_PATIENCE_S)
            finally:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _connected(libvirt: Any, folder: Path, process: "subprocess.Popen[bytes] | None") -> Any:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        if process is not None and process.poll() is not None:
            said = _logs(folder)
            if "not permitted" in said or "ermission denied" in said:
                pytest.skip("this root may not mount, as in most containers")
            raise AssertionError(f"libvirtd has ended: {said}")
        with suppress(libvirt.libvirtError):
            return libvirt.open(f"qemu+unix:///system?socket={folder}/libvirt-sock")
        if time.monotonic() > deadline:
            raise AssertionError(f"libvirtd does not answer: {_logs(folder)}")
        time.sleep(0.1)


def _logs(folder: Path) -> str:
    return "\n".join(
        path.read_text(errors="replace")[-2000:]
        for path in (folder / "output", folder / "libvirtd.log")
        if path.exists()
    )


def _first_child(pid: int) -> int:
    """The first process with the new mounts and process ids."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def fleece_inside() -> list[str]:
    """The words that start `fleece` in `Libvirtd.inside`."""
    return [sys.executable, "-m", "agent.main"]
