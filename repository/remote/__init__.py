"""Repositories on a Proxmox Backup Server or a Fleece server."""
