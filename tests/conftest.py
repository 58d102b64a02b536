"""Fixtures for all rooms; docs/development.md shows how they are used."""

import ctypes
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from trio._core._run import GLOBAL_RUN_CONTEXT

from tests.support.cache import ROOT, Unavailable
from tests.support.debian_image import debian_image
from tests.support.debian_vm import DebianVm
from tests.support.disk_images import MadeImage, made_image
from tests.support.golden_store import unpack_golden_store
from tests.support.guest import SmallGuest, small_guest
from tests.support.qemu_binaries import QemuBinary, backports_qemu, distribution_qemu
from tests.support.rgw import RunningRgw, ceph, running_rgw
from tests.support.s3_emulator import S3Emulator
from tests.support.stores import StorePool, open_pool
from tests.support.warm_command import WarmCommand

# A background shell or nohup may have set these to be ignored, which Fleece respects and tests of signals cannot use.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in every run, so that a change is refused for what it changed; `make test-long` draws new ones.
# A busy machine is slow to draw them, which says nothing about a test.
settings.register_profile(
    "always the same",
    derandomize=not os.environ.get("FLEECE_TEST_LONG"),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("always the same")

#: Seconds for a test in the Debian VM: a limit for what hangs, since a busy machine is slow without acceleration.
VM_TIMEOUT_S: Final = 900
T = TypeVar("T")
_LIBC: Final = ctypes.CDLL(None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in the Debian VM come first and together: one process has the VM, and nothing waits for them at the end."""
    in_vm = [item for item in items if item.get_closest_marker("vm") is not None]
    for item in in_vm:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(VM_TIMEOUT_S))  # the first of them builds it
    items.sort(key=lambda item: item.get_closest_marker("vm") is None)


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Commands that are run in this process set up logging for themselves: undo that for the tests that follow."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler:  # not those of pytest
            root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _loop_is_over() -> Iterator[None]:
    """A test that is ended by its limit of time breaks out of trio, which then would run nothing that follows."""
    yield
    if vars(GLOBAL_RUN_CONTEXT):
        vars(GLOBAL_RUN_CONTEXT).clear()
        signal.set_wakeup_fd(-1)


@pytest.fixture(autouse=True, scope="module")
def _memory_given_back() -> Iterator[None]:
    """What a module has freed goes back to the system: the C library would keep a gigabyte of it."""
    yield
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


_QEMUS: dict[str, Callable[[], QemuBinary]] = {"distribution": distribution_qemu, "backports": backports_qemu}


def _or_skip(get: Callable[[], T]) -> T:
    try:
        return get()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def made() -> Callable[[str], MadeImage]:
    """A disk image of a kind; skips where it cannot be made (no root, no loop devices, no packages)."""
    return lambda kind: _or_skip(lambda: made_image(kind))


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.qemu) for name in _QEMUS])
def qemu(request: pytest.FixtureRequest) -> QemuBinary:
    """Each QEMU there is to test with, one after the other: the distribution's and the one of its backports."""
    return _or_skip(_QEMUS[request.param])


@pytest.fixture
def rounds(qemu: QemuBinary) -> Callable[[int], int]:
    """`rounds(20)` is how often a test that counts on numbers shall repeat on this QEMU.

    All of them on the newest QEMU there is, a quarter on the other; in `make test-long` all on both.
    """

    def count(full: int) -> int:
        if os.environ.get("FLEECE_TEST_LONG") or qemu == _newest_qemu():
            return full
        return -(-full // 4)

    return count


@pytest.fixture
def long_rounds() -> Callable[[int], int]:
    """`long_rounds(50)` is how often a test that counts on numbers shall repeat: a fifth, all in `make test-long`."""
    return lambda full: full if os.environ.get("FLEECE_TEST_LONG") else -(-full // 5)


def _newest_qemu() -> QemuBinary:
    try:
        return backports_qemu()
    except Unavailable:
        return distribution_qemu()


@pytest.fixture
def distribution() -> QemuBinary:
    """The distribution's QEMU only, where one is enough (its qemu-img, qemu-nbd, ...)."""
    return _or_skip(distribution_qemu)


@pytest.fixture
def backports() -> QemuBinary:
    """The newer QEMU only, for what older ones cannot do."""
    return _or_skip(backports_qemu)


@pytest.fixture(scope="session")
def guest() -> SmallGuest:
    """Kernel and initramfs of the small guest."""
    return _or_skip(small_guest)


@pytest.fixture(scope="session")
def started_debian_vm() -> Iterator[DebianVm]:
    """A Debian VM for all tests of this process, with its state after the start saved as `started`."""
    with DebianVm.start(_or_skip(distribution_qemu), image=_or_skip(debian_image)) as vm:
        vm.save("started")
        yield vm


@pytest.fixture
def debian_vm(started_debian_vm: DebianVm) -> DebianVm:
    """A Debian VM as it was after its start, to do anything with; mark such tests `vm`."""
    started_debian_vm.restore("started")
    return started_debian_vm


@pytest.fixture(scope="session")
def warm_command() -> Iterator[WarmCommand]:
    """Runs `fleece` in a process of its own, but without its start."""
    command = WarmCommand()
    yield command
    command.close()


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    """An empty folder in memory, removed after the test: a datastore has 65536 folders, which cost time on a disk."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="fleece-test-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def store_pool() -> Iterator[StorePool]:
    """Empty datastores in memory, their chunk folders used again from test to test."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with open_pool(parent) as pool:
        yield pool


@pytest.fixture
def store_folder(store_pool: StorePool) -> Iterator[Path]:
    """The folder of an empty datastore, for `Datastore.open` or the command's `--repo`."""
    base = store_pool.lend()
    try:
        yield base
    finally:
        store_pool.take_back(base)


@pytest.fixture
def s3_emulator() -> Iterator[S3Emulator]:
    """A strict S3 endpoint with one bucket; a planned fault that is not met, or a wrong request, fails the test."""
    with S3Emulator() as emulator:
        yield emulator


@pytest.fixture(scope="session")
def rgw() -> Iterator[RunningRgw]:
    """A real Ceph gateway, for all tests of this process; `rgw.make_bucket()` gives each test one of its own."""
    _or_skip(ceph)
    with running_rgw() as running:
        yield running


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of files that a real PBS wrote: `FLEECE_GOLDEN`, else `../shared/golden` beside the checkout."""
    folder = Path(os.environ.get("FLEECE_GOLDEN") or ROOT.parent / "shared/golden")
    if not folder.is_dir():
        pytest.skip(f"no golden data in {folder} (FLEECE_GOLDEN)")
    return folder


@pytest.fixture(scope="module")
def golden_store(golden: Path, store_pool: StorePool) -> Iterator[Path]:
    """The datastore that a real PBS wrote, for tests that change nothing others look at."""
    base = store_pool.lend()
    try:
        unpack_golden_store(golden, base)
        yield base
    finally:
        store_pool.take_back(base)
