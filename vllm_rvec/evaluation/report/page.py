"""A sweep's results as one HTML page: no script, nothing loaded from anywhere.

Whatever it shows was written by others (names, questions, what a model said): all of it goes
through `escape`, and a content security policy forbids the rest.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from vllm_rvec.evaluation.report.document import as_document
from vllm_rvec.evaluation.report.methods import METHODS
from vllm_rvec.evaluation.report.pictures import (
    accuracy_picture,
    failure_picture,
    flip_picture,
    gain_picture,
    length_picture,
)
from vllm_rvec.evaluation.report.style import STYLE
from vllm_rvec.evaluation.report.svg import escape
from vllm_rvec.evaluation.report.tables import (
    accuracy_table,
    confirmation_table,
    cost_table,
    difference_table,
    gain_table,
    noise_table,
    shown_scopes,
    task_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_rvec.evaluation.report.tables import Table
    from vllm_rvec.evaluation.results import Flip, Scope, SweepResults

__all__ = ["as_html"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def as_html(results: SweepResults) -> str:
    """The whole report."""
    body = "\n".join(_parts(results))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>Sweep of alphas</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _parts(results: SweepResults) -> Iterator[str]:
    yield "<h1>Sweep of alphas</h1>"
    yield from _verdict(results)
    if results.confirmations:
        yield "<section><h2>Held-out confirmation</h2>"
        yield _table(confirmation_table(results))
        yield "</section>"
    gains = gain_table(results)
    if gains is not None:
        yield "<section><h2>Losses beside gains</h2>"
        yield _figure(gain_picture(results, "gains"))
        yield _table(gains)
        yield "</section>"
    for index, scope in enumerate(shown_scopes(results)):
        yield from _scope(results, scope, f"scope-{index}")
    yield "<section><h2>Noise and cost</h2>"
    yield _table(noise_table(results))
    yield _table(cost_table(results))
    yield "</section>"
    yield from _flips(results)
    yield from _repeat(results)
    yield "<section><h2>How it was calculated</h2><ul>"
    yield "".join(f"<li>{escape(method)}</li>" for method in METHODS)
    yield "</ul></section>"


def _verdict(results: SweepResults) -> Iterator[str]:
    verdict = results.verdict
    yield f'<section class="verdict {escape(verdict.code)}"><p>{escape(verdict.text)}</p>'
    if verdict.with_prompt is not None:
        yield f"<p>{escape(verdict.with_prompt.text)}</p>"
    yield "</section>"
    if verdict.warnings:
        yield "<section><h2>Before you believe it</h2><ul>"
        for one in verdict.warnings:
            yield f'<li class="{escape(one.code)}">{escape(one.text)}</li>'
        yield "</ul></section>"


def _scope(results: SweepResults, scope: Scope, key: str) -> Iterator[str]:
    yield f'<section><h2>{escape(scope.label)}</h2><div class="pictures">'
    yield _figure(accuracy_picture(results, scope, f"{key}-accuracy"))
    yield _figure(length_picture(results, scope, f"{key}-length"))
    yield _figure(failure_picture(results, scope, f"{key}-failures"))
    yield _figure(flip_picture(results, scope, f"{key}-flips"))
    yield "</div>"
    yield _table(accuracy_table(results, scope))
    yield _table(difference_table(results, scope))
    yield "</section>"


def _figure(picture: str | None) -> str:
    if picture is None:
        return ""
    # The caption is the picture's own title, escaped already, for those who see it.
    start = picture.index(">", picture.index("<title")) + 1
    caption = picture[start : picture.index("</title>")]
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _table(table: Table | None) -> str:
    if table is None or not table.rows:
        return ""
    head = "".join(
        f'<th scope="col"{_number(index, table)}>{escape(column)}</th>'
        for index, column in enumerate(table.columns)
    )
    rows = "".join(_row(row, table) for row in table.rows)
    return (
        f'<div class="table"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(row: tuple[str, ...], table: Table) -> str:
    first = f'<th scope="row"><bdi>{escape(row[0])}</bdi></th>'
    others = "".join(
        f"<td{_number(index, table)}><bdi>{escape(cell)}</bdi></td>"
        for index, cell in enumerate(row[1:], start=1)
    )
    return f"<tr>{first}{others}</tr>"


def _number(index: int, table: Table) -> str:
    return ' class="number"' if index >= table.texts else ""


def _flips(results: SweepResults) -> Iterator[str]:
    if not results.flips:
        return
    yield "<section><h2>Problems that flip: a sample</h2>"
    for arm in dict.fromkeys(one.arm for one in results.flips):
        yield f"<details><summary>{escape(arm)}</summary>"
        yield from (_flip(one) for one in results.flips if one.arm == arm)
        yield "</details>"
    yield "</section>"


def _flip(flip: Flip) -> str:
    what = "gained: only the arm is right" if flip.is_gain else "lost: only base is right"
    texts = (
        ("asked", flip.question),
        ("expected", flip.expected),
        ("base", flip.base),
        (flip.arm, flip.answer),
    )
    shown = "".join(
        f"<dt><bdi>{escape(name)}</bdi></dt><dd><pre>{escape(text)}</pre></dd>"
        for name, text in texts
    )
    return (
        f'<article class="{"gained" if flip.is_gain else "lost"}">'
        f"<h3>{escape(flip.task)}, {escape(flip.problem)} ({what})</h3><dl>{shown}</dl></article>"
    )


def _repeat(results: SweepResults) -> Iterator[str]:
    yield "<section><h2>Repeat this</h2>"
    yield _table(task_table(results))
    facts = as_document(results)["facts"]
    if isinstance(facts, dict) and facts:
        yield "<dl>"
        for name, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value, indent=2)
            yield f"<dt>{escape(name)}</dt><dd><pre>{escape(text)}</pre></dd>"
        yield "</dl>"
    yield "</section>"
