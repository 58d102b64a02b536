"""Random metadata and trees for hypothesis."""

from hypothesis import strategies as st

from pxar.format import KIND_OF_MODE, Kind, name_fault
from pxar.metadata import Acl, DefaultAcl, Metadata, Stat
from tests.pxar.archives import Item

_U32 = st.integers(0, (1 << 32) - 1)
_U64 = st.integers(0, (1 << 64) - 1)
_PAIRS = st.lists(st.tuples(_U64, st.integers(0, 7)), max_size=3).map(tuple)
_TEXT = st.binary(min_size=1, max_size=30).map(lambda text: text.replace(b"\0", b"0"))
_NAMES = _TEXT.filter(lambda name: name_fault(name) is None)


@st.composite
def metadata(draw: st.DrawFn, kind: int) -> Metadata:
    """Any metadata of a file with these type bits."""
    mode = kind | draw(st.integers(0, 0o7777))
    seconds, nanoseconds = draw(st.integers(-(1 << 63), (1 << 63) - 1)), draw(st.integers(0, 999_999_999))
    stat = Stat(mode, draw(_U64), draw(_U32), draw(_U32), seconds, nanoseconds)
    if draw(st.booleans()):
        return Metadata(stat)
    xattrs = draw(st.lists(st.tuples(_TEXT, st.binary(max_size=40)), max_size=3).map(tuple))
    default = st.none() | st.builds(DefaultAcl, _U64, _U64, _U64, _U64)
    acl = Acl(draw(_PAIRS), draw(_PAIRS), draw(st.none() | _U64), draw(default), draw(_PAIRS), draw(_PAIRS))
    return Metadata(stat, xattrs, acl, draw(st.none() | st.binary(max_size=30)), draw(st.none() | _U64))


def _leaf(mode: int) -> st.SearchStrategy[Item]:
    kind = KIND_OF_MODE[mode]
    made = {"metadata": metadata(mode), "kind": st.just(kind)}
    if kind is Kind.FILE:
        made["content"] = st.binary(max_size=60)
    elif kind is Kind.SYMLINK:
        made["target"] = _TEXT
    elif kind in (Kind.BLOCK, Kind.CHARACTER):
        made["device"] = st.tuples(_U64, _U64)
    return st.builds(Item, **made)


def _directory(children: st.SearchStrategy[Item]) -> st.SearchStrategy[Item]:
    named = st.dictionaries(_NAMES, children, max_size=8)
    return st.builds(Item, kind=st.just(Kind.DIRECTORY), metadata=metadata(0o040000), children=named)


@st.composite
def trees(draw: st.DrawFn) -> Item:
    """A root directory; some names in it may be hard links to files that come before them."""
    leaves = st.one_of([_leaf(mode) for mode in KIND_OF_MODE if mode != 0o040000])
    root = draw(_directory(st.recursive(leaves, _directory, max_leaves=25)))
    files: list[bytes] = []

    def link(directory: Item, path: bytes) -> None:
        for name, child in sorted(directory.children.items()):
            if child.kind is Kind.DIRECTORY:
                link(child, path + name + b"/")
            elif child.kind is Kind.FILE and files and draw(st.integers(0, 3)) == 0:
                directory.children[name] = Item(Kind.HARDLINK, Metadata(Stat(0)), target=draw(st.sampled_from(files)))
            elif child.kind is Kind.FILE:
                files.append(path + name)

    link(root, b"")
    return root
