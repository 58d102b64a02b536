"""Top floor: the command `fleece`, its configuration, and the composition of all other rooms.

    main.py             `main`, `run`: the tree of verbs; errors become text and exit codes here
    cli_*.py            the verbs, thin: options in, a report out
    invocation.py       what every verb has: repository, output, configuration, progress
    config.py           `load_config`: the TOML file that people write
    registry.py         the datastores that commands made
    running.py          `run`: trio, signals, the way back from an interruption

Nothing is imported here, so that `fleece --help` is quick.
"""
