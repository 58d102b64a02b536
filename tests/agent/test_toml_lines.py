import pytest

from agent.toml_lines import find_line

TEXT = '''\
# [vm.web] in a comment
default-repository = "main"  # trailing

[repository.main]
path = "/backup/main"

[vm."web.1"]
files = [
  "a.conf:/a",  # with = and [vm.db]
  "b.conf:/b",
]
note = """
[vm.hidden]
qmp = 3
"""
qmp = "/run/web"
names.virtio0 = "system"
disks = { scsi0 = "/dev/a", scsi1 = "/dev/b" }

[vm.db]
id = 'x"y'
'''


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("default-repository",), 2),
        (("repository", "main", "path"), 5),
        (("vm", "web.1"), 7),
        (("vm", "web.1", "files", 1), 8),
        (("vm", "web.1", "note"), 12),
        (("vm", "web.1", "qmp"), 16),
        (("vm", "web.1", "names", "virtio0"), 17),
        (("vm", "web.1", "disks", "scsi1"), 18),
        (("vm", "db", "id"), 21),
        (("vm", "db", "missing"), 20),
        (("nothing",), None),
    ],
)
def test_keys_are_found_on_their_line(keys: tuple[str | int, ...], line: int | None) -> None:
    assert find_line(TEXT, keys) == line


@pytest.mark.parametrize("text", ["", '"""', "[[[", "a = [", "]]]]\na = 1", "= = =\n'"])
def test_nonsense_does_not_confuse_the_scanner(text: str) -> None:
    assert find_line(text, ("b",)) is None
