"""The check of a vector against a target on disk: headers, tokens, and a few weights.

Imports no torch. The loader asks the same questions of what streams by; it puts the levels together
itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.checkpoint.table import FLOAT_DTYPES, read_config, read_table
from vllm_rvec.vector.compatibility.lineage import LineageProbe
from vllm_rvec.vector.compatibility.quantization import (
    beside_level,
    declared_quantization,
    quantization_level,
)
from vllm_rvec.vector.compatibility.report import Report
from vllm_rvec.vector.compatibility.structure import (
    Pairing,
    architecture_findings,
    is_for_language_part,
    structure_level,
    tensor_findings,
)
from vllm_rvec.vector.compatibility.tokenizer import TOKENIZER_NAME, tokenizer_level
from vllm_rvec.vector.compatibility.weights import read_weights
from vllm_rvec.vector.recipe import tensor_alphas

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from vllm_rvec.checkpoint.table import TensorTable
    from vllm_rvec.vector.compatibility.report import Level
    from vllm_rvec.vector.manifest import Manifest
    from vllm_rvec.vector.reader import VectorReader
    from vllm_rvec.vector.recipe import RecipeVector

__all__ = ["addable_tensors", "check_lineage", "check_target"]


def check_target(
    vector: VectorReader,
    target: Path,
    *,
    vocabulary: str = "strict",
    recipe: RecipeVector | None = None,
    is_beside: bool = False,
) -> Report:
    """Check whether a vector belongs to a target.

    Args:
        vector: The stored vector.
        target: The target's folder.
        vocabulary: One of `VOCABULARY_POLICIES`.
        recipe: Where in the model the vector is added; everywhere where None.
        is_beside: Whether the vector stays beside the weights, as in a dial: then a quantized
            target will do, of which names and shapes are not compared here.

    Returns:
        Three levels: structure, tokenizer, lineage; before them quantization where the target was
        quantized beforehand.

    Raises:
        CheckpointError: The target can't be read.
        ConfigError: There is no such policy, or the recipe does not fit the vector.
    """
    manifest = vector.manifest
    config, table = read_config(target), read_table(target)
    only = None
    if recipe is not None:
        only = tensor_alphas(recipe, manifest.tensors, is_complete=manifest.complete).keys()
    is_partial = is_for_language_part(manifest, config)
    pairing = Pairing(manifest, vocabulary, only=only, is_partial=is_partial)
    method = declared_quantization(config, target)
    if is_beside and method:
        quantization = beside_level(method)
        structure = structure_level(architecture_findings(manifest, config), ())
    else:
        quantization = quantization_level(pairing, method, addable_tensors(table))
        structure = _structure(pairing, config, table)
    return Report(
        vector=str(vector.folder),
        target=str(target),
        levels=(
            *([] if quantization is None else [quantization]),
            structure,
            tokenizer_level(manifest.tokenizer, target / TOKENIZER_NAME),
            _lineage(manifest, table),
        ),
    )


def check_lineage(manifest: Manifest, checkpoint: Path) -> Level:
    """Check whether a checkpoint has the initialisation of a vector's base donor.

    Args:
        manifest: The vector's manifest.
        checkpoint: A folder: the tuned donor's, say.

    Raises:
        CheckpointError: The checkpoint can't be read.
    """
    return _lineage(manifest, read_table(checkpoint))


def addable_tensors(table: TensorTable) -> dict[str, bool]:
    """Tell of each tensor of a checkpoint whether it is of a dtype that can be added to."""
    return {name: info.dtype in FLOAT_DTYPES for name, info in table.items()}


def _structure(pairing: Pairing, config: Mapping[str, Any], table: TensorTable) -> Level:
    return structure_level(
        architecture_findings(pairing.manifest, config),
        tensor_findings(
            pairing,
            {name: info.shape for name, info in table.items()},
            is_tied=config.get("tie_word_embeddings"),
        ),
    )


def _lineage(manifest: Manifest, table: TensorTable) -> Level:
    probe = LineageProbe(manifest)
    wanted = {
        name: positions
        for name, info in table.items()
        if (positions := probe.positions(name, info.shape)) is not None
    }
    for name, values in read_weights(table, wanted).items():
        probe.add(name, values)
    return probe.level()
