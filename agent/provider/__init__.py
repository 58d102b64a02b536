"""The backup provider for Proxmox VE: what its plugin, `proxmox/`, asks by `fleece provider`.

`calls` answers single questions, `backup` and `restore` are sessions for one guest, `channel` is the pipes between a
session and the plugin. docs/proxmox-provider.md.
"""
