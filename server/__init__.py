"""Serves datastores to Proxmox Backup Server clients and other Fleece hosts (REST and the HTTP/2 backup protocol).

It is the HTTP face of `repository.local`. Public: `state.ServerState` (users, tasks, datastores), `service.Service`
(sockets, connections, signals), `certificate`, `access` (users, tokens, roles, rights), `tasks.TaskFiles`.

    service     sockets, TLS, drain        http1, http2   the protocols, within limits
    application who asks, which call       routing, schema  paths, rights, parameters
    api/        plain REST                 backup_*, reader_*  the upgraded protocols
"""
