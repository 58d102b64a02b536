"""What the S3 emulator does with a request: checks it strictly, then changes buckets in memory.

It recomputes signatures (with code of its own, not Fleece's), compares SHA-256 and MD5 of bodies, and knows which
headers each request may have, how a path must be encoded, how long a key may be and how far clocks may differ. It has
put-if-absent, copy, multi-delete and ListObjectsV2 with pages of 1000.
"""

import base64
import calendar
import hashlib
import hmac
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Final
from urllib.parse import quote, unquote
from xml.etree import ElementTree

from tests.support.s3_bucket import XMLNS, FakeBucket, StoredObject, delete_xml, error_xml, iso

ACCESS_KEY: Final = "AKIAEMULATOR"
SECRET: Final = "emulator/secret+KEY"
REGION: Final = "test-region-1"
BUCKET: Final = "bucket"
#: Seconds that clocks may differ.
MAX_SKEW_S: Final = 900
_BASE: Final = frozenset({"host", "x-amz-date", "x-amz-content-sha256", "authorization"})
#: Headers that each operation must have, and those that it may have.
_HEADERS: Final[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = {
    "PUT": (_BASE | {"content-length", "content-type"}, frozenset({"content-md5", "if-none-match"})),
    "COPY": (
        _BASE | {"content-length", "content-type", "x-amz-copy-source", "x-amz-metadata-directive"},
        frozenset(),
    ),
    "POST": (_BASE | {"content-length", "content-md5"}, frozenset()),
}
_AUTHORIZATION: Final = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<access>[^/]+)/(?P<day>\d{8})/(?P<region>[^/]+)/s3/aws4_request,"
    r"SignedHeaders=(?P<names>[a-z0-9;-]+),Signature=(?P<signature>[0-9a-f]{64})"
)


@dataclass
class Answer:
    """What is sent back."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """The request is answered with an error."""

    def __init__(self, status: int, code: str, message: str = "", **details: str) -> None:
        super().__init__(code)
        self.status, self.code, self.message, self.details = status, code, message, details


@dataclass
class Request:
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    bucket: str = ""
    key: str = ""
    query: dict[str, str | None] = field(default_factory=dict)
    operation: str = ""

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name)


class S3Service:
    """One account. Attributes that tests set may be changed at any time."""

    def __init__(self, *, path_style: bool, buckets: Sequence[str], strict: bool) -> None:
        self.path_style = path_style
        self.strict = strict  #: False: foreign clients may send other headers
        self.buckets = {name: FakeBucket() for name in buckets}
        self.access_key, self.secret, self.region = ACCESS_KEY, SECRET, REGION
        self.clock_offset_s = 0.0  #: how far its clock is ahead
        self.knows_if_none_match = True
        self.respects_if_none_match = True  #: False: the header is passed over in silence
        self.knows_multi_delete = True
        self.not_found_without_code = False  #: 404 answers have no body
        self.lock = threading.RLock()

    @property
    def bucket(self) -> FakeBucket:
        """The first bucket."""
        return next(iter(self.buckets.values()))

    def now(self) -> float:
        """Its clock."""
        return time.time() + self.clock_offset_s

    def understand(self, request: Request) -> None:
        """Find out bucket, key and operation, and whether the request has the form that Fleece's must have."""
        path, _, query = request.target.partition("?")
        decoded = unquote(path, errors="strict")
        if quote(decoded, safe="/-._~") != path:
            raise Refused(400, "InvalidURI", f"the path {path} is not encoded as it must be")
        for part in query.split("&") if query else ():
            name, equals, value = part.partition("=")
            if quote(unquote(value), safe="-._~") != value:
                raise Refused(400, "InvalidURI", f"the query {query} is not encoded as it must be")
            request.query[unquote(name)] = unquote(value) if equals else None
        host = (request.header("host") or "").rpartition(":")[0]
        if self.path_style:
            request.bucket, _, request.key = decoded.lstrip("/").partition("/")
        else:
            request.bucket = host.partition(".")[0] if host.partition(".")[0] in self.buckets else ""
            request.key = decoded.removeprefix("/")
        request.operation = _operation(request)
        if not self.strict:
            return
        names = [name for name, _ in request.headers]
        must, may = _HEADERS.get(request.operation, (_BASE, frozenset()))
        if len(set(names)) != len(names) or not must <= set(names) <= must | may:
            raise Refused(400, "InvalidRequest", f"headers of {request.operation}: {sorted(names)}")

    def _authenticate(self, request: Request) -> None:
        match = _AUTHORIZATION.fullmatch((request.header("authorization") or "").replace(", ", ","))
        if match is None:
            raise Refused(403, "AccessDenied", "no signature")
        if match["access"] != self.access_key:
            raise Refused(403, "InvalidAccessKeyId", AWSAccessKeyId=match["access"])
        date = request.header("x-amz-date") or ""
        if match["region"] != self.region:
            raise Refused(400, "AuthorizationHeaderMalformed", "wrong region", Region=self.region)
        names = match["names"].split(";")
        sent = sorted(name for name, _ in request.headers if name != "authorization")
        if self.strict and names != sent:
            raise Refused(403, "AccessDenied", f"signed are {names}, sent {sent}")
        values = dict(request.headers)
        lines = [request.method, request.target.partition("?")[0]]
        pairs = sorted(
            f"{quote(name, safe='-._~')}={quote(value or '', safe='-._~')}" for name, value in request.query.items()
        )
        lines += ["&".join(pairs), *(f"{name}:{values.get(name, '').strip()}" for name in names), "", ";".join(names)]
        lines.append(values.get("x-amz-content-sha256", ""))
        canonical = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        scope = f"{match['day']}/{match['region']}/s3/aws4_request"
        key = f"AWS4{self.secret}".encode()
        for part in scope.split("/"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        text = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{canonical}"
        if hmac.new(key, text.encode(), hashlib.sha256).hexdigest() != match["signature"]:
            raise Refused(403, "SignatureDoesNotMatch", AWSAccessKeyId=match["access"])
        # A day's key is told from another day's by the signature; the time must fit besides.
        then = time.strptime(date, "%Y%m%dT%H%M%SZ")
        if abs(calendar.timegm(then) - self.now()) > MAX_SKEW_S or match["day"] != date[:8]:
            raise Refused(403, "RequestTimeTooSkewed")

    def do(self, request: Request, failed: Mapping[str, str], *, trust: bool = False) -> Answer:
        try:
            with self.lock:
                return self._carry_out(request, failed, trust)
        except Refused as refused:
            return self.refusal(request, refused)

    def refusal(self, request: Request, refused: Refused) -> Answer:
        details = {"BucketName": request.bucket, "Key": request.key, **refused.details}
        body = error_xml(refused.code, refused.message, details)
        if self.not_found_without_code and refused.status == 404:
            return Answer(404)
        return Answer(refused.status, body, {"content-type": "application/xml"})

    def _carry_out(self, request: Request, failed: Mapping[str, str], trust: bool) -> Answer:
        self._authenticate(request)
        told = request.header("x-amz-content-sha256")
        if not trust and hashlib.sha256(request.body).hexdigest() != told:
            raise Refused(400, "XAmzContentSHA256Mismatch")
        md5 = request.header("content-md5")
        if not trust and md5 is not None and base64.b64encode(hashlib.md5(request.body).digest()).decode() != md5:
            raise Refused(400, "BadDigest")
        if request.operation == "LIST-BUCKETS":
            found = "".join(
                f"<Bucket><Name>{name}</Name><CreationDate>{iso(0)}</CreationDate></Bucket>" for name in self.buckets
            )
            text = f'<ListAllMyBucketsResult xmlns="{XMLNS}"><Buckets>{found}</Buckets></ListAllMyBucketsResult>'
            return Answer(200, text.encode())
        bucket = self.buckets.get(request.bucket)
        if bucket is None:
            raise Refused(404, "NoSuchBucket", BucketName=request.bucket)
        if len(request.key.encode()) > 1024:
            raise Refused(400, "KeyTooLongError")
        match request.operation:
            case "HEAD-BUCKET":
                return Answer(200)
            case "LIST":
                return self._list(request, bucket)
            case "GET" | "HEAD":
                return self._get(request, bucket)
            case "PUT":
                return self._put(request, bucket)
            case "COPY":
                return self._copy(request, bucket)
            case "DELETE" if (id := request.query.get("versionId")) is not None:
                if not bucket.delete_version(request.key, id):
                    raise Refused(403, "AccessDenied", "it is locked")
                return Answer(204)
            case "DELETE":
                bucket.delete(request.key, self.now())
                return Answer(204)
            case "POST":
                return self._delete_many(request, bucket, failed)
            case "versioning":
                status = f"<Status>{bucket.versioning}</Status>" if bucket.versioning else ""
                return Answer(
                    200, f'<VersioningConfiguration xmlns="{XMLNS}">{status}</VersioningConfiguration>'.encode()
                )
            case "versions":
                marks = [request.query.get(name) or "" for name in ("prefix", "key-marker", "version-id-marker")]
                return Answer(200, bucket.version_listing(*marks), {"content-type": "application/xml"})
            case "object-lock":
                if not bucket.object_lock:
                    raise Refused(404, "ObjectLockConfigurationNotFoundError")
                rule = f"<Rule><DefaultRetention><Mode>{bucket.object_lock}</Mode></DefaultRetention></Rule>"
                text = f"<ObjectLockEnabled>Enabled</ObjectLockEnabled>{rule}"
                return Answer(200, f"<ObjectLockConfiguration>{text}</ObjectLockConfiguration>".encode())
        raise Refused(405, "MethodNotAllowed", request.operation)

    def _list(self, request: Request, bucket: FakeBucket) -> Answer:
        extra = set(request.query) - {"list-type", "prefix", "continuation-token"}
        if extra and self.strict:
            raise Refused(400, "InvalidArgument", f"parameters {sorted(extra)}")
        try:
            listing = bucket.listing(request.query.get("prefix") or "", request.query.get("continuation-token"))
        except ValueError:
            raise Refused(400, "InvalidArgument", "the continuation token") from None
        return Answer(200, listing, {"content-type": "application/xml"})

    def _get(self, request: Request, bucket: FakeBucket) -> Answer:
        stored = bucket.objects.get(request.key)
        if stored is None:
            raise Refused(404, "NoSuchKey")
        headers = {
            "content-length": str(len(stored.data)),
            "content-type": "binary/octet-stream",
            "etag": f'"{stored.etag}"',
            "last-modified": formatdate(stored.last_modified, usegmt=True),
        }
        if stored.storage_class != "STANDARD":
            headers["x-amz-storage-class"] = stored.storage_class
            if request.method == "GET":
                raise Refused(403, "InvalidObjectState", StorageClass=stored.storage_class)
        if request.method == "GET":
            del headers["content-length"]
        return Answer(200, stored.data, headers)

    def _put(self, request: Request, bucket: FakeBucket) -> Answer:
        if bucket.object_lock and request.header("content-md5") is None:
            why = "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock"
            raise Refused(400, "InvalidRequest", why)
        condition = request.header("if-none-match")
        if condition is not None:
            if not self.knows_if_none_match:
                raise Refused(
                    501, "NotImplemented", "A header you provided implies functionality", Header="If-None-Match"
                )
            if condition != "*":
                raise Refused(400, "InvalidArgument", f"if-none-match: {condition}")
            if request.key in bucket.objects and self.respects_if_none_match:
                raise Refused(412, "PreconditionFailed")
        return self._stored(bucket.put(request.key, request.body, self.now()))

    def _stored(self, stored: StoredObject) -> Answer:
        return Answer(200, b"", {"etag": f'"{stored.etag}"'})

    def _copy(self, request: Request, bucket: FakeBucket) -> Answer:
        source = request.header("x-amz-copy-source") or ""
        if quote(unquote(source), safe="/-._~") != source or request.header("x-amz-metadata-directive") != "REPLACE":
            raise Refused(400, "InvalidArgument", f"copy of {source}")
        name, _, key = unquote(source).partition("/")
        stored = self.buckets[name].objects.get(key) if name in self.buckets else None
        if stored is None:
            raise Refused(404, "NoSuchKey")
        copied = bucket.put(request.key, stored.data, self.now())
        modified = f"<LastModified>{iso(copied.last_modified)}</LastModified>"
        text = f'<CopyObjectResult xmlns="{XMLNS}">{modified}<ETag>"{copied.etag}"</ETag></CopyObjectResult>'
        return Answer(200, text.encode(), {"content-type": "application/xml"})

    def _delete_many(self, request: Request, bucket: FakeBucket, failed: Mapping[str, str]) -> Answer:
        if not self.knows_multi_delete:
            raise Refused(501, "NotImplemented")
        try:
            root = ElementTree.fromstring(request.body)
        except ElementTree.ParseError as error:
            raise Refused(400, "MalformedXML", str(error)) from error
        keys = [element.text or "" for element in root.iter(f"{{{XMLNS}}}Key")]
        ids = [element.text or "" for element in root.iter(f"{{{XMLNS}}}VersionId")]
        if root.tag != f"{{{XMLNS}}}Delete" or not 1 <= len(keys) <= 1000:
            raise Refused(400, "MalformedXML", f"{len(keys)} keys")
        refused = {key: code for key, code in failed.items() if key in keys}
        deleted = [key for key in keys if key not in refused]
        quiet = root.findtext(f"{{{XMLNS}}}Quiet") == "true"
        if ids:
            pairs = list(zip(keys, ids, strict=True))
            locked = {pair: "AccessDenied" for pair in pairs if not bucket.delete_version(*pair)}
            return Answer(200, delete_xml(deleted, {}, quiet, locked), {"content-type": "application/xml"})
        for key in deleted:
            bucket.delete(key, self.now())
        return Answer(200, delete_xml(deleted, refused, quiet), {"content-type": "application/xml"})


def _operation(request: Request) -> str:
    for name in ("versioning", "object-lock", "versions"):
        if name in request.query:
            return name
    match request.method:
        case "GET" if not request.bucket:
            return "LIST-BUCKETS"
        case "GET" if not request.key:
            return "LIST"
        case "HEAD" if not request.key:
            return "HEAD-BUCKET"
        case "PUT" if request.header("x-amz-copy-source") is not None:
            return "COPY"
    return request.method
