"""One rank of a parallel layout: loads models fused and merged, and tells what it did as JSON.

Run as `python -m tests.support.rank RANK RANKS STORE`, with the cases as a JSON object on stdin,
as tests/loader/test_layouts.py makes it. All ranks meet in the file STORE.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.support.vllm_model import Place, load_parameters

__all__ = ["compare"]


def compare(case: dict[str, Any], place: Place) -> dict[str, Any]:
    """Load this rank's part of a model twice.

    Args:
        case: `target`, `merged`, `extra`, the loader's configuration, and `arguments`, vLLM's.
        place: Which rank of which layout this is.

    Returns:
        The parameters that differ, what this rank holds, and what the loader says it added.
    """
    place = replace(place, layout=place.layout | case["arguments"])
    merged = load_parameters(Path(case["merged"]), place=place).parameters
    fused = load_parameters(Path(case["target"]), "rvec", place=place, **case["extra"])
    ours = fused.parameters
    ledger = fused.loader.stream.ledger
    single = {parameter.data_ptr(): parameter for parameter in ours.values()}
    return {
        "names": sorted(ours),
        "differing": sorted(
            ours.keys() ^ merged.keys()
            | {name for name in ours if not torch.equal(_bits(ours[name]), _bits(merged[name]))}
        ),
        "held": sum(parameter.numel() for parameter in single.values()),
        "added": ledger.elements,
        "early": sorted(ledger.materialized),
    }


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.contiguous().view(torch.uint8)


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = json.load(sys.stdin)
    place = Place(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), work["layout"])
    done = {name: compare(case, place) for name, case in work["cases"].items()}
    sys.stdout.write(json.dumps(done) + "\n")
