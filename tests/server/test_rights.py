"""Rights: every role and every operation, tokens, namespaces, owners (spec 5)."""

from typing import Any

import pytest

from core.errors import UsageError
from datastore.names import Group, Namespace
from repository.local import LocalRepository
from server.access.acl import AclEntry, AclTree
from server.access.auth_ids import AuthId
from server.access.roles import ALL, NONE, ROLES, Privilege
from tests.support.direct_server import Direct
from tests.support.snapshots import write_snapshot

P = Privilege
WHICH = {"backup-type": "host", "backup-id": "web", "backup-time": 1000}
GROUP = {key: WHICH[key] for key in ("backup-type", "backup-id")}
BASE = "/admin/datastore/main"
ANY = P.DATASTORE_AUDIT | P.DATASTORE_BACKUP | P.DATASTORE_MODIFY | P.DATASTORE_READ
#: Name, method, path, parameters, privileges for every group, privileges for own groups.
OPERATIONS: list[tuple[str, str, str, dict[str, Any], Privilege, Privilege]] = [
    ("snapshots", "GET", f"{BASE}/snapshots", {}, P.DATASTORE_AUDIT | P.DATASTORE_BACKUP, NONE),
    ("groups", "GET", f"{BASE}/groups", {}, P.DATASTORE_AUDIT | P.DATASTORE_BACKUP, NONE),
    ("namespace", "GET", f"{BASE}/namespace", {}, ANY, NONE),
    ("status", "GET", f"{BASE}/status", {}, ANY, NONE),
    ("files", "GET", f"{BASE}/files", WHICH, P.DATASTORE_AUDIT | P.DATASTORE_READ, P.DATASTORE_BACKUP),
    ("notes", "GET", f"{BASE}/notes", WHICH, P.DATASTORE_AUDIT, P.DATASTORE_BACKUP),
    ("set notes", "PUT", f"{BASE}/notes", {**WHICH, "notes": ""}, P.DATASTORE_MODIFY, P.DATASTORE_BACKUP),
    ("group notes", "GET", f"{BASE}/group-notes", GROUP, P.DATASTORE_AUDIT, P.DATASTORE_BACKUP),
    ("set group notes", "PUT", f"{BASE}/group-notes", {**GROUP, "notes": ""}, P.DATASTORE_MODIFY, P.DATASTORE_BACKUP),
    ("protected", "GET", f"{BASE}/protected", WHICH, P.DATASTORE_AUDIT, P.DATASTORE_BACKUP),
    ("protect", "PUT", f"{BASE}/protected", {**WHICH, "protected": 0}, P.DATASTORE_MODIFY, P.DATASTORE_BACKUP),
    (
        "download", "GET", f"{BASE}/download", {**WHICH, "file-name": "a.blob"}, P.DATASTORE_READ, P.DATASTORE_BACKUP,
    ),
    (
        "prune", "POST", f"{BASE}/prune", {**GROUP, "keep-last": 1, "dry-run": 1}, P.DATASTORE_MODIFY,
        P.DATASTORE_PRUNE,
    ),
    ("gc status", "GET", f"{BASE}/gc", {}, P.DATASTORE_AUDIT, NONE),
    ("operations", "GET", f"{BASE}/active-operations", {}, P.DATASTORE_AUDIT, NONE),
    ("add namespace", "POST", f"{BASE}/namespace", {"name": "new"}, P.DATASTORE_MODIFY, NONE),
    ("forget", "DELETE", f"{BASE}/snapshots", {**WHICH, "backup-time": 5}, P.DATASTORE_MODIFY, P.DATASTORE_PRUNE),
]  # fmt: skip
REFUSED = (401, 403)


async def stored(local: LocalRepository, owner: str, ns: Namespace = Namespace()) -> None:  # noqa: B008 - immutable
    group = Group.parse("host/web", ns)
    await write_snapshot(local, group, 1000, {"a.blob": b"text"})
    await local.set_owner(group, owner)


async def test_every_role_and_operation(direct: Direct, local: LocalRepository, no_delays: None) -> None:
    for role in ROLES:
        direct.right("/datastore/main", f"{role.lower()}@pbs", role)
        direct.user(f"{role.lower()}@pbs!tok")
        direct.right("/datastore/main", f"{role.lower()}@pbs!all", "Admin")
    wrong = []
    await stored(local, "somebody@pbs")
    for own in (False, True):
        for role, (bits, _) in ROLES.items():
            for user, rights in (
                (f"{role.lower()}@pbs", bits),
                (f"{role.lower()}@pbs!tok", NONE),  # a token inherits nothing
                (f"{role.lower()}@pbs!all", bits),  # and has no more than its user
            ):
                if own:
                    await local.set_owner(Group.parse("host/web"), user)
                for name, method, path, query, full, owned in OPERATIONS:
                    allowed = bool(rights & full) or (own and bool(rights & owned))
                    got = await ask(direct, method, path, user, query)
                    text = got.text
                    refused = got.status in REFUSED or "owner check failed" in text
                    if refused == allowed:
                        wrong.append((name, user, own, got.status, text[:80]))
    assert wrong == []


async def ask(direct: Direct, method: str, path: str, user: str, query: dict[str, Any]) -> Any:
    """As `Direct.call`, for tokens too, whose secrets nobody knows."""
    application = direct.application
    original = application.caller

    async def caller(request: object) -> AuthId:
        return AuthId.parse(user)

    application.caller = caller  # type: ignore[method-assign]
    try:
        return await direct.call(method, path, None, query=query)
    finally:
        application.caller = original  # type: ignore[method-assign]


@pytest.mark.parametrize("role", list(ROLES))
async def test_upgrades(role: str, direct: Direct, local: LocalRepository, no_delays: None) -> None:
    bits = ROLES[role][0]
    direct.right("/datastore/main", "u@pbs", role)
    backup = await direct.refusal("backup", "u@pbs", {"store": "main", **GROUP, "backup-time": 2000})
    assert backup.status == (101 if bits & P.DATASTORE_BACKUP else 403)
    await stored(local, "somebody@pbs")
    reader = await direct.refusal("reader", "u@pbs", {"store": "main", **WHICH})
    assert reader.status == (101 if bits & P.DATASTORE_READ else 400)
    await local.set_owner(Group.parse("host/web"), "u@pbs!tok")
    reader = await direct.refusal("reader", "u@pbs", {"store": "main", **WHICH})
    assert reader.status == (101 if bits & (P.DATASTORE_READ | P.DATASTORE_BACKUP) else 400)


async def test_who_may_only_back_up_removes_nothing(direct: Direct, local: LocalRepository, no_delays: None) -> None:
    direct.right("/datastore/main", "u@pbs", "DatastoreBackup")
    await stored(local, "u@pbs")
    removing: list[tuple[str, str, dict[str, Any]]] = [
        ("DELETE", "snapshots", WHICH),
        ("DELETE", "groups", GROUP),
        ("POST", "prune", {**GROUP, "keep-last": 1}),
        ("POST", "prune-datastore", {"keep-last": 1}),
        ("POST", "gc", {}),
        ("DELETE", "namespace", {"ns": "a"}),
    ]
    for method, path, query in removing:
        got = await direct.call(method, f"{BASE}/{path}", "u@pbs", query=query)
        assert got.status == 403, path
    assert [str(one.snapshot) for one in await local.snapshots()] == ["host/web/1970-01-01T00:16:40Z"]


def rights(entries: list[AclEntry], who: str, path: str) -> Privilege:
    return AclTree(entries).privileges(AuthId.parse(who), [part for part in path.split("/") if part])


def test_a_longer_path_replaces_what_a_shorter_one_gives() -> None:
    entries = [
        AclEntry("/", "u@pbs", "Admin"),
        AclEntry("/datastore/main", "u@pbs", "DatastoreAudit"),
        AclEntry("/datastore/main", "u@pbs", "DatastoreBackup"),
        AclEntry("/datastore/main/a", "u@pbs", "NoAccess"),
        AclEntry("/datastore/main/a", "u@pbs", "Admin"),
        AclEntry("/datastore/main/b", "u@pbs", "Admin", propagate=False),
    ]
    assert rights(entries, "u@pbs", "/") == ALL
    assert rights(entries, "u@pbs", "/datastore/other/x") == ALL
    both = P.DATASTORE_AUDIT | P.DATASTORE_BACKUP
    assert rights(entries, "u@pbs", "/datastore/main") == both
    assert rights(entries, "u@pbs", "/datastore/main/c/d") == both
    assert rights(entries, "u@pbs", "/datastore/main/a") == NONE
    assert rights(entries, "u@pbs", "/datastore/main/a/x") == NONE
    assert rights(entries, "u@pbs", "/datastore/main/b") == ALL
    assert rights(entries, "u@pbs", "/datastore/main/b/x") == both


def test_a_token_may_what_it_and_its_user_may() -> None:
    entries = [
        AclEntry("/datastore", "u@pbs", "DatastorePowerUser"),
        AclEntry("/datastore", "u@pbs!t", "DatastoreAdmin"),
        AclEntry("/datastore", "root@pam!t", "DatastoreAudit"),
        AclEntry("/datastore", "x@pbs!t", "Admin"),
    ]
    assert rights(entries, "u@pbs!t", "/datastore/main") == P.DATASTORE_BACKUP | P.DATASTORE_PRUNE
    assert rights(entries, "u@pbs!other", "/datastore/main") == NONE
    assert rights(entries, "root@pam!t", "/datastore/main") == P.DATASTORE_AUDIT
    assert rights(entries, "root@pam", "/anything") == ALL
    assert rights(entries, "x@pbs!t", "/datastore/main") == NONE


@pytest.mark.parametrize(
    ("caller", "owner", "owns"),
    [
        ("u@pbs", "u@pbs", True),
        ("u@pbs", "u@pbs!t", True),
        ("u@pbs!t", "u@pbs!t", True),
        ("u@pbs!t", "u@pbs", False),
        ("u@pbs!t", "u@pbs!t2", False),
        ("u@pbs", "u@pbsx!t", False),
        ("u@pbs", "v@pbs", False),
    ],
)
def test_owners(caller: str, owner: str, owns: bool) -> None:
    assert AuthId.parse(caller).owns(owner) is owns


async def test_groups_are_only_known_by_name(direct: Direct) -> None:
    access = direct.state.access
    access.add_user(AuthId("u@pbs"))
    access.set_right(AclEntry("/datastore/main", "@admins", "Admin"))
    access.set_right(AclEntry("/datastore/main", "u@pbs", "DatastoreAudit"))
    shown = (await direct.call("GET", "/access/acl")).data
    assert [(one["ugid"], one["ugid_type"], one["roleid"]) for one in shown] == [
        ("admins", "group", "Admin"),
        ("u@pbs", "user", "DatastoreAudit"),
    ]
    assert direct.state.privileges(AuthId("u@pbs"), ("datastore", "main")) == P.DATASTORE_AUDIT
    change = {"path": "/", "role": "Admin", "group": "admins"}
    got = await direct.call("PUT", "/access/acl", json_body=change)
    assert (got.status, got.text) == (400, "parameter 'group' - groups are currently not supported.")
    access.set_right(AclEntry("/datastore/main", "@admins", "Admin"), delete=True)
    assert [one.auth_id for one in access.tree().entries] == ["u@pbs"]
    for wrong in ("@", "@a b", "@../x", "@" + "x" * 64):
        with pytest.raises(UsageError, match="use the auth-id"):
            access.set_right(AclEntry("/", wrong, "Admin"))
