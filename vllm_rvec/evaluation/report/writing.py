"""The files of a report, each whole or not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.output import replace_durably
from vllm_rvec.errors import ConfigError
from vllm_rvec.evaluation.report.document import as_json
from vllm_rvec.evaluation.report.markdown import as_markdown
from vllm_rvec.evaluation.report.page import as_html

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_rvec.evaluation.results import SweepResults

__all__ = ["write_reports"]


def write_reports(results: SweepResults, folder: Path) -> tuple[Path, ...]:
    """Write `report.html`, `report.md` and `report.json`, each whole or not at all.

    All three are made before the first is written, and JSON, which machines wait for, comes last.

    Args:
        results: What `analyse` gave.
        folder: Made if it isn't there; reports of an earlier run are replaced.

    Returns:
        The three paths.

    Raises:
        ConfigError: The folder can't be written to.
    """
    texts = {
        "report.html": as_html(results),
        "report.md": as_markdown(results),
        "report.json": as_json(results),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            replace_durably(folder / name, text.encode())
    except OSError as exc:
        raise ConfigError(
            f"The report can't be written to {folder}.",
            why=exc.strerror or str(exc),
            fix="Name a folder that can be made and written to.",
            path=folder,
        ) from exc
    return tuple(folder / name for name in texts)
