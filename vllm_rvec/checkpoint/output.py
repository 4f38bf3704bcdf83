"""Make an output folder whole or not at all.

The work is done in a hidden folder beside the output, which takes the output's name when all of it
is there and durable. A run that is killed leaves its hidden folder behind; the next run for the
same output finds it, says so, and removes it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rvec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["new_folder", "replace_durably", "sync_folder", "write_durably"]

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
"""Held as long as the run lives: what tells its folder from the remains of a killed one."""

UNLOCKED_SECONDS = 60.0
"""How long a run may have a folder without its lock: an instant at its start and at its end."""


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a hidden folder that becomes `output` if the block succeeds, and is gone if not.

    Raises:
        ConfigError: `output` exists, is being made by another run, or can't be written.
    """
    _check_free(output)
    folder, lock = _start(output)
    try:
        yield folder
        (folder / LOCK_NAME).unlink()
        folder.chmod(0o755)
        sync_folder(folder)
        _check_free(output)  # another run may have been faster
        folder.rename(output)
        sync_folder(output.parent)
    except OSError as exc:
        shutil.rmtree(folder, ignore_errors=True)
        if getattr(exc, "what", None):  # one of ours that is also an OSError: it says it better
            raise
        raise _cannot_write(output, exc) from exc
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet, and wait until the disk has it."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Write a file that may exist: readers find the old one or the new one, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)  # of a process of the same number that was killed
    try:
        write_durably(aside, data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def _check_free(output: Path) -> None:
    if os.path.lexists(output):
        raise ConfigError(
            f"the output {output} exists already",
            why="nothing is ever overwritten",
            fix="choose another folder, or remove it first",
            path=output,
        )


def _start(output: Path) -> tuple[Path, int]:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(output)
        folder = Path(tempfile.mkdtemp(prefix=_prefix(output), dir=output.parent))
        lock = os.open(folder / LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (OSError, ValueError) as exc:
        raise _cannot_write(output, exc) from exc
    return folder, lock


def _clear_remains(output: Path) -> None:
    # Not glob: the output's name may hold its special characters.
    found = [p for p in output.parent.iterdir() if p.name.startswith(_prefix(output))]
    for folder in found:
        if _is_alive(folder):
            logger.warning("Another run is making %s too: whoever finishes first has it", output)
            continue
        logger.warning("An earlier run for %s was interrupted; removing %s", output, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(folder: Path) -> bool:
    try:
        lock = os.open(folder / LOCK_NAME, os.O_RDWR)
    except FileNotFoundError:
        # A run that is about to make its lock, or to rename the folder; or one killed just there.
        return not folder.is_dir() or time.time() - folder.stat().st_mtime < UNLOCKED_SECONDS
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _prefix(output: Path) -> str:
    return f".{output.name}.unfinished-"


def _cannot_write(output: Path, exc: OSError | ValueError) -> ConfigError:
    why = getattr(exc, "strerror", None) or str(exc)
    if isinstance(exc, FileExistsError | NotADirectoryError):
        why = f"on the way to it, {exc.filename} is a file"
    return ConfigError(
        f"the output {output} can't be written",
        why=why,
        fix="choose a folder that can be made, on a disk with room for it",
        path=output,
    )


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
