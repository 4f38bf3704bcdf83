"""Find the vector that a command was given, and show what takes longer than a second."""

import typer

from vllm_rvec.checkpoint.fetch import Located
from vllm_rvec.cli.progress import show_when_slow
from vllm_rvec.vector.fetching import locate_vector

__all__ = ["find_vector"]


def find_vector(reference: str) -> Located:
    """Find a vector's folder as `locate_vector` does, with a bar and notes on stderr."""
    with show_when_slow("fetching") as on_progress:
        return locate_vector(
            reference, on_progress=on_progress, notify=lambda line: typer.echo(line, err=True)
        )
