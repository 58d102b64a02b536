"""The read-only file system over snapshots: images as files, small files decoded.

Public API: `mount.mount` (everything from the checks to the unmount), `mount.serve` (under trio), `mount.OneArchive`,
`mount.OneSnapshot`, `options.MountOptions`, `errors.MountError`, and `helper.main`, the script `mount.fleece`.
"""
