"""Where one load's time goes, drawn: a bar for a plain load and one for each kind of vector.

`make profile` draws `benchmarks/images/load_profile.svg` again. Each bar is the load of median
length among the repeats, warm, in one process, in turn. Clocks stand at three doors that every load
passes: the weights that the model is given, until the first (opening files, checks), each later one
(slicing the mapping, making the pair), and each copy into a parameter, where the sum is computed;
what is left is vLLM's and Python's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from benchmarks.files import Files, add_shape
from benchmarks.loading import Way
from benchmarks.page_cache import files_of, read_back
from tests.support.vllm_model import CreatedModel, engine_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Profile", "draw", "kind_of"]

IMAGE = Path(__file__).parent / "images" / "load_profile.svg"
OPENING, STREAM, REST = "opening, checks", "stream", "vLLM, Python"
STAGES = (OPENING, STREAM, "embedding", "attention", "feed-forward", "norms", "other", REST)
COLOURS = ("#4c4c4c", "#9a9a9a", "#1b6ca8", "#3d9be9", "#e08e45", "#b5c99a", "#c77dba", "#dddddd")
KINDS = {
    "embed_tokens": "embedding",
    "lm_head": "embedding",
    "self_attn": "attention",
    "mlp": "feed-forward",
    "norm": "norms",
}
WAYS = ("plain", "dense", "sparse", "int8")


@dataclass(slots=True)
class Profile:
    """One load, by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        """Count some time."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @property
    def total(self) -> float:
        """Of all stages."""
        return sum(self.seconds.values())


def kind_of(name: str) -> str:
    """Tell which stage a tensor's copy belongs to.

    >>> kind_of("model.layers.3.self_attn.q_proj.weight")
    'attention'
    """
    return next((kind for part, kind in KINDS.items() if part in name), "other")


def main() -> None:
    """Load each way in turn, draw the median loads, print their stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shape(parser)
    parser.add_argument("--repeats", type=int, default=9, help="loads; the median one is drawn")
    parser.add_argument("--output", type=Path, default=IMAGE, help="an .svg or a .png")
    options = parser.parse_args()
    with Files.asked_for(options) as files:
        profiles = measure(files, options.repeats)
    draw(profiles, files.title, options.output)
    json.dump({name: profile.seconds for name, profile in profiles.items()}, sys.stdout, indent=1)
    print()


def measure(files: Files, repeats: int) -> dict[str, Profile]:
    """Return the median load of each way."""
    from vllm.model_executor.model_loader import get_model_loader

    read_back(files_of(files.target, *(files.vector(kind) for kind in WAYS[1:])))
    model = CreatedModel(engine_config(files.target, "safetensors", {}, "bfloat16"))
    configs = {}
    for name in WAYS:
        way = Way() if name == "plain" else Way.fused(files.vector(name))
        configs[name] = engine_config(files.target, way.load_format, way.extra, "bfloat16")
    loads: dict[str, list[Profile]] = {name: [] for name in WAYS}
    for _ in range(1 + repeats):
        for name, config in configs.items():
            loads[name].append(_profiled(model, get_model_loader(config.load_config)))
    return {name: _median(profiles[1:]) for name, profiles in loads.items()}


def _median(profiles: list[Profile]) -> Profile:
    return sorted(profiles, key=lambda profile: profile.total)[len(profiles) // 2]


def _profiled(created: CreatedModel, loader: Any) -> Profile:
    profile = Profile()
    with _clocks(created.model, profile):
        seconds = created.load(loader)
    profile.add(REST, seconds - profile.total)
    return profile


@contextmanager
def _clocks(model: Any, profile: Profile) -> Iterator[None]:
    """Put clocks at the weights that a model is given, and at copies into its parameters."""
    current, load, copy = [""], model.load_weights, torch.Tensor.copy_

    def timed_load(weights: Iterable[tuple[str, torch.Tensor]]) -> object:
        return load(_timed_stream(iter(weights), current, profile))

    def timed_copy(out: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        started = time.perf_counter()
        copied: torch.Tensor = copy(out, *arguments, **options)
        profile.add(kind_of(current[0]), time.perf_counter() - started)
        return copied

    with (
        patch.object(model, "load_weights", timed_load),
        patch.object(torch.Tensor, "copy_", timed_copy),
    ):
        yield


def _timed_stream(
    weights: Iterator[tuple[str, torch.Tensor]], current: list[str], profile: Profile
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hand weights on; note the name of each, and how long it was waited for."""
    stage = OPENING
    while True:
        started = time.perf_counter()
        pair = next(weights, None)
        profile.add(stage, time.perf_counter() - started)
        if pair is None:
            return
        stage, current[0] = STREAM, pair[0]
        yield pair


def draw(profiles: dict[str, Profile], title: str, output: Path) -> None:
    """Draw a bar for each load, its stages in one order; the same figures give the same bytes."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    # A browser's own letters keep the file small; fixed names of parts keep it the same.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rvec", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(8, 0.5 * len(profiles) + 1.5), layout="constrained")
        names, starts = list(profiles), [0.0] * len(profiles)
        for stage, colour in zip(STAGES, COLOURS, strict=True):
            widths = [1000 * profile.seconds.get(stage, 0.0) for profile in profiles.values()]
            if not any(widths):
                continue
            axes.barh(names, widths, left=starts, color=colour, label=stage)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("ms in load_weights")
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
        output.parent.mkdir(parents=True, exist_ok=True)
        is_svg = output.suffix == ".svg"
        figure.savefig(output, dpi=120, metadata={"Date": None} if is_svg else None)
        plt.close(figure)


if __name__ == "__main__":
    main()
