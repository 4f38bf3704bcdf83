"""VLLM's own parser, for commands that stand in files: a flag that it has not ends the test."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["server_flags"]


def server_flags(words: Sequence[str]) -> argparse.Namespace:
    """Read what stands after the server's program, as vLLM does."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(list(words))
    validate_parsed_serve_args(found)
    return found
