"""QEMU's block nodes and how they hang together, as far as Fleece needs to see it.

docs/hypervisor.md, "Clean-up". Everything here comes from QEMU and is checked where it is taken out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from hypervisor import checked
from hypervisor.disk_names import image_path
from hypervisor.qmp import Qmp

#: Nodes of ours: `fleece-`, the kind, and the number of the disk.
_OURS: Final = re.compile(r"fleece-(?P<kind>[fpcstkno])(?P<number>[0-9]{1,4})")


class OurNode(NamedTuple):
    """A block node that Fleece has added.

    `f` fleecing image, `p` pass-through, `c` copy-before-write, `s` view, `t` state of a TPM, `k` helper of a mark,
    `o` disk that a rollback has put aside, `n` the nothing that its device has meanwhile.
    """

    kind: str
    number: int

    @classmethod
    def parse(cls, name: str) -> "OurNode | None":
        """None if `name` is somebody else's."""
        match = _OURS.fullmatch(name)
        return None if match is None else cls(match["kind"], int(match["number"]))

    def __str__(self) -> str:
        return f"fleece-{self.kind}{self.number}"


@dataclass(frozen=True, slots=True)
class BlockNode:
    """One entry of `query-named-block-nodes`."""

    name: str
    driver: str
    read_only: bool
    size: int  #: bytes
    file: str | None  #: path of the image, None where there is none
    bitmaps: Sequence[dict[str, Any]] = field(default=(), repr=False)  #: those that have a name

    @property
    def ours(self) -> OurNode | None:
        """What it is for Fleece; None for somebody else's."""
        return OurNode.parse(self.name)


def released(node: BlockNode) -> BlockNode:
    """`node` with its bitmaps as they are when nobody uses them."""
    return replace(node, bitmaps=[{**bitmap, "busy": False} for bitmap in node.bitmaps])


async def block_nodes(qmp: Qmp) -> dict[str, BlockNode]:
    """All block nodes by name.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    where = f"{qmp.where}, query-named-block-nodes"
    nodes = {}
    for entry in checked.objects(await qmp.execute("query-named-block-nodes", {"flat": True}), where):
        name = checked.field(entry, "node-name", str, where)
        image = checked.field(entry, "image", dict, where)
        bitmaps = [
            bitmap
            for bitmap in checked.objects(entry.get("dirty-bitmaps") or [], where)
            if checked.optional(bitmap, "name", str, where)  # a filter's own ones have no name
        ]
        nodes[name] = BlockNode(
            name,
            checked.field(entry, "drv", str, where),
            checked.field(entry, "ro", bool, where),
            checked.field(image, "virtual-size", int, where),
            image_path(checked.optional(entry, "file", str, where) or ""),
            bitmaps,
        )
    return nodes


async def children(qmp: Qmp) -> Mapping[str, Mapping[str, str]]:
    """The named children of every block node: `{"fleece-p0": {"file": "fmt0"}}`.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    where = f"{qmp.where}, x-debug-query-block-graph"
    graph = checked.of_type(await qmp.execute("x-debug-query-block-graph"), dict, where)
    names = {
        checked.field(node, "id", int, where): checked.field(node, "name", str, where)
        for node in checked.objects(graph.get("nodes"), where)
        if node.get("type") == "block-driver"
    }
    found: dict[str, dict[str, str]] = {name: {} for name in names.values()}
    for edge in checked.objects(graph.get("edges"), where):
        parent = names.get(checked.field(edge, "parent", int, where))
        child = names.get(checked.field(edge, "child", int, where))
        if parent is not None and child is not None:
            found[parent][checked.field(edge, "name", str, where)] = child
    return found


def nodes_below(graph: Mapping[str, Mapping[str, str]], root: str) -> set[str]:
    """The nodes that `root` stands on, directly or not, in what `children` gives."""
    found: set[str] = set()
    ahead = [root]
    while ahead:
        new = set(graph.get(ahead.pop(), {}).values()) - found
        found |= new
        ahead += new
    return found


class Root(NamedTuple):
    """The node a device uses, and the device's path for `qom-set`."""

    qom_path: str
    node: str


async def device_roots(qmp: Qmp) -> list[Root]:
    """The roots of all devices that have one now.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    where = f"{qmp.where}, query-block"
    roots = []
    for entry in checked.objects(await qmp.execute("query-block"), where):
        qdev = checked.optional(entry, "qdev", str, where)
        inserted = checked.optional(entry, "inserted", dict, where)
        if qdev and inserted is not None:
            path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
            roots.append(Root(path, checked.field(inserted, "node-name", str, where)))
    return roots


async def put_aside(qmp: Qmp) -> dict[int, str]:
    """The disks' nodes that a rollback has put aside and not put back, by number; mostly none.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    if not any(node.ours is not None and node.ours.kind == "o" for node in (await block_nodes(qmp)).values()):
        return {}
    found = {}
    for name, below in (await children(qmp)).items():
        ours = OurNode.parse(name)
        if ours is not None and ours.kind == "o" and "file" in below:
            found[ours.number] = below["file"]
    return found


async def our_exports(qmp: Qmp) -> tuple[list[str], int]:
    """Ids of the exports that are Fleece's, and the number of all others.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    where = f"{qmp.where}, query-block-exports"
    ids = [
        checked.field(export, "id", str, where)
        for export in checked.objects(await qmp.execute("query-block-exports"), where)
    ]
    ours = [name for name in ids if name.startswith("fleece-")]
    return ours, len(ids) - len(ours)


async def nodes_of_jobs(qmp: Qmp) -> dict[str, set[str]]:
    """Block nodes, by name, that a block job works on or that stand over one it works on, with the jobs' names.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`.
    """
    where = f"{qmp.where}, x-debug-query-block-graph"
    graph = checked.of_type(await qmp.execute("x-debug-query-block-graph"), dict, where)
    kinds: dict[int, tuple[str, str]] = {}
    for entry in checked.objects(graph.get("nodes"), where):
        number = checked.field(entry, "id", int, where)
        kinds[number] = (checked.field(entry, "type", str, where), checked.field(entry, "name", str, where))
    edges: dict[int, set[int]] = {}
    for edge in checked.objects(graph.get("edges"), where):
        parent = checked.field(edge, "parent", int, where)
        edges.setdefault(parent, set()).add(checked.field(edge, "child", int, where))

    def below(number: int) -> set[int]:
        reached, ahead = {number}, [number]
        while ahead:
            new = edges.get(ahead.pop(), set()) - reached
            reached |= new
            ahead.extend(new)
        return reached

    busy: dict[str, set[str]] = {}
    for job, (kind, name) in kinds.items():
        if kind != "block-job":
            continue
        reached, direct = below(job), edges.get(job, set())
        for number, (node_kind, node) in kinds.items():
            # A base image that two disks share and no job writes to makes neither of them busy.
            if node_kind == "block-driver" and (number in reached or below(number) & direct):
                busy.setdefault(node, set()).add(name)
    return busy
