"""Block nodes that libvirt has made and cannot take away, because a view of ours stood on them. docs/libvirt.md."""

from collections.abc import Iterable
from typing import Final

from hypervisor.block_graph import block_nodes, children, device_roots
from hypervisor.domain_address import DomainAddress
from hypervisor.errors import QmpCommandError
from hypervisor.qmp import Qmp

_PREFIX: Final = "libvirt-"


async def remove_orphans(qmp: Qmp, roots: Iterable[str]) -> list[str]:
    """Remove the nodes `roots` of disks that were unplugged meanwhile, with what is below them; says what was done.

    When libvirt unplugs a disk it removes the nodes as well, and forgets them if QEMU refuses, as it does while a
    backup reads. Nobody else would close the image then. What is still in use, a disk's or an overlay's, stays.

    Raises:
        QmpError, QmpAnswerError: as `Qmp.execute`, but for commands that are refused.
    """
    if DomainAddress.parse(qmp.where) is None:
        return []
    there, graph = await block_nodes(qmp), await children(qmp)
    used = {root for _, root in await device_roots(qmp)}
    removed = []
    ahead = [root for root in roots if root in there and root not in used]
    while ahead:
        node = ahead.pop()
        if not node.startswith(_PREFIX) or node in removed:
            continue
        try:
            await qmp.execute("blockdev-del", {"node-name": node})
        except QmpCommandError:
            continue
        removed.append(node)
        ahead += graph.get(node, {}).values()
    return [f"closed the image of an unplugged disk ({', '.join(removed)})"] if removed else []
