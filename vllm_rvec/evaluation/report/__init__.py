"""What a sweep shows, for people and machines: JSON, Markdown, HTML, and the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from vllm_rvec.evaluation.results import SweepResults

__all__ = ["print_table", "write_reports"]


def write_reports(results: SweepResults, folder: Path) -> tuple[Path, ...]:
    """Write `report.json`, `report.md` and `report.html`, each whole or not at all.

    Args:
        results: What `analyse` gave.
        folder: Made if it isn't there; reports of an earlier run are replaced.

    Returns:
        The three paths.

    Raises:
        ConfigError: The folder can't be written to.
    """
    raise NotImplementedError


def print_table(results: SweepResults, console: Console) -> None:
    """Print the recommendation, the warnings and the table of arms."""
    raise NotImplementedError
