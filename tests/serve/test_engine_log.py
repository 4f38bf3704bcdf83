"""What vLLM prints is read as vLLM 0.32 wrote it into `captured/`."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_rvec.serve import root_cause
from vllm_rvec.serve.engine_log import LONGEST_LINE, LineSplitter, clean, phase, severity

CAPTURED = Path(__file__).with_name("captured")


def captured(name: str) -> list[str]:
    """Read a capture as the pump does."""
    splitter = LineSplitter()
    text = (CAPTURED / f"{name}.log").read_bytes()
    return [*splitter.feed(text), *splitter.feed(b"", is_last=True)]


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        # --no-such-flag 3 (vLLM takes the 3 for a model)
        ("unknown_flag", "unrecognized arguments: --no-such-flag"),
        # --model /tmp/srv/nowhere
        (
            "no_such_model",
            "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or",
        ),
        # --max-model-len 4096 for a model of 512
        (
            "too_long",
            "User-specified max_model_len (4096) is greater than the derived max_model_len",
        ),
        # model.safetensors cut off: raised in the Worker, raised again in two processes above it
        (
            "cut_off_weights",
            "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: inc",
        ),
        # --load-format rvec with a folder that is not there
        ("no_such_vector", "VectorNotFoundError: there is no vector folder /tmp/srv/no-vector\n  "),
    ],
)
def test_the_root_cause_is_found_in_real_output(name: str, cause: str) -> None:
    """One line says it, out of up to 230."""
    assert root_cause(captured(name)).startswith(cause)


def test_the_loaders_own_words_come_with_all_their_lines() -> None:
    """The prefix that vLLM repeats on each line of a record is gone, and the rest is whole."""
    cause = root_cause(captured("no_such_vector")).splitlines()
    assert len(cause) == 3
    assert cause[1].startswith("  why: ")
    assert cause[2] == "  do:  give a folder made by `vllm-rvec extract`"


def test_the_loaders_lines_may_be_mixed_with_others() -> None:
    """Two workers write at once; the first error's lines belong together."""
    first, second = (
        "(Worker pid=1) ERROR 11-23 17:44:16 [m.py:1] ",
        "(Worker pid=2) ERROR 11-23 17:44:16 [m.py:1] ",
    )
    lines = [
        "ValueError: before",
        first + "rvec error: VectorCorruptError: cut off",
        second + "rvec error: VectorCorruptError: another",
        first + "  why: 10 bytes",
        second + "  why: 20 bytes",
        first + "Traceback (most recent call last):",
        first + "  File x",
        "RuntimeError: after",
    ]
    assert root_cause(lines) == "VectorCorruptError: cut off\n  why: 10 bytes"


def test_the_loaders_words_are_found_without_vllms_prefix() -> None:
    """As they look before vLLM has set up its logging."""
    lines = ["rvec error: ConfigError: alpha", "  why: nan", "Traceback (most recent call last):"]
    assert root_cause(lines) == "ConfigError: alpha\n  why: nan"


def test_colours_do_not_hide_a_cause() -> None:
    """VLLM_LOGGING_COLOR=1 colours the prefix's parts."""
    process, level = "\x1b[0;36m(EngineCore pid=1)\x1b[0;0m", "\x1b[31mERROR\x1b[0m"
    line = (
        f"{process} {level} \x1b[90m11-23 17:44:16\x1b[0m \x1b[90m[core.py:1]\x1b[0m OSError: gone"
    )
    assert root_cause([line]) == "OSError: gone"
    assert severity(line) == "ERROR"


def test_where_nothing_looks_like_a_cause_there_is_none() -> None:
    """Ordinary lines are not made into one."""
    lines = ["INFO:     Started", "(A pid=1) INFO 11-23 17:44:16 [m.py:1] an Error: inside", ""]
    assert root_cause(lines) == ""
    assert root_cause([]) == ""


def test_phases_are_told_from_real_lines() -> None:
    """In the order in which they come."""
    lines = [
        "(Worker pid=4329) INFO 11-23 17:13:56 [cpu_model_runner.py:68] Starting to load model",
        "(Worker pid=4329) INFO 11-23 17:13:56 [default_loader.py:501] Loading weights took 0.01 s",
        "(APIServer pid=4144) INFO 11-23 17:14:04 [entry.py:140] Starting vLLM server on",
        "INFO:     Application startup complete.",
    ]
    assert [phase(line) for line in lines] == [
        "loading weights",
        "warming up",
        "opening its port",
        None,
    ]


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("(APIServer pid=1) WARNING 11-23 17:13:25 [vllm.py:1703] text", "WARNING"),
        ("ERROR 11-23 17:13:25 [vllm.py:1703] text", "ERROR"),
        ("INFO:     127.0.0.1:40142", None),
        ("ERROR of another kind", None),
    ],
)
def test_severity_is_read_from_vllms_prefix(line: str, level: str | None) -> None:
    """Other programs' formats are not guessed at."""
    assert severity(line) == level


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("a\tb", "a   b"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "link"),
        ("\x1bPdevice\x1b\\ok", "ok"),
        ("\x1bcreset \x1b(B\x9b2Jx", "reset x"),
        ("never ends \x1b]0;title", "never ends "),
        ("bell\x07 back\x08 nul\x00 del\x7f", "bell back nul del"),
        ("left\u202eright \u2066", "leftright "),
        ("▄▄ ▄█ 向量 é", "▄▄ ▄█ 向量 é"),
    ],
)
def test_control_sequences_are_stripped(line: str, text: str) -> None:
    """What stays can be printed on a terminal."""
    assert clean(line) == text


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_lines_do_not_depend_on_how_bytes_arrive(size: int) -> None:
    """A carriage return and a newline, or the bytes of one character, may come apart."""
    data = "one\r\ntwo é\rthree\n\n\nfour \u2028 five\nrest".encode() + b"\xc3"
    splitter = LineSplitter()
    lines = [
        line for at in range(0, len(data), size) for line in splitter.feed(data[at : at + size])
    ]
    lines += splitter.feed(b"", is_last=True)
    assert lines == ["one", "two é", "three", "four \u2028 five", "rest\ufffd"]


def test_a_line_without_an_end_is_given_out_in_pieces() -> None:
    """Nothing grows for ever."""
    splitter = LineSplitter()
    lines = [line for _ in range(300) for line in splitter.feed(b"x" * 1000)]
    assert len(lines) == 4
    assert max(map(len, lines)) < LONGEST_LINE + 1000
