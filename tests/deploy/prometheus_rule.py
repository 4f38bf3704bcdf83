"""Writes the monitoring overlay's rules, `python -m tests.deploy.prometheus_rule`.

A copy of deploy/monitoring/rules.yaml, since Prometheus' own file is no object of Kubernetes. A
test says when to run this again.
"""

from __future__ import annotations

import textwrap

from tests.deploy.rendered import KUBERNETES
from tests.deploy.tools import DEPLOY

FILE = KUBERNETES / "overlays" / "monitoring" / "rules.yaml"
HEAD = """\
# deploy/monitoring/rules.yaml, by `python -m tests.deploy.prometheus_rule`: change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vllm-rvec
spec:
"""


def prometheus_rule() -> str:
    """Return what the file is to hold."""
    return HEAD + textwrap.indent((DEPLOY / "monitoring" / "rules.yaml").read_text(), "  ")


def main() -> None:
    """Write it."""
    FILE.write_text(prometheus_rule())


if __name__ == "__main__":
    main()
