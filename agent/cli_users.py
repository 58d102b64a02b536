"""`fleece user`, `fleece token`, `fleece acl`: who may do what on this host's server."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.invocation import Invocation, command

if TYPE_CHECKING:
    from server.access.store import AccessStore, Account

#: The password that `user add` and `user passwd` set; with `_FD`, `_FILE` or `_CMD` behind it: where it comes from.
PASSWORD_VARIABLE = "FLEECE_USER_PASSWORD"

UserArgument = Annotated[str, typer.Argument(metavar="USER", help="name@pbs, or root@pam.")]
TokenArgument = Annotated[str, typer.Argument(metavar="TOKEN", help="name@pbs!token.")]
CommentOption = Annotated[str, typer.Option("--comment", metavar="TEXT", help="For people.")]
ExpireOption = Annotated[
    int, typer.Option("--expire", metavar="UNIX-SECONDS", min=0, help="Of no use from then on; 0: never.")
]
PathArgument = Annotated[str, typer.Argument(metavar="PATH", help="/, /datastore/NAME, /datastore/NAME/NAMESPACE, ...")]
WhoArgument = Annotated[str, typer.Argument(metavar="WHO", help="A user or token.")]
RoleArgument = Annotated[str, typer.Argument(metavar="ROLE", help="DatastoreBackup, DatastoreAdmin, ...")]


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    user = typer.Typer(no_args_is_help=True, help="Users of this host's server.", rich_markup_mode=None)
    application.add_typer(user, name="user")
    command(
        user,
        "add",
        repository=False,
        examples="""
fleece user add backup@pbs                         asks for the password
FLEECE_USER_PASSWORD_FILE=/root/pw fleece user add backup@pbs --comment 'web servers'
fleece user add hosts@pbs --no-password            only for its API tokens
""",
    )(user_add)
    command(user, "list", repository=False, examples="fleece user list --output json")(user_list)
    command(user, "passwd", repository=False, examples="fleece user passwd backup@pbs")(user_passwd)
    command(user, "remove", repository=False, examples="fleece user remove backup@pbs")(user_remove)
    token = typer.Typer(no_args_is_help=True, help="API tokens, for machines.", rich_markup_mode=None)
    application.add_typer(token, name="token")
    command(
        token,
        "add",
        repository=False,
        examples="""
fleece token add 'backup@pbs!web1'                 prints the secret, once
fleece token add 'backup@pbs!web1' --output json | jq -r .secret
""",
    )(token_add)
    command(token, "list", repository=False, examples="fleece token list")(token_list)
    command(token, "remove", repository=False, examples="fleece token remove 'backup@pbs!web1'")(token_remove)
    acl = typer.Typer(no_args_is_help=True, help="Rights of users and tokens.", rich_markup_mode=None)
    application.add_typer(acl, name="acl")
    command(
        acl,
        "update",
        repository=False,
        examples="""
fleece acl update /datastore/main backup@pbs DatastoreBackup          may add backups, never remove any
fleece acl update /datastore/main 'backup@pbs!web1' DatastoreBackup   a token needs its own right, too
fleece acl update /datastore/main/web admin@pbs DatastoreAdmin        only in the namespace web
fleece acl update /datastore/main backup@pbs DatastoreBackup --delete
""",
    )(acl_update)
    command(acl, "list", repository=False, examples="fleece acl list\nfleece acl list --output json")(acl_list)


def _access() -> "AccessStore":
    from agent.serving import server_folder
    from server.access.store import AccessStore

    return AccessStore(server_folder())


def _password(user: str) -> str:
    from agent.keys import new_passphrase
    from core.errors import UsageError

    found = new_passphrase(PASSWORD_VARIABLE, f"Password of {user}: ", "password")
    try:
        return found.decode()
    except UnicodeDecodeError:
        raise UsageError("set the password of", user, "it is no UTF-8") from None


def _account(account: "Account", word: str) -> dict[str, Any]:
    return {
        word: str(account.auth_id),
        "comment": account.comment,
        "enable": account.enabled,
        "expire": account.expire,
    }


def _line(account: "Account") -> str:
    notes = [account.comment] if account.comment else []
    if not account.active(time.time()):
        notes.append("disabled" if not account.enabled else "expired")
    return str(account.auth_id) + (f"  ({', '.join(notes)})" if notes else "")


def user_add(
    invocation: Invocation,
    user: UserArgument,
    comment: CommentOption = "",
    expire: ExpireOption = 0,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="It cannot log in; its tokens can be used.")
    ] = False,
) -> None:
    """Add a user. It has no rights yet: 'fleece acl update' gives them."""
    from server.access.auth_ids import AuthId

    wanted = AuthId.parse(user)
    password = None if no_password else _password(user)
    _access().add_user(wanted, password=password, comment=comment, expire=expire)
    invocation.emit({"userid": user}, lambda: f"Added {user}.")


def user_list(invocation: Invocation) -> None:
    """List the users."""
    users = [account for account in _access().accounts().values() if account.auth_id.token is None]
    invocation.emit([_account(one, "userid") for one in users], lambda: [_line(one) for one in users])


def user_passwd(invocation: Invocation, user: UserArgument) -> None:
    """Give a user another password; tickets that it has stay valid for two hours at most."""
    from server.access.auth_ids import AuthId

    wanted = AuthId.parse(user)
    _access().set_password(wanted, _password(user))
    invocation.emit({"userid": user}, lambda: f"{user} has a new password.")


def user_remove(invocation: Invocation, user: UserArgument) -> None:
    """Remove a user, its tokens, and the rights of all of them. Its backups stay."""
    from server.access.auth_ids import AuthId

    _access().remove_user(AuthId.parse(user))
    invocation.emit({"userid": user}, lambda: f"Removed {user}.")


def token_add(
    invocation: Invocation, token: TokenArgument, comment: CommentOption = "", expire: ExpireOption = 0
) -> None:
    """Add an API token of a user, and print its secret, which is kept nowhere."""
    from server.access.auth_ids import AuthId

    secret = _access().add_token(AuthId.parse(token), comment=comment, expire=expire)
    invocation.emit({"tokenid": token, "secret": secret}, lambda: f"Token  {token}\nSecret {secret}")


def token_list(invocation: Invocation) -> None:
    """List the API tokens."""
    tokens = [account for account in _access().accounts().values() if account.auth_id.token is not None]
    invocation.emit([_account(one, "tokenid") for one in tokens], lambda: [_line(one) for one in tokens])


def token_remove(invocation: Invocation, token: TokenArgument) -> None:
    """Remove an API token and its rights. Its backups stay."""
    from server.access.auth_ids import AuthId

    _access().remove_token(AuthId.parse(token))
    invocation.emit({"tokenid": token}, lambda: f"Removed {token}.")


def acl_update(
    invocation: Invocation,
    path: PathArgument,
    who: WhoArgument,
    role: RoleArgument,
    propagate: Annotated[bool, typer.Option("--propagate/--no-propagate", help="It holds below the path, too.")] = True,
    delete: Annotated[bool, typer.Option("--delete", help="Take it away.")] = False,
) -> None:
    """Give a user or token a role on a path, or take it away. A running server uses it at once."""
    from server.access.acl import AclEntry
    from server.access.auth_ids import parse_holder

    entry = AclEntry(path, parse_holder(who), role, propagate)
    _access().set_right(entry, delete=delete)
    words = f"{who} has the role {role} on {path}" if not delete else f"{who} has no longer the role {role} on {path}"
    document = {"path": path, "auth-id": who, "role": role, "propagate": propagate, "deleted": delete}
    invocation.emit(document, lambda: f"{words}.")


def acl_list(invocation: Invocation) -> None:
    """List the rights."""
    entries = sorted(_access().tree().entries, key=lambda entry: (entry.path, entry.auth_id, entry.role))
    document = [
        {"path": one.path, "auth-id": one.auth_id, "role": one.role, "propagate": one.propagate} for one in entries
    ]
    invocation.emit(
        document,
        lambda: [
            f"{one.path}  {one.auth_id}  {one.role}" + ("" if one.propagate else "  (not below)") for one in entries
        ],
    )
