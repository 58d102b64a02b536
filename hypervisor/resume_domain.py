"""`resume_child.py` for a domain of libvirt: the guest goes on by libvirt's own call, so that it knows of it.

Started by `hypervisor.pause` with the domain's address. docs/hypervisor.md, "Pausing the guest".
"""

import os
import sys
import time
from typing import Any

from hypervisor.domain_address import DomainAddress
from hypervisor.resume_child import TRIES, parent_is_gone, to_the_background


def resume(lib: Any, address: DomainAddress) -> bool:
    """Let the guest go on if it is paused; False if libvirt cannot be asked now. `lib` are its bindings."""
    try:
        connection = lib.open(address.uri)
        by_uuid = DomainAddress.is_uuid(address.domain)
        domain = (connection.lookupByUUIDString if by_uuid else connection.lookupByName)(address.domain)
        if domain.state()[0] == lib.VIR_DOMAIN_PAUSED:
            domain.resume()
    except lib.libvirtError:
        return False
    return True


def main() -> None:
    """Run as a module."""
    from hypervisor.libvirt_host import bindings

    address = DomainAddress.parse(sys.argv[1])
    assert address is not None
    lib, _ = bindings()
    to_the_background()
    if not parent_is_gone():
        return
    for _ in range(TRIES):
        if resume(lib, address):
            return
        time.sleep(0.5)


if __name__ == "__main__":
    main()
    os._exit(0)  # a thread of libvirt must not hold the process
