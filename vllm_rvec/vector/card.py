"""The model card of a vector on the Hub, made from its manifest.

A manifest's texts are whatever its maker wrote: in the card they stand as code, and its front
matter holds only what has the form that the Hub asks for.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import yaml

from vllm_rvec.checkpoint.hub import is_hub_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_rvec.vector.manifest import Donor, Manifest, TensorEntry

__all__ = ["make_card"]

TAGS: Final = ("rvec", "task-vector", "reasoning-vector")

# https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENSES: Final = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
    lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql
    unknown unlicense wtfpl zlib
"""
"""What the Hub takes as `license`; it refuses a card with another."""

WARNING: Final = (
    "> **It belongs only to models of the same architecture, with the same tokenizer, that descend "
    "from the same pretrained initialisation as the models below.** Added to any other model it is "
    "noise, even where all shapes match. Check before you use it."
)

USAGE: Final = (
    "With vllm_rvec: check that it belongs to your model, then serve that model with it (alpha 0 "
    "is the model as it is, 1 the whole vector)."
)

SHOWN_CHARACTERS = 200
"""How much of one text of the manifest the card shows."""
SHOWN_NAME_CHARACTERS = 60
"""How long the name of a licence may be that the Hub does not know."""
SHOWN_FILES = 100
SHOWN_STEPS = 50
"""How many files and lineage steps the card lists."""


def make_card(manifest: Manifest, repo: str | None) -> str:
    """Write a vector's model card.

    Args:
        manifest: The vector's.
        repo: Where it will be, `owner/name`; None if that is not known.

    Returns:
        Markdown with YAML front matter, as the Hub's README.md.
    """
    name = repo if repo is not None and is_hub_name(repo) else None
    sections = [
        f"---\n{_front_matter(manifest)}---",
        *_introduction(manifest, name),
        *_usage(name or "VECTOR"),
        *_origin(manifest),
        *_exactness(manifest),
        *_encodings(manifest),
        *_lineage(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(manifest: Manifest) -> str:
    fields: dict[str, object] = {"library_name": "vllm_rvec", "tags": list(TAGS)}
    donors = (manifest.donors.tuned, manifest.donors.base)
    if models := list(dict.fromkeys(donor.id for donor in donors if is_hub_name(donor.id))):
        # Without a relation the Hub takes the repository for a fine-tuned model that runs alone.
        fields |= {"base_model": models, "base_model_relation": "adapter"}
    return yaml.safe_dump(fields | _license(manifest), sort_keys=False, allow_unicode=False)


def _license(manifest: Manifest) -> dict[str, str]:
    """Return the donors' licence, where they agree and name one."""
    tuned, base = manifest.donors.tuned.license, manifest.donors.base.license
    if not tuned or tuned != base:
        return {}
    if tuned.lower() in HUB_LICENSES.split():
        return {"license": tuned.lower()}
    name = re.sub(r"[^a-z0-9.]+", "-", tuned.lower()).strip("-.")[:SHOWN_NAME_CHARACTERS]
    return {"license": "other"} | ({"license_name": name} if name else {})


def _introduction(manifest: Manifest, repo: str | None) -> list[str]:
    elements = sum(entry.elements for entry in manifest.tensors.values())
    size_bytes = manifest.size_bytes
    kind = "a difference of two models' weights"
    if manifest.formula != "tuned - base":
        kind = "a LoRA adapter's change of a model's weights"
    what = (
        f"This is a stored *reasoning vector* (a task vector): {kind}, `v = {manifest.formula}`, "
        "tensor by tensor. It is no model and does not run alone: it is added to the weights of "
        "another model, `target + alpha * v`."
    )
    size = (
        f"{len(manifest.tensors):,} tensors, {elements:,} weights, {_size(size_bytes)}, for "
        f"architecture {_code(manifest.architecture)} (model type {_code(manifest.model_type)})."
    )
    title = repo.partition("/")[2] if repo else "A reasoning vector"
    return [f"# {title}", what, size, WARNING]


def _usage(vector: str) -> list[str]:
    commands = (
        f"vllm-rvec check {vector} --target TARGET",
        f"python -m vllm_rvec.serve --model TARGET --vector {vector}",
    )
    return ["## How to use it", USAGE, "\n".join(("```sh", *commands, "```"))]


def _origin(manifest: Manifest) -> list[str]:
    donors = (("tuned", manifest.donors.tuned), ("base", manifest.donors.base))
    vocabulary = manifest.vocabulary
    policy = "all rows" if vocabulary.policy == "strict" else "the rows that both have"
    rows = {"tuned": vocabulary.tuned_rows, "base": vocabulary.base_rows}
    counts = ", ".join(f"{count:,} {side}" for side, count in rows.items() if count is not None)
    digests = [
        (side, _code(name), _code(digest))
        for side, donor in donors
        for name, digest in sorted(donor.files.items())
    ]
    made = (
        f"Vocabulary: {policy}{f' ({counts})' if counts else ''}. "
        f"Made {_code(manifest.created)} by {_code(manifest.tool)}."
    )
    return [
        "## Where it comes from",
        _table(("side", "model", "revision", "licence"), [_donor(*pair) for pair in donors]),
        made,
        "Digests of the files that were read:",
        _table(("side", "file", "blake3"), digests) if digests else "None are known.",
    ]


def _donor(side: str, donor: Donor) -> tuple[str, str, str, str]:
    return side, _code(donor.id), _code(donor.revision), _code(donor.license)


def _exactness(manifest: Manifest) -> list[str]:
    sections = ["## How exact it is"]
    found = manifest.roundtrip
    if found is None:
        sections.append("How well `base + 1 * v` gives back the tuned model was not counted.")
    elif found.exact == found.weights:
        sections.append(
            f"`base + 1 * v` gives back all {found.weights:,} weights of the tuned model bit for "
            "bit."
        )
    else:
        sections.append(
            f"`base + 1 * v` gives back {found.exact:,} of {found.weights:,} weights of the tuned "
            f"model bit for bit ({found.exact / found.weights:.4%}); {found.one_unit_off:,} are "
            f"one unit in the last place off, {found.further_off:,} further."
        )
    return [*sections, _loss(manifest.tensors)]


def _loss(tensors: dict[str, TensorEntry]) -> str:
    lossy = {name: entry for name, entry in tensors.items() if entry.error > 0}
    if not lossy:
        return "Its encodings lost nothing of the difference."
    worst = max(lossy, key=lambda name: lossy[name].error)
    lost = math.hypot(*(entry.error * entry.norm for entry in lossy.values()))
    whole = math.hypot(*(entry.norm for entry in tensors.values()))
    overall = f"about {lost / whole:.2%} in all, " if whole > 0 and math.isfinite(lost) else ""
    return (
        f"The encodings of {len(lossy):,} of {len(tensors):,} tensors are lossy. Relative error "
        f"(Frobenius): {overall}{lossy[worst].error:.2%} in the worst tensor, {_code(worst)}."
    )


def _encodings(manifest: Manifest) -> list[str]:
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for entry in manifest.tensors.values():
        count = counts[entry.encoding, "" if entry.encoding == "zero" else entry.dtype]
        count[0] += 1
        count[1] += entry.elements
    return [
        "## What is in it",
        _table(
            ("encoding", "decodes to", "tensors", "weights"),
            [(e, d, f"{n:,}", f"{size:,}") for (e, d), (n, size) in sorted(counts.items())],
        ),
        _table(
            ("file", "size", "blake3"),
            [
                (_code(name), _size(file.size_bytes), _code(file.blake3))
                for name, file in sorted(manifest.files.items())
            ],
        ),
    ]


def _lineage(manifest: Manifest) -> list[str]:
    if not manifest.lineage:
        return []
    steps = []
    for number, step in enumerate(manifest.lineage[:SHOWN_STEPS], 1):
        parameters = ", ".join(
            f"{_code(name)} = {_code(value)}" for name, value in step.parameters.items()
        )
        what = f"{number}. {_code(step.operation)}{': ' if parameters else ''}{parameters}"
        inputs = f" of {', '.join(map(_code, step.inputs))}" if step.inputs else ""
        steps.append(f"{what}{inputs} ({_code(step.created)}, {_code(step.tool)})")
    return ["## What was done to it since", "\n".join(steps) + _more(manifest.lineage, SHOWN_STEPS)]


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    found = list(rows)
    lines = [header, ("---",) * len(header), *found[:SHOWN_FILES]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + _more(found, SHOWN_FILES)


def _more(found: list[tuple[str, ...]] | tuple[object, ...], shown: int) -> str:
    return f"\n\n... and {len(found) - shown:,} more" if len(found) > shown else ""


def _code(text: str | None) -> str:
    """Write a text that is not ours as Markdown code: no markup, no HTML, no end of a table."""
    if not text or not text.strip():
        return "-"
    plain = "".join(c if c.isprintable() else " " for c in text[:SHOWN_CHARACTERS])
    plain = " ".join(plain.replace("`", "'").replace("|", "/").split())
    return f"`{plain}{'...' if len(text) > SHOWN_CHARACTERS else ''}`"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:,.1f} GB"
