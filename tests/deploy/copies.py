"""Writes what the monitoring overlay takes from deploy/monitoring, `python -m tests.deploy.copies`.

Copies, since Kustomize reads no file outside its folder. A test says when to run this again.
"""

from __future__ import annotations

import textwrap

from tests.deploy.rendered import KUBERNETES
from tests.deploy.tools import DEPLOY

OVERLAY = KUBERNETES / "overlays" / "monitoring"
RULE = """\
# Written by `python -m tests.deploy.copies` from deploy/monitoring/rules.yaml: change that.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vllm-rvec
spec:
"""


def copies() -> dict[str, str]:
    """Return what each file of the overlay is to hold."""
    monitoring = DEPLOY / "monitoring"
    rules = (monitoring / "rules.yaml").read_text()
    return {
        "rules.yaml": RULE + textwrap.indent(rules, "  "),
        "dashboard.json": (monitoring / "dashboard.json").read_text(),
    }


def main() -> None:
    """Write them."""
    for name, text in copies().items():
        (OVERLAY / name).write_text(text)


if __name__ == "__main__":
    main()
