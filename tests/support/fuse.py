"""What tests need that mount something."""

import os

import pytest

#: Mounts need the kernel's FUSE; containers without it run everything else.
NEEDS_FUSE = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="no usable /dev/fuse on this machine"
)
