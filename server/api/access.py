"""Version, login, users, tokens, roles and rights (spec 6.1)."""

from typing import Any, Final

import trio

from core.errors import FleeceError, NotFoundError
from core.limits import in_io_thread
from server.access.acl import ACL_PATH, AclEntry, components
from server.access.auth_ids import ROOT_USER, AuthId
from server.access.roles import ROLES, Privilege, names
from server.access.store import Account
from server.access.tickets import LIFETIME_S, unsigned
from server.answers import Answer, Result, as_json, digest_of
from server.errors import ApiError, UnauthorizedError, forbidden
from server.routing import Call, Endpoint, Open
from server.schema import AUTH, BOOL, COMMENT, ROLE, SAFE, TOKEN_NAME, USER, Integer, Parameter, Text, optional
from server.state import RELEASE, VERSION

_PATH: Final = Text(ACL_PATH, 1, 128)
_PASSWORD: Final = Text(longest=1024)
_GROUP: Final = Text(SAFE, 3, 64)
_COOKIE: Final = "__Host-PBSAuthCookie"
#: Makes a browser forget the ticket: after a logout, and with every refusal of credentials (spec 2.3).
DROP_COOKIE: Final = f"{_COOKIE}=; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Secure; SameSite=Lax; HttpOnly; Path=/;"


async def ping(call: Call) -> object:
    """`GET /ping`."""
    return {"pong": True}


async def version(call: Call) -> object:
    """`GET /version`."""
    return {"version": VERSION, "release": RELEASE, "repoid": "fleece"}


async def login(call: Call) -> object:
    """`POST /access/ticket`: a ticket for a password, or for a ticket that is still valid."""
    state = call.state
    user, password = AuthId(call["username"]), call["password"]
    if call["path"] is not None or call["privs"] is not None or call["port"] is not None:
        raise ApiError("terminal tickets are not offered")
    if password is None or call["tfa-challenge"] is not None or not await _is_right(call, user, password):
        raise ApiError("permission check failed.", 401)
    ticket = state.tickets.ticket(str(user))
    data = {"username": str(user), "CSRFPreventionToken": state.tickets.csrf_token(str(user))}
    headers = []
    if call["http-only"]:
        from urllib.parse import quote

        cookie = f"{_COOKIE}={quote(ticket, safe='')}; Max-Age={LIFETIME_S}; Secure; SameSite=Lax; HttpOnly; Path=/;"
        headers.append(("set-cookie", cookie))
        data["ticket-info"] = unsigned(ticket)
    else:
        data["ticket"] = ticket
    document = {"data": data, "status": 200, "success": True}
    return Answer(content_type="application/json", parts=[as_json(document)], headers=headers)


async def _is_right(call: Call, user: AuthId, password: str) -> bool:
    state = call.state
    if password.startswith("PBS:"):
        try:
            return state.tickets.verify(password) == str(user) and state.access.active(user)
        except UnauthorizedError:
            return False
    return await state.access.check_password(user, password, call.peer)


async def logout(call: Call) -> object:
    """`DELETE /access/ticket`: makes the client forget its cookie."""
    document = {"data": {}, "status": 200, "success": True}
    return Answer(content_type=None, parts=[as_json(document)], headers=[("set-cookie", DROP_COOKIE)])


async def permissions(call: Call) -> object:
    """`GET /access/permissions`."""
    state, caller = call.state, call.caller
    wanted = caller if call["auth-id"] is None else AuthId.parse(call["auth-id"])
    mine = wanted == caller or (caller.token is None and wanted.user == caller.user)
    if not mine and not state.privileges(caller, ("access",)) & Privilege.SYS_AUDIT:
        raise ApiError(f"not allowed to list permissions of {wanted}")
    tree = state.access.tree()
    found: dict[str, dict[str, bool]] = {}
    for path in tree.paths() if call["path"] is None else [call["path"]]:
        here, below = tree.with_propagation(wanted, components(path))
        if here or call["path"] is not None:
            kept = set(names(below))
            found[path] = {name: name in kept for name in names(here)}
    return found


async def roles(call: Call) -> object:
    """`GET /access/roles`."""
    return [{"roleid": name, "privs": names(bits), "comment": text} for name, (bits, text) in ROLES.items()]


async def users(call: Call) -> object:
    """`GET /access/users`."""
    state, caller = call.state, call.caller
    accounts = await in_io_thread(state.access.accounts)
    everybody = bool(state.privileges(caller, ("access", "users")) & Privilege.SYS_AUDIT)
    known = {str(ROOT_USER): Account(ROOT_USER, None, "Superuser"), **accounts}
    found: list[dict[str, Any]] = []
    for account in known.values():
        if account.auth_id.token is not None or not (everybody or account.auth_id.user == caller.user):
            continue
        entry = {"userid": str(account.auth_id), **_details(account)}
        if call["include_tokens"]:
            tokens = [one for one in known.values() if one.auth_id.token and one.auth_id.user == account.auth_id.user]
            if tokens:
                entry["tokens"] = [{"tokenid": str(one.auth_id), **_details(one)} for one in tokens]
        found.append(entry)
    return Result(found, {"digest": digest_of(found)})


def _details(account: Account) -> dict[str, Any]:
    details: dict[str, Any] = {}
    if account.comment:
        details["comment"] = account.comment
    if not account.enabled:
        details["enable"] = False
    if account.expire:
        details["expire"] = account.expire
    return details


def _may_change_tokens(call: Call) -> None:
    if str(call.caller) == call["userid"]:
        return
    if not call.state.privileges(call.caller, ("access", "users")) & Privilege.PERMISSIONS_MODIFY:
        raise forbidden()


async def add_token(call: Call) -> object:
    """`POST /access/users/{userid}/token/{token-name}`."""
    _may_change_tokens(call)
    name = f"{call['userid']}!{call['token-name']}"
    token = AuthId.parse(name)
    if call.state.access.account(token) is not None:
        raise ApiError(f"token '{token.token}' for user '{token.user}' already exists.")
    comment, expire = call["comment"] or "", call["expire"] or 0
    secret = await trio.to_thread.run_sync(lambda: call.state.access.add_token(token, comment=comment, expire=expire))
    return {"tokenid": name, "value": secret}


async def remove_token(call: Call) -> None:
    """`DELETE /access/users/{userid}/token/{token-name}`."""
    _may_change_tokens(call)
    token = AuthId.parse(f"{call['userid']}!{call['token-name']}")
    try:
        await in_io_thread(call.state.access.remove_token, token)
    except NotFoundError:
        raise ApiError(f"token '{token.token}' for user '{token.user}' does not exist.") from None


async def acl(call: Call) -> object:
    """`GET /access/acl`."""
    state, caller = call.state, call.caller
    everybody = bool(state.privileges(caller, ("access", "acl")) & Privilege.SYS_AUDIT)
    found = []
    for entry in state.access.tree().entries:
        if not everybody and not (caller.token is None and entry.auth_id.startswith(f"{caller}!")):
            continue
        path = call["path"]
        if path is not None and entry.path != path:
            inside = entry.path.startswith(path.rstrip("/") + "/")
            if call["exact"] or not inside:
                continue
        found.append(
            {
                "path": entry.path,
                "propagate": entry.propagate,
                "roleid": entry.role,
                "ugid": entry.auth_id.removeprefix("@"),
                "ugid_type": "group" if entry.auth_id.startswith("@") else "user",
            }
        )
    return Result(found, {"digest": digest_of(found)})


async def change_acl(call: Call) -> None:
    """`PUT /access/acl`."""
    state, caller = call.state, call.caller
    if call["group"] is not None:
        raise ApiError("parameter 'group' - groups are currently not supported.")
    if call["auth-id"] is None:
        raise ApiError("missing 'userid' or 'group' parameter.")
    target = AuthId.parse(call["auth-id"])
    own_token = target.token is not None and caller.token is None and target.user == caller.user
    if not own_token and not state.privileges(caller, ("access", "acl")) & Privilege.PERMISSIONS_MODIFY:
        raise ApiError("Unprivileged users can only set ACL items for API tokens.")
    if not call["delete"] and state.access.account(target) is None:
        raise ApiError(f"no such {'user' if target.token is None else 'API token'}.")
    entry = AclEntry(call["path"], str(target), call["role"], call["propagate"])
    try:
        await in_io_thread(lambda: state.access.set_right(entry, delete=call["delete"]))
    except NotFoundError:
        return
    except FleeceError as error:
        raise ApiError(str(error)) from error


_TOKEN: Final = {"userid": Parameter(USER), "token-name": Parameter(TOKEN_NAME)}
ENDPOINTS: Final = (
    Endpoint("GET", "/ping", ping, access=Open.WORLD),
    Endpoint("GET", "/version", version),
    Endpoint(
        "POST",
        "/access/ticket",
        login,
        {
            "username": Parameter(USER),
            "password": optional(_PASSWORD),
            "tfa-challenge": optional(_PASSWORD),
            "path": optional(_PASSWORD),
            "privs": optional(_PASSWORD),
            "port": optional(Integer(0, 65535)),
            "http-only": optional(BOOL, False),
        },
        Open.WORLD,
    ),
    Endpoint("DELETE", "/access/ticket", logout, access=Open.WORLD),
    Endpoint("GET", "/access/permissions", permissions, {"auth-id": optional(AUTH), "path": optional(_PATH)}),
    Endpoint("GET", "/access/roles", roles),
    Endpoint("GET", "/access/users", users, {"include_tokens": optional(BOOL, False)}),
    Endpoint(
        "POST",
        "/access/users/{userid}/token/{token-name}",
        add_token,
        {**_TOKEN, "comment": optional(COMMENT), "expire": optional(Integer(0))},
    ),
    Endpoint("DELETE", "/access/users/{userid}/token/{token-name}", remove_token, _TOKEN),
    Endpoint("GET", "/access/acl", acl, {"path": optional(_PATH), "exact": optional(BOOL, False)}),
    Endpoint(
        "PUT",
        "/access/acl",
        change_acl,
        {
            "path": Parameter(_PATH),
            "role": Parameter(ROLE),
            "auth-id": optional(AUTH),
            "group": optional(_GROUP),
            "propagate": optional(BOOL, True),
            "delete": optional(BOOL, False),
        },
    ),
)
