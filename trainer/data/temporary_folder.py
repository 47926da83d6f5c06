"""Temporary folders that are gone however this process ends, but for a kill."""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import suppress

_folders: weakref.WeakSet[tempfile.TemporaryDirectory[str]] = weakref.WeakSet()
_owner = os.getpid()


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that exists as long as what is returned, and is removed by `remove_folders` as well."""
    global _owner
    if _owner != os.getpid():  # after a fork: the others are the parent's
        _owner = os.getpid()
        _folders.clear()
    folder = tempfile.TemporaryDirectory(prefix="limbeck-")
    _folders.add(folder)
    return folder


def remove_folders() -> None:
    """Remove this process's folders, for an end that skips Python's own way of ending (`os._exit`)."""
    for folder in list(_folders) if _owner == os.getpid() else ():
        with suppress(OSError):
            folder.cleanup()
