"""The files of `core.state_files` under the name that the commands know them by."""

from core.state_files import Plain, StateFile

__all__ = ["Plain", "StateFile"]
