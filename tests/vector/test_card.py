"""vllm_rvec.vector.card: what a vector's page on the Hub says, whatever the manifest holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from markdown_it import MarkdownIt  # rich brings it

from vllm_rvec.vector import VectorReader
from vllm_rvec.vector.card import make_card
from vllm_rvec.vector.manifest import Donor, Donors, Manifest, Roundtrip, Step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOSTILE = (
    "x\n---\nlicense: mit\n---\n# Owned <script>alert(1)</script> `</code>` | a | b \\| c \\\n"
    "```sh\nrm -rf ~\n```\n\u202e[link](javascript:alert(1)) ![](http://x/y.png)\x1b[31m"
)


@pytest.fixture
def manifest(vector: Path) -> Manifest:
    """A manifest of two local donors without licence."""
    return VectorReader(vector).manifest


def donors(tuned: str, base: str, licenses: tuple[str | None, str | None] = (None, None)) -> Donors:
    return Donors(
        tuned=Donor(
            id=tuned, revision="c0ffee", license=licenses[0], files={"a.safetensors": "0" * 64}
        ),
        base=Donor(id=base, revision=None, license=licenses[1], files={}),
    )


def front_matter(card: str) -> dict[str, Any]:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def rendered(markdown: str) -> Iterator[str]:
    """Name the kind of every piece that a renderer of Markdown sees."""
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        yield token.type
        yield from (child.type for child in token.children or ())


def test_the_front_matter_is_what_the_hub_asks_for(manifest: Manifest) -> None:
    """Donors on the Hub are its base models; it is nothing that runs alone."""
    card = make_card(
        manifest.model_copy(update={"donors": donors("a/grpo", "a/sft", ("MIT", "MIT"))}), "me/v"
    )
    assert front_matter(card) == {
        "library_name": "vllm_rvec",
        "tags": ["rvec", "task-vector", "reasoning-vector"],
        "base_model": ["a/grpo", "a/sft"],
        "base_model_relation": "adapter",
        "license": "mit",
    }


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ((None, None), {}),
        (("mit", None), {}),
        (("mit", "apache-2.0"), {}),
        (("apache-2.0", "apache-2.0"), {"license": "apache-2.0"}),
        (
            ("My Own: License\n", "My Own: License\n"),
            {"license": "other", "license_name": "my-own-license"},
        ),
        ((HOSTILE, "mit"), {}),
    ],
)
def test_a_licence_is_given_where_the_donors_agree(
    manifest: Manifest, licenses: tuple[str | None, str | None], expected: dict[str, str]
) -> None:
    """Under the Hub's names for them: it refuses a card with another."""
    card = make_card(manifest.model_copy(update={"donors": donors("a", "b", licenses)}), None)
    found = front_matter(card)
    assert {key: found[key] for key in found if key.startswith("license")} == expected


def test_local_donors_are_no_base_models(manifest: Manifest) -> None:
    """Their names stand in the text only."""
    card = make_card(manifest, "me/v")
    assert "base_model" not in front_matter(card)
    assert "| tuned | `tuned` |" in card


def test_the_card_says_what_the_manifest_says(manifest: Manifest) -> None:
    """Formula, digests, sizes, how exact it is, how to use it, and where it does not belong."""
    card = make_card(manifest, "me/my-vector")
    (file,) = manifest.files.values()
    roundtrip = manifest.roundtrip
    assert roundtrip is not None
    for text in (
        "# my-vector\n",
        "`v = tuned - base`",
        "`Qwen2ForCausalLM`",
        "same architecture, with the same tokenizer",
        "same pretrained initialisation",
        f"all {roundtrip.weights:,} weights of the tuned model bit for bit",
        "lost nothing",
        f"`{file.blake3}`",
        *(f"`{digest}`" for digest in manifest.donors.tuned.files.values()),
        "python -m vllm_rvec.serve --model TARGET --vector me/my-vector\n",
        "vllm-rvec check me/my-vector --target TARGET\n",
        "| dense | F32 | 26 |",
    ):
        assert text in card


def test_weights_that_are_off_are_counted(manifest: Manifest) -> None:
    """As `extract` found them."""
    roundtrip = Roundtrip(weights=1000, exact=990, one_unit_off=9, further_off=1)
    card = make_card(manifest.model_copy(update={"roundtrip": roundtrip}), None)
    assert "990 of 1,000 weights" in card
    assert "(99.0000%); 9 are one unit in the last place off, 1 further" in card


def test_lossy_encodings_say_how_lossy(manifest: Manifest) -> None:
    """In all, and the worst tensor by name."""
    name = "model.norm.weight"
    tensors = dict(manifest.tensors)
    tensors[name] = tensors[name].model_copy(update={"error": 0.25})
    card = make_card(manifest.model_copy(update={"tensors": tensors, "roundtrip": None}), None)
    assert "1 of 26 tensors are lossy" in card
    assert f"25.00% in the worst tensor, `{name}`" in card
    assert "was not counted" in card


def test_the_lineage_is_told_in_order(manifest: Manifest) -> None:
    """Each step with its parameters."""
    steps = [
        Step(operation=name, parameters={"density": "0.2"}, inputs=(), created="now", tool="t")
        for name in ("transform", "combine")
    ]
    card = make_card(manifest.model_copy(update={"lineage": tuple(steps)}), None)
    assert "1. `transform`: `density` = `0.2` (`now`, `t`)\n2. `combine`" in card


def test_hostile_texts_stay_texts(manifest: Manifest) -> None:
    """No key of theirs in the front matter, no HTML, no code block, no cell of a table."""
    step = Step(operation=HOSTILE, parameters={HOSTILE: HOSTILE}, created=HOSTILE, tool=HOSTILE)
    donor = Donor(id=HOSTILE, revision=HOSTILE, license=HOSTILE, files={HOSTILE: "0" * 64})
    hostile = manifest.model_copy(
        update={
            "donors": Donors(tuned=donor, base=donor),
            "architecture": HOSTILE,
            "model_type": HOSTILE,
            "tool": HOSTILE,
            "created": HOSTILE,
            "lineage": (step,),
            "tensors": {HOSTILE: next(iter(manifest.tensors.values()))},
        }
    )
    card = make_card(hostile, HOSTILE)
    found = front_matter(card)
    assert found.keys() == {"library_name", "tags", "license", "license_name"}
    assert found["license"] == "other"
    assert card.count("\n---\n") == 1
    assert card.count("```") == 2
    assert not set("\x1b\u202e") & set(card)
    kinds = set(rendered(card.split("---\n", 2)[2]))
    assert {"fence", "code_inline", "table_open"} <= kinds
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "code_block"}
    assert "--vector VECTOR\n" in card


def test_long_lists_are_cut(manifest: Manifest) -> None:
    """A manifest of a million files or steps makes no card of that size."""
    files = {f"{number}.safetensors": "0" * 64 for number in range(1000)}
    many = Donors(tuned=Donor(id="x" * 10_000, files=files), base=Donor(id="b"))
    card = make_card(manifest.model_copy(update={"donors": many}), None)
    assert "... and 900 more" in card
    assert len(card) < 20_000
