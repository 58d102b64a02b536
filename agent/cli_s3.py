"""`fleece s3 endpoint`: where buckets are, and with which keys."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from agent import cli_s3_stores
from agent.invocation import Invocation, command
from agent.rate_options import BurstInOption, BurstOutOption, RateInOption, RateOutOption
from agent.section_options import FingerprintOnlyOption, FingerprintOption, check_credential, given, unset_too
from core.errors import FleeceError, UsageError

if TYPE_CHECKING:
    from agent.s3_endpoints import Listed
    from core.progress import Progress
    from datastore.s3.probe import ProbeReport
    from datastore.s3.xml import Bucket

EndpointId = Annotated[str, typer.Argument(metavar="ID", help="A name of 3 to 32 characters, for example aws.")]
AccessKeyOption = Annotated[str | None, typer.Option("--access-key", metavar="KEY", help="Not secret.")]
SecretFileOption = Annotated[
    Path | None,
    typer.Option("--secret-file", metavar="FILE", help="Read the secret key from the first line of FILE."),
]
SecretFdOption = Annotated[
    int | None, typer.Option("--secret-fd", metavar="N", min=0, help="Read it from this file descriptor.")
]
PortOption = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Else 443, or 80 with --allow-http.")]
RegionOption = Annotated[
    str | None, typer.Option("--region", metavar="REGION", help="For signatures and {{region}}; R2 wants auto.")
]
PathStyleOption = Annotated[
    bool | None,
    typer.Option("--path-style/--no-path-style", help="The bucket stands in the path: Ceph, MinIO and the like."),
]
AllowHttpOption = Annotated[
    bool | None,
    typer.Option("--allow-http/--no-allow-http", help="Talk http, unencrypted; for gateways on this machine."),
]
PutRateOption = Annotated[float | None, typer.Option("--put-rate-limit", metavar="N", help="PUT requests a second.")]
RequestRateOption = Annotated[
    float | None, typer.Option("--request-rate-limit", metavar="N", help="Requests of all kinds a second.")
]
QuirkOption = Annotated[
    list[str] | None,
    typer.Option(
        "--provider-quirk", metavar="QUIRK",
        help="What the provider cannot do: skip-if-none-match-header, delete-objects-via-delete-object. Repeatable;"
        " 'check' finds out.",
    ),
]  # fmt: skip
ThrottleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--throttle-code", metavar="CODE",
        help="An answer that means 'slower' at this provider: 403, 403/AccessDenied, TooBusy. Repeatable.",
    ),
]  # fmt: skip
ContentMd5Option = Annotated[
    Literal["auto", "always", "never"] | None,
    typer.Option("--content-md5", help="Send MD5 sums of what is stored (default auto: where they are needed)."),
]
ProxyOption = Annotated[
    str | None,
    typer.Option("--proxy", metavar="URL", help="http://HOST[:PORT]: connect through this proxy, which makes tunnels."),
]


def add_to(application: typer.Typer) -> None:
    """Register the verbs."""
    group = typer.Typer(
        no_args_is_help=True, help="S3 endpoints, and datastores in their buckets.", rich_markup_mode=None
    )
    application.add_typer(group, name="s3")
    endpoint = typer.Typer(
        no_args_is_help=True, help="Add, list, check, change and remove S3 endpoints.", rich_markup_mode=None
    )
    group.add_typer(endpoint, name="endpoint")
    command(
        endpoint,
        "add",
        repository=False,
        examples="""
fleece s3 endpoint add aws --endpoint '{{bucket}}.s3.{{region}}.amazonaws.com' --region eu-west-1 --access-key AKIA...
fleece s3 endpoint add ceph --endpoint rgw.example.org --port 8443 --path-style --access-key ... --secret-file /root/key
fleece s3 endpoint add r2x --endpoint ACCOUNT.r2.cloudflarestorage.com --region auto --path-style --access-key ...
fleece s3 endpoint add local --endpoint 127.0.0.1 --port 9000 --path-style --allow-http --access-key ...
FLEECE_S3_SECRET_CMD='pass s3/aws' fleece s3 endpoint add aws --endpoint ... --access-key ...
fleece s3 endpoint add unit --endpoint ... --access-key ... --systemd-credential
""",
    )(add)
    command(
        endpoint,
        "update",
        repository=False,
        examples="""
fleece s3 endpoint update aws --access-key AKIA... --secret-file /root/new-key     running mounts pick it up
fleece s3 endpoint update aws --request-rate-limit 30 --throttle-code 403
fleece s3 endpoint update aws --unset request-rate-limit
""",
    )(update)
    command(endpoint, "list", repository=False, examples="fleece s3 endpoint list --output json")(list_endpoints)
    command(
        endpoint,
        "check",
        repository=False,
        examples="""
fleece s3 endpoint check aws --bucket backups
fleece s3 endpoint check aws --bucket backups --store-prefix main      with a key whose rights end at main/
fleece s3 endpoint check aws --bucket backups --output json | jq '."quirks-to-set"'
""",
    )(check)
    command(endpoint, "buckets", repository=False, examples="fleece s3 endpoint buckets aws")(buckets)
    command(endpoint, "remove", repository=False, examples="fleece s3 endpoint remove aws")(remove)
    cli_s3_stores.add_to(group)


def add(
    invocation: Invocation,
    id: EndpointId,
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint", metavar="HOST",
            help="Host name or address, without https://. May begin with {{bucket}}. and contain {{region}}.",
        ),
    ],
    access_key: Annotated[str, typer.Option("--access-key", metavar="KEY", help="Not secret.")],
    secret_file: SecretFileOption = None,
    secret_fd: SecretFdOption = None,
    systemd_credential: Annotated[
        bool,
        typer.Option("--systemd-credential", help="Store no secret: each unit has LoadCredential=s3-ID:FILE."),
    ] = False,
    port: PortOption = None,
    region: RegionOption = None,
    path_style: PathStyleOption = None,
    fingerprint: FingerprintOption = None,
    fingerprint_only: FingerprintOnlyOption = None,
    allow_http: AllowHttpOption = None,
    put_rate_limit: PutRateOption = None,
    request_rate_limit: RequestRateOption = None,
    rate_in: RateInOption = None,
    burst_in: BurstInOption = None,
    rate_out: RateOutOption = None,
    burst_out: BurstOutOption = None,
    provider_quirk: QuirkOption = None,
    throttle_code: ThrottleOption = None,
    content_md5: ContentMd5Option = None,
    proxy: ProxyOption = None,
) -> None:  # fmt: skip
    """Make an S3 endpoint known: where it is, and the keys for it.

    The secret key is asked for at the terminal, or comes from --secret-file, --secret-fd, or the variable
    FLEECE_S3_SECRET (or what FLEECE_S3_SECRET_FILE, _FD or _CMD lead to); never from the command line. It is stored in
    a file of mode 0600. Nothing is sent to the endpoint: 'fleece s3 endpoint check' does that.
    """
    from agent.s3_endpoints import section_of

    values = given(
        endpoint=endpoint, access_key=access_key, port=port, region=region, path_style=path_style,
        fingerprint=fingerprint, fingerprint_only=fingerprint_only, allow_http=allow_http,
        put_rate_limit=put_rate_limit, request_rate_limit=request_rate_limit, rate_in=rate_in, burst_in=burst_in,
        rate_out=rate_out, burst_out=burst_out, provider_quirks=provider_quirk, throttle_codes=throttle_code,
        content_md5=content_md5, proxy=proxy,
    )  # fmt: skip
    section = section_of(values)
    section.resolve(id)  # before anybody is asked for a secret
    check_credential(systemd_credential, secret_file, secret_fd)
    secret = None if systemd_credential else _secret(id, secret_file, secret_fd, needed=True)
    invocation.endpoints.add(id, section, secret)
    invocation.emit(
        {"id": id, **section.to_json()},
        lambda: f"added S3 endpoint {id!r}\ntry it with: fleece s3 endpoint check {id} --bucket BUCKET",
    )


def update(
    invocation: Invocation,
    id: EndpointId,
    endpoint: Annotated[str | None, typer.Option("--endpoint", metavar="HOST", help="Host name or template.")] = None,
    access_key: AccessKeyOption = None,
    secret_file: SecretFileOption = None,
    secret_fd: SecretFdOption = None,
    ask_secret: Annotated[
        bool, typer.Option("--secret", help="Ask for a new secret key, or take it from FLEECE_S3_SECRET.")
    ] = False,
    port: PortOption = None,
    region: RegionOption = None,
    path_style: PathStyleOption = None,
    fingerprint: FingerprintOption = None,
    fingerprint_only: FingerprintOnlyOption = None,
    allow_http: AllowHttpOption = None,
    put_rate_limit: PutRateOption = None,
    request_rate_limit: RequestRateOption = None,
    rate_in: RateInOption = None,
    burst_in: BurstInOption = None,
    rate_out: RateOutOption = None,
    burst_out: BurstOutOption = None,
    provider_quirk: QuirkOption = None,
    throttle_code: ThrottleOption = None,
    content_md5: ContentMd5Option = None,
    proxy: ProxyOption = None,
    unset: Annotated[
        list[str] | None, typer.Option("--unset", metavar="NAME", help="Back to the default: port, region, ...")
    ] = None,
) -> None:
    """Change an S3 endpoint; what is not named stays.

    Running mounts and jobs go on with new keys within seconds; everything else counts from the next command on.
    """
    changes = given(
        endpoint=endpoint, access_key=access_key, port=port, region=region, path_style=path_style,
        fingerprint=fingerprint, fingerprint_only=fingerprint_only, allow_http=allow_http,
        put_rate_limit=put_rate_limit, request_rate_limit=request_rate_limit, rate_in=rate_in, burst_in=burst_in,
        rate_out=rate_out, burst_out=burst_out, provider_quirks=provider_quirk, throttle_codes=throttle_code,
        content_md5=content_md5, proxy=proxy,
    )  # fmt: skip
    from agent.s3_endpoints import EndpointSection

    unset_too(changes, unset or (), EndpointSection, "an endpoint")
    invocation.endpoints.section(id)
    secret = _secret(id, secret_file, secret_fd, needed=ask_secret)
    if not changes and secret is None:
        raise UsageError("update the S3 endpoint", repr(id), "nothing is to be changed", "see --help")
    section = invocation.endpoints.update(id, changes, secret)
    invocation.emit({"id": id, **section.to_json()}, lambda: f"changed S3 endpoint {id!r}")


def _secret(id: str, file: Path | None, descriptor: int | None, *, needed: bool) -> str | None:
    from agent.given_secrets import given_secret

    prompt = f"Secret key of S3 endpoint {id}: "
    return given_secret(
        "the secret key", prompt, "FLEECE_S3_SECRET", file, descriptor, option="--secret", needed=needed
    )


def list_endpoints(invocation: Invocation) -> None:
    """List the S3 endpoints, without their secrets, and which datastores use them."""
    from agent.documents import table

    found = invocation.endpoints.listed(invocation.registry)
    document = [
        {"id": one.id, **one.section.to_json(), "secret": one.secret.value, "used-by": list(one.used_by)}
        for one in found
    ]

    def lines() -> list[str]:
        header = ("id", "endpoint", "region", "access key", "secret", "used by")
        return list(table(header, [_row(one) for one in found])) if found else ["No S3 endpoints."]

    invocation.emit(document, lines)


def _row(one: "Listed") -> tuple[str, ...]:
    section = one.section
    scheme = "http://" if section.allow_http else ""
    port = f":{section.port}" if section.port is not None else ""
    used = ", ".join(one.used_by)
    return one.id, f"{scheme}{section.endpoint}{port}", section.region, section.access_key, one.secret.value, used


def check(
    invocation: Invocation,
    id: EndpointId,
    bucket: Annotated[str, typer.Option("--bucket", metavar="BUCKET", help="The bucket to try it with.")],
    store_prefix: Annotated[
        str | None,
        typer.Option("--store-prefix", metavar="NAME", help="Below the keys of this datastore, where rights may end."),
    ] = None,
) -> None:
    """Find out whether a datastore can live in a bucket, and which quirks to set.

    Writes, reads, lists, copies and deletes a few small objects of its own; then asks for versioning, object lock and
    the clock. Ends with 0 if all is well, 3 with warnings, 1 if it does not work.
    """
    from datastore.s3.probe import Mark, probe, summary

    endpoint = invocation.s3.use(id)

    async def work(progress: "Progress") -> "ProbeReport":
        return await probe(endpoint, bucket, store=store_prefix, counters=invocation.s3.counters)

    report = invocation.run(work, what="check the S3 endpoint", where=id)
    commands = [f"fleece s3 endpoint update {id} --provider-quirk {one.value}" for one in report.quirks_to_set]
    if len(report.quirks_to_set) > 1:
        options = " ".join(f"--provider-quirk {one.value}" for one in report.quirks_to_set)
        commands = [f"fleece s3 endpoint update {id} {options}"]
    document = {"id": id, **report.to_json()}
    invocation.emit(document, lambda: [*summary(report), *(f"-> {line}" for line in commands)])
    if not report.usable:
        failed = next(one for one in report.findings if one.mark is Mark.FAILED)
        raise FleeceError("use", f"{id}:{bucket}", f"{failed.name}: {failed.text}")
    for finding in report.findings:
        if finding.mark is Mark.WARNING:
            invocation.warnings.append(f"{finding.name}: {finding.text}")


def buckets(invocation: Invocation, id: EndpointId) -> None:
    """List the buckets that the endpoint's key may see; many keys may see none."""
    from agent.documents import table

    endpoint = invocation.s3.use(id)

    async def work(progress: "Progress") -> "list[Bucket]":
        from datastore.s3.client import list_buckets
        from datastore.s3.link import EndpointLink

        policy = invocation.s3.policy(attended=True)
        async with EndpointLink.open(endpoint, counters=invocation.s3.counters, policy=policy) as link:
            return list(await list_buckets(link))

    found = invocation.run(work, what="list the buckets of", where=id)
    rows = [(bucket.name, bucket.created) for bucket in found]
    invocation.emit(
        [{"name": name, "created": created} for name, created in rows],
        lambda: list(table(("bucket", "created"), rows)) if rows else ["No buckets."],
    )


def remove(invocation: Invocation, id: EndpointId) -> None:
    """Forget an S3 endpoint and its secret. One that a datastore uses stays."""
    invocation.endpoints.remove(id, invocation.registry)
    invocation.emit({"id": id, "removed": True}, lambda: f"forgot S3 endpoint {id!r}")
