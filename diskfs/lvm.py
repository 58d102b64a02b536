"""LVM2: physical volumes, the text that describes a volume group, and logical volumes put together.

Linear, striped and zero segments, and the first copy of mirrors and RAID 1. Written here because dissect.volume 3.18
joins stripes one behind the other, takes the metadata of any disk and not the newest, and follows volumes that are
made of themselves until the stack ends. Source: LVM2's lib/format_text/layout.h and its own metadata (behaviour).
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from struct import Struct
from typing import Any, Final, NamedTuple

from diskfs.blocks import Blocks, Piece, Pieces, Slice, Striped
from diskfs.errors import DiskFsError

_SECTOR: Final = 512
_SECTORS: Final = 4
_LABEL: Final = Struct("<8sQII8s")  # LABELONE, sector, CRC from byte 20 on, offset of what follows, LVM2 001
_PV: Final = Struct("<32sQ")  # UUID, bytes of the device
_AREA: Final = Struct("<QQ")  # offset, bytes; zeros end a list
_MDA: Final = Struct("<I16sIQQ")  # CRC of the rest of the sector, magic, version, offset, bytes
_MDA_MAGIC: Final = b" LVM2 x[5A%r0N*>"
_TEXT: Final = Struct("<QQII")  # offset in the area, bytes, CRC, flags
_IGNORED: Final = 1
#: Magic, features, copies, own number; changes of state; those that failed, bit by bit; filled and synchronised up to.
_RAID: Final = Struct("<4sIIIQQQQ")
_RAID_MAGIC: Final = b"DmRd"
_ALL: Final = (1 << 64) - 1
_CRC_START: Final = 0xF597A6CF
#: Bytes of a group's description; each volume takes a few hundred.
_MAX_TEXT: Final = 8 << 20
_MAX_AREAS: Final = 16
_MAX_DEPTH: Final = 16
#: Volumes within each other.
_MAX_STACK: Final = 8
_MAX_SEGMENTS: Final = 100_000
_NAME: Final = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,127}")
_TOKEN: Final = re.compile(
    r"""(?P<space>\s+|\#[^\n]*)|(?P<name>[A-Za-z0-9+_.][A-Za-z0-9+_./:@-]*)|"(?P<text>(?:[^"\\]|\\.)*)"|(?P<sign>[={}\[\],])"""
)
_NUMBER: Final = re.compile(r"-?[0-9]{1,19}")


class PhysicalVolume(NamedTuple):
    """A disk or partition of a volume group."""

    id: str
    blocks: Blocks
    group: Mapping[str, Any]  #: the description
    group_name: str


def read_pv(blocks: Blocks) -> PhysicalVolume:
    """The physical volume on `blocks`.

    Raises:
        DiskFsError: it is damaged, or belongs to no group.
    """
    for number in range(_SECTORS):
        sector = blocks.read_at(number * _SECTOR, _SECTOR)
        if len(sector) == _SECTOR and sector[:8] == b"LABELONE":
            _, _, crc, offset, kind = _LABEL.unpack_from(sector)
            if _crc(sector[20:]) == crc and kind == b"LVM2 001" and offset + _PV.size <= _SECTOR:
                break
    else:
        raise DiskFsError("read", "physical volume", "its label is damaged")
    uuid, _ = _PV.unpack_from(sector, offset)
    at = offset + _PV.size
    _, at = _areas(sector, at)  # of data: the group's description has where they begin
    text_areas, _ = _areas(sector, at)
    newest: tuple[int, str, Mapping[str, Any]] | None = None
    for place, _ in text_areas:
        found = _description(blocks, place)
        if found is not None and (newest is None or found[0] > newest[0]):
            newest = found
    if newest is None:
        raise DiskFsError("read", "physical volume", "no description of its volume group is on it that can be read")
    return PhysicalVolume(uuid.decode("latin-1"), blocks, newest[2], newest[1])


def _areas(sector: bytes, at: int) -> tuple[list[tuple[int, int]], int]:
    found: list[tuple[int, int]] = []
    while at + _AREA.size <= len(sector) and len(found) < _MAX_AREAS:
        offset, size = _AREA.unpack_from(sector, at)
        at += _AREA.size
        if not offset and not size:
            return found, at
        found.append((offset, size))
    raise DiskFsError("read", "physical volume", "its list of areas does not end")


def _description(blocks: Blocks, place: int) -> tuple[int, str, Mapping[str, Any]] | None:
    """Sequence number, name and description of the group in the metadata area at `place`; None if it is not usable."""
    sector = blocks.read_at(place, _SECTOR)
    if len(sector) < _SECTOR:
        return None
    crc, magic, _, start, size = _MDA.unpack_from(sector)
    if magic != _MDA_MAGIC or _crc(sector[4:]) != crc or start != place or size <= _SECTOR:
        return None
    offset, length, text_crc, flags = _TEXT.unpack_from(sector, _MDA.size)
    if flags & _IGNORED or not length or length > min(_MAX_TEXT, size) or not _SECTOR <= offset < size:
        return None
    first = min(length, size - offset)
    # The area is a ring behind its first sector.
    data = blocks.read_at(place + offset, first) + blocks.read_at(place + _SECTOR, length - first)
    if len(data) != length or _crc(data) != text_crc:
        return None
    root = parse(data.rstrip(b"\0").decode("utf-8", "replace"))
    for name, value in root.items():
        if isinstance(value, dict) and "seqno" in value and _NAME.fullmatch(name):
            return _number(value, "seqno"), name, value
    return None


def parse(text: str) -> dict[str, Any]:
    """LVM's configuration text: sections as dictionaries, arrays as lists, texts and whole numbers.

    Raises:
        DiskFsError: it is no such text.
    """
    root: dict[str, Any] = {}
    stack = [root]
    tokens = _tokens(text)
    for kind, token in tokens:
        if (kind, token) == ("sign", "}"):
            stack.pop()
            if not stack:
                raise _garbled("a } too many")
            continue
        if kind not in ("name", "text"):
            raise _garbled(f"{token!r} where a name must be")
        _, sign = next(tokens, ("", ""))
        if sign == "{":
            if len(stack) >= _MAX_DEPTH:
                raise _garbled(f"more than {_MAX_DEPTH} sections within each other")
            below: dict[str, Any] = {}
            stack[-1][token] = below
            stack.append(below)
        elif sign == "=":
            stack[-1][token] = _value(tokens)
        else:
            raise _garbled(f"{sign!r} behind {token!r}")
    if len(stack) != 1:
        raise _garbled("a } is missing")
    return root


def _value(tokens: Iterator[tuple[str, str]]) -> Any:
    kind, token = next(tokens, ("", ""))
    if (kind, token) != ("sign", "["):
        return _scalar(kind, token)
    found: list[Any] = []
    for kind, token in tokens:
        if (kind, token) == ("sign", "]"):
            return found
        if (kind, token) != ("sign", ","):
            found.append(_scalar(kind, token))
    raise _garbled("a ] is missing")


def _scalar(kind: str, token: str) -> Any:
    if kind == "text":
        return re.sub(r"\\(.)", r"\1", token)
    if kind != "name":
        raise _garbled(f"{token!r} where a value must be")
    return int(token) if _NUMBER.fullmatch(token) else token


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _garbled(f"{text[at]!r}")
        at = match.end()
        kind = match.lastgroup or ""
        if kind != "space":
            yield kind, match[kind]


def _garbled(why: str) -> DiskFsError:
    return DiskFsError("read", "description of a volume group", f"it is damaged: {why}")


class VolumeGroup:
    """A volume group, from the newest description that its physical volumes have.

    Raises:
        DiskFsError: the description lacks what it must have.
    """

    def __init__(self, found: list[PhysicalVolume]) -> None:
        newest = max(found, key=lambda pv: _number(pv.group, "seqno"))
        self.name: Final = newest.group_name
        self.id: Final = newest.group.get("id")
        self._group = newest.group
        self._extent = _number(self._group, "extent_size") * _SECTOR
        if not 0 < self._extent <= 1 << 40:
            raise _garbled("no size of extents that can be")
        devices: dict[str, PhysicalVolume] = {}
        for pv in found:
            devices.setdefault(pv.id, pv)
        self._devices: dict[str, tuple[PhysicalVolume | None, Mapping[str, Any]]] = {}
        for name, section in _section(self._group, "physical_volumes").items():
            if isinstance(section, dict):
                self._devices[name] = devices.get(str(section.get("id", "")).replace("-", "")), section
        self._volumes = {
            name: section
            for name, section in _section(self._group, "logical_volumes").items()
            if isinstance(section, dict) and _NAME.fullmatch(name)
        }

    @property
    def is_complete(self) -> bool:
        """Whether all its physical volumes are there."""
        return all(pv is not None for pv, _ in self._devices.values())

    def volumes(self) -> Iterator[tuple[str, Blocks | DiskFsError]]:
        """Each logical volume that users see, or why it cannot be read."""
        segments = [
            segment for section in self._volumes.values() for segment in section.values() if isinstance(segment, dict)
        ]
        stores = {str(segment.get(key)) for segment in segments for key in ("cow_store", "merging_store")}
        merging = {str(segment.get("origin")) for segment in segments if "merging_store" in segment}
        for name, section in self._volumes.items():
            if "VISIBLE" not in _listed(section, "status"):
                continue
            try:
                if name in stores:
                    raise _unsupported("it is a snapshot volume")
                if name in merging:
                    raise _unsupported("a snapshot is being merged into it: neither has all of its content")
                yield name, self._open(name, ())
            except DiskFsError as error:
                yield name, error

    def _open(self, name: str, above: tuple[str, ...]) -> Blocks:
        if name in above or len(above) >= _MAX_STACK:
            raise DiskFsError("read", name, "the volume is made of itself")
        section = self._volumes.get(name)
        if section is None:
            raise DiskFsError("read", name, "the group has no such volume")
        segments = [segment for segment in section.values() if isinstance(segment, dict)]
        if len(segments) > _MAX_SEGMENTS:
            raise DiskFsError("read", name, f"more than {_MAX_SEGMENTS} segments")
        segments.sort(key=lambda segment: _number(segment, "start_extent"))
        pieces = []
        for segment in segments:
            start, count = _number(segment, "start_extent"), _number(segment, "extent_count")
            length = count * self._extent
            blocks = self._segment(segment, count, (*above, name))
            if blocks is not None and blocks.size < length:
                raise DiskFsError("read", name, "a part of it lies behind the end of its disk")
            pieces.append(Piece(start * self._extent, length, blocks))
        if not pieces:
            raise DiskFsError("read", name, "it has no segment")
        (first, *more) = pieces
        return first.blocks if not more and not first.offset and first.blocks is not None else Pieces(pieces)

    def _segment(self, segment: Mapping[str, Any], count: int, above: tuple[str, ...]) -> Blocks | None:
        kind = str(segment.get("type", "")).partition("+")[0]
        if kind in ("striped", "linear"):
            return self._stripes(segment, count, above)
        if kind == "zero":
            return None
        if kind == "mirror":
            legs = _listed(segment, "mirrors")[::2]
        elif kind == "raid1":
            legs = self._sound_legs(_listed(segment, "raids"), above)
        else:
            raise _unsupported(f"volumes of type {kind[:40] or 'none'} are not read")
        wrong = _unsupported("no copy of it is there")
        for leg in legs[:8]:
            try:
                return self._open(str(leg), above)
            except DiskFsError as error:
                wrong = error
        raise wrong

    def _sound_legs(self, raids: list[Any], above: tuple[str, ...]) -> list[Any]:
        """The copies of a RAID 1, those first that were there until the end: one that failed is older.

        Raises:
            DiskFsError: all copies have failed.
        """
        found: list[tuple[bool, int, int, Any]] = []  # whether it was filled, events, less its place, copy
        failed: dict[int, int] = {}  # by number of events
        for place, (meta, image) in enumerate(zip(raids[:16:2], raids[1:16:2], strict=False)):
            filled, events = False, 0
            try:
                head = self._open(str(meta), above).read_at(0, _RAID.size)
            except DiskFsError:
                head = b""
            if len(head) == _RAID.size and head[:4] == _RAID_MAGIC:
                _, _, _, _, events, failures, upto, _ = _RAID.unpack(head)
                filled = upto == _ALL
                failed[events] = failed.get(events, 0) | failures
            found.append((filled, events, -place, image))
        lost = failed[max(failed)] if failed else 0
        sound = sorted((one for one in found if not lost >> -one[2] & 1), key=lambda one: one[:3], reverse=True)
        if not sound:
            raise _unsupported("no copy of it is there that is up to date")
        return [image for _, _, _, image in sound]

    def _stripes(self, segment: Mapping[str, Any], count: int, above: tuple[str, ...]) -> Blocks:
        stripes = _listed(segment, "stripes")
        columns = len(stripes) // 2
        if not 1 <= columns <= 128 or count % columns:
            raise _garbled("stripes that do not fit a segment")
        length = count // columns * self._extent
        found: list[Blocks] = []
        for name, extent in zip(stripes[::2], stripes[1::2], strict=True):
            if not isinstance(extent, int):
                raise _garbled("a stripe without its extent")
            if name not in self._devices:
                found.append(Slice(self._open(str(name), above), extent * self._extent, length))
                continue
            pv, section = self._devices[name]
            if pv is None:
                raise DiskFsError("read", above[-1], f"the physical volume {section.get('id')} is not in the snapshot")
            found.append(Slice(pv.blocks, _number(section, "pe_start") * _SECTOR + extent * self._extent, length))
        if columns == 1:
            return found[0]
        stripe = _number(segment, "stripe_size") * _SECTOR
        if not stripe or length % stripe:
            raise _garbled("a size of stripes that does not fit")
        return Striped(found, stripe)


def _section(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = found.get(name, {})
    if not isinstance(section, dict):
        raise _garbled(f"{name} is no section")
    return section


def _number(found: Mapping[str, Any], name: str) -> int:
    value = found.get(name)
    if not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise _garbled(f"{name} is no number")
    return value


def _listed(found: Mapping[str, Any], name: str) -> list[Any]:
    value = found.get(name, [])
    return value if isinstance(value, list) else [value]


def _unsupported(why: str) -> DiskFsError:
    return DiskFsError("read", "logical volume", why)


def _crc(data: bytes) -> int:
    """LVM's own variant: CRC-32 without the inversions of zlib's, from another start."""
    return zlib.crc32(data, _CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
