"""A virtual machine inside the Debian VM: a QEMU that waits at its first instruction, with one disk.

`start(debian, qemu=...)` runs it as the unit `vm-web`: QMP at /run/web.qmp for Fleece, at /run/own.qmp for the tests.
`look(debian)` tells what it has, `write(debian, ...)` plays its guest.
"""

import json
from typing import Any, Final

from tests.support.debian_vm import DebianVm

#: Where the disk's bytes are, in the Debian VM.
DISK: Final = "/var/lib/web.raw"
_OPTIONS: Final = (
    "-nodefaults -no-user-config -display none -machine q35 -accel tcg -m 64 -S"
    " -qmp unix:/run/web.qmp,server=on,wait=off -qmp unix:/run/own.qmp,server=on,wait=off"
    f" -blockdev driver=raw,node-name=fmt0,file.driver=file,file.filename={DISK}"
    " -device virtio-blk-pci,drive=fmt0,id=disk0"
)
#: qmp.py COMMAND [ARGUMENTS]: the answer of QEMU as JSON; `look` instead of a command: what it has.
_QMP: Final = """
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect("/run/own.qmp")
f = s.makefile("rw")
f.readline()
def do(command, **arguments):
    f.write(json.dumps({"execute": command, "arguments": arguments}) + "\\n")
    f.flush()
    while "return" not in (answer := json.loads(f.readline())):
        assert "error" not in answer, answer
    return answer["return"]
do("qmp_capabilities")
if sys.argv[1] != "look":
    print(json.dumps(do(sys.argv[1], **json.loads(sys.argv[2] if sys.argv[2:] else "{}"))))
    sys.exit()
nodes = do("query-named-block-nodes")
print(json.dumps({
    "nodes": sorted(node["node-name"] for node in nodes if not node["node-name"].startswith("#")),
    "roots": [block["inserted"]["node-name"] for block in do("query-block") if "inserted" in block],
    "exports": [export["id"] for export in do("query-block-exports")],
    "bitmaps": [one["name"] for node in nodes for one in node.get("dirty-bitmaps", ()) if "name" in one],
}))
"""


def start(debian: DebianVm, *, qemu: str = "qemu-system-x86_64") -> None:
    """Start it; `DISK` must be there, `qemu` is a program in the Debian VM."""
    debian.write("/root/qmp.py", _QMP)
    debian.check(f"systemd-run -q --unit=vm-web {qemu} {_OPTIONS}")
    debian.until("python3 /root/qmp.py query-status")


def look(debian: DebianVm) -> dict[str, Any]:
    """Block nodes with names, roots of devices, exports and bitmaps."""
    found: dict[str, Any] = json.loads(debian.check("python3 /root/qmp.py look"))
    return found


def write(debian: DebianVm, pattern: int, offset: int, length: int) -> None:
    """Write bytes of one value to the disk, as its guest would."""
    line = f'qemu-io -d /machine/peripheral/disk0/virtio-backend "write -P {pattern} {offset} {length}"'
    arguments = json.dumps({"command-line": line})
    assert json.loads(debian.check(f"python3 /root/qmp.py human-monitor-command '{arguments}'")) == ""
