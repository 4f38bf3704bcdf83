"""The flags of a dial: the same words in `serve`, which may not import the loader, and here."""

from __future__ import annotations

import importlib

import pytest

from vllm_rvec.errors import ConfigError
from vllm_rvec.loader.dial import parts
from vllm_rvec.loader.dial.admission import AlphaAdmission
from vllm_rvec.serve import plan
from vllm_rvec.vector.dial import AlphaRequestError


def test_serve_gives_the_same_parts() -> None:
    """Word for word."""
    assert plan.DIAL_PARTS == {"worker-cls": parts.WORKER, "scheduler-cls": parts.SCHEDULER}
    assert plan.DIAL_PROCESSOR == parts.ADMISSION
    assert plan.DIAL_MIDDLEWARE == parts.MIDDLEWARE
    assert plan.DIAL_ENVIRONMENT == parts.ENVIRONMENT


@pytest.mark.parametrize("path", [parts.SCHEDULER, parts.ADMISSION, parts.MIDDLEWARE])
def test_every_part_is_where_the_flag_says(path: str) -> None:
    """The worker's module is for worker processes: engines of tests import it."""
    module, name = path.replace(":", ".").rsplit(".", 1)
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_the_keywords_for_python_tell_the_check_what_may_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Out of range, or for a vector that is not there: refused before an engine sees it."""
    from vllm import SamplingParams

    monkeypatch.setattr(AlphaAdmission, "dial", None)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    asks = SamplingParams(extra_args={"alpha": 0.5})
    with pytest.raises(AlphaRequestError, match="--middleware"):
        AlphaAdmission.validate_params(asks)
    given = parts.dial_arguments(vector="v", alpha_range=[0, 1])
    assert given["model_loader_extra_config"] == {
        "mode": "dial",
        "vector": "v",
        "alpha_range": [0, 1],
    }
    AlphaAdmission.validate_params(asks)
    AlphaAdmission.validate_params(SamplingParams())
    for wrong in (1.5, [0.1, 0.2], {"other": 1}, "0.5", True):
        with pytest.raises(AlphaRequestError):
            AlphaAdmission.validate_params(SamplingParams(extra_args={"alpha": wrong}))


def test_keys_are_checked_at_once() -> None:
    """Before an engine takes half a minute to say it."""
    with pytest.raises(ConfigError, match="vektor"):
        parts.dial_arguments(vektor="v")
