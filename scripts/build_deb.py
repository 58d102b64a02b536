"""Builds the Debian package: `make deb`, or `python scripts/build_deb.py --output FOLDER`.

The package carries an environment of its own below /usr/lib/fleece: Fleece, built from this checkout with its C parts,
and the Python packages it needs, copied from `.venv`: the very files that were tested. One that was changed since it
was installed is fetched instead, and nothing else needs a network. Debian's packages are depended on where Fleece would
otherwise have to follow security fixes of C libraries: Python itself, libfuse3, libnbd, and OpenSSL with
`cryptography`. It installs without a network.

The same commit, tools and versions give the same bytes (`SOURCE_DATE_EPOCH`, else the time of the last commit).
"""

import argparse
import base64
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parents[1]
DEBIAN: Final = ROOT / "debian"
#: Where the environment lies once it is installed.
HOME: Final = Path("usr/lib/fleece")
PYTHON: Final = Path("/usr/bin/python3")
#: Parts of Fleece that are optional with pip, and that the package has. Their libraries are AGPL-3.0 as Fleece is, or
#: Apache-2.0.
EXTRAS: Final = ("images",)
#: Python packages that Debian has and keeps secure, by the Debian package to depend on.
FROM_DEBIAN: Final = {"cryptography": "python3-cryptography (>= 38)"}
#: Besides Python itself, the C library and libfuse.
DEPENDS: Final = ("python3-libnbd (>= 1.14)", "fuse3", "init-system-helpers (>= 1.54)")
RECOMMENDS: Final = ("qemu-utils", "ca-certificates")
SUGGESTS: Final = ("qemu-system-x86", "libnbd-bin", "nbdkit", "nbdkit-plugin-python", "python3-libvirt (>= 8.2)")
#: Of packages of others: of no use at run time.
_USELESS: Final = re.compile(
    r"/(tests?|_tests|testing/tests|f2py|_pyinstaller|include|__pycache__|bin)/|/(numpy/typing|numpy/_core/lib)/"
    r"|^/zstandard/_cffi\.|\.(pyi|pyx|pxd|a|c|h|cpp)$|/(RECORD|REQUESTED|INSTALLER|direct_url\.json)$"
)
#: Those whose libraries come with 20 MB for debuggers. Others are not touched: not every library survives it.
_UNSTRIPPED: Final = ("pyfuse3", "zstandard")
_DOCS: Final = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs")
_UNITS: Final = (".service", ".socket", ".timer")


class BuildError(Exception):
    """The package cannot be built; the text says why."""


def main(arguments: Sequence[str]) -> int:
    """Build; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the Debian package of Fleece.")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the package (dist)")
    parser.add_argument("--version", help="version of the package (of pyproject.toml, and of the commit)")
    parser.add_argument("--compression", default="xz", help="xz, zstd, gzip or none")
    parser.add_argument("--level", type=int, default=6, help="of the compression")
    given = parser.parse_args(arguments)
    try:
        print(build(given.output, version=given.version, compression=given.compression, level=given.level))
    except (BuildError, OSError, subprocess.CalledProcessError) as error:
        print(f"build_deb: {error}", file=sys.stderr)
        return 1
    return 0


def build(output: Path, *, version: str | None = None, compression: str = "xz", level: int = 6) -> Path:
    """Build the package and return its path.

    Raises:
        BuildError: something it needs is missing; nothing is written then.
    """
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(_epoch()))
    os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="fleece-deb-") as name:
        work = Path(name)
        stage = work / "stage"
        version = version or _version()
        _environment(work, stage / HOME)
        _system_files(work, stage, version)
        _control(stage, version)
        target = output / f"fleece_{version.replace(':', '%3a')}_{_said('dpkg', '--print-architecture')}.deb"
        output.mkdir(parents=True, exist_ok=True)
        line = [
            "dpkg-deb",
            "--root-owner-group",
            f"-Z{compression}",
            *([] if compression == "none" else [f"-z{level}"]),
        ]
        _run(*line, "--build", str(stage), str(target))
    return target


def _environment(work: Path, home: Path) -> None:
    """What `python -m venv` makes, with Fleece and what it needs, compiled."""
    version = _said(str(PYTHON), "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    if version != sysconfig.get_python_version():
        raise BuildError(f".venv is of Python {sysconfig.get_python_version()}, {PYTHON} is {version}: run make setup")
    packages = home / f"lib/python{version}/site-packages"
    (home / "bin").mkdir(parents=True)
    (home / "bin/python3").symlink_to(Path("../../..") / PYTHON.relative_to("/usr"))
    # Debian's packages are seen behind those that are carried along.
    (home / "pyvenv.cfg").write_text(
        f"home = {PYTHON.parent}\ninclude-system-site-packages = true\nversion = {version}\n"
    )
    changed = [name for name in needed_packages() if not copy_installed(metadata.distribution(name), packages)]
    fetched = [f"{name}=={metadata.version(name)}" for name in changed]
    line = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    _run(*line, "--target", str(packages), str(_wheel(work)), *fetched)
    _check_native_parts(packages)
    for path in sorted(packages.rglob("*")):
        if path.is_file() and _USELESS.search(f"/{path.relative_to(packages)}"):
            path.unlink()
    for path in packages.rglob("*.so*"):
        path.chmod(0o644)
        if path.parent.name in _UNSTRIPPED or path.name.endswith(".abi3.so"):
            _run("strip", "--strip-unneeded", str(path))
    _remove_empty_folders(packages)
    for name, target in _scripts():
        _write_script(home / "bin" / name, target)
    _compile(packages, home)


def needed_packages() -> list[str]:
    """Names of the Python packages that Fleece needs, and those need, without what comes from Debian."""
    found: dict[str, None] = {}
    left = ["fleece"]
    while left:
        package = left.pop()
        extras = ("", *EXTRAS) if package == "fleece" else ("",)
        for text in metadata.requires(package) or ():
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
                continue
            if name not in FROM_DEBIAN and name not in found:
                found[name] = None
                left.append(name)
    return sorted(found)


def copy_installed(installed: metadata.Distribution, target: Path) -> bool:
    """Copy a Python package as it is installed; False, and nothing copied, if it is not what its wheel brought."""
    contents: dict[str, tuple[bytes, int]] = {}
    for file in installed.files or ():
        if file.hash is None or ".." in file.parts:
            continue  # made by the installation, or a command of its own
        try:
            path = Path(str(installed.locate_file(file)))
            data, mode = path.read_bytes(), path.stat().st_mode & 0o755
        except OSError:
            return False
        digest = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, data).digest()).rstrip(b"=")
        if digest.decode() != file.hash.value:
            return False
        contents[str(file)] = data, mode
    for name, (data, mode) in contents.items():
        _folder(target / name).write_bytes(data)
        (target / name).chmod(mode)
    return bool(contents)


def _wheel(work: Path) -> Path:
    """Fleece as a wheel, from a copy, so that nothing is left in the checkout."""
    copy = work / "source"
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages: list[str] = tomllib.load(file)["tool"]["setuptools"]["packages"]
    for name in sorted({package.split(".")[0] for package in packages}):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    line = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    _run(*line, "--no-build-isolation", "-w", str(work), str(copy))
    (wheel,) = work.glob("fleece-*.whl")
    return wheel


def _check_native_parts(packages: Path) -> None:
    """The build goes on without a compiler; the package does not."""
    missing = [
        f"{source.parent.name}/{source.name}"
        for source in sorted(ROOT.glob("*/_*.c"))
        if (packages / source.parent.name / "__init__.py").exists()
        and not (packages / source.parent.name / f"{source.stem}.abi3.so").exists()
    ]
    if missing:
        raise BuildError(f"these C parts were not built: {', '.join(missing)}")


def _scripts() -> Iterator[tuple[str, str]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        yield from tomllib.load(file)["project"]["scripts"].items()


def _write_script(path: Path, target: str) -> None:
    module, _, function = target.partition(":")
    # Isolated: neither the folder it is called from nor a user's variables bring in other modules.
    path.write_text(
        f"#!/{HOME}/bin/python3 -I\nimport sys\n\nfrom {module} import {function}\n\n"
        f'if __name__ == "__main__":\n    sys.exit({function}())\n'
    )
    path.chmod(0o755)


def _compile(packages: Path, home: Path) -> None:
    """Byte code that is valid whatever the times of the files are, as installation changes them."""
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    for path in packages.rglob("*"):
        os.utime(path, (epoch, epoch), follow_symlinks=False)
    where = f"/{packages.relative_to(home.parents[2])}"
    line = [str(PYTHON), "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", str(packages)]
    _run(*line, "-p", where, str(packages))


def _system_files(work: Path, stage: Path, version: str) -> None:
    """Commands, units, documentation and configuration in the places where Debian has them."""
    for name, where in (
        ("fleece", "usr/bin/fleece"),
        ("fleece-vzdump-hook", "usr/bin/fleece-vzdump-hook"),
        ("mount.fleece", "usr/sbin/mount.fleece"),
        ("mount.fleece", "usr/sbin/mount.fuse.fleece"),
    ):
        _folder(stage / where).symlink_to(f"../lib/fleece/bin/{name}")
    for unit in sorted((ROOT / "systemd").iterdir()):
        if unit.suffix in _UNITS:
            shutil.copyfile(unit, _folder(stage / "usr/lib/systemd/system" / unit.name))
    for kind in ("sysusers", "tmpfiles"):
        shutil.copyfile(ROOT / f"systemd/fleece.{kind}.conf", _folder(stage / f"usr/lib/{kind}.d/fleece.conf"))
    # The plugin for Proxmox VE: of no use, and not loaded, anywhere else.
    for module in sorted((ROOT / "proxmox").rglob("*.pm")):
        shutil.copyfile(module, _folder(stage / "usr/share/perl5" / module.relative_to(ROOT / "proxmox")))
    shutil.copyfile(DEBIAN / "fleece.toml", _folder(stage / "etc/fleece/fleece.toml"))
    doc = stage / "usr/share/doc/fleece"
    write_documentation(doc)
    shutil.copyfile(ROOT / "systemd/mnt-backup.mount", _folder(doc / "examples/mnt-backup.mount"))
    (doc / "copyright").write_text((DEBIAN / "copyright").read_text() + "".join(_licences()))
    _gzip(doc / "changelog.gz", _changelog(version).encode())
    shutil.copyfile(DEBIAN / "lintian-overrides", _folder(stage / "usr/share/lintian/overrides/fleece"))
    _manual(work, stage)


def write_documentation(doc: Path) -> None:
    """The pages for people, all in one folder: links between them, and to the licence, are made to fit."""
    for name in _DOCS:
        source = ROOT / name
        for path in sorted(source.glob("*.md")) if source.is_dir() else [source]:
            text = re.sub(r"\]\((?:docs|\.\.)/", "](", path.read_text()).replace("](LICENSE)", "](LICENSE.gz)")
            _folder(doc / path.name).write_text(text)
    _gzip(doc / "LICENSE.gz", (ROOT / "LICENSE").read_bytes())


def _manual(work: Path, stage: Path) -> None:
    """Manual pages and completions, as the command itself tells them."""
    env = {**os.environ, "HOME": str(work), "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "agent.main"]
    for shell, where in (
        ("bash", "usr/share/bash-completion/completions/fleece"),
        ("zsh", "usr/share/zsh/vendor-completions/_fleece"),
        ("fish", "usr/share/fish/vendor_completions.d/fleece.fish"),
    ):
        done = subprocess.run([*command, "completion", shell], env=env, cwd=ROOT, check=True, capture_output=True)
        _folder(stage / where).write_bytes(done.stdout)
    for page in sorted(DEBIAN.glob("*.[1-8]")):
        text = page.read_text()
        if "@COMMANDS@" in text:
            text = text.replace("@COMMANDS@\n", "".join(_commands()))
        text = text.replace("@DATE@", time.strftime("%Y-%m-%d", time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]))))
        _gzip(stage / f"usr/share/man/man{page.suffix[1:]}" / f"{page.name}.gz", text.encode())
    (stage / "usr/share/man/man8/mount.fuse.fleece.8.gz").symlink_to("mount.fleece.8.gz")


def _commands() -> Iterator[str]:
    """Every verb with its arguments and what its help says first, for fleece(1)."""
    import typer

    from agent.main import build as build_commands

    def lines(command: Any, name: str) -> Iterator[str]:
        context = command.context_class(command, info_name=name)
        if hasattr(command, "list_commands"):
            for verb in command.list_commands(context):
                found = command.get_command(context, verb)
                if not found.hidden:
                    yield from lines(found, f"{name} {verb}".strip())
            return
        usage = _roff(" ".join(command.collect_usage_pieces(context)).replace("[OPTIONS]", "").strip())
        said = " ".join((command.help or "").split("\n\n")[0].split())
        yield f'.TP\n.BI "{_roff(name)} " "{usage}"\n{_roff(said)}\n'

    yield from lines(typer.main.get_command(build_commands()), "")


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return re.sub(r"^([.'])", r"\\&\1", escaped)


def _licences() -> Iterator[str]:
    for name in needed_packages():
        found = metadata.metadata(name)

        def first(*fields: str, found: metadata.PackageMetadata = found) -> str:
            return next((" ".join(text.split())[:200] for field in fields for text in found.get_all(field) or ()), "")

        named = [text.split(" :: ")[-1] for text in found.get_all("Classifier") or () if text.startswith("License ::")]
        licence = first("License-Expression") or "; ".join(named) or first("License") or "see its .dist-info"
        yield (
            f"\nFiles: usr/lib/fleece/lib/*/{name}/*\n"
            f"Copyright: {first('Author', 'Author-email') or 'its authors'}\nLicense: {name}\n {licence}\n"
        )


def _changelog(version: str) -> str:
    when = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"])))
    return (
        f"fleece ({version}) unstable; urgency=medium\n\n"
        "  * What changed for users is in CHANGELOG.md beside this file.\n\n"
        f" -- {_maintainer()}  {when}\n"
    )


def _control(stage: Path, version: str) -> None:
    """The folder DEBIAN: what dpkg is to know."""
    python = sysconfig.get_python_version()
    major, minor = python.split(".")
    libc = _said("dpkg-query", "-W", "-f", "${Version}", "libc6").split("-")[0].split("+")[0]
    depends = [
        f"python3 (>= {python}~)", f"python3 (<< {major}.{int(minor) + 1})", f"libc6 (>= {libc})",
        *FROM_DEBIAN.values(), f"{fuse_package()} (>= 3.10)", *DEPENDS,
    ]  # fmt: skip
    files = [path for path in sorted(stage.rglob("*")) if path.is_file() and not path.is_symlink()]
    size = sum(-(-path.stat().st_size // 1024) for path in files)
    folder = stage / "DEBIAN"
    folder.mkdir()
    (folder / "control").write_text(
        f"Package: fleece\nVersion: {version}\nArchitecture: {_said('dpkg', '--print-architecture')}\n"
        f"Maintainer: {_maintainer()}\nInstalled-Size: {size}\nSection: admin\nPriority: optional\n"
        f"Depends: {', '.join(depends)}\nRecommends: {', '.join(RECOMMENDS)}\nSuggests: {', '.join(SUGGESTS)}\n"
        + (DEBIAN / "description").read_text()
    )
    (folder / "conffiles").write_text("".join(f"/{path.relative_to(stage)}\n" for path in files if "etc" in path.parts))
    sums = (f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(stage)}\n" for path in files)
    (folder / "md5sums").write_text("".join(sums))
    for name in ("postinst", "prerm", "postrm"):
        shutil.copyfile(DEBIAN / name, folder / name)
        (folder / name).chmod(0o755)


def fuse_package() -> str:
    """The package of the libfuse that pyfuse3 was built with: Debian 12 calls it `libfuse3-3`, Debian 13 `libfuse3-4`.

    Raises:
        BuildError: none has it.
    """
    pyfuse3 = metadata.distribution("pyfuse3")
    (module,) = (file for file in pyfuse3.files or () if file.match("pyfuse3/__init__.*.so"))
    linked = re.search(r"^\s*(libfuse3\.so\.\d+) => /", _said("ldd", str(pyfuse3.locate_file(module))), re.MULTILINE)
    if linked is None:
        raise BuildError("pyfuse3 is not linked with Debian's libfuse3")
    owner = _said("dpkg-query", "-S", f"*/{linked[1]}").splitlines()[0]
    return owner.partition(":")[0]


def _maintainer() -> str:
    """Who builds it, as Debian's own tools want to be told."""
    name, mail = os.environ.get("DEBFULLNAME", "Fleece"), os.environ.get("DEBEMAIL", "fleece@fleece.example")
    return f"{name} <{mail}>"


def _version() -> str:
    """The version of pyproject.toml; between releases with the time of the commit, before the release to come."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        version: str = tomllib.load(file)["project"]["version"]
    tagged = subprocess.run(
        ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD"], capture_output=True, text=True, check=False
    )
    if f"v{version}" in tagged.stdout.split():
        return version
    return version + time.strftime("~dev%Y%m%d%H%M%S", time.gmtime(_epoch()))


def _epoch() -> int:
    if text := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(text)
    done = subprocess.run(
        ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False
    )
    return (
        int(done.stdout)
        if done.returncode == 0 and done.stdout.strip()
        else int((ROOT / "CHANGELOG.md").stat().st_mtime)
    )


def _remove_empty_folders(folder: Path) -> None:
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def _gzip(path: Path, data: bytes) -> None:
    _folder(path).write_bytes(gzip.compress(data, compresslevel=9, mtime=0))


def _folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _said(*line: str) -> str:
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def _run(*line: str) -> None:
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(
            f"{Path(line[0]).name} {line[1] if len(line) > 1 else ''}: {(done.stderr or done.stdout).strip()}"
        )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
