"""A Debian that plays the hypervisor host: systemd as pid 1, a real kernel with /dev/nbdX, FUSE, udev, its own QEMU.

It runs under TCG, is ready 10 to 20 s after its start, and has no network. The file system is `debian_image.py`'s, with
an overlay of its own for each VM, so nothing that is done in a VM is seen by another. Mark such tests
`vm` and take the fixture `debian_vm`: one VM for all tests of a process, put back before each to the state it had after
its start (half a second). Or start one:

    with DebianVm.start(distribution_qemu()) as vm:
        done = vm.run("modprobe nbd nbds_max=4; ls /dev/nbd*")     # done.code, .out (stdout), .err; as root, with bash
        text = vm.check("lsblk /dev/nbd0")                         # stdout of what must succeed, else GuestError
        vm.put(Path("dist/fleece.deb"), "/root/fleece.deb")        # also vm.write("/etc/x", "text"), vm.read("/etc/x")
        vm.unpack({"a/b.py": b"..."}, "/opt")                      # many files at once
        job = vm.start_line("sleep 100"); ...; job.wait()          # several lines at a time; vm.run is start and wait
        vm.until("test -e /run/x")                                 # asks again and again until it succeeds
        vm.save("clean"); ...; vm.restore("clean")                 # the whole VM, memory and disk, as it was: a second
        vm.reboot(); vm.crash()                                    # start anew, in order or as if power was lost
        vm.qmp.execute("query-status")                             # QEMU's own QMP; vm.fleece_qmp is a second socket
                                                                   # for Fleece, vm.guest_agent that of qemu-guest-agent

`vm.run` waits at most `timeout_s` (a hang limit: TCG on a busy machine is slow, so it is long). A line that goes on in
the background (`... &`) outlives its answer. Not for several threads. `disks` adds disks, /dev/vdb and so on; a raw one
must be `read_only`, or `save` fails.
"""

import base64
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from tests.support.debian_image import debian_image
from tests.support.guest import GuestError, small_guest
from tests.support.qemu_binaries import QemuBinary
from tests.support.running import VmDisk

#: Seconds after which a VM is ended, whatever it is doing: even if the tests were killed, nothing stays for long. One
#: VM serves all tests of a host, which takes the better part of an hour with the long ones.
LIFETIME_S: Final = 5400 if os.environ.get("FLEECE_TEST_LONG") else 1800
#: Seconds for a start: a busy machine takes ten times the ten seconds it should.
BOOT_S: Final = 300.0
#: Seconds for a line.
PATIENCE_S: Final = 240.0
#: Bytes of a file in one request.
_PIECE: Final = 1 << 20


@dataclass(frozen=True)
class Done:
    """What a line gave."""

    line: str
    code: int
    out: str
    err: str


class Line:
    """A line that runs in the VM."""

    def __init__(self, vm: "DebianVm", line: str, number: int) -> None:
        self._vm, self._line, self._number = vm, line, number

    def wait(self, timeout_s: float = PATIENCE_S) -> Done:
        """Its exit code and output.

        Raises:
            GuestError: it has not ended within `timeout_s`, or the VM ended.
        """
        answer = self._vm.answer(self._number, self._line, timeout_s)
        out, err = (base64.b64decode(answer[name]).decode(errors="replace") for name in ("out", "err"))
        return Done(self._line, answer["code"], out, err)


class DebianVm:
    """A running Debian; see the module for how it is used."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]") -> None:
        self.folder: Final = folder  #: sockets, overlay and logs; removed at the end
        self._process: Final = process
        self._control: Final = self._connected("control")
        self.qmp: Final = BlockingQmp(self._connected("own"))  #: the tests' own connection
        self.fleece_qmp: Final = folder / "qmp"  #: a QMP socket for Fleece outside the VM
        self.guest_agent: Final = folder / "agent"  #: the socket of the qemu-guest-agent that runs in the VM
        self._received = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._number = 0
        self._boot = ""

    @classmethod
    @contextmanager
    def start(
        cls,
        qemu: QemuBinary,
        *,
        image: Path | None = None,
        disks: Sequence[VmDisk] = (),
        memory_mib: int = 768,
        cpus: int = 2,
        append: str = "",
    ) -> Iterator[Self]:
        """A Debian that has started, until the block ends.

        `image` is what its root's overlay lies upon (`debian_image()`), `append` goes to its kernel's command line.

        Raises:
            Unavailable: it cannot be built on this machine.
            GuestError: it does not start.
        """
        folder = Path(tempfile.mkdtemp(prefix="fleece-debian-", dir="/tmp"))
        try:
            root = folder / "root.qcow2"
            base = image or debian_image()
            create = [qemu.img, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(root)]
            subprocess.run(create, check=True, timeout=60)
            line = _command_line(qemu, folder, root, disks, memory_mib, cpus, append)
            with (folder / "log").open("wb") as log:
                process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            try:
                with closing(cls(folder, process)) as vm:
                    vm.ready()
                    yield vm
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Hang up; for `start`, which ends the VM as well."""
        self._control.close()
        self.qmp.close()

    def run(self, line: str, *, timeout_s: float = PATIENCE_S, given: bytes = b"") -> Done:
        """Exit code and output of a line of bash, run by root in /root; `given` is its standard input.

        Raises:
            GuestError: it has not ended within `timeout_s`, or the VM ended.
        """
        return self.start_line(line, given=given).wait(timeout_s)

    def check(self, line: str, *, timeout_s: float = PATIENCE_S, given: bytes = b"") -> str:
        """Standard output of a line that must succeed.

        Raises:
            GuestError: it failed, or as `run`.
        """
        done = self.run(line, timeout_s=timeout_s, given=given)
        if done.code:
            raise GuestError(f"{line!r} gave exit code {done.code}: {done.out}{done.err}")
        return done.out

    def start_line(self, line: str, *, given: bytes = b"") -> Line:
        """Run a line; others can be run meanwhile."""
        return Line(self, line, self._ask({"run": line, "input": base64.b64encode(given).decode()}))

    def until(self, line: str, *, timeout_s: float = PATIENCE_S) -> str:
        """Run `line` until it succeeds; gives its standard output then.

        Raises:
            GuestError: it still fails after `timeout_s`; has its last output and the end of the journal.
        """
        # The loop is in the VM: a question from outside costs it more than the pause between two.
        loop = 'until said=$(eval "$LINE" 2>/dev/null); do sleep 0.3; done; printf %s "$said"'
        waiting = self.start_line(f"LINE={shlex.quote(line)}; {loop}")
        try:
            return waiting.wait(timeout_s).out
        except GuestError as error:
            last = self.run(line)
            journal = self.run("journalctl -q --no-pager -n 60 -o short-monotonic").out
            raise GuestError(f"{line!r} still fails: {last.out}{last.err}\n{journal}") from error

    def put(self, source: Path, target: str, mode: int = 0o644) -> None:
        """Copy a file of ours into the VM; folders are made."""
        self.write(target, source.read_bytes(), mode)

    def write(self, target: str, content: bytes | str, mode: int = 0o644) -> None:
        """Write a file in the VM; folders are made."""
        data = content.encode() if isinstance(content, str) else content
        for offset in range(0, max(len(data), 1), _PIECE):
            piece = base64.b64encode(data[offset : offset + _PIECE]).decode()
            request = {"write": target, "mode": mode, "data": piece, "append": offset > 0}
            self.answer(self._ask(request), target, PATIENCE_S)

    def read(self, source: str) -> bytes:
        """The content of a file in the VM.

        Raises:
            GuestError: it cannot be read.
        """
        data = b""
        while piece := base64.b64decode(
            self.answer(self._ask({"read": source, "offset": len(data)}), source, PATIENCE_S)["data"]
        ):
            data += piece
        return data

    def unpack(self, files: Mapping[str, bytes | Path], target: str) -> None:
        """Put many files (or folders of ours) below the folder `target` of the VM, which is made."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, content in files.items():
                if isinstance(content, Path):
                    archive.add(content, name, filter=_of_root)
                else:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        self.write("/var/tmp/unpack.tar", packed.getvalue())
        self.check(f"mkdir -p {target} && tar -xf /var/tmp/unpack.tar -C {target} && rm /var/tmp/unpack.tar")

    def save(self, name: str) -> None:
        """Keep the state of the whole VM, memory and disks, until it ends; nothing may be running by `start_line`.

        Raises:
            GuestError: QEMU cannot.
        """
        self.qmp.human(f"savevm {name}")

    def restore(self, name: str) -> None:
        """Put the whole VM back to what it was at `save`; what runs is gone, answers that are due never come.

        Raises:
            GuestError: QEMU cannot.
        """
        self.qmp.human("stop")
        self._drop_received()
        self.qmp.human(f"loadvm {name}")
        self.qmp.human("cont")
        self.run("true")

    def reboot(self) -> None:
        """Let the VM start anew in order, as an administrator would.

        Raises:
            GuestError: it does not come back.
        """
        before = self._boot
        self._ask({"run": "systemctl reboot", "input": ""})
        self.ready(before)

    def crash(self) -> None:
        """Start the VM anew as if its power was lost for a moment: what was not synced to its disk is lost to it.

        Raises:
            GuestError: it does not come back.
        """
        before = self._boot
        self.qmp.human("system_reset")
        self.ready(before)

    def ready(self, boot_before: str = "") -> None:
        """Return when the VM has started and all its units are up; `boot_before` is the boot that does not count.

        Raises:
            GuestError: not within `BOOT_S`.
        """
        deadline = time.monotonic() + BOOT_S
        while self._boot in ("", boot_before):
            self._receive(deadline, "the start")
        self.run("systemctl is-system-running --wait", timeout_s=BOOT_S)

    def console(self) -> str:
        """What kernel and systemd wrote on the console."""
        return (self.folder / "console").read_text(errors="replace")

    def answer(self, number: int, what: str, timeout_s: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            GuestError: none within `timeout_s`, the VM ended, or it says that it cannot.
        """
        deadline = time.monotonic() + timeout_s
        while number not in self._answers:
            self._receive(deadline, what)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise GuestError(f"{what}: {answer['error']}")
        return answer

    def _ask(self, request: dict[str, Any]) -> int:
        self._number += 1
        self._control.settimeout(PATIENCE_S)
        try:
            self._control.sendall(json.dumps({"id": self._number, **request}).encode() + b"\n")
        except OSError as error:
            raise GuestError(f"the VM takes nothing: {error}; {self._told()}") from error
        return self._number

    def _receive(self, deadline: float, what: str) -> None:
        self._control.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            data = self._control.recv(1 << 20)
        except (TimeoutError, ConnectionError) as error:
            raise GuestError(f"no answer to {what!r}: {error}; {self._told()}") from error
        if not data:
            raise GuestError(f"QEMU ended before the answer to {what!r}; {self._told()}")
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "ready" in message:
                self._boot = message["ready"]
                self._answers.clear()
            else:
                self._answers[message["id"]] = message

    def _drop_received(self) -> None:
        """Forget what the stopped VM has said: its other end will not know of it."""
        self._control.settimeout(0.05)
        with suppress(TimeoutError):
            while self._control.recv(1 << 20):
                pass
        self._received = b""
        self._answers.clear()

    def _told(self) -> str:
        log = (self.folder / "log").read_text(errors="replace")
        return f"QEMU said {log[-1000:]!r}, the console {self.console()[-1500:]!r}"

    def _connected(self, name: str) -> socket.socket:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(self.folder / name))
            except (FileNotFoundError, ConnectionRefusedError) as error:
                connection.close()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise GuestError(f"QEMU did not start: {(self.folder / 'log').read_text()}") from error
                time.sleep(0.02)
            else:
                return connection


class BlockingQmp:
    """QEMU's QMP for a test that waits."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        self._file: Final = connection.makefile("rwb")
        connection.close()
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """What QEMU answers; events are left out.

        Raises:
            GuestError: it refused, or ended.
        """
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while True:
            line = self._file.readline()
            if not line:
                raise GuestError(f"QEMU ended at {command}")
            message = json.loads(line)
            if "error" in message:
                raise GuestError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]

    def close(self) -> None:
        """Hang up."""
        self._file.close()

    def human(self, line: str) -> None:
        """A line for the monitor that says nothing if it succeeds.

        Raises:
            GuestError: it said something.
        """
        said = self.execute("human-monitor-command", **{"command-line": line})
        if said.strip():
            raise GuestError(f"{line}: {said.strip()}")


def _command_line(
    qemu: QemuBinary, folder: Path, root: Path, disks: Sequence[VmDisk], memory_mib: int, cpus: int, append: str
) -> list[str]:
    guest = small_guest()
    line = ["timeout", "-k", "5", f"{LIFETIME_S}s", qemu.system, "-nodefaults", "-no-user-config", "-display", "none"]
    # numpy needs more than QEMU's own type of processor.
    line += ["-machine", "q35", "-accel", "tcg", "-cpu", "Westmere", "-m", str(memory_mib), "-smp", str(cpus)]
    line += ["-name", "fleece-debian"]
    for name in ("own", "qmp"):
        line += ["-qmp", f"unix:{folder}/{name},server=on,wait=off"]
    line += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd)]
    # On a busy machine the kernel would take a timer that ticks late for one that is not connected, and hang.
    words = "no_timer_check console=ttyS0 root=/dev/vda rw quiet panic=-1 systemd.show_status=no mitigations=off"
    line += ["-append", f"{words} random.trust_cpu=on {append}".strip()]
    line += ["-chardev", f"file,id=s0,path={folder}/console", "-serial", "chardev:s0", "-device", "virtio-serial-pci"]
    for name, port in (("control", "fleece.control"), ("agent", "org.qemu.guest_agent.0")):
        line += ["-chardev", f"socket,id={name},path={folder}/{name},server=on,wait=off"]
        line += ["-device", f"virtserialport,chardev={name},name={port}"]
    line += ["-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0"]
    cache = {"cache": {"no-flush": True}}
    for number, disk in enumerate((VmDisk(root, "root", format="qcow2", blockdev_options=cache), *disks)):
        line += disk.arguments(number)
    return line


def _of_root(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Entries of a folder as root has them, without what Python leaves beside its modules."""
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return None if re.search(r"(^|/)__pycache__(/|$)", info.name) else info
