"""Two donor checkpoints, matched tensor by tensor, whatever their shards, dtypes and prefixes."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from vllm_rvec.checkpoint.digest import file_digest
from vllm_rvec.checkpoint.model_card import license_of
from vllm_rvec.checkpoint.reader import CheckpointReader
from vllm_rvec.checkpoint.table import read_config
from vllm_rvec.errors import CheckpointError, printable
from vllm_rvec.vector.encodings.source import row_blocks
from vllm_rvec.vector.manifest import MAX_DIMENSIONS, Donor, Vocabulary, is_tensor_name
from vllm_rvec.vector.names import OUTPUT_HEAD, by_plain_name, embedding_among, is_vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

    import numpy as np
    import numpy.typing as npt

    from vllm_rvec.checkpoint.fetch import Located

__all__ = ["DonorReader", "Pair", "match_donors", "vocabulary_of"]

DIGESTED_NAMES = ("config.json", "tokenizer.json")
"""Files of a donor that are digested beside its shards."""

RELEASED_BYTES = 8 << 20
"""Pages of a tensor are given back in steps of this size."""


class DonorReader:
    """One donor: its tensors, and the digests of its files, computed in the background.

    Args:
        donor: Its folder and what it is called.

    Raises:
        CheckpointError: It can't be read, or has a tensor that no vector can have.
    """

    def __init__(self, donor: Located) -> None:
        self.located = donor
        self.config: dict[str, Any] = read_config(donor.folder)
        self.reader = CheckpointReader(donor.folder)
        self._check_tensors()
        self._pool = ThreadPoolExecutor(1, "rvec-donor-digest")
        self._digests: dict[Path, Future[str]] = {}
        self._lock = threading.Lock()  # tensors are asked for by several threads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def folder(self) -> Path:
        """The donor's folder."""
        return self.located.folder

    @property
    def architecture(self) -> str:
        """Its first architecture; empty if its configuration names none."""
        architectures = self.config.get("architectures")
        is_named = isinstance(architectures, list) and architectures
        return printable(str(architectures[0])) if is_named else ""  # type: ignore[index]

    @property
    def model_type(self) -> str:
        """Its model type; empty if its configuration has none."""
        return printable(str(self.config.get("model_type") or ""))

    @property
    def is_untied(self) -> bool:
        """Whether its configuration says that its output head is not its embedding."""
        return self.config.get("tie_word_embeddings") is False

    def tensor(self, name: str) -> torch.Tensor:
        """Return one of its tensors, and have its file digested while the file is in memory."""
        self._digest(self.reader.table[name].shard)
        return self.reader.tensor(name)

    def blocks(self, name: str, rows: int | None) -> Iterator[torch.Tensor]:
        """Give a tensor in blocks of rows, letting go of the pages behind.

        Args:
            name: The tensor.
            rows: How many of its rows; all where None.
        """
        tensor = self.tensor(name)
        behind = released = 0
        for block in row_blocks(tensor if rows is None else tensor[:rows]):
            yield block
            behind += block.nbytes
            if behind - released >= RELEASED_BYTES:
                self.reader.release(name, behind)
                released = behind
        self.reader.release(name)

    def sample(self, name: str, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return a tensor's weights at flat positions, as a sketch takes them."""
        picked = self.tensor(name).reshape(-1)[torch.from_numpy(positions)].float().numpy()
        self.reader.release(name)
        return picked

    def describe(self) -> Donor:
        """Say where this side of the difference came from; waits for the digests."""
        others = [path for name in DIGESTED_NAMES if (path := self.folder / name).is_file()]
        shards = {info.shard for info in self.reader.table.values()}
        for path in (*others, *shards):
            self._digest(path)
        return Donor(
            id=self.located.id,
            revision=self.located.revision,
            license=license_of(self.folder),
            files={
                printable(path.name): job.result() for path, job in sorted(self._digests.items())
            },
        )

    def _digest(self, path: Path) -> None:
        with self._lock:
            if path not in self._digests:
                self._digests[path] = self._pool.submit(file_digest, path)

    def _check_tensors(self) -> None:
        problems = [
            f"{name!r}: shape {list(info.shape)}"
            for name, info in sorted(self.reader.table.items())
            if not is_tensor_name(name) or len(info.shape) > MAX_DIMENSIONS
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder} has tensors that no vector can have",
                problems=problems,
                why="a name in a vector is printable, not empty, and has no colon; a shape has at "
                f"most {MAX_DIMENSIONS} dimensions",
                fix="rename them, or check where the checkpoint comes from",
                path=self.folder,
            )


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of the vector, and where its two sides are."""

    name: str
    """As the vector calls it."""
    shape: tuple[int, ...]
    tuned: str
    """The tuned donor's tensor."""
    base: str
    """The base donor's: of another name where one of them has no prefix, or ties its head."""


def match_donors(tuned: DonorReader, base: DonorReader, vocabulary: str = "strict") -> list[Pair]:
    """Find the two sides of every tensor of the vector.

    Args:
        tuned: The tuned donor.
        base: The base donor.
        vocabulary: `strict`: both must have the same rows; `common`: the rows that both have.

    Returns:
        The pairs in the order in which the tuned donor's files hold them.

    Raises:
        CheckpointError: The donors don't match; all mismatches at once.
    """
    ours, theirs = _sides(tuned, base)
    problems = _model_problems(tuned, base)
    problems += [f"{ours[key]}: only in {tuned.folder}" for key in sorted(ours.keys() - theirs)]
    problems += [f"{theirs[key]}: only in {base.folder}" for key in sorted(theirs.keys() - ours)]
    pairs = []
    for key in ours.keys() & theirs.keys():
        pair, problem = _pair(tuned, base, (key, ours[key], theirs[key]), vocabulary)
        problems += [problem] if problem else []
        pairs.append(pair)
    if problems:
        raise CheckpointError(
            "the donors don't match",
            problems=sorted(problems),
            why="a difference is only defined tensor by tensor, for one architecture",
            fix="use two checkpoints that were tuned from one pretrained initialisation",
        )
    table = tuned.reader.table
    return sorted(pairs, key=lambda p: (table[p.tuned].shard, table[p.tuned].offset_bytes, p.name))


def vocabulary_of(tuned: DonorReader, base: DonorReader, policy: str) -> Vocabulary:
    """Say how many rows the donors' embeddings have."""
    rows = []
    for donor in (tuned, base):
        embedding = embedding_among(donor.reader.table)
        shape = donor.reader.table[embedding].shape if embedding else ()
        rows.append(shape[0] if shape else None)
    is_common = policy == "common" and rows[0] != rows[1]
    return Vocabulary(
        policy="common" if is_common else "strict", tuned_rows=rows[0], base_rows=rows[1]
    )


def _sides(tuned: DonorReader, base: DonorReader) -> tuple[dict[str, str], dict[str, str]]:
    """Map plain names to each donor's own, with one idea of the output head on both sides."""
    ours = dict(by_plain_name(tuned.reader.table))
    theirs = dict(by_plain_name(base.reader.table))
    if OUTPUT_HEAD not in ours and OUTPUT_HEAD not in theirs:
        return ours, theirs
    if _is_tied(tuned, ours) and _is_tied(base, theirs):
        ours.pop(OUTPUT_HEAD, None)
        theirs.pop(OUTPUT_HEAD, None)
        return ours, theirs
    for donor, side in ((tuned, ours), (base, theirs)):
        # A donor without a head of its own uses its embedding as one; but for the bare model of an
        # untied one, which was written without its head.
        embedding = None if donor.is_untied else embedding_among(side.values())
        if OUTPUT_HEAD not in side and embedding is not None:
            side[OUTPUT_HEAD] = embedding
    return ours, theirs


def _is_tied(donor: DonorReader, names: dict[str, str]) -> bool:
    """Tell whether a donor's output head is its embedding: not stored, or stored twice."""
    head, embedding = names.get(OUTPUT_HEAD), embedding_among(names.values())
    if head is None or embedding is None:
        return head is None and not donor.is_untied
    table = donor.reader.table
    if (table[head].shape, table[head].dtype) != (table[embedding].shape, table[embedding].dtype):
        return False
    blocks = (donor.blocks(name, None) for name in (head, embedding))
    return all(torch.equal(*sides) for sides in zip(*blocks, strict=True))


def _model_problems(tuned: DonorReader, base: DonorReader) -> list[str]:
    kinds = tuned.model_type, base.model_type
    return [] if kinds[0] == kinds[1] else [f"model type: {kinds[0]} tuned, {kinds[1]} base"]


def _pair(
    tuned: DonorReader, base: DonorReader, names: tuple[str, str, str], vocabulary: str
) -> tuple[Pair, str]:
    plain, ours, theirs = names
    # The one with the prefix; but a head may be one donor's embedding.
    name = OUTPUT_HEAD if plain == OUTPUT_HEAD else max(ours, theirs, key=len)
    shape, other = tuned.reader.table[ours].shape, base.reader.table[theirs].shape
    pair = Pair(name, shape, ours, theirs)
    if shape == other:
        return pair, ""
    problem = f"{name}: shape {list(shape)} tuned, {list(other)} base"
    if not is_vocabulary(name) or shape[1:] != other[1:]:
        return pair, problem
    if vocabulary != "common":
        return pair, f"{problem} (--vocab common takes the rows that both have)"
    return Pair(name, (min(shape[0], other[0]), *shape[1:]), ours, theirs), ""
