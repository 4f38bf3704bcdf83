"""Engines that can't be a dial, and models that it can't serve: said before anything is served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.dial.admission import AlphaAdmission
from vllm_rvec.loader.dial.installing import install
from vllm_rvec.loader.dial.layers import Batch
from vllm_rvec.loader.dial.loading import refuse_undialable
from vllm_rvec.loader.dial.parts import ADMISSION, SCHEDULER
from vllm_rvec.loader.dial.turns import Turns

CPU = torch.device("cpu")


def config(**changed: Any) -> Any:
    """An engine's configuration, as far as it is looked at."""
    given: dict[str, Any] = {
        "worker": True,
        "stages": 1,
        "scheduler": SCHEDULER,
        "processors": [ADMISSION],
        "second_runner": False,
        "speculative": None,
        "lora": None,
        "runner": "generate",
        "embeds": False,
        "sleep": False,
    } | changed
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            rvec_dial_worker=given["worker"], pipeline_parallel_size=given["stages"]
        ),
        scheduler_config=SimpleNamespace(scheduler_cls=given["scheduler"]),
        model_config=SimpleNamespace(
            logits_processors=given["processors"],
            runner_type=given["runner"],
            enable_prompt_embeds=given["embeds"],
            enable_sleep_mode=given["sleep"],
        ),
        use_v2_model_runner=given["second_runner"],
        speculative_config=given["speculative"],
        lora_config=given["lora"],
    )


@pytest.mark.parametrize("processor", [ADMISSION, AlphaAdmission])
def test_an_engine_with_all_parts_may_go_on(processor: object) -> None:
    """Nothing is missing, nothing is in the way; in Python the class itself will do."""
    refuse_undialable(config(processors=[processor]))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"worker": False}, "--worker-cls"),
        ({"scheduler": None}, "--scheduler-cls"),
        ({"processors": None}, "--logits-processors"),
        ({"second_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"stages": 2}, "pipeline"),
        ({"speculative": object()}, "speculative"),
        ({"lora": object()}, "--enable-lora"),
        ({"runner": "pooling"}, "pooling"),
        ({"embeds": True}, "--enable-prompt-embeds"),
        ({"sleep": True}, "--enable-sleep-mode"),
    ],
)
def test_what_is_missing_is_named_with_the_flags(changed: dict[str, Any], says: str) -> None:
    """And all flags stand in the way out, to be copied."""
    with pytest.raises(ConfigError) as caught:
        refuse_undialable(config(**changed))
    assert any(says in problem for problem in caught.value.problems)
    assert SCHEDULER in caught.value.fix


def test_all_that_is_missing_is_named_at_once() -> None:
    """Not one start of half a minute for each."""
    with pytest.raises(ConfigError) as caught:
        refuse_undialable(config(worker=False, scheduler=None, processors=None, stages=2))
    assert len(caught.value.problems) == 4


class Model(nn.Module):
    """A linear layer, and a parameter that is used in some other way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.zeros(3))
        self.conv = nn.Conv1d(2, 2, 1)


def zeros() -> Model:
    model = Model()
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def batch() -> Batch:
    off = Turns.all_at([0.0], CPU)
    return Batch(off, off, 1)


def test_a_vector_is_put_beside_what_it_changes_only() -> None:
    """Modules whose part is zero cost nothing."""
    model, shadow = Model(), zeros()
    shadow.linear.weight.data[0, 0] = 1
    done = install(model, [shadow], batch(), "auto")
    assert done.modules == ("linear",)
    assert done.held_bytes == shadow.linear.weight.nbytes


def test_all_parameters_that_cant_be_applied_are_named() -> None:
    """With the way out; nothing has been changed."""
    model, shadow = Model(), zeros()
    for parameter in shadow.parameters():
        parameter.data.fill_(1)
    with pytest.raises(ConfigError) as caught:
        install(model, [shadow], batch(), "auto")
    said = str(caught.value)
    assert ".scale" in said
    assert "conv.weight" in said
    assert "conv.bias" in said
    assert "linear.weight" not in said
    assert "--mode fused" in said
    assert not model.linear._forward_hooks
