"""What people and other programs see of the jobs of this host: events, metrics, notifications, a status page.

    sections.py       `[events]`, `[metrics]`, `[notify.NAME]` and `[status]` of the configuration
    reporter.py       the one place that a run of a job goes through at its beginning and end
    events.py         the event log: JSON lines in a file, or the journal
    summaries.py      what is kept of each job beside its history: counters, and the last backup of each guest
    survey.py         what is known of each repository
    overview.py       all of that as one document
    metrics.py        the document in Prometheus's text format; textfile.py writes it for node_exporter
    page.py           the document as a page; web.py serves page, document and metrics from the agent
    rules.py          which notification is sent, repeated, left out
    templates.py      its words; mail.py, webhook.py, command.py: its ways; delivery.py tries them
    state.py          small JSON files that are replaced as a whole

Nothing in here makes a job fail. docs/monitoring.md.
"""
