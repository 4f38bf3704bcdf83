"""Where a task's files are: a path on this machine, or a dataset on the Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.hub import HubId, explain, hub_errors, quiet_progress
from vllm_rvec.errors import ConfigError, FetchError
from vllm_rvec.evaluation.tasks.files import SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_rvec.evaluation.tasks.spec import TaskSpec

__all__ = ["Files", "files_of", "is_elsewhere"]


@dataclass(frozen=True, slots=True)
class Files:
    """A task's files, and how the report calls them."""

    paths: tuple[Path, ...]
    source: str


def is_elsewhere(spec: TaskSpec) -> bool:
    """Whether a task's files would have to be looked for on the Hub."""
    return _path_meant(spec) is None


def files_of(spec: TaskSpec) -> Files:
    """Find a task's files; fetch them from the Hub if they are not on this machine.

    Raises:
        ConfigError: There are none, or no access.
        FetchError: The network or the Hub fails.
    """
    if (path := _path_meant(spec)) is not None:
        return Files(_local(path), str(path))
    hub_id = HubId.parse(spec.dataset or spec.path or "")
    if hub_id is None:  # checked with the spec
        raise ConfigError(f"{spec.dataset} is no dataset's id")
    return _on_hub(HubId(hub_id.repo, spec.revision or hub_id.revision), spec)


def _path_meant(spec: TaskSpec) -> Path | None:
    """The path on this machine; None where a dataset of the Hub is meant."""
    if spec.path is None:
        return None
    # Not Path.expanduser: that raises where there is no such user.
    path = Path(os.path.expanduser(spec.path))  # noqa: PTH111
    return path if path.exists() or HubId.parse(spec.path) is None else None


def _local(path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        if found := _preferred(p for p in path.iterdir() if p.is_file()):
            return found
        raise ConfigError(
            f"the folder {path} holds no task's file",
            fix=f"a file's name should end in {', '.join(SUFFIXES)}",
            path=path,
        )
    if not path.exists():
        raise ConfigError(
            f"there is no task's file {path}",
            fix="give a file, a folder, or a dataset's id on the Hub: owner/name",
            path=path,
        )
    return (path,)


def _preferred(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Of files that differ in their ending alone, keep the plainest; in order of their names."""
    found, best = list(paths), dict[str, Path]()
    for suffix in SUFFIXES:  # none is the end of another
        for path in found:
            if path.name.endswith(suffix):
                best.setdefault(str(path).removesuffix(suffix), path)
    return tuple(sorted(best.values()))


def _on_hub(hub_id: HubId, spec: TaskSpec) -> Files:
    folder = _download(hub_id, spec)
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and _is_wanted(p, folder, spec)]
    if not (paths := _preferred(found)):
        raise ConfigError(
            f"the dataset {hub_id} has no file for this task",
            why=f"none is called {spec.file}" if spec.file else _why_none(spec),
            fix="look at its files on the Hub, and set `file`, `split`, `subset` or `revision`",
        )
    return Files(paths, f"{hub_id.repo}@{folder.name}")


def _why_none(spec: TaskSpec) -> str:
    where = f" in a folder {spec.subset}" if spec.subset else ""
    return f"none{where} has `{spec.split}` in its name and ends in {', '.join(SUFFIXES)}"


def _is_wanted(path: Path, folder: Path, spec: TaskSpec) -> bool:
    name = path.relative_to(folder).as_posix()
    if spec.file is not None:
        return name == spec.file
    *folders, _ = name.split("/")
    words = re.split(r"[^A-Za-z0-9]+", name)
    return spec.split in words and (spec.subset is None or spec.subset in folders)


def _download(hub_id: HubId, spec: TaskSpec) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - half a second

    inner = f"*{spec.split}*"
    patterns = [spec.file] if spec.file else [f"{inner}{suffix}" for suffix in SUFFIXES]
    try:
        with quiet_progress():
            found = snapshot_download(
                hub_id.repo,
                repo_type="dataset",
                revision=hub_id.revision,
                allow_patterns=patterns,
            )
    except hub_errors() as exc:
        refusal = explain(exc, hub_id)
        raise (FetchError if refusal.may_pass else ConfigError)(
            f"there is no task's file {hub_id} here, and the Hub gives no such dataset",
            why=refusal.why,
            fix=refusal.fix,
        ) from exc
    return Path(found)
