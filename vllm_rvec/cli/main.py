"""`vllm-rvec`: the commands, and what a failure of each kind exits with."""

import sys
from collections.abc import Callable

import typer
from rich.console import Console
from rich.text import Text

from vllm_rvec import __version__
from vllm_rvec.cli.check import check_command
from vllm_rvec.cli.check_config import check_config_command
from vllm_rvec.cli.combine import combine_command
from vllm_rvec.cli.extract import extract_command
from vllm_rvec.cli.fetch import fetch_command
from vllm_rvec.cli.inspect import inspect_command
from vllm_rvec.cli.lora import export_lora_command, import_lora_command
from vllm_rvec.cli.merge import merge_command
from vllm_rvec.cli.new_key import new_key_command
from vllm_rvec.cli.push import push_command
from vllm_rvec.cli.random_like import random_like_command
from vllm_rvec.cli.results import results_command
from vllm_rvec.cli.route import route_command
from vllm_rvec.cli.serve import serve_command
from vllm_rvec.cli.sweep import sweep_command
from vllm_rvec.cli.transform import transform_command
from vllm_rvec.cli.verify import verify_command
from vllm_rvec.errors import (
    CheckpointError,
    ConfigError,
    EngineStartupError,
    FetchError,
    IncompatibleVectorError,
    RvecError,
    VectorCorruptError,
    VectorFormatError,
)

__all__ = ["EXIT_CODES", "app", "run", "run_serve"]

EXIT_CODES: dict[type[RvecError], int] = {
    ConfigError: 3,
    CheckpointError: 4,
    VectorFormatError: 5,
    VectorCorruptError: 6,
    IncompatibleVectorError: 7,
    EngineStartupError: 8,
    FetchError: 9,
}
"""Exit status by kind of error. 0 is success or a stop that was asked for, 1 a bug of ours, 2 a
wrong command line."""

EXIT_HELP = """Exit status: 0 done or stopped as asked, 1 internal error, 2 wrong command line, \
3 configuration, 4 checkpoint, 5 not a vector, 6 damaged vector, 7 vector and target don't match, \
8 an engine did not start, 9 not fetched (network; of a URL also access, room), 130 interrupted by \
Ctrl-C."""

SHOWN_ENGINE_LINES = 12

INTERRUPTED = 130
"""The exit status after Ctrl-C, by the shells' convention."""

app = typer.Typer(
    name="vllm-rvec",
    help="Serve a model enhanced with a reasoning vector, and make such vectors.",
    epilog=EXIT_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
serve_app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

for commands in (app, serve_app):
    commands.command(
        "serve",
        epilog=EXIT_HELP,
        context_settings={"allow_extra_args": True},
    )(serve_command)
WITH_VLLM_FLAGS = {"sweep"}
"""Commands that take flags of vLLM behind `--`, beside `serve`."""
COMMANDS: dict[str, Callable[..., None]] = {
    "route": route_command,
    "check-config": check_config_command,
    "new-key": new_key_command,
    "results": results_command,
    "extract": extract_command,
    "inspect": inspect_command,
    "verify": verify_command,
    "check": check_command,
    "merge": merge_command,
    "transform": transform_command,
    "combine": combine_command,
    "random-like": random_like_command,
    "import-lora": import_lora_command,
    "export-lora": export_lora_command,
    "push": push_command,
    "fetch": fetch_command,
    "sweep": sweep_command,
}
for name, command in COMMANDS.items():
    settings = {"allow_extra_args": name in WITH_VLLM_FLAGS}
    app.command(name, epilog=EXIT_HELP, context_settings=settings)(command)


@app.command("version")
def version_command() -> None:
    """Print the version."""
    typer.echo(__version__)


def run() -> None:
    """Run `vllm-rvec`; does not return."""
    sys.exit(_run(app, "vllm-rvec"))


def run_serve() -> None:
    """Run `python -m vllm_rvec.serve`, which is `vllm-rvec serve`; does not return."""
    sys.exit(_run(serve_app, "python -m vllm_rvec.serve"))


def _run(commands: typer.Typer, name: str) -> int:
    try:
        commands(prog_name=name)
    except RvecError as exc:
        show_error(exc, Console(stderr=True))
        return exit_code(exc)
    except OSError as exc:  # a disk, a permission: nothing of ours, and no traceback's business
        show_error(RvecError(f"the system refused: {exc}"), Console(stderr=True))
        return EXIT_CODES[ConfigError]
    except SystemExit as exc:  # typer's own: help, usage errors, success, Ctrl-C
        if exc.code == INTERRUPTED:
            typer.echo("interrupted", err=True)
        return exc.code if isinstance(exc.code, int) else 1
    return 0


def exit_code(error: RvecError) -> int:
    """Return the exit status for an error of ours."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)


def show_error(error: RvecError, console: Console) -> None:
    """Print an error in one screen: what, why, what to do, and an engine's last lines."""
    lines = getattr(error, "last_lines", ())[-SHOWN_ENGINE_LINES:]
    if lines:
        console.print(Text(f"the engine's last {len(lines)} lines:", style="dim"))
    for line in lines:
        # Engine output is not trusted: as text, never as markup.
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
    console.print(
        Text("error: ", style="bold red").append(str(error), style="not bold default"),
        soft_wrap=True,
    )
