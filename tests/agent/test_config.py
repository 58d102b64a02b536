from pathlib import Path

import pytest

from agent.config import MAX_CONFIG_SIZE, Config, load_config, parse_config
from agent.job_sections import PruneJob, VerifyJob
from core.errors import UsageError

WHOLE = """\
default-repository = "main"
owner = "backup@pbs!host1"
scratch = "/scratch"

[repository.main]
path = "/backup/main"
ns = "a/b"
sync-level = "file"

[vm.web]
id = "100"
qmp = "/run/web.qmp"
guest-agent = "/run/web.qga"
bitmap = "transient"
include = ["scsi*"]
files = ["web.conf:/etc/web.conf"]
bwlimit = "100M"

[vm.web.names]
virtio0 = "system"

[vm.web.disks]
system = "/var/lib/web.qcow2"

[limits]
host = 2
store = 1

[job.nightly]
type = "backup"
schedule = "02:00"
vm = ["web", "tag:prod*", "id:1??", "socket:/run/qemu/*.qmp"]
exclude-vm = ["test-*"]
archives = ["etc.pxar:/etc", "fstab.conf:/etc/fstab"]
exclude = ["*.tmp"]
parallel = 2
retries = 3
retry-wait = "1m"
catch-up = false
hook = "/etc/fleece/hook"
hook-timeout = "30s"

[job.old]
type = "prune"
schedule = "Mon..Fri 22:30"
repository = "main"
ns = "a"
max-depth = 1
group-filter = ["type:vm", "exclude:regex:^vm/9"]
keep-daily = 7

[job.check]
type = "verify"
outdated-after = 30
max-duration = "8h"
max-bytes = "2TiB"

[job.sweep]
type = "gc"
comment = "after prune"
"""


def test_everything_the_documentation_shows_is_accepted() -> None:
    config = parse_config(WHOLE, "fleece.toml")
    assert config.default_repository == "main"
    assert config.repository["main"].path == Path("/backup/main")
    assert config.repository["main"].sync_level == "file"
    web = config.vm["web"]
    assert (web.id, web.guest_agent, web.bitmap) == ("100", Path("/run/web.qga"), "transient")
    assert web.disks == {"system": Path("/var/lib/web.qcow2")}
    old, check = config.job["old"], config.job["check"]
    assert isinstance(old, PruneJob)
    assert (old.keep_daily, old.keep_last, old.max_depth, old.repository) == (7, None, 1, "main")
    assert isinstance(check, VerifyJob)
    assert (check.ignore_verified, check.outdated_after) == (True, 30)


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ('\n[vm.web]\nqpm = "/run/x"\n', 3, "vm.web.qpm is no known option (did you mean 'qmp'?)"),
        ("[vm.web]\nid = 100\n", 2, "vm.web.id: input should be a valid string"),
        ('[vm.web]\nid = "a/b"\n', 2, "vm.web.id: it is not of the form"),
        ('[vm.web]\nbitmap = "always"\n', 2, "vm.web.bitmap must be 'persistent', 'transient' or 'none'"),
        ('[vm.web]\nqmp = "run/x"\n', 2, "vm.web.qmp: a path in the configuration begins with a /"),
        ('[vm.web]\nbwlimit = "fast"\n', 2, "vm.web.bwlimit: it is not a number with a unit"),
        ("[repository.main]\n", 1, "repository.main: path is missing"),
        ('[repository.ab]\npath = "/x"\n', 1, "3 to 32 letters"),
        ('[repository.main]\npath = "/x"\nns = "a//b"\n', 3, "'' is no valid component"),
        ('owner = "root"\n', 1, "not of the form user@realm"),
        ('defalt-repository = "x"\n', 1, "(did you mean 'default-repository'?)"),
        (
            '[job.x]\ntype = "dance"\n',
            2,
            "job.x.type must be one of 'backup', 'prune', 'verify', 'gc', 'sync', 'test-boot'",
        ),
        ('[job.x]\ntype = "backup"\n', 1, "job.x: it names nothing to back up"),
        ('[job.x]\ntype = "backup"\nvm = ["tag:"]\n', 3, "job.x.vm.0: it says nothing"),
        ('[job.x]\ntype = "backup"\nvm = ["socket:run/x"]\n', 3, "the path of a socket begins with a /"),
        ('[job.x]\ntype = "backup"\narchives = ["a:/x"]\n', 3, "job.x.archives.0: it is not of the form"),
        ('[job.x]\ntype = "backup"\narchives = ["a.pxar:/x", "a.pxar:/y"]\n', 1, "'a.pxar' is there twice"),
        ("[limits]\nhosts = 2\n", 2, "limits.hosts is no known option (did you mean 'host'?)"),
        ('[job.x]\nschedule = "daily"\n', 1, "job.x.type is missing"),
        ('[job."a/b"]\ntype = "gc"\n', 1, "letters, digits"),
        ('[job.x]\ntype = "gc"\nschedul = "daily"\n', 3, "job.x.schedul is no known option (did you mean 'schedule'?)"),
        ('[job.x]\ntype = "gc"\nschedule = "soon"\n', 3, "job.x.schedule: 'soon' is no part of a calendar time"),
        ('[job.x]\ntype = "sync"\nschedule = "25:00"\nremote = "far"\n', 3, "job.x.schedule: 25 is not between"),
        ('[job.x]\ntype = "prune"\n', 1, "job.x: it needs a keep option"),
        ('[job.x]\ntype = "prune"\nkeep-last = 0\n', 3, "job.x.keep-last: input should be greater than or equal to 1"),
        ('[job.x]\ntype = "prune"\nkeep-dayly = 1\n', 3, "(did you mean 'keep-daily'?)"),
        ('[job.x]\ntype = "prune"\nkeep-last = 1\ngroup-filter = ["vm"]\n', 4, "job.x.group-filter.0: it is not"),
        ('[job.x]\ntype = "verify"\nmax-duration = "long"\n', 3, "job.x.max-duration: it is not a number with a unit"),
        ('[vm."a/b"]\nqmp = "/x"\n', 1, "vm.a/b: its name is no backup id; give it one with id"),
        ('[vzdump-hook]\ntimeout = "long"\n', 2, "vzdump-hook.timeout: it is not a number with a unit"),
        ('\n[vzdump-hook.jobs]\njob-end = ["ofsite"]\n', 3, "vzdump-hook.jobs.job-end names the job 'ofsite', but"),
        ("a = \n", 1, "no valid TOML"),
        ('a = "\n', 1, "no valid TOML"),
        ("[vm.web]\n[vm.web]\n", 2, "no valid TOML"),
        pytest.param("a = " + "[" * 5000, 1, "no valid TOML", id="nested without end"),
        pytest.param("a = 1" + "0" * 5000, 1, "no valid TOML", id="a number without end"),
    ],
)
def test_an_error_names_file_line_and_option(text: str, line: int, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config(text, "/etc/fleece/fleece.toml")
    assert caught.value.where == f"/etc/fleece/fleece.toml:{line}"
    assert why in caught.value.why


def test_all_errors_are_listed_at_once_by_line() -> None:
    with pytest.raises(UsageError) as caught:
        parse_config("[vm.web]\nx = 1\n\n[vm.db]\ny = 2\n", "f")
    assert caught.value.where == "f:2"
    assert "vm.web.x is no known option; line 5: vm.db.y is no known option" in caught.value.why


def test_a_missing_file_is_an_empty_configuration_unless_somebody_named_it(tmp_path: Path) -> None:
    missing = tmp_path / "fleece.toml"
    assert load_config(missing, must_exist=False) == Config()
    with pytest.raises(UsageError, match="there is no such file"):
        load_config(missing, must_exist=True)


def test_what_is_no_text_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "fleece.toml"
    path.write_bytes(b'a = "x"\nb = "\xff"\n')
    with pytest.raises(UsageError, match=r"fleece\.toml:2: it is not UTF-8"):
        load_config(path, must_exist=True)
    path.write_bytes(b"#" * (MAX_CONFIG_SIZE + 1))
    with pytest.raises(UsageError, match="larger than"):
        load_config(path, must_exist=True)
    with pytest.raises(UsageError, match="Is a directory"):
        load_config(tmp_path, must_exist=True)
