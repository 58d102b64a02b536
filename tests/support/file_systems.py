"""Real file systems for tests, in a file on a loop device, where the machine lets us mount them."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.support.apt import AptRoot, codename
from tests.support.cache import Unavailable, cached, once
from tests.support.loop_devices import loop_device

#: The command that makes each, and bytes of the smallest that it likes.
_MAKERS: Final = {
    "ext4": (["mke2fs", "-q", "-F", "-t", "ext4"], 64 << 20),
    "xfs": (["mkfs.xfs", "-q", "-f"], 320 << 20),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], 128 << 20),
}
#: Where the machine's own tools are, whoever's PATH it is.
_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_PACKAGES: Final = ("xfsprogs", "btrfs-progs", "dosfstools", "mtools", "ntfs-3g", "fdisk", "lvm2")


@once
def _tools() -> Path:
    release = codename()
    if not release:
        raise Unavailable("this is no Debian, whose tools make other file systems")

    def build(folder: Path) -> None:
        AptRoot.open("apt-release", (release,)).unpack_with_dependencies(_PACKAGES, release, folder)

    return cached("file-system-tools-2", build)


def run_tool(command: Sequence[str | Path], *, stdin: str | None = None, **environment: str) -> str:
    """What `command` says on standard output, run by the machine's own tool or the distribution's one in the cache.

    Raises:
        Unavailable: there is none.
        subprocess.CalledProcessError: it failed.
    """
    name, *arguments = command
    own = shutil.which(name, path=_SYSTEM_PATH)
    variables = {**os.environ, **environment}
    if own is None:
        tools = _tools()
        variables["LD_LIBRARY_PATH"] = ":".join(sorted({str(path.parent) for path in tools.glob("**/lib*.so*")}))
        own = next((str(path) for path in tools.glob(f"**/*bin/{name}") if path.exists()), None)
        if own is None:
            raise Unavailable(f"{name} is missing")
    done = subprocess.run(
        [own, *arguments], check=True, capture_output=True, timeout=60, env=variables, text=True, input=stdin
    )
    return done.stdout


def _make(command: list[str], image: Path) -> None:
    run_tool([*command, image])


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """An empty file system of `kind`, mounted below `folder` while the block runs; skips where that cannot be."""
    command, size = _MAKERS[kind]
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system to test with")
    image, point = folder / f"{kind}.img", folder / kind
    with image.open("wb") as file:
        file.truncate(size)
    try:
        _make(command, image)
    except Unavailable as reason:
        pytest.skip(f"no {kind} to test with: {reason}")
    with mounted_image(kind, image, point):
        yield point


@contextmanager
def mounted_image(kind: str, image: Path, point: Path, *options: str) -> Iterator[Path]:
    """The file system in the file `image`, mounted on the new folder `point`, with options of `mount`."""
    point.mkdir()
    with loop_device(image) as device:
        command = ["mount", "-t", kind, *options, device, str(point)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(f"no {kind} to test with: {done.stderr.strip()}")
        try:
            yield point
        finally:
            subprocess.run(["umount", point], check=True, timeout=60)
            image.unlink()
