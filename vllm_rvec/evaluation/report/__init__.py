"""What a sweep shows, for people and machines: JSON, Markdown, HTML, and the terminal."""

from __future__ import annotations

from vllm_rvec.evaluation.report.document import SCHEMA, SCHEMA_VERSION, as_document, as_json
from vllm_rvec.evaluation.report.markdown import as_markdown
from vllm_rvec.evaluation.report.page import as_html
from vllm_rvec.evaluation.report.terminal import print_table
from vllm_rvec.evaluation.report.writing import write_reports

__all__ = [
    "SCHEMA",
    "SCHEMA_VERSION",
    "as_document",
    "as_html",
    "as_json",
    "as_markdown",
    "print_table",
    "write_reports",
]
