"""What people write about a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from vllm_rvec.checkpoint.hub import HubId
from vllm_rvec.vector.dial_settings import refuse_bool

__all__ = ["Ask", "FewShot", "FormatName", "TaskSpec"]

FormatName = Literal["jsonl", "gsm8k", "humaneval", "sciq", "bbh"]
Ask = Literal["chat", "completion"]
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, BeforeValidator(refuse_bool), Field(ge=1)]


class _Written(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )


class FewShot(_Written):
    """Solved examples that are shown before each question."""

    path: Text
    """A local file of the task's own format; its first problems are the examples, and aren't asked,
    should the task have them too. Or a `.txt`, or
    a folder of one for each family (`date_understanding.txt`, as BIG-Bench Hard's cot-prompts are),
    which is put before the question as it is."""

    count: Annotated[Positive, Field(le=100)] = 5
    """How many of the file's problems. A text is shown whole."""


class TaskSpec(_Written):
    """A task: where its problems are, how they are asked, and how answers are graded."""

    path: Text | None = None
    """A file (`.jsonl`, `.json`, `.jsonl.gz`, `.parquet`) or a folder of them; or, where there is
    no such path, a dataset's id on the Hub, as `dataset`."""

    dataset: Text | None = None
    """A dataset on the Hub: `owner/name` or `owner/name@revision`."""

    revision: Text | None = None
    """Of the dataset: a branch, tag or commit. Give a commit, and the task stays what it is."""

    subset: Text | None = None
    """Of the dataset: only files in the folder of this name, such as GSM8K's `main`."""

    split: Text = "test"
    """Of the dataset: only files that have this in their name."""

    file: Text | None = None
    """Of the dataset: this very file, whatever subset and split say."""

    format: FormatName = "jsonl"
    """How the files are to be read: our own lines, or those of a public benchmark."""

    name: Text | None = None
    """What the report calls it; else the file's or the dataset's name."""

    ask: Ask | None = None
    """Over `/v1/chat/completions` with the model's template, or `/v1/completions` with the prompt
    as it is. Else chat; our own lines say it themselves, by `messages` or `prompt`."""

    system: Text | None = None
    """A system message before each chat."""

    instruction: str | None = None
    """What is added behind each question of a chat, after an empty line, so that the scorer finds
    the answer. The public formats have one of their own; an empty text leaves it out."""

    support: bool = True
    """SciQ: show the passage that holds the answer, as the usual harness does."""

    scorer: Text | None = None
    """`exact`, `regex`, `numeric`, `choice`, `python`, `bbh`; else the format's own, and `exact`
    for our own lines."""

    options: dict[str, JsonValue] = Field(default_factory=dict)
    """The scorer's options."""

    allow_code: bool = False
    """Run what the model writes: the scorer `python` is refused without it."""

    limit: Positive | None = None
    """How many problems, chosen by a hash with the seed: a larger limit only adds some."""

    seed: Annotated[int, BeforeValidator(refuse_bool), Field(ge=0, lt=2**63)] = 0
    """Of that choice, and of the order in which SciQ's options are shown."""

    max_tokens: Positive | None = None
    """Of an answer; else the format's, 512 for our own lines."""

    stop: tuple[Text, ...] | None = None
    """Texts that end an answer; else the format's, which are for completions only."""

    thinking_prompt: Text = "Think step by step."
    """What the arms with a prompt add behind the question. The default is the paper's."""

    few_shot: FewShot | None = None
    """Solved examples to show."""

    @model_validator(mode="after")
    def _check_together(self) -> TaskSpec:
        if (self.path is None) == (self.dataset is None):
            msg = "a task has either a `path` or a `dataset`"
            raise ValueError(msg)
        if self.dataset is not None and HubId.parse(self.dataset) is None:
            msg = "`dataset` should be owner/name or owner/name@revision"
            raise ValueError(msg)
        return self

    @property
    def called(self) -> str:
        """The task's name."""
        if self.name is not None:
            return self.name
        place = (self.dataset or self.path or "").partition("@")[0]
        stem = Path(place).name.partition(".")[0] or place
        return f"{stem}-{self.subset}" if self.subset else stem
