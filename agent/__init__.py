"""Top floor: the command line and configuration. Composes the other rooms and owns the order "snapshot, then bitmap".

    main.py            `main`, the command `fleece`: the tree of verbs, errors as text and exit codes
    cli_*.py           the verbs: plain functions of an `Invocation` and their own options
    invocation.py      what every verb has: general options, configuration, repository, output, warnings
    running.py         trio, signals, one error out of many
    vm_backup.py       the backup of a virtual machine; vm_settings.py: what is known of one
    nbd_holder.py      disks held ready as block devices or files; nbd_offers.py: which, nbd_records.py: by whom
    sessions.py        a backup session at a free second
    jobs.py            jobs of the configuration, run and recorded (job_store.py); job_backup.py: those of type backup
    host_agent.py      the service; due_jobs.py, calendar_times.py: when what is due
    hooks.py           scripts that jobs call; vzdump_hook.py: Fleece as vzdump's
    monitoring/        events, metrics, notifications, the status page: what is seen of jobs
    slots.py           limits on what runs at the same time; vm_choice.py: which VMs a job means
    config.py          fleece.toml, its schema; toml_lines.py: on which line a key stands
    registry.py        the datastores that commands made; repositories.py: what `--repo` means
    s3_endpoints.py    S3 endpoints, their secrets in secrets.py; state_files.py: TOML files that commands write
    s3_use.py          buckets opened, keys watched, costs counted; s3_budget.py: limits
    bucket_stores.py   datastores in buckets, as the commands for datastores see them
    pbs_import.py      a PBS host's configuration made known here; pbs_config.py reads it
    specifications.py  `NAME.img:SOURCE`
    documents.py       snapshots and tables as people and programs read them
    doctor.py          what this host can do
    places.py          where files lie

Nothing is imported here, and nothing heavy at the top of main.py and cli_*.py, so that `fleece --help` is quick.
"""
