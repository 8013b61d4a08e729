"""Which engines the planner offers to which types of models."""

from __future__ import annotations

from typing import Any

import pytest

from shared.planner import COMPILED_ARCHITECTURES, alternatives, candidates, cheaper_plan
from shared.shape import NEMOTRON_NANO_4B, ModelShape
from tests.shared.test_planner import H100, planned, spec_of


def typed(model_type: str) -> ModelShape:
    return ModelShape.from_json(NEMOTRON_NANO_4B.to_json() | {"model_type": model_type})


def test_an_architecture_that_the_compiled_engine_does_not_know_gets_another() -> None:
    assert "gemma" not in COMPILED_ARCHITECTURES
    assert planned(spec_of(), H100, typed("gemma")).engine == "unsloth"


@pytest.mark.parametrize("fields", [{}, {"packing": False}, {"quantization": "4bit"}])
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "granite", "cohere", "falcon_h1", "phi3"])
def test_auto_takes_unsloth_only_where_it_is_known_to_keep_documents_apart(
    model_type: str, fields: dict[str, Any]
) -> None:
    shape = typed(model_type)
    plan = planned(spec_of(**fields), H100, shape)
    others = alternatives(spec_of(**fields), shape, [H100])
    after = cheaper_plan(spec_of(**fields), shape, [H100], [plan])
    assert after is not None
    assert {made.engine for made in (plan, after, *others)} == {"reference"}
    assert "unsloth" in {c.way.engine for c in candidates(spec_of(**fields), typed("mistral"), [H100])}
    assert candidates(spec_of(engine="unsloth", **fields), shape, [H100]) == []
