"""VLLM's own parser, for commands that stand in files: JSON in, JSON out, in a process of its own.

[[words of a command after the program], ...] becomes [{what was parsed}, ...]; a flag that vLLM has
not ends it.
"""

from __future__ import annotations

import json
import sys

__all__: list[str] = []


def main() -> None:
    """Parse them all: importing vLLM takes longer than that."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    parsed = [vars(parser.parse_args(words)) for words in json.load(sys.stdin)]
    sys.stdout.write("\n" + json.dumps(parsed, default=str) + "\n")


if __name__ == "__main__":
    main()
