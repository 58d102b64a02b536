"""A volume group that LVM made, on two disks."""

import json
from contextlib import ExitStack
from pathlib import Path

from tests.support.cache import cached
from tests.support.disk_images import _loop
from tests.support.file_systems import run_tool

_MIB = 1 << 20


def made_group() -> tuple[list[Path], list[dict[str, str]]]:
    """The disks of the group `guest`, whose volumes are empty, and its segments as LVM lists them.

    Raises:
        Unavailable: this machine cannot build it.
    """
    folder = cached("lvm-images-1", _made)
    segments = json.loads((folder / "segments.json").read_text())["report"][0]["seg"]
    return [folder / "pv0.img", folder / "pv1.img"], segments


def _made(folder: Path) -> None:
    """Two physical volumes; `root` on the first, `span` on both, `stripe` over both."""
    paths = [folder / "pv0.img", folder / "pv1.img"]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(160 * _MIB)
    with ExitStack() as stack:
        devices = [stack.enter_context(_loop(path)) for path in paths]
        only = ",".join(f'"a|^{device}$|"' for device in devices)
        config = (
            f'devices{{ dir="/dev" scan=["/dev"] use_devicesfile=0 filter=[{only},"r|.*|"] }} '
            f'global{{ use_lvmpolld=0 locking_dir="{folder}/lock" }} '
            "activation{ udev_sync=0 udev_rules=0 monitoring=0 } backup{ backup=0 archive=0 }"
        )

        def lvm(verb: str, *arguments: str) -> str:
            return run_tool(
                ["lvm", verb, "--driverloaded", "n", "--config", config, *arguments], DM_DISABLE_UDEV="1"
            )  # fmt: skip

        lvm("pvcreate", "-y", *devices)
        lvm("vgcreate", "-s", "1M", "guest", *devices)
        new = ("-an", "-Zn", "-Wn", "-y")
        lvm("lvcreate", *new, "-L", "70M", "-n", "root", "guest", devices[0])
        lvm("lvcreate", *new, "-i", "2", "-I", "64k", "-L", "100M", "-n", "stripe", "guest")
        lvm("lvcreate", *new, "-l", "100%FREE", "-n", "span", "guest")
        listed = lvm("lvs", "--reportformat", "json", "--segments", "-o", "lv_name,seg_le_ranges,stripe_size", "guest")
        for number, device in enumerate(devices):
            listed = listed.replace(f'"{device}', f'"{number}').replace(f" {device}:", f" {number}:")
            listed = listed.replace(f"{device}:", f"{number}:")
        (folder / "segments.json").write_text(listed)
