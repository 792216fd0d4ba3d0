"""--ready-file: a file that exists exactly while the server accepts requests."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from pyserve.errors import StartupError


class ReadyFile:
    """Writes the file atomically. Making one removes the file that a killed server has left."""

    def __init__(self, path: Path | None) -> None:
        """Raises StartupError where the file cannot be written. `path` None: there is no file."""
        self._path = path
        if path is None:
            return
        try:
            path.unlink(missing_ok=True)
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise PermissionError(f"{path.parent} is not a folder that can be written")
        except OSError as error:
            raise StartupError(
                f"--ready-file {path}: {error.strerror or error}; "
                "it must be a path in a folder that exists and can be written"
            ) from None

    def write(self, *, url: str, model: str) -> None:
        """Write one JSON object with url, model and pid. Raises StartupError."""
        if self._path is None:
            return
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps({"url": url, "model": model, "pid": os.getpid()}) + "\n")
            draft.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise StartupError(f"--ready-file {self._path}: {error.strerror}") from None

    def remove(self) -> None:
        """Remove the file. Does nothing where it does not exist."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
