"""What holds for the whole house: who may import what, that every room says what it is, that set-up is safe."""

import ast
import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.support.cache import ROOT

ROOMS = ("agent", "core", "datastore", "diskfs", "fusefs", "hypervisor", "pxar", "repository", "server")


@cache
def modules() -> list[tuple[str, ast.Module]]:
    return [
        (path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(), str(path)))
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
    ]


@cache
def imported_by() -> dict[str, set[str]]:
    """What each module imports: of `from a import b` both `a` and `a.b`."""
    found: dict[str, set[str]] = {}
    for module, tree in modules():
        names = found.setdefault(module, set())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@cache
def attributes_in() -> dict[str, set[str]]:
    """The dotted names in each module."""
    return {
        module: {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for module, tree in modules()
    }


def importers(package: str) -> list[str]:
    """The modules that import `package` or something in it."""
    return [
        module
        for module, names in imported_by().items()
        if any(name == package or name.startswith(f"{package}.") for name in names)
    ]


def test_qmp_library_is_imported_in_exactly_one_module() -> None:
    assert importers("qemu.qmp") == ["hypervisor/qmp.py"]


def test_asyncio_stays_in_the_module_that_bridges_it() -> None:
    assert {*importers("asyncio"), *importers("trio_asyncio")} <= {"hypervisor/qmp.py"}


@pytest.mark.parametrize("package", ["httpx", "httpcore"])
def test_the_http_library_is_imported_in_one_module(package: str) -> None:
    assert importers(package) == ["datastore/s3/http.py"]


@pytest.mark.parametrize("package", ["concurrent.futures", "multiprocessing", "threading.Thread"])
def test_no_module_starts_threads_or_pools_of_its_own(package: str) -> None:
    used = [module for module, names in attributes_in().items() if package in names]
    assert importers(package) + used == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is_for(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
    assert docstring is not None
    assert len(docstring.split()) >= 8


def test_every_module_begins_with_a_docstring() -> None:
    assert [name for name, tree in modules() if ast.get_docstring(tree) is None] == []


def test_every_room_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(folder.parts) for folder in folders}
    assert project["project"]["name"] == "fleece"
    assert project["project"]["scripts"]["fleece"] == "agent.main:main"


def test_c_parts_are_for_the_stable_abi() -> None:
    sources = [path for room in ROOMS for path in (ROOT / room).glob("*.c")]
    assert sources, "the C parts are gone"
    for path in sources:
        assert path.name.startswith("_"), f"{path} is not found by setup.py"
        assert list(path.parent.glob(f"{path.stem}.abi3.so")) or not os.access("/usr/bin/gcc", os.X_OK)


def test_licence_is_the_whole_agpl() -> None:
    lines = (ROOT / "LICENSE").read_text().splitlines()
    assert len(lines) == 661
    assert lines[0].strip() == "GNU AFFERO GENERAL PUBLIC LICENSE"


def test_nothing_in_the_tree_marks_unfinished_work() -> None:
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")))
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    suspects = [ROOT / name for name in listed.decode().split("\0") if name.endswith((".py", ".c", ".md", ".toml"))]
    assert suspects
    assert [str(path) for path in suspects if path.exists() and marks.search(path.read_text())] == []


def test_links_in_the_documentation_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())]
    assert links
    dead = [f"{page.name}: {link}" for page, link in links if "://" not in link and not (page.parent / link).exists()]
    assert dead == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with nothing in it but the set-up, and a machine on which APT is a script."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup").write_bytes((ROOT / "scripts/setup").read_bytes())
    (tmp_path / "scripts/setup").chmod(0o755)
    (tmp_path / "bin").mkdir()
    return tmp_path


def run_setup(checkout: Path, apt: str, probe: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up with one package to look for (`probe`), and `apt` as the script of apt-get."""
    script = (checkout / "scripts/setup").read_text()
    start, end = script.index("    cat <<-'END'\n"), script.index('    [ "$purpose" = bench ]')
    needed = f'    echo "a-package {probe}"\n'
    (checkout / "scripts/setup").write_text(script[:start] + needed + script[end:])
    (checkout / "bin/apt-get").write_text(f'#!/bin/sh\necho "apt-get $*" >>"{checkout}/calls"\n{apt}')
    (checkout / "bin/apt-get").chmod(0o755)
    (checkout / "bin/sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (checkout / "bin/sudo").chmod(0o755)
    environment = {**os.environ, "PATH": f"{checkout}/bin:{os.environ['PATH']}"}
    return subprocess.run(
        [checkout / "scripts/setup"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_setup_stops_where_apt_would_remove_something(checkout: Path) -> None:
    apt = 'case "$*" in *-s*) echo "Remv pve-qemu-kvm [9.0]"; echo "Inst a-package";; esac\n'
    done = run_setup(checkout, apt, "false")
    assert done.returncode == 1
    assert "APT would remove pve-qemu-kvm to install a-package. Nothing was changed." in done.stderr
    installs = [line for line in (checkout / "calls").read_text().splitlines() if "install" in line]
    assert [line for line in installs if " -s " not in line] == []


def test_setup_installs_only_what_is_missing_and_nothing_that_is_recommended(checkout: Path) -> None:
    done = run_setup(
        checkout,
        f'case "$*" in *-s*) ;; *install*) touch "{checkout}/there";; esac\nexit 0\n',
        f"test -e {checkout}/there",
    )
    real = [
        line for line in (checkout / "calls").read_text().splitlines() if " install " in line and " -s " not in line
    ]
    assert real == ["apt-get -q -y --no-install-recommends --no-remove install a-package"]
    assert "still not usable" not in done.stderr


def test_setup_gives_apts_reason_when_a_package_cannot_be_had(checkout: Path) -> None:
    apt = 'case "$*" in *-s*) echo "E: Unable to locate package a-package" >&2; exit 100;; esac\n'
    done = run_setup(checkout, apt, "false")
    assert done.returncode == 1
    assert "Unable to locate package a-package" in done.stderr
    assert "APT cannot install a-package" in done.stderr


def test_setup_says_when_an_installed_package_brings_not_what_it_should(checkout: Path) -> None:
    done = run_setup(checkout, "exit 0\n", "false")
    assert done.returncode == 1
    assert "installed, but still not usable: a-package" in done.stderr


def test_setup_that_was_done_before_does_nothing_and_is_quick() -> None:
    if not (ROOT / ".venv/.fleece-setup").exists():
        pytest.skip("this checkout was not set up by 'make setup'")
    # The first run brings what changed since; the second must find nothing to do.
    for timeout_s in (300, 10):
        done = subprocess.run(
            [ROOT / "scripts/setup"], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
