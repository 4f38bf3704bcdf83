"""Ask the demo's model: batched sampling with a key-value cache, and grades.

Not for serving: that is vLLM's part. Float32 on the CPU, so that results repeat.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from chat_tokenizer import END_OF_TURN, chat_prompt
from tasks import Problem, is_correct
from torch import Tensor
from transformers import DynamicCache, Qwen2ForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Executor

    from tokenizers import Tokenizer

__all__ = ["MAX_NEW_TOKENS", "Reply", "ask", "generate", "score"]

MAX_NEW_TOKENS = 64
"""The longest worked solution in the demo takes about 45 tokens."""

BATCH_SIZE = 144
"""Replies sampled side by side; the 288 of a step of GRPO make two batches, for two threads."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One sampled reply, without its prompt."""

    token_ids: list[int]
    """As sampled, with the final end-of-turn token where there is one."""
    text: str
    is_ended: bool
    """Whether the model ended its turn within the token limit."""


def ask(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    *,
    pool: Executor,
    is_forced_to_work: bool = False,
) -> list[Reply]:
    """Ask every problem greedily, in ChatML.

    Args:
        model: float32 model on the CPU.
        tokenizer: the demo's tokenizer.
        problems: what to ask.
        pool: threads that take a batch each.
        is_forced_to_work: forbid `Answer` as the first token, so that the model has to begin
            with its steps.
    """
    prompts = [tokenizer.encode(chat_prompt(p.question)).ids for p in problems]
    banned = tokenizer.encode("Answer: ").ids[0] if is_forced_to_work else None
    return generate(model, tokenizer, prompts, pool=pool, temperature=0.0, banned_first_id=banned)


def score(reply: Reply, problem: Problem) -> bool:
    """The reward of GRPO and the grade of the evaluation: exact answer, and ended."""
    return reply.is_ended and is_correct(reply.text, problem.answer)


def generate(
    model: Qwen2ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    pool: Executor,
    temperature: float,
    seed: int = 0,
    banned_first_id: int | None = None,
) -> list[Reply]:
    """Continue every prompt until its end-of-turn token or `MAX_NEW_TOKENS`.

    Args:
        model: float32 model on the CPU.
        tokenizer: the demo's tokenizer.
        prompts: token ids, of any lengths; sorted by length into batches inside.
        pool: threads that take a batch each. Their number changes no reply.
        temperature: 0 is greedy.
        seed: of the draws where temperature is above 0; each batch has a generator of its own.
        banned_first_id: a token that no reply may begin with.

    Returns:
        Replies in the order of the prompts.
    """
    end_id = tokenizer.encode(END_OF_TURN).ids[0]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))

    def continue_batch(begin: int) -> list[Reply]:
        columns = _columns(
            model,
            [prompts[index] for index in order[begin : begin + BATCH_SIZE]],
            end_id=end_id,
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed + begin),
            banned_first_id=banned_first_id,
        )
        rows = torch.stack(list(columns), dim=1).tolist()
        return [_reply(tokenizer, ids, end_id) for ids in rows]

    batches = pool.map(continue_batch, range(0, len(order), BATCH_SIZE))
    replies = dict(zip(order, itertools.chain.from_iterable(batches), strict=True))
    return [replies[index] for index in range(len(prompts))]


@torch.no_grad()
def _columns(
    model: Qwen2ForCausalLM,
    prompts: Sequence[list[int]],
    *,
    end_id: int,
    temperature: float,
    generator: torch.Generator,
    banned_first_id: int | None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, int64 [batch], until all rows have ended.

    Prompts are padded on the left and the padding masked; rotary positions are counted from each
    prompt's own first token.
    """
    length = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    cache = DynamicCache(config=model.config)
    is_done = torch.zeros(len(prompts), dtype=torch.bool)
    for step in range(MAX_NEW_TOKENS):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if step == 0 and banned_first_id is not None:
            logits[:, banned_first_id] = -torch.inf
        token_ids = _pick(logits, temperature, generator).masked_fill(is_done, end_id)
        yield token_ids
        is_done |= token_ids == end_id
        if bool(is_done.all()):
            return
        input_ids = token_ids[:, None]
        mask = torch.cat([mask, torch.ones_like(input_ids)], dim=1)


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _reply(tokenizer: Tokenizer, ids: list[int], end_id: int) -> Reply:
    is_ended = end_id in ids
    kept = ids[: ids.index(end_id)] if is_ended else ids
    text = tokenizer.decode(kept, skip_special_tokens=False)
    return Reply([*kept, end_id] if is_ended else kept, text, is_ended)
