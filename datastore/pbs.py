"""What this host's Proxmox Backup Server, if there is one, says about a store: its name there and its maintenance mode.

Fleece then also takes its locks where PBS looks for them, and respects the maintenance mode.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONFIG: Final = Path("/etc/proxmox-backup/datastore.cfg")
LOCKS: Final = Path("/run/proxmox-backup/locks")
#: Its presence means that PBS, until the next boot, locks folders instead of files.
OLD_LOCKING: Final = Path("/run/proxmox-backup/old-locking")
#: Bytes of a configuration file that are looked at.
_MAX_CONFIG: Final = 16 << 20

_SECTION: Final = re.compile(r"datastore:\s*(\S+)\s*")
_OPTION: Final = re.compile(r"\s+(\S+)\s+(.*?)\s*")


@dataclass(frozen=True, slots=True)
class PbsStore:
    """A datastore of this host's PBS."""

    name: str
    path: str
    maintenance: str = ""  #: `read-only`, `offline`, `delete`, `unmount`, `s3-refresh`, or nothing
    s3: bool = False  #: the folder is the cache of a bucket: an empty chunk file stands for one that lies there

    @property
    def refuses_reading(self) -> bool:
        """True if nobody may use the store now."""
        return self.maintenance in ("offline", "delete", "unmount", "s3-refresh")

    @property
    def refuses_writing(self) -> bool:
        """True if nothing may be written now."""
        return self.refuses_reading or self.maintenance == "read-only"


def read_config(config: Path = CONFIG) -> list[PbsStore]:
    """All datastores of this host's PBS; none if it has no PBS or the file is not for us to read."""
    try:
        with config.open("rb") as file:
            text = file.read(_MAX_CONFIG).decode(errors="replace")
    except OSError:
        return []
    stores: list[dict[str, str]] = []
    for line in text.splitlines():
        if section := _SECTION.fullmatch(line):
            stores.append({"name": section[1]})
        elif stores and (option := _OPTION.fullmatch(line)):
            stores[-1].setdefault(option[1], option[2])
    return [
        PbsStore(
            store["name"],
            store["path"],
            re.split("[,;]", store.get("maintenance-mode", ""))[0].removeprefix("type="),
            s3="type=s3" in store.get("backend", "").split(","),
        )
        for store in stores
        if "path" in store
    ]


def find_store(base: Path, config: Path = CONFIG) -> PbsStore | None:
    """The store of this host's PBS whose real path is that of `base`."""
    real = base.resolve()
    return next((store for store in read_config(config) if Path(store.path).resolve() == real), None)
