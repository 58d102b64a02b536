"""`[job.NAME]`: what a job of each type may say. Reference for people: docs/configuration.md."""

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from agent.cli_verify import parse_duration
from agent.config_types import (
    AbsolutePath,
    BackupId,
    NamespaceText,
    Owner,
    RepositoryName,
    Section,
    Size,
    checked,
)
from agent.s3_budget import Budget
from agent.schedules import check_schedule
from agent.specifications import parse_specification, parse_specifications
from agent.vm_choice import Selector
from core.errors import UsageError
from datastore.filters import GroupFilter
from datastore.names import is_safe_id


def check_job_name(name: str) -> str:
    """Return `name` if it may name a job: it becomes a folder.

    Raises:
        UsageError: other characters, or more than 64 of them.
    """
    if not is_safe_id(name) or len(name) > 64:
        raise UsageError("use the job name", repr(name), "1 to 64 letters, digits, '.', '_' or '-' are allowed")
    return name


JobName = Annotated[str, checked(check_job_name)]
#: With one space between the parts: systemd is particular about that before a time zone.
Schedule = Annotated[str, checked(check_schedule), AfterValidator(lambda text: " ".join(text.split()))]
Filter = Annotated[str, checked(GroupFilter.parse)]
Count = Annotated[int, Field(ge=1)]
Duration = Annotated[str, checked(parse_duration)]


def check_cutoff(text: str) -> None:
    """Refuse what no garbage collection takes, when the file is read and not in the night.

    Raises:
        UsageError: no time, too short or too long a one.
    """
    from datastore.gc import MAX_CUTOFF_S, MIN_CUTOFF_S

    if not MIN_CUTOFF_S <= parse_duration(text) <= MAX_CUTOFF_S:
        raise UsageError("use the cut-off", repr(text), "1m to 48h are possible")


def _check_mode(text: str) -> None:
    from repository.verify_modes import VerifyMode

    VerifyMode.parse(text)


def _check_sign(text: str) -> None:
    from agent.boot_trials import parse_signs

    parse_signs([text])


def _check_memory(text: str) -> None:
    from agent.boot_trials import parse_memory

    parse_memory(text)


def _check_second(text: str) -> None:
    if parse_duration(text) < 1:
        raise UsageError("use the time", repr(text), "it is shorter than a second")


class _Job(Section):
    schedule: Schedule | None = None  #: None: only by 'fleece job run'
    catch_up: bool = True  #: whether the agent makes up for a time that was missed
    retries: Annotated[int, Field(ge=0, le=20)] = 0  #: so often what failed is tried again
    retry_wait: Duration = "5m"  #: before each of them
    repository: str | None = None  #: None: the configuration's default
    comment: str | None = None
    s3_budget: Annotated[str, checked(Budget.parse)] | None = None  #: None: that of `[s3]`
    hook: AbsolutePath | None = None  #: None: that of the top
    hook_timeout: Duration | None = None


class BackupJob(_Job):
    """Backs up virtual machines, each into its group, and folders, images and files into one."""

    type: Literal["backup"]
    vm: list[Annotated[str, checked(Selector.parse)]] = Field(default_factory=list)
    exclude_vm: list[Annotated[str, checked(Selector.parse)]] = Field(default_factory=list)
    archives: list[Annotated[str, checked(parse_specification)]] = Field(default_factory=list)
    ns: NamespaceText | None = None
    parallel: Annotated[int, Field(ge=1, le=64)] = 1  #: backups of this job at a time
    owner: Owner | None = None
    notes: str | None = None
    bwlimit: Size | None = None
    lock_wait: Duration = "10m"
    keyfile: AbsolutePath | None = None
    master_pubkey_file: AbsolutePath | None = None
    crypt_mode: Literal["encrypt", "sign-only", "none"] | None = None
    backup_id: BackupId | None = None  #: of the archives; None: this host's name
    backup_type: Literal["host", "vm", "ct"] = "host"
    change_detection_mode: Literal["legacy", "data", "metadata"] | None = None
    exclude: list[str] = Field(default_factory=list)  #: patterns of files in the folders
    exclude_caches: bool = False
    include_dev: list[str] = Field(default_factory=list)
    all_file_systems: bool = False
    skip_lost_and_found: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> "BackupJob":
        if not self.vm and not self.archives:
            raise ValueError("it names nothing to back up: write vm = [...] or archives = [...]")
        if self.exclude_vm and not self.vm:
            raise ValueError("exclude-vm leaves out some of vm, which is empty")
        if self.include_dev and self.all_file_systems:
            raise ValueError("all-file-systems enters every file system: include-dev is too much")
        try:
            parse_specifications(self.archives)
        except UsageError as error:
            raise ValueError(f"archives: {error.where} is there twice") from error
        return self


class PruneJob(_Job):
    """Removes old snapshots."""

    type: Literal["prune"]
    ns: NamespaceText | None = None
    max_depth: Annotated[int, Field(ge=0, le=7)] | None = None  #: None: everything below
    group_filter: list[Filter] = Field(default_factory=list)
    keep_last: Count | None = None
    keep_hourly: Count | None = None
    keep_daily: Count | None = None
    keep_weekly: Count | None = None
    keep_monthly: Count | None = None
    keep_yearly: Count | None = None

    @model_validator(mode="after")
    def _keeps_something(self) -> "PruneJob":
        kinds = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
        if all(getattr(self, f"keep_{kind}") is None for kind in kinds):
            raise ValueError("it needs a keep option, such as keep-last = 7")
        return self


class VerifyJob(_Job):
    """Verifies a namespace and those below it."""

    type: Literal["verify"]
    ns: NamespaceText | None = None
    max_depth: Annotated[int, Field(ge=0, le=7)] | None = None  #: None: everything below
    group_filter: list[Filter] = Field(default_factory=list)
    ignore_verified: bool = True
    outdated_after: Annotated[int, Field(ge=0)] | None = None  #: days
    max_duration: Duration | None = None
    max_bytes: Size | None = None
    keyfile: AbsolutePath | None = None
    mode: Annotated[str, checked(_check_mode)] = "full"  #: of a bucket, where reading costs money


class GcJob(_Job):
    """Collects garbage."""

    type: Literal["gc"]
    cutoff: Annotated[str, checked(check_cutoff)] | None = None
    lock_wait: Duration | None = None
    allow_empty: bool = False  #: of a bucket: also without a single snapshot


class SyncJob(_Job):
    """Pushes `repository` to another datastore, or pulls from one into it."""

    type: Literal["sync"]
    remote: str  #: a remote of `fleece remote`, or a repository
    sync_direction: Literal["pull", "push"] = "pull"
    remote_store: RepositoryName | None = None
    remote_ns: NamespaceText | None = None
    ns: NamespaceText | None = None
    max_depth: Annotated[int, Field(ge=0, le=7)] | None = None  #: None: everything below
    group_filter: list[Filter] = Field(default_factory=list)
    transfer_last: Count | None = None
    encrypted_only: bool = False
    verified_only: bool = False
    resync_corrupt: bool = False
    remove_vanished: bool = False
    owner: Owner | None = None
    parallel: Annotated[int, Field(ge=1, le=32)] = 1
    rate_in: Size | None = None
    burst_in: Size | None = None
    rate_out: Size | None = None
    burst_out: Size | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> "SyncJob":
        if self.resync_corrupt and self.sync_direction == "push":
            raise ValueError("resync-corrupt belongs to sync-direction pull")
        return self


class TestBootJob(_Job):
    """Starts the newest backup of each machine to see whether it comes to life."""

    type: Literal["test-boot"]
    ns: NamespaceText | None = None
    max_depth: Annotated[int, Field(ge=0, le=7)] | None = None  #: None: everything below
    group_filter: list[Filter] = Field(default_factory=list)
    wait: list[Annotated[str, checked(_check_sign)]] = Field(default_factory=list)  #: empty: any sign of life
    timeout: Annotated[str, checked(_check_second)] = "5m"
    settle: Annotated[str, checked(_check_second)] = "10s"
    memory: Annotated[str, checked(_check_memory)] | None = None
    cpus: Annotated[int, Field(ge=1, le=255)] | None = None
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    qemu: str | None = None
    space: Size = "4G"
    keyfile: AbsolutePath | None = None


RunnableJob = BackupJob | PruneJob | VerifyJob | GcJob | SyncJob | TestBootJob
JobSection = Annotated[RunnableJob, Field(discriminator="type")]
#: By type, for suggestions.
JOB_MODELS: Final[dict[str, type[BaseModel]]] = {
    "backup": BackupJob,
    "prune": PruneJob,
    "verify": VerifyJob,
    "gc": GcJob,
    "sync": SyncJob,
    "test-boot": TestBootJob,
}
