"""What may stand behind `-o` of a mount, and in the options column of /etc/fstab."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from core.errors import UsageError
from core.units import MIB, parse_size

#: Bytes of decoded chunks a mount keeps: 32 chunks of a disk image.
DEFAULT_CACHE_SIZE: Final = 128 * MIB
#: A chunk being read and the one after it.
MIN_CACHE_SIZE: Final = 16 * MIB
#: The largest user or group; the number after it means nobody.
_MAX_ID: Final = (1 << 32) - 2
#: libfuse and the kernel know what these mean.
_PASSED_ON: Final = frozenset({"allow_other", "allow_root", "auto_unmount", "noexec", "debug", "sync", "dirsync"})
#: As above, with a value.
_PASSED_ON_VALUE: Final = frozenset({"context", "fscontext", "defcontext", "rootcontext"})
#: True of every mount of Fleece, or nothing to it; mount(8) and fstab write them. `rw` is what mount(8) adds where
#: fstab says `defaults`.
_IGNORED: Final = frozenset({
    "ro", "rw", "defaults", "default_permissions", "nosuid", "nodev", "suid", "dev", "exec", "async",
    "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "lazytime", "nolazytime",
    "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group", "noiversion", "silent", "loud",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How one mount is made."""

    cache_size: int = DEFAULT_CACHE_SIZE  #: bytes of decoded chunks
    uid: int | None = None  #: owner of everything; None is the user who mounts
    gid: int | None = None
    source: str | None = None  #: what /proc/mounts and `df` show; None is the repository's name
    log: Path | None = None  #: where a mount in the background writes its log lines; None is the system log
    fuse: tuple[str, ...] = ()  #: passed on to libfuse
    images: bool = False  #: folders of disk images are listed, not only found by their names

    @classmethod
    def parse(cls, *texts: str) -> Self:
        """Read comma-separated options, `uid=1000,allow_other`; the later ones win.

        Raises:
            UsageError: an option that is not known, or a value that it cannot have.
        """
        cache_size, uid, gid, source, log, fuse = DEFAULT_CACHE_SIZE, None, None, None, None, dict[str, str]()
        images = False
        for name, value in split_options(*texts):
            match name, value:
                case "cache", str():
                    cache_size = parse_size(value)
                    if cache_size < MIN_CACHE_SIZE:
                        raise _error(f"cache={value}", f"at least {MIN_CACHE_SIZE // MIB}M are needed")
                case "uid", str():
                    uid = _number(name, value)
                case "gid", str():
                    gid = _number(name, value)
                case "images", None:
                    images = True
                case "fsname", str() if value:
                    source = value
                case "log", str() if value:
                    log = Path(value).absolute()
                case _, None if name in _PASSED_ON:
                    fuse[name] = name
                case _, str() if name in _PASSED_ON_VALUE and value:
                    # A comma stands in quotes for the kernel too.
                    fuse[name] = f'{name}="{value}"' if "," in value else f"{name}={value}"
                case _, None if name in _IGNORED:
                    pass
                case _ if name.startswith(("x-", "X-")) or name == "comment":
                    pass
                case _:
                    text = name if value is None else f"{name}={value}"
                    raise _error(text, "it is not known, or must (not) have a value", "see 'fleece mount --help'")
        return cls(cache_size, uid, gid, source, log, tuple(fuse.values()), images)


def split_options(*texts: str) -> Iterator[tuple[str, str | None]]:
    """The options of comma-separated lists as name and value, None where there is no `=`; empty ones left out.

    A value in double quotes may hold commas.
    """
    for text in texts:
        part, quoted = "", False
        for char in [*text, ","]:
            if char == '"':
                quoted = not quoted
            elif char != "," or quoted:
                part += char
            else:
                if part:
                    name, equals, value = part.partition("=")
                    yield name, value if equals else None
                part = ""
        if part:
            raise _error(text, "a double quote is not closed")


def _number(name: str, value: str) -> int:
    if value.isascii() and value.isdigit() and int(value) <= _MAX_ID:
        return int(value)
    raise _error(f"{name}={value}", f"it must be a number of at most {_MAX_ID}")


def _error(option: str, why: str, hint: str = "") -> UsageError:
    return UsageError("use the mount option", repr(option), why, hint)
