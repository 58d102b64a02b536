"""Where Fleece's own files lie on this host: configuration, state, run-time files.

The system's for root, a user's own else (XDG base directories). `FLEECE_STATE_DIR` and `FLEECE_RUN_DIR` move the last
two, for tests and containers.
"""

import os
import stat
from pathlib import Path

from core.errors import FleeceError, os_reason


def _is_root() -> bool:
    return os.geteuid() == 0


def _xdg(variable: str, default: str) -> Path:
    # The specification says that relative paths in these variables are to be ignored.
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else Path.home() / default


def config_file() -> Path:
    """The configuration that is read when neither `--config` nor `FLEECE_CONFIG` names one."""
    return Path("/etc/fleece/fleece.toml") if _is_root() else _xdg("XDG_CONFIG_HOME", ".config") / "fleece/fleece.toml"


def state_dir() -> Path:
    """The folder of what commands write and what must survive a reboot."""
    if configured := os.environ.get("FLEECE_STATE_DIR"):
        return Path(configured)
    return Path("/var/lib/fleece") if _is_root() else _xdg("XDG_STATE_HOME", ".local/state") / "fleece"


def run_dir() -> Path:
    """The folder of sockets, locks and state that end with this boot."""
    if configured := os.environ.get("FLEECE_RUN_DIR"):
        return Path(configured)
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if _is_root():
        return Path("/run/fleece")
    return Path(runtime) / "fleece" if runtime.startswith("/") else Path(f"/tmp/fleece-{os.geteuid()}")


def private_run_dir() -> Path:
    """`run_dir`, made if it is missing, and nobody else's.

    Raises:
        FleeceError: it cannot be made, or belongs to somebody else, who could read disks through a socket in it.
    """
    folder = run_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise FleeceError("use the run folder", str(folder), os_reason(error)) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise FleeceError(
            "use the run folder", str(folder), "it is no folder of this user that only they can write",
            "remove it, or name another one with FLEECE_RUN_DIR",
        )  # fmt: skip
    return folder


def datastores_file() -> Path:
    """The list that `fleece datastore create` writes."""
    return state_dir() / "datastores.toml"


def s3_endpoints_file() -> Path:
    """The list that `fleece s3 endpoint` writes."""
    return state_dir() / "s3-endpoints.toml"


def remotes_file() -> Path:
    """The list that `fleece remote` writes."""
    return state_dir() / "remotes.toml"


def secrets_dir() -> Path:
    """The folder of secrets, a file each, for nobody else to read."""
    return state_dir() / "secrets"


def fingerprints_file() -> Path:
    """The certificates of servers that this user has confirmed."""
    return _xdg("XDG_CONFIG_HOME", ".config") / "fleece/fingerprints"


def scratch_dir() -> Path:
    """The folder of fleecing images when the configuration names none."""
    return state_dir() / "tmp"
