"""A double of the QEMU of Proxmox VE: a QMP proxy before a real stock QEMU, with the commands for backup access.

    async with ProxmoxQemu.before(vm) as double:      # vm.qmp is the double's socket while the block runs
        ...

Data and bitmaps are QEMU's own: an access is a copy-before-write filter restricted to the bitmap, a snapshot-access
node above, and dirty bitmaps that are disabled, merged and cleared; so what a backup reads and what its bitmap says is
really checked. What Proxmox's QEMU does in its main loop the double does at a standstill of the machine. Answers,
errors and limits: what Proxmox's own backup code relies on. Like QEMU it serves one client at a time. Node names of an
access are shown as QEMU makes them up (`#block...`).
"""

import json
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from tests.support.running import OwnQmp, RunningQemu

GRANULARITY: Final = 4 * 1024 * 1024
BACKGROUND: Final = "backup-access-background-bitmap"
_NATIVE: Final = ("Proxmox", "Proxmox VE")
_SUPPORT: Final = {
    "pbs-dirty-bitmap": True,
    "query-bitmap-info": True,
    "pbs-dirty-bitmap-savevm": True,
    "pbs-dirty-bitmap-migration": True,
    "pbs-masterkey": True,
    "pbs-library-version": "1.5.1 (d3f2e15a1b0a2a6ae4e1f1d5d7d2a9a0d9a0b7c1)",
    "backup-max-workers": True,
    "backup-fleecing": True,
    "backup-access-api": True,
}
_FULL_NODE: Final = "pve-full"


class Refused(Exception):  # noqa: N818 - an answer
    """The answer to a command is an error."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.error_class = error_class


class Lost(Exception):  # noqa: N818 - a fault
    """The connection ends instead of an answer."""


@dataclass
class Device:
    """One device of an access."""

    name: str
    number: int
    node: str  #: the disk's own, below throttle
    root: str  #: what a device or throttle node had below it before
    fleecing: str
    size: int
    qom_path: str | None  #: whose drive is switched; None: nothing, or a throttle node
    throttle: str | None  #: the throttle node above
    bitmap: bool = False
    action: str = "not-used"

    @property
    def cbw(self) -> str:
        return f"pve-c{self.number}"

    @property
    def view(self) -> str:
        return f"pve-s{self.number}"


@dataclass
class Access:
    """An access that is up."""

    target: str
    devices: list[Device] = field(default_factory=list)


@dataclass
class ProxmoxQemu:
    """The double; `plan` is asked for every command before it is run and may plan a fault."""

    vm: RunningQemu
    upstream: OwnQmp
    path: Path
    support: dict[str, Any] = field(default_factory=lambda: dict(_SUPPORT))
    access: Access | None = None
    #: Gives for a command None, `refuse` (it is not run), `lose` (neither, and the connection ends) or `lose-after` (it
    #: is run, but the connection ends before the answer).
    plan: Callable[[str], str | None] = lambda _command: None
    seen: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)  #: commands after the negotiation
    throttle_group: str = "group0"
    native_backup: bool = False  #: one of Proxmox's own runs
    drives_only: bool = False  #: as before Proxmox VE 9, a fleecing image is found only if it is a drive
    twist: Callable[[list[dict[str, Any]]], Any] = lambda told: told  #: makes another answer of that to a setup
    before_setup: Callable[[], Awaitable[None]] | None = None  #: called before the next setup
    _shown: dict[str, str] = field(default_factory=dict)
    _numbers: int = 0

    @classmethod
    @asynccontextmanager
    async def before(cls, vm: RunningQemu) -> AsyncIterator["ProxmoxQemu"]:
        """Serve while the block runs; `vm.qmp` is the double's socket meanwhile."""
        real = vm.qmp
        folder = Path(tempfile.mkdtemp(prefix="fleece-pve-", dir="/tmp"))
        upstream = await OwnQmp.connect(real)
        double = cls(vm, upstream, folder / "qmp")
        failure: BaseException | None = None
        try:
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                await listener.bind(str(double.path))
                listener.listen(4)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(double._serve, listener)
                    vm.qmp = double.path
                    try:
                        yield double
                    except Exception as error:
                        failure = error  # not in the group that a nursery makes
                    nursery.cancel_scope.cancel()
        finally:
            vm.qmp = real
            await upstream.aclose()
            shutil.rmtree(folder)
        if failure is not None:
            raise failure

    # -- the socket ---------------------------------------------------------------------------------------------------

    async def _serve(self, listener: Any) -> None:
        while True:
            connection, _ = await listener.accept()
            async with trio.SocketStream(connection) as stream:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError, Lost):
                    await self._client(stream)

    async def _client(self, stream: trio.SocketStream) -> None:
        version = await self._version()
        await self._send(stream, {"QMP": {"version": version, "capabilities": ["oob"]}})
        received = b""
        while data := await stream.receive_some(65536):
            received += data
            requests, received = _requests(received)
            for request in requests:
                await self._send(stream, await self._answer(request))

    async def _send(self, stream: trio.SocketStream, message: Mapping[str, Any]) -> None:
        await stream.send_all(json.dumps(message).encode() + b"\r\n")

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        command, arguments = request["execute"], request.get("arguments", {})
        tag = {"id": request["id"]} if "id" in request else {}
        if command == "qmp_capabilities":
            return {"return": {}, **tag}
        self.seen.append((command, arguments))
        fault = self.plan(command)
        if fault == "lose":
            raise Lost
        try:
            if fault == "refuse":
                raise Refused("planned by the test")
            answer = {"return": await self._run(command, arguments), **tag}
        except Refused as refused:
            answer = {"error": {"class": refused.error_class, "desc": str(refused)}, **tag}
        if fault == "lose-after":
            raise Lost
        return answer

    async def _run(self, command: str, arguments: dict[str, Any]) -> Any:
        match command:
            case "query-version":
                return await self._version()
            case "query-commands":
                own = ("query-proxmox-support", "backup-access-setup", "backup-access-teardown")
                added = (*own, "query-pbs-bitmap-info", "query-backup", "backup", "backup-cancel")
                return [*await self._ask(command), *({"name": name} for name in added)]
            case "query-proxmox-support":
                return self.support
            case "query-pbs-bitmap-info":
                return await self._bitmap_info()
            case "backup-access-setup":
                if self.before_setup is not None:
                    await self.before_setup()
                    self.before_setup = None
                return await self._at_a_standstill(lambda: self._set_up(arguments))
            case "backup-access-teardown":
                return await self._at_a_standstill(lambda: self._tear_down(arguments))
        return self._renamed(await self._ask(command, self._renamed(arguments, back=True)))

    async def _version(self) -> Any:
        version = await self._ask("query-version")
        qemu = version["qemu"]
        return {**version, "package": f"pve-qemu-kvm_{qemu['major']}.{qemu['minor']}.{qemu['micro']}-4"}

    async def _ask(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        message = await self.upstream.ask(command, arguments)
        if "error" in message:
            raise Refused(message["error"]["desc"], message["error"]["class"])
        return message["return"]

    def _renamed(self, value: Any, *, back: bool = False) -> Any:
        """`value` with the names of an access's nodes as they are shown, or the other way round."""
        if not self._shown:
            return value
        names = {shown: name for name, shown in self._shown.items()} if back else self._shown
        return _replaced(value, names)

    # -- backup access ------------------------------------------------------------------------------------------------

    async def _at_a_standstill(self, work: Callable[[], Any]) -> Any:
        running = (await self._ask("query-status"))["running"]
        if running:
            await self._ask("stop")
        try:
            return await work()
        finally:
            if running:
                await self._ask("cont")

    async def _set_up(self, arguments: dict[str, Any]) -> Any:
        target, wanted = _text(arguments, "target-id"), arguments.get("devices")
        if not isinstance(wanted, list):
            raise Refused("Invalid parameter type for 'devices', expected: array")
        if unknown := sorted(set(arguments) - {"target-id", "devices"}):
            raise Refused(f"Parameter '{unknown[0]}' is unexpected")
        if self.access is not None or self.native_backup:
            other = "Proxmox VE" if self.access is None else self.access.target
            raise Refused(f"previous backup for target '{other}' not finished")
        if not wanted:
            raise Refused("empty device list")
        access = Access(target)
        modes: dict[str, str] = {}
        for entry in wanted:
            device, mode = _text(entry, "device"), entry.get("bitmap-mode", "none")
            if mode not in ("none", "new", "use"):
                raise Refused(f"Parameter 'bitmap-mode' does not accept value '{mode}'")
            if device in modes:
                raise Refused(f"Device '{device}' is listed twice")
            modes[device] = mode
            access.devices.append(await self._device(device))
        self.access = access
        try:
            for one in access.devices:
                await self._take_bitmap(one, target, modes[one.name])
            for one in access.devices:
                await self._insert(one, target)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._remove(access)
                await self._end_bitmaps(access, success=False)
                self.access = None
            raise
        return self.twist([self._told(one, target) for one in access.devices])

    def _told(self, device: Device, target: str) -> dict[str, Any]:
        told = {"node-name": self._shown[device.view], "device": device.name, "size": device.size}
        told["bitmap-action"] = device.action
        if device.bitmap:
            told |= {"bitmap-node-name": device.node, "bitmap-name": target}
        return told

    async def _device(self, name: str) -> Device:
        nodes = await self._nodes()
        blocks = await self._ask("query-block")
        root = next((entry["inserted"]["node-name"] for entry in blocks if entry["device"] == name), name)
        if root not in nodes:
            raise Refused(f"Device '{name}' not found", "DeviceNotFound")
        graph = await self._children()
        throttle = root if nodes[root]["drv"] == "throttle" else None
        node = graph[root]["file"] if throttle is not None else root
        wanted = f"{name}-fleecing"
        drives = {entry["device"]: entry["inserted"]["node-name"] for entry in blocks if "inserted" in entry}
        fleecing = drives.get(wanted, "" if self.drives_only else wanted)
        if fleecing not in nodes:
            raise Refused(f"Device '{wanted}' not found", "DeviceNotFound")
        size, space = nodes[node]["image"]["virtual-size"], nodes[fleecing]["image"]["virtual-size"]
        if size // 512 != space // 512:
            raise Refused(f"Size mismatch for '{wanted}' - sector count {space // 512} instead of {size // 512}")
        qdev = next((entry.get("qdev") for entry in blocks if entry.get("inserted", {}).get("node-name") == root), None)
        path = f"/machine/peripheral/{qdev}" if qdev and not qdev.startswith("/") else qdev or None
        self._numbers += 1
        return Device(name, self._numbers, node, root, fleecing, size, None if throttle is not None else path, throttle)

    async def _take_bitmap(self, device: Device, target: str, mode: str) -> None:
        bitmaps = (await self._nodes())[device.node].get("dirty-bitmaps", ())
        there = any(bitmap.get("name") == target for bitmap in bitmaps)
        place = {"node": device.node, "name": target}
        if there and mode in ("none", "new"):
            await self._ask("block-dirty-bitmap-remove", place)
        if mode == "none":
            device.action = "not-used-removed" if there else "not-used"
            return
        if there and mode == "use":
            device.action = "used"
        else:
            device.action = "new" if mode == "new" else "missing-recreated"
            await self._add_full_bitmap(device, place)
        device.bitmap = True
        await self._ask("block-dirty-bitmap-disable", place)
        background = {"node": device.node, "name": BACKGROUND, "granularity": GRANULARITY}
        await self._ask("block-dirty-bitmap-add", background)

    async def _add_full_bitmap(self, device: Device, place: dict[str, str]) -> None:
        """A bitmap in which everything is dirty: merged from one of a node that was written from end to end."""
        source = {"node": _FULL_NODE, "name": "full"}
        await self._ask("blockdev-add", {"driver": "null-co", "node-name": _FULL_NODE, "size": device.size})
        try:
            await self._ask("block-dirty-bitmap-add", {**source, "granularity": GRANULARITY})
            line = f'qemu-io {_FULL_NODE} "write -z 0 {device.size}"'
            await self._ask("human-monitor-command", {"command-line": line})
            (full,) = (await self._nodes())[_FULL_NODE]["dirty-bitmaps"]
            assert full["count"] >= device.size, f"{device.name}: only {full['count']} bytes are dirty"
            await self._ask("block-dirty-bitmap-add", {**place, "granularity": GRANULARITY})
            merge = {"node": place["node"], "target": place["name"], "bitmaps": [source]}
            await self._ask("block-dirty-bitmap-merge", merge)
            await self._ask("block-dirty-bitmap-remove", source)
        finally:
            await self._ask("blockdev-del", {"node-name": _FULL_NODE})

    async def _insert(self, device: Device, target: str) -> None:
        nodes = await self._nodes()
        read_only = nodes[device.node]["ro"]
        timeout_s = 45 if self.vm.binary.version >= (9, 1, 0) else 4
        options: dict[str, Any] = {"driver": "copy-before-write", "node-name": device.cbw, "file": device.node}
        options |= {"target": device.fleecing, "on-cbw-error": "break-snapshot", "cbw-timeout": timeout_s}
        if read_only:
            options["read-only"] = True
        if device.bitmap:
            options["bitmap"] = {"node": device.node, "name": target}
        await self._ask("blockdev-add", options)
        self._shown[device.cbw] = f"#block{9000 + 2 * device.number}"
        await self._switch(device, device.cbw)
        view = {"driver": "snapshot-access", "node-name": device.view, "file": device.cbw, "discard": "unmap"}
        await self._ask("blockdev-add", view)
        self._shown[device.view] = f"#block{9001 + 2 * device.number}"

    async def _switch(self, device: Device, node: str) -> None:
        if device.throttle is not None:
            options = {"driver": "throttle", "node-name": device.throttle, "throttle-group": self.throttle_group}
            await self._ask("blockdev-reopen", {"options": [{**options, "file": node}]})
        elif device.qom_path is not None:
            await self._ask("qom-set", {"path": device.qom_path, "property": "drive", "value": node})

    async def _tear_down(self, arguments: dict[str, Any]) -> dict[str, Any]:
        target, success = _text(arguments, "target-id"), arguments.get("success")
        if not isinstance(success, bool):
            raise Refused("Parameter 'success' is missing")
        if target in _NATIVE:
            raise Refused(f"target ID '{target}' is reserved for native backup")
        if self.access is None:
            return {}
        if self.access.target != target:
            raise Refused(f"cannot teardown access for target '{target}': access is for '{self.access.target}'")
        access = self.access
        exported = {export["node-name"] for export in await self._ask("query-block-exports")}
        for device in access.devices:
            if device.view in exported:
                raise Refused(f"Node {self._shown[device.view]} is in use")
        await self._remove(access)
        await self._end_bitmaps(access, success=success)
        self.access = None
        return {}

    async def _remove(self, access: Access) -> None:
        nodes = await self._nodes()
        for device in access.devices:
            if device.view in nodes:
                await self._ask("blockdev-del", {"node-name": device.view})
            if device.cbw in nodes:
                with suppress(Refused):  # the device may have been unplugged
                    await self._switch(device, device.node)
                await self._ask("blockdev-del", {"node-name": device.cbw})
            self._shown.pop(device.view, None)
            self._shown.pop(device.cbw, None)

    async def _end_bitmaps(self, access: Access, *, success: bool) -> None:
        nodes = await self._nodes()
        for device in access.devices:
            names = {bitmap.get("name") for bitmap in nodes[device.node].get("dirty-bitmaps", ())}
            if BACKGROUND not in names:
                continue
            place = {"node": device.node, "name": access.target}
            merge = {"node": device.node, "target": access.target, "bitmaps": [BACKGROUND]}
            actions = [{"type": "block-dirty-bitmap-clear", "data": place}] if success else []
            actions += [
                {"type": "block-dirty-bitmap-merge", "data": merge},
                {"type": "block-dirty-bitmap-remove", "data": {"node": device.node, "name": BACKGROUND}},
                {"type": "block-dirty-bitmap-enable", "data": place},
            ]
            await self._ask("transaction", {"actions": actions})

    async def _bitmap_info(self) -> list[dict[str, Any]]:
        if self.access is None:
            return []
        nodes, told = await self._nodes(), []
        for device in self.access.devices:
            counts = {bitmap.get("name"): bitmap["count"] for bitmap in nodes[device.node].get("dirty-bitmaps", ())}
            dirty = min(counts.get(self.access.target, device.size), device.size)
            told.append({"drive": device.name, "action": device.action, "size": device.size, "dirty": dirty})
        return told

    async def _nodes(self) -> dict[str, dict[str, Any]]:
        return {node["node-name"]: node for node in await self._ask("query-named-block-nodes", {"flat": True})}

    async def _children(self) -> dict[str, dict[str, str]]:
        graph = await self._ask("x-debug-query-block-graph")
        names = {node["id"]: node["name"] for node in graph["nodes"] if node["type"] == "block-driver"}
        found: dict[str, dict[str, str]] = {name: {} for name in names.values()}
        for edge in graph["edges"]:
            if edge["parent"] in names and edge["child"] in names:
                found[names[edge["parent"]]][edge["name"]] = names[edge["child"]]
        return found


def _requests(received: bytes) -> tuple[list[dict[str, Any]], bytes]:
    """The whole requests in `received`, and what is left after them."""
    requests: list[dict[str, Any]] = []
    while (start := received.find(b"{")) >= 0:
        text = received[start:].decode("latin-1")
        try:
            request, end = json.JSONDecoder().raw_decode(text)
        except ValueError:
            break
        received = text[end:].encode("latin-1")
        requests.append(request)
    return requests, received


def _replaced(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_replaced(one, names) for one in value]
    if isinstance(value, dict):
        return {key: _replaced(one, names) for key, one in value.items()}
    return value


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise Refused(f"Parameter '{name}' is missing")
    return value
