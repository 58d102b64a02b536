"""The closing report, as JSON and for people."""

import json

from datastore.names import BackupType, Group
from repository.report import ArchiveReport, BackupReport, Mode


def test_json_has_the_keys_of_the_contract() -> None:
    archive = ArchiveReport(
        "drive-scsi0.img", 8 << 20, Mode.INCREMENTAL, None, 4 << 20, 65536, 4 << 20, 4 << 20, 1000, 2, 1
    )
    report = BackupReport(Group(BackupType.VM, "100").at(1767323045), [archive], 1.23456, 0.02, ["a warning"])
    assert json.loads(json.dumps(report.to_json())) == {
        "snapshot": "vm/100/2026-01-02T03:04:05Z",
        "archives": [
            {
                "name": "drive-scsi0.img",
                "size": 8388608,
                "mode": "incremental",
                "reason": None,
                "read": 4194304,
                "dirty": 65536,
                "reused": 4194304,
                "new": 4194304,
                "stored": 1000,
                "chunks": 2,
                "chunks-new": 1,
            }
        ],
        "frozen-s": 0.02,
        "duration-s": 1.235,
        "warnings": ["a warning"],
    }


def test_text_says_how_and_why_each_archive_was_read() -> None:
    full = ArchiveReport("drive-scsi0.img", 8 << 20, Mode.FULL, "size changed", read=8 << 20, chunks=2)
    report = BackupReport(Group(BackupType.VM, "100").at(1767323045), [full], 2.0, 0.02)
    first, closing, frozen = report.lines()
    assert first.startswith("drive-scsi0.img: 8.00 MiB, full (size changed), read 8.00 MiB")
    assert closing == "vm/100/2026-01-02T03:04:05Z: read 8.00 MiB in 2.00 s, 4.00 MiB/s"
    assert frozen == "guest file systems were frozen for 0.02 s"


def test_report_without_time_or_data_names_no_rate() -> None:
    report = BackupReport(Group(BackupType.VM, "100").at(1767323045), [], 0.0)
    assert report.lines() == ["vm/100/2026-01-02T03:04:05Z: read 0 B in 0.00 s"]


def test_of_small_files_only_their_sizes_are_said() -> None:
    small = ArchiveReport("vm.conf", 520, Mode.FULL, "small file", read=520, new=520, stored=300)
    first, closing = BackupReport(Group(BackupType.VM, "100").at(1767323045), [small], 0.2).lines()
    assert first == "vm.conf: 520 B, stored 300 B"
    assert closing == "vm/100/2026-01-02T03:04:05Z: read 520 B in 0.20 s"
