"""What the documentation and `--help` speak of is there: commands, options, configuration, pages, files, variables."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from pydantic import BaseModel

from agent.config import Config, parse_config
from agent.job_sections import JOB_MODELS
from agent.main import build
from agent.monitoring.sections import NOTIFY_MODELS
from core.errors import UsageError
from tests.support.cache import ROOT

from .test_project import ROOMS

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|(?<=\n\n)((?: {4}[^\n]*\n|\n(?= {4}))+)", re.M | re.S)
#: Where what was said of an option ends: a comment in a column of its own, another command, a redirection.
_END = re.compile(r"\s{2,}| #| (?:\|\||&&) | [<>]|;|\)\"?| \| (?=(?:jq|tar|ssh|lpr|grep|while|head)\b)|`|(?<=\w\") ")
_CALL = re.compile(r"(?<![\w.'-])(?<!add )fleece (?=[a-z-])")
#: Shows a form, with parts that may be left out or of which there is a choice, and no command that can be run as it is.
_FORM = re.compile(r"[\[\]|]|\.\.\.")


class Call(NamedTuple):
    """A command as a page, or a help text, has it."""

    where: str
    text: str
    whole: bool  #: in a line of its own, not in a sentence


def code_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and text of the blocks of a page, fenced or indented by four."""
    for block in _BLOCK.finditer(text):
        yield (block[1], block[2]) if block[3] is None else ("", re.sub(r"^ {4}", "", block[3], flags=re.M))


def calls_in(where: str, text: str, *, whole: bool) -> Iterator[Call]:
    for start in _CALL.finditer(text):
        rest = text[start.end() :]
        end = _END.search(rest)
        yield Call(where, rest[: end.start()] if end else rest, whole and "#" not in text[: start.start()])


@cache
def calls() -> tuple[Call, ...]:
    """All commands of the documentation."""
    found: list[Call] = []
    for page in PAGES:
        text = page.read_text()
        for _, block in code_blocks(text):
            # The form of a command may go on in the next line.
            for line in re.sub(r"\n {8,}(?=\[)", " ", block).splitlines():
                found += calls_in(page.name, line, whole=True)
        for span in re.findall(r"`([^`]+)`", _BLOCK.sub("", text)):
            found += calls_in(page.name, span.replace("\n", " "), whole=False)
    return tuple(found)


@cache
def tree() -> Any:
    return typer.main.get_command(build())


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb with the words that lead to it."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, one in command.commands.items():
        yield from leaves(one, (*path, name))


def options_of(command: Any) -> set[str]:
    below = [one for _, one in leaves(command)]
    return {name for one in below for option in one.params for name in (*option.opts, *option.secondary_opts)}


def split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def meant(words: list[str]) -> tuple[list[Any], list[str]]:
    """The verbs or groups that the first words of a call name (`add|update` are two), and the words behind."""
    chosen = [tree()]
    for position, word in enumerate(words):
        if not all(hasattr(one, "commands") for one in chosen) or re.match(r"[a-z]", word) is None:
            return chosen, words[position:]
        chosen = [one.commands[name] for one in chosen for name in word.split("|")]
    return chosen, []


def wrong_in(call: Call) -> str:
    """What is wrong with a call; empty if nothing is."""
    try:
        chosen, rest = meant(split(call.text))
    except KeyError as error:
        return f"there is no verb {error}"
    known = set().union(*map(options_of, [tree()] if " | " in call.text else chosen)) | {"--help", "-h"}
    for word in rest:
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", word) if "-" in word[:2] else ():
            if option not in known and not (option.endswith("-") and any(one.startswith(option) for one in known)):
                return f"there is no option {option}"
    if call.whole and _FORM.search(call.text) is None and not hasattr(chosen[0], "commands"):
        try:
            chosen[0].make_context("fleece", list(rest))
        except typer.TyperException as error:
            return error.format_message()
    return ""


def test_commands_in_the_documentation_are_understood() -> None:
    assert len(calls()) > 300
    assert [f"{one.where}: fleece {one.text}: {why}" for one in calls() if (why := wrong_in(one))] == []


def test_examples_of_help_texts_are_understood() -> None:
    examples = [
        one
        for path, command in leaves(tree())
        for line in (command.epilog or "").splitlines()
        for one in calls_in(" ".join(path), line, whole=True)
    ]
    assert len(examples) > 200
    assert [f"{one.where}: fleece {one.text}: {why}" for one in examples if (why := wrong_in(one))] == []


def test_every_verb_has_an_example_and_is_in_the_documentation() -> None:
    text = " ".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    verbs = [(" ".join(path), command) for path, command in leaves(tree()) if not command.hidden]
    assert [name for name, command in verbs if f"fleece {name}" not in (command.epilog or "")] == []
    named = {id(one) for call in calls() for one in _verbs_named(call)}
    assert [name for name, command in verbs if id(command) not in named and f"`{name}`" not in text] == []


def test_every_option_is_explained_by_its_help_and_in_the_documentation() -> None:
    text = " ".join(page.read_text() for page in PAGES)
    options = [
        (" ".join(path), option)
        for path, command in leaves(tree())
        for option in command.params
        if option.param_type_name == "option" and not option.hidden and not command.hidden
    ]
    assert [f"{verb} {option.opts}" for verb, option in options if not option.help] == []
    names = [(verb, [*option.opts, *option.secondary_opts]) for verb, option in options]
    assert [f"{verb} {all_}" for verb, all_ in names if not any(re.search(rf"{one}\b", text) for one in all_)] == []


def test_help_knows_datastores_on_servers() -> None:
    assert "Proxmox Backup Server or another Fleece" in " ".join((tree().help or "").split())
    (repo,) = (one for one in tree().params if one.name == "repo")
    assert "user@realm@host:store" in repo.help


def _verbs_named(call: Call) -> list[Any]:
    """The verbs of a call; of `fleece user add ... | list` also those behind the lines."""
    words = split(call.text)
    chosen, _ = meant(words)
    beside = getattr(tree().commands.get(words[0]) if words else None, "commands", {})
    more = [beside.get(text.split()[0]) for text in call.text.split(" | ")[1:] if beside]
    return [*chosen, *more]


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def test_links_to_parts_of_pages_lead_to_headings() -> None:
    links = [(page, *link) for page in PAGES for link in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text())]
    inside = [(page, (page.parent / name) if name else page, anchor) for page, name, anchor in links if ":" not in name]
    assert inside
    assert [f"{page.name}: {to.name}#{anchor}" for page, to, anchor in inside if anchor not in anchors(to)] == []


def test_the_index_has_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w./-]+)\)", (ROOT / "docs/index.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= listed


def test_files_that_the_documentation_names_are_there() -> None:
    rooms = (
        r"agent|core|datastore|diskfs|fusefs|hypervisor|pxar|repository|server|tests|bench|demo|scripts|systemd|proxmox"
    )
    named = [(page, path) for page in PAGES for path in re.findall(rf"`((?:{rooms})/[\w./*@-]+)`", page.read_text())]
    assert named
    gone = [
        f"{page.name}: {path}"
        for page, path in named
        if not list(ROOT.glob(path.rstrip("/"))) and "_MODULE" not in path
    ]
    assert gone == []


def test_targets_of_make_that_the_documentation_names_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.M))
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"(?:`|^ {4})make ([a-z][\w-]*)", text, re.M)) <= targets
    programs = set(
        re.findall(r"`(bench/\w+\.py)`", (ROOT / "docs/benchmarks.md").read_text().partition("The limits")[0])
    )
    assert programs == set(re.findall(r"bench/\w+\.py", makefile))


def configurations() -> list[tuple[str, str]]:
    own = re.compile(
        rf"^\[(?:{'|'.join(field.alias or name for name, field in Config.model_fields.items())})[].]", re.M
    )
    return [
        (page.name, block)
        for page in PAGES
        for language, block in code_blocks(page.read_text())
        if language == "toml" or (not language and own.search(block))
    ]


def fault_of(page: str, text: str) -> str:
    """Why a configuration is refused; what it names may stand elsewhere on the page, and fingerprints are cut short."""
    try:
        parse_config(re.sub(r'(?<=fingerprint = ")[^"]*\.\.\.(?=")', ":".join(["00"] * 32), text), page)
    except UsageError as error:
        return "" if "but there is no [job." in error.why else str(error)
    return ""


def test_configurations_in_the_documentation_are_accepted() -> None:
    assert len(configurations()) > 10
    assert [fault for page, text in configurations() if (fault := fault_of(page, text))] == []


def test_every_option_of_the_configuration_is_documented() -> None:
    text = " ".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    seen: set[str] = set()

    def look(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            seen.add(field.alias or name)
            for one in _models_in(field.annotation):
                look(one)

    look(Config)
    for model in (*JOB_MODELS.values(), *NOTIFY_MODELS.values()):
        look(model)
    assert len(seen) > 100
    assert (
        sorted(key for key in seen if re.search(rf"`{key}`|^ *{key} = |\[(?:[\w.-]+\.)?{key}[\].]", text, re.M) is None)
        == []
    )


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


def test_json_in_the_documentation_is_json() -> None:
    blocks = [
        (page.name, block) for page in PAGES for language, block in code_blocks(page.read_text()) if language == "json"
    ]
    assert len(blocks) > 5
    for page, block in blocks:
        try:
            json.loads(block)
        except ValueError as error:
            pytest.fail(f"{page}: {error}: {block[:60]}")


def sources(*rooms: str) -> Iterator[str]:
    for room in rooms:
        yield from (path.read_text() for path in (ROOT / room).rglob("*.py"))


def test_variables_of_the_environment_are_documented() -> None:
    used = {name for text in sources(*ROOMS) for name in re.findall(r'"((?:FLEECE|PBS)_[A-Z0-9_]+)"', text)}
    assert {"FLEECE_CONFIG", "PBS_PASSWORD"} < used
    text = " ".join(page.read_text() for page in PAGES)
    assert sorted(name for name in used if re.search(rf"\b{name}\b", text) is None) == []


def test_manual_pages_have_the_variables_and_options_of_the_documentation() -> None:
    rows = re.findall(
        r"^\| (`[A-Z].*)", (ROOT / "docs/configuration.md").read_text().partition("## Environment")[2], re.M
    )
    variables = {
        name for row in rows if "for tests" not in row for name in re.findall(r"`([A-Z_0-9]+)`", row.split("|")[0])
    }
    assert len(variables) > 15
    manual = (ROOT / "debian/fleece.1").read_text()
    assert sorted(name for name in variables if re.search(rf"\b{name}\b", manual) is None) == []
    table = (ROOT / "docs/mount.md").read_text().partition("## Options")[2].partition("`noexec`")[0]
    options = re.findall(r"`(\w+)(?:=\w+)?`(?:,| \|)", " ".join(re.findall(r"^\|[^|]+\|", table, re.M)))
    assert {"cache", "gid", "allow_root"} < set(options)
    assert [name for name in options if name not in (ROOT / "debian/mount.fleece.8").read_text()] == []


def test_rules_that_comments_name_are_written_down() -> None:
    rules = set(re.findall(r"\*\*(R[0-9]+)\*\*", (ROOT / "docs/s3-rules.md").read_text()))
    notes = [note for text in sources(*ROOMS) for note in re.findall(r"\((R[0-9][R0-9, andto]*)\)", text)]
    named = {rule for note in notes for rule in re.findall(r"R[0-9]+", note)}
    assert named
    assert sorted(named - rules) == []


def test_fixtures_that_the_documentation_names_are_there() -> None:
    table = (
        (ROOT / "docs/development.md")
        .read_text()
        .partition("### Fixtures")[2]
        .partition("\n\n| fixture")[2]
        .partition("\n\n")[0]
    )
    named = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\|([^|]+)\|", table, re.M))))
    fixtures = re.findall(
        r"^@pytest.fixture(?!\(autouse).*\n(?:async )?def (\w+)", (ROOT / "tests/conftest.py").read_text(), re.M
    )
    inner = {"started_debian_vm", "store_pool"}  # what others are made of
    assert named == set(fixtures) - inner


def test_reasons_of_a_full_read_are_documented() -> None:
    given = (ROOT / "hypervisor/bitmaps.py").read_text().partition("async def choose(")[2].partition("\ndef ")
    text = (
        "".join(given)
        + (ROOT / "agent/vm_backup.py").read_text().partition("async def base_lookup")[2].partition("\n\n\n")[0]
    )
    reasons = re.findall(r'(?:return f?|why = |else |or )"([^"{]{12,}?) ?[{"]', text)
    assert len(reasons) > 20
    page = (ROOT / "docs/hypervisor.md").read_text()
    assert [reason for reason in reasons if reason not in page] == []


def test_ways_to_hash_are_documented() -> None:
    variants = re.findall(r'^    \{"([\w-]+)", \d+, \w+\},', (ROOT / "datastore/_sha256.c").read_text(), re.M)
    assert len(variants) > 2
    for page in ("configuration.md", "development.md"):
        row = re.search(r"^\| `FLEECE_SHA256` .*", (ROOT / "docs" / page).read_text(), re.M)
        assert row is not None
        assert [name for name in ("hashlib", *variants) if f"`{name}`" not in row[0]] == []


def test_the_document_of_every_verb_is_described() -> None:
    text = (ROOT / "docs/json.md").read_text()
    told = set(re.findall(r"`([a-z][a-z0-9 -]*)`", text)) | set(re.findall(r"(?<=[ :])[a-z]+(?=[,`])", text))
    missing = []
    for path, command in leaves(tree()):
        if command.hidden or "--output" not in options_of(command) or path[0] in ("key", "provider"):
            continue
        *groups, verb = path
        if " ".join(path) not in told and not (
            verb in told and any(one.startswith(" ".join(groups) + " ") for one in told)
        ):
            missing.append(" ".join(path))
    assert missing == []
