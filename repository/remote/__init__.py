"""Repositories on a Proxmox Backup Server or a Fleece server.

address.py      `RemoteAddress`: `[[user@realm[!token]@]host[:port]:]store`
opening.py      `open_remote`, `open_server`, `RemoteOptions`: connections and credentials put together
repository.py   `RemoteRepository`: the interface over REST
session.py      `RemoteBackupSession`: the backup protocol; `index_writer.py` checks what it is told
reader.py       `RemoteReader`: the reader protocol, with reconnection
upkeep.py       prune, garbage collection and verification by the server
tasks.py        `follow`: a server's task to its end
login.py        API tokens; tickets and their renewal
rest.py         calls and their errors
connection.py   `RemoteServer`: REST, and upgraded connections
http2.py        `Http2Client`: many requests at a time after the upgrade
indexes.py      bounds on indexes that a server sends
listing.py      lists that a server sends, checked
looking.py      looking whether a snapshot is there
errors.py       what goes wrong
"""
