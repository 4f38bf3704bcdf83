"""vllm_rvec.serve.flags: vLLM's flags as words."""

from __future__ import annotations

import pytest

from vllm_rvec.serve.flags import flag_value, stands_for, take_values


@pytest.mark.parametrize(
    ("words", "values", "rest"),
    [
        ([], [], []),
        (["--seed", "1", "--middleware", "a"], [["a"]], ["--seed", "1"]),
        (["--middleware", "a", "b", "-tp", "2"], [["a", "b"]], ["-tp", "2"]),
        (["--middleware=a", "x", "--middleware", "b"], [["a"], ["b"]], ["x"]),
        (["--middleware"], [[]], []),
        (["--middle", "a"], [["a"]], []),
    ],
)
def test_a_flags_values_are_taken_out(
    words: list[str], values: list[list[str]], rest: list[str]
) -> None:
    """However it is written; the other words keep their order."""
    assert take_values(words, "middleware") == (values, rest)


def test_a_whole_name_goes_before_a_beginning() -> None:
    """As argparse has it."""
    assert stands_for("data", ["data-parallel", "data"]) == "data"
    assert stands_for("worker-extension-cls", ["worker-cls"]) is None
    assert stands_for("", ["a"]) is None


def test_a_flags_value_follows_or_is_its_own() -> None:
    """Nothing where nothing follows."""
    words = ["--a=1", "-pp", "2", "--b"]
    assert [flag_value(words, at) for at in (0, 1, 3)] == ["1", "2", ""]
