"""Domains that jobs choose by pattern, of libvirt's own test driver, which has one domain called `test`."""

from collections.abc import Callable

import pytest

from agent.config import Config
from agent.doctor import State, _domain
from agent.vm_choice import Choice, choose_vms
from agent.vm_settings import VmOptions, resolve_vm
from core.errors import NotFoundError, UsageError
from hypervisor.domain_address import DomainAddress
from hypervisor.errors import LibvirtError
from hypervisor.libvirt_host import connected, domain_names, domain_state, look_around

pytest.importorskip("libvirt", reason="needs python3-libvirt, which `make setup` installs")
URI = "test:///default"


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Choice]:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", URI)

    def choose(*wanted: str, without: tuple[str, ...] = (), config: Config | None = None) -> Choice:
        return choose_vms(config or Config(), wanted, without)

    return choose


def test_a_pattern_finds_domains_that_have_no_section(choose: Callable[..., Choice]) -> None:
    (vm,) = choose("libvirt:t*").vms
    assert (vm.label, vm.options, vm.certain) == ("test", VmOptions(libvirt="test"), False)
    settings = resolve_vm(Config(), vm.options)
    assert (settings.monitor, settings.id) == (f"libvirt+{URI}#test", "test")
    assert choose("libvirt:db*").idle == ["libvirt:db*"]
    assert choose("libvirt:db").missing == ["libvirt:db"]
    assert choose("libvirt:*", without=("libvirt:test",)).vms == []


def test_a_domain_with_a_section_is_chosen_by_it_and_once(choose: Callable[..., Choice]) -> None:
    config = Config.model_validate({"vm": {"web": {"libvirt": "test", "tags": ["prod"]}}})
    assert [vm.options for vm in choose("libvirt:*", "tag:prod", config=config).vms] == [VmOptions(name="web")]
    assert resolve_vm(config, VmOptions(libvirt="test")).label == "web"


def test_libvirt_that_does_not_answer_fails_the_choice(
    choose: Callable[..., Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///system?socket=/nonexistent/sock")
    with pytest.raises(LibvirtError, match="list the domains"):
        choose("libvirt:*")


@pytest.mark.parametrize(
    "options",
    [
        VmOptions(libvirt="../x"),
        VmOptions(libvirt="web", qmp="/run/x"),  # type: ignore[arg-type]
        VmOptions(libvirt="two words"),
        VmOptions(connect=URI, id="x"),
    ],
)
def test_what_names_no_domain_is_wrong_usage(options: VmOptions) -> None:
    with pytest.raises(UsageError):
        resolve_vm(Config(), options)


async def test_a_domain_is_found_by_name_and_uuid_and_others_are_not() -> None:
    state = await domain_state(DomainAddress(URI, "test"))
    assert (state.name, state.active, state.persistent) == ("test", True, True)
    assert (await domain_state(DomainAddress(URI, state.uuid))).name == "test"
    with pytest.raises(NotFoundError, match="no such domain"):
        await domain_state(DomainAddress(URI, "other"))
    known = await look_around(URI, "other", state.uuid)
    assert (known.taken, known.uuid_taken_by, known.saved) == (None, "test", False)


async def test_a_libvirt_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(LibvirtError, match="is libvirtd running"):
        async with connected("qemu+unix:///system?socket=/nonexistent/sock"):
            pass


async def test_a_libvirt_of_another_host_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(LibvirtError, match="it is on another host"):
        async with connected("qemu+ssh://other.invalid/system"):
            pass
    with pytest.raises(LibvirtError, match="it is on another host"):
        domain_names("qemu+ssh://other.invalid/system")


def test_doctor_tells_whether_libvirt_has_the_domain() -> None:
    good, missing, away = (
        _domain("web", "test", URI),
        _domain("db", "other", URI),
        _domain("x", "test", "qemu+unix:///system?socket=/nonexistent/sock"),
    )
    assert [check.state for check in (good, missing, away)] == [State.OK, State.WARNING, State.FAILED]
    assert missing.fix
    assert "is libvirtd running" in away.fix
