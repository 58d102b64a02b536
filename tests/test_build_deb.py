"""Parts of `make deb` that need no package; what is in it, and how it installs: tests/host/test_package.py."""

import importlib.util
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.cache import ROOT


@pytest.fixture(scope="module")
def build_deb() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_deb", ROOT / "scripts/build_deb.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_between_installed_pages_lead_somewhere(build_deb: ModuleType, tmp_path: Path) -> None:
    build_deb.write_documentation(tmp_path)
    pages = list(tmp_path.glob("*.md"))
    assert {page.name for page in pages} >= {"README.md", "CHANGELOG.md", "index.md", "agent.md"}
    links = [(page.name, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())]
    assert ("README.md", "index.md") in links
    assert ("index.md", "README.md") in links
    assert [(page, link) for page, link in links if "://" not in link and not (tmp_path / link).is_file()] == []


def test_a_purge_leaves_keys_and_lists_of_datastores_only(tmp_path: Path) -> None:
    state = tmp_path / "var/lib/fleece"
    goes = (
        "jobs/night/history.jsonl",
        "agent/schedule.json",
        "monitoring/x",
        "tmp/y",
        "find-index/1.sqlite",
        "test-boot/1.png",
    )
    stays = ("datastores.toml", "secrets/key", "server/users.toml", "remotes.toml")
    for name in (*goes, *stays):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).touch()
    script = (ROOT / "debian/postrm").read_text().replace("deb-systemd-helper", "no-such-program")
    for place in ("/var/lib/fleece", "/var/log/fleece", "/run/fleece"):
        script = re.sub(rf"(?<!\S){place}|(?<==){place}", f"{tmp_path}{place}", script)
    assert script.count(str(tmp_path)) == 4
    assert re.findall(r"(?<![\w.-])/(?:etc|run|usr|var)/\S*fleece", script) == []
    done = subprocess.run(["/bin/sh", "-c", script, "postrm", "purge"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, f"{state} stays" in done.stderr) == (0, True), done
    left = {path.relative_to(state).as_posix() for path in state.rglob("*") if path.is_file()}
    assert left == set(stays)


def test_a_python_package_is_copied_only_if_it_is_as_it_was_installed(build_deb: ModuleType, tmp_path: Path) -> None:
    installed = metadata.distribution("hpack")
    assert build_deb.copy_installed(installed, tmp_path / "good")
    original = Path(str(installed.locate_file("hpack")))
    copied = {path.relative_to(tmp_path / "good/hpack") for path in (tmp_path / "good/hpack").rglob("*.py")}
    assert copied == {path.relative_to(original) for path in original.rglob("*.py")}
    assert not list((tmp_path / "good").rglob("*.pyc"))
    for fault in ("changed", "missing"):
        folder = tmp_path / fault
        shutil.copytree(tmp_path / "good", folder)
        (record,) = (Path(str(installed.locate_file(file))) for file in installed.files or () if file.name == "RECORD")
        shutil.copy(record, folder / record.parent.name)
        damaged = metadata.PathDistribution(folder / record.parent.name)
        assert build_deb.copy_installed(damaged, tmp_path / f"{fault}-copy")
        shutil.rmtree(tmp_path / f"{fault}-copy")
        if fault == "changed":
            (folder / "hpack/huffman.py").write_text("pass")
        else:
            (folder / "hpack/huffman.py").unlink()
        assert not build_deb.copy_installed(damaged, tmp_path / f"{fault}-copy")
        assert not (tmp_path / f"{fault}-copy").exists()


def test_the_package_depends_on_the_libfuse_of_the_release_it_was_built_on(
    build_deb: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name changes with each release of Debian that changes its interface; Proxmox VE 9 is built upon 13."""
    assert re.fullmatch(r"libfuse3-\d+", build_deb.fuse_package())
    said = {
        "ldd": "\tlinux-vdso.so.1 (0x00007ff)\n\tlibfuse3.so.4 => /lib/x86_64-linux-gnu/libfuse3.so.4 (0x00007f6)",
        "dpkg-query": "libfuse3-4:amd64: /usr/lib/x86_64-linux-gnu/libfuse3.so.4",
    }
    monkeypatch.setattr(build_deb, "_said", lambda program, *line: said[program])
    assert build_deb.fuse_package() == "libfuse3-4"
    said["ldd"] = "\tlibfuse3.so.4 => not found"
    with pytest.raises(build_deb.BuildError, match="not linked"):
        build_deb.fuse_package()
