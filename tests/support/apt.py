"""Debian packages that are unpacked for a test and never installed.

The sources are the machine's own: the entries of its APT configuration that offer its release, with the suites a test
wants. Lists and packages go into folders of their own below `.cache/`, so the machine's APT is left as it is.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from tests.support.cache import Unavailable, cached

ETC_APT: Final = Path("/etc/apt")
OS_RELEASE: Final = Path("/etc/os-release")
#: Seconds for one run of APT: lists are 10 MB, the largest download is 40 MB.
APT_TIMEOUT_S: Final = 300
#: `deb [key=value ...] URI SUITE COMPONENT...`
_ONE_LINE: Final = re.compile(
    r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s*(?P<components>.*)"
)
_OPTION_FIELDS: Final = {"signed-by": "Signed-By", "trusted": "Trusted", "arch": "Architectures"}


def codename() -> str:
    """The release's name, `bookworm`; empty where /etc/os-release has none."""
    text = OS_RELEASE.read_text() if OS_RELEASE.exists() else ""
    match = re.search(r"^VERSION_CODENAME=\"?([a-z]+)\"?$", text, re.MULTILINE)
    return match[1] if match else ""


def sources_for(release: str, suites: Sequence[str], etc_apt: Path = ETC_APT) -> str:
    """A deb822 sources file with every configured entry that offers `release`, its suites replaced by `suites`.

    Empty if no entry does. Both forms of entry are understood; only what says where packages come from and who signs
    them is taken over.
    """
    stanzas = []
    for entry in _entries(etc_apt):
        if "deb" in entry["Types"].split() and release in entry["Suites"].split():
            kept = {name: entry[name] for name in ("URIs", "Components", *_OPTION_FIELDS.values()) if name in entry}
            # Nothing but package lists: some machines also fetch icons and file lists.
            fields = {"Types": "deb", "Suites": " ".join(suites), "Targets": "Packages", **kept}
            stanzas.append("".join(f"{name}: {value}\n" for name, value in fields.items()))
    return "\n".join(dict.fromkeys(stanzas))


def _entries(etc_apt: Path) -> Iterator[Mapping[str, str]]:
    """Every enabled entry of the configuration as deb822 fields (only the ones named here)."""
    for path in (etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*"))):
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if path.suffix == ".list":
            yield from _one_line_entries(text)
        elif path.suffix == ".sources":
            yield from _deb822_entries(text)


def _one_line_entries(text: str) -> Iterator[Mapping[str, str]]:
    for line in text.splitlines():
        match = _ONE_LINE.fullmatch(line.split("#")[0].strip())
        if match is None or match["uri"].startswith("cdrom:"):
            continue
        fields = {"Types": "deb", "URIs": match["uri"], "Suites": match["suite"], "Components": match["components"]}
        for option in (match["options"] or "").split():
            name, _, value = option.partition("=")
            if name in _OPTION_FIELDS:
                fields[_OPTION_FIELDS[name]] = value.replace(",", " ")
        yield fields


def _deb822_entries(text: str) -> Iterator[Mapping[str, str]]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and name:  # a key written into the file itself goes on over many lines
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                name = {"uris": "URIs"}.get(name.lower(), name.title())
                fields[name] = value.strip()
        if fields.get("Enabled", "yes").lower() != "no" and {"Types", "URIs", "Suites"} <= fields.keys():
            yield fields


@dataclass(frozen=True)
class AptRoot:
    """APT with sources, lists and archives of its own; dependencies are counted from what is installed here."""

    folder: Path

    @classmethod
    def open(cls, name: str, suites: Sequence[str]) -> Self:
        """The root `name` of the cache with up-to-date lists of `suites`, fetched when it is made.

        Raises:
            Unavailable: no source offers the release, or the lists cannot be fetched.
        """

        def build(folder: Path) -> None:
            sources = sources_for(codename(), suites)
            if not sources:
                raise Unavailable(f"no APT source of this machine offers {suites[-1]}")
            for part in ("lists/partial", "cache/archives/partial"):
                (folder / part).mkdir(parents=True)
            (folder / "fleece.sources").write_text(sources)
            cls(folder)._apt("apt-get", "-q", "update", what=f"no APT source of this machine answers for {suites[-1]}")

        return cls(cached(name, build))

    def latest(self, package: str, suite: str) -> str:
        """The version of `package` that `suite` offers.

        Raises:
            Unavailable: it offers none.
        """
        listed = self._apt("apt-cache", "madison", package, what=f"APT does not know {package}")
        for line in listed.splitlines():
            fields = [field.strip() for field in line.split("|")]
            if len(fields) == 3 and f" {suite}/" in fields[2]:
                return fields[1]
        raise Unavailable(f"no APT source of this machine has {package} in {suite}")

    def depends(self, package: str) -> list[str]:
        """The packages that `package` depends on directly."""
        listed = self._apt("apt-cache", "depends", package, what=f"APT does not know {package}")
        return re.findall(r"^\s+Depends: ([^<\s]\S*)$", listed, re.MULTILINE)

    def unpack(self, packages: Sequence[str], target: Path) -> None:
        """Download exactly `packages` and unpack them into `target`.

        Raises:
            Unavailable: one cannot be fetched.
        """
        with _fresh(self.folder / "downloads") as downloads:
            self._apt(
                "apt-get", "-q", "download", *packages, what=f"cannot download {' '.join(packages)}", cwd=downloads
            )
            _unpack(downloads, target)

    def unpack_with_dependencies(self, packages: Sequence[str], suite: str, target: Path) -> None:
        """Unpack `packages` of `suite` and everything they need that is not installed here.

        Raises:
            Unavailable: one cannot be fetched.
        """
        archives = self.folder / "cache/archives"
        arguments = ("-q", "-y", "--download-only", "--no-install-recommends", "--reinstall", "-t", suite, "install")
        self._apt("apt-get", *arguments, *packages, what=f"cannot download {' '.join(packages)}")
        _unpack(archives, target)
        for archive in archives.glob("*.deb"):
            archive.unlink()

    def download_for(self, status: Path, packages: Sequence[str], suite: str, target: Path) -> list[Path]:
        """Download `packages` of `suite`, and everything they need beyond what another machine has, into `target`.

        `status` is that machine's /var/lib/dpkg/status, and `target` an empty folder.

        Raises:
            Unavailable: one cannot be fetched.
        """
        (target / "partial").mkdir()
        arguments = ("-q", "-y", "--download-only", "--no-install-recommends", "-t", suite, "install")
        own = {"Dir::State::Status": status, "Dir::Cache::Archives": target}
        self._apt("apt-get", *arguments, *packages, what=f"cannot download {' '.join(packages)}", own=own)
        return sorted(target.glob("*.deb"))

    def _apt(
        self, command: str, *arguments: str, what: str, cwd: Path | None = None, own: Mapping[str, Path] | None = None
    ) -> str:
        options = {
            "Dir::Etc::SourceList": self.folder / "fleece.sources",
            "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": self.folder / "lists",
            "Dir::Cache": self.folder / "cache",
            "Debug::NoLocking": "true",  # nothing of the machine is changed
            "APT::Sandbox::User": "root",  # the user _apt may not read a checkout
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "20",
            "Acquire::https::Timeout": "20",
            "APT::Update::Error-Mode": "any",
            **(own or {}),
        }
        line = [command, *(part for name, value in options.items() for part in ("-o", f"{name}={value}")), *arguments]
        try:
            done = subprocess.run(
                line, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=APT_TIMEOUT_S
            )
        except FileNotFoundError as error:
            raise Unavailable("this machine has no APT") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{what}: no answer in {APT_TIMEOUT_S} s") from error
        if done.returncode:
            last = (done.stderr.strip() or "it says nothing").splitlines()[-1]
            raise Unavailable(f"{what}: {last}")
        return done.stdout


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """An empty folder that is removed at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(archives: Path, target: Path) -> None:
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True, timeout=APT_TIMEOUT_S)
