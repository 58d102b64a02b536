"""Serves a datastore to Proxmox Backup Server clients and other Fleece hosts (REST and the HTTP/2 backup protocol).

Empty so far: a repository is a local folder today. It will be the HTTP face of `repository.local`.
"""
