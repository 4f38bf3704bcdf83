"""`vllm-rvec results`."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import aiohttp
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rvec.cli.printable import printable
from vllm_rvec.errors import ConfigError, FetchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_rvec.intervals import Estimate, Interval
    from vllm_rvec.router.results import ExperimentSummary, VariantSummary
    from vllm_rvec.router.results.report import Quantiles
    from vllm_rvec.router.results.statistics import Difference

__all__ = ["results_command"]

TIMEOUT_SECONDS = 60.0
"""A summary of many millions of requests takes its time."""
MAX_ANSWER_BYTES = 16 * 2**20
SHOWN_NAMES = 8
MAX_VERDICT = 2000
NONE = "-"


def results_command(
    url: Annotated[
        str | None, typer.Option(help="The running router, such as http://localhost:8000.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VLLM_RVEC_API_KEY", help="A key of the router's.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Instead of a router: its results file. Rotated ones are read too."),
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Only this alias.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Say which variant of each alias is better, and how sure that is."""
    if (url is None) == (file is None):
        raise typer.BadParameter("give one of them", param_hint="--url or --file")
    found = _from_file(file) if file is not None else _from_url(url or "", api_key)
    shown = found if alias is None else [one for one in found if one.experiment == alias]
    if alias is not None and not shown:
        raise _unknown(alias, found)
    if as_json:
        data = [summary.as_json() for summary in shown]
        typer.echo(json.dumps({"object": "list", "data": data}, allow_nan=False))
    else:
        _print(shown)


def _from_file(file: Path) -> "list[ExperimentSummary]":
    from vllm_rvec.router.results import read_experiments  # noqa: PLC0415 - scipy, half a second

    return read_experiments(file)


def _from_url(url: str, api_key: str | None) -> "list[ExperimentSummary]":
    from vllm_rvec.router.feedback import EXPERIMENTS_PATH  # noqa: PLC0415 - as slow
    from vllm_rvec.router.results import ExperimentSummary  # noqa: PLC0415 - scipy, half a second

    address = f"{url.rstrip('/').removesuffix('/v1')}{EXPERIMENTS_PATH}"
    try:
        status, body = asyncio.run(_get(address, api_key))
    except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
        why = "it does not answer in time" if isinstance(exc, TimeoutError) else str(exc)
        raise FetchError(f"Can't ask the router at {url}.", why=why) from exc
    if status != 200:
        raise _refused(url, status)
    try:
        return [ExperimentSummary.from_json(one) for one in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError) as exc:
        raise FetchError(
            f"{url} answers something else than results.",
            why=str(exc),
            fix="Give the address of a router of this version.",
        ) from exc


async def _get(address: str, api_key: str | None) -> tuple[int, bytes]:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    # A redirect would take the key to where it doesn't belong.
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(address, headers=headers, allow_redirects=False) as response,
    ):
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise ValueError("the answer is too long")
        return response.status, bytes(body)


def _refused(url: str, status: int) -> FetchError:
    fix = {
        401: "Give one of the router's keys: --api-key, or VLLM_RVEC_API_KEY.",
        403: "Give a key that may read results: --api-key, or VLLM_RVEC_API_KEY.",
        404: "Name a results file in the router's configuration: `results: {path: ...}`.",
    }
    return FetchError(
        f"The router at {url} gives no results.",
        why=f"HTTP status {status}",
        fix=fix.get(status, ""),
    )


def _unknown(alias: str, found: "Sequence[ExperimentSummary]") -> ConfigError:
    names = [printable(one.experiment) for one in found]
    known = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
    return ConfigError(
        f"There are no results of an alias {alias!r}.",
        fix=f"There are of: {known}." if known else "There are none yet.",
    )


def _print(summaries: "Sequence[ExperimentSummary]") -> None:
    console = Console()
    for summary in summaries:
        console.print(_traffic(summary))
        console.print(_ratings(summary))
        style = "" if summary.is_split_as_configured else "bold red"
        console.print(Text(printable(summary.verdict, MAX_VERDICT), style))
        for note in _notes(summary):
            console.print(Text(note, "dim"))
        console.print()
    if not summaries:
        console.print("no experiment yet: no request was sent to an alias with a split")


def _notes(summary: "ExperimentSummary") -> list[str]:
    notes = [printable(summary.caution, MAX_VERDICT)]
    if summary.not_counted:
        counts = ", ".join(
            f"{count:,} {printable(reason)}" for reason, count in summary.not_counted.items()
        )
        notes.append(f"not counted, since the split did not assign them: {counts}")
    if summary.sample_ratio_p is None:
        notes.append("is the traffic split as configured? too few users to tell yet")
    else:
        notes.append(f"is the traffic split as configured? p = {summary.sample_ratio_p:.2g}")
    return notes


def _traffic(summary: "ExperimentSummary") -> Table:
    table = _table(f"{printable(summary.experiment)}: traffic", "variant")
    for name in (
        "requests",
        "users",
        "share/\nset, %",
        "errors",
        "first\ntoken, s",
        "per\ntoken, ms",
        "duration,\ns",
        "tokens\nin/out",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for one in summary.variants:
        table.add_row(
            Text(printable(one.variant)),
            f"{one.exposures:,}",
            f"{one.units:,}",
            f"{_points(one.realised_share)}/{_points(one.configured_share)}",
            NONE if one.error_rate is None else _percent(one.error_rate.value, digits=2),
            _seconds(one.ttft_seconds),
            _milliseconds(one.token_seconds),
            _seconds(one.duration_seconds),
            f"{_short(one.prompt_tokens)}/{_short(one.completion_tokens)}",
        )
    table.caption = Text(
        "users: or sessions, and requests without a key; share: of users since the split was last "
        "changed; times: p50/p95 of the newest successful requests"
    )
    return table


def _ratings(summary: "ExperimentSummary") -> Table:
    is_rate = summary.measure != "scores"
    table = _table(f"{printable(summary.experiment)}: ratings", "variant")
    value = "win\nrate" if is_rate else "mean\nscore"
    for name in ("rated", value, "95 %\ninterval", "difference", "95 %\ninterval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in summary.variants:
        table.add_row(
            Text(printable(one.variant)),
            *_estimated(one, is_rate=is_rate),
            *_differing(one.difference, is_rate=is_rate),
        )
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.caption_justify, table.padding = "left", (0, 1, 0, 0)
    table.add_column(first, overflow="fold")
    return table


def _estimated(one: "VariantSummary", *, is_rate: bool) -> tuple[str, str, str]:
    rated = one.votes if is_rate else one.scores
    estimate: Estimate | None = one.win_rate if is_rate else one.mean_score
    if estimate is None:
        return f"{rated:,}", NONE, NONE
    value = _percent(estimate.value) if is_rate else f"{estimate.value:.4g}"
    return f"{rated:,}", value, _interval(estimate.interval, is_rate=is_rate)


def _differing(difference: "Difference | None", *, is_rate: bool) -> tuple[str, str, str]:
    if difference is None:
        return NONE, NONE, NONE
    value = f"{difference.value * 100:+.1f}" if is_rate else f"{difference.value:+.3g}"
    p_value = NONE if difference.p_value is None else f"{difference.p_value:.2g}"
    return value, _interval(difference.interval, is_rate=is_rate, sign="+"), p_value


def _interval(interval: "Interval | None", *, is_rate: bool, sign: str = "") -> str:
    if interval is None:
        return NONE
    if is_rate:
        return f"{interval.low * 100:{sign}.1f} to {interval.high * 100:{sign}.1f}"
    return f"{interval.low:{sign}.3g} to {interval.high:{sign}.3g}"


def _short(tokens: int) -> str:
    if tokens < 10_000:
        return f"{tokens:,}"
    return f"{tokens / 1e3:,.0f}k" if tokens < 10_000_000 else f"{tokens / 1e6:,.0f}M"


def _points(share: float | None) -> str:
    return NONE if share is None else f"{share * 100:.1f}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f} %"


def _milliseconds(quantiles: "Quantiles | None") -> str:
    if quantiles is None:
        return NONE
    return f"{quantiles.p50 * 1000:.0f}/{quantiles.p95 * 1000:.0f}"


def _seconds(quantiles: "Quantiles | None") -> str:
    return NONE if quantiles is None else f"{quantiles.p50:.2f}/{quantiles.p95:.2f}"
