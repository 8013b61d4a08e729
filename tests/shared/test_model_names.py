"""Names of fine-tuned models: what is built is what is read."""

from __future__ import annotations

import pytest

from shared.ids import new_job_id
from shared.model_names import TunedModel, parse_tuned_model, tuned_model
from shared.spec import BUNDLED_MODEL

JOB = "ftjob-0123456789abcdefghijklmn"


def test_a_name_holds_base_owner_suffix_and_id() -> None:
    name = tuned_model(BUNDLED_MODEL, "ann", "my-tune", JOB)
    assert name == "ft:bundled/smollm2-135m-instruct:ann:my-tune:0123456789abcdefghijklmn"
    assert parse_tuned_model(name) == TunedModel(BUNDLED_MODEL, "ann", "my-tune", JOB)
    checkpoint = tuned_model(BUNDLED_MODEL, "ann", "my-tune", JOB, 20)
    assert checkpoint == f"{name}:ckpt-step-20"
    assert parse_tuned_model(checkpoint) == TunedModel(BUNDLED_MODEL, "ann", "my-tune", JOB, 20)


@pytest.mark.parametrize(
    ("given", "suffix"),
    [(None, ""), ("", ""), ("::", ""), ("a b:c", "a-b-c"), ("übung", "bung"), ("x" * 200, "x" * 64)],
)
def test_any_name_of_a_job_makes_a_suffix_without_colons(given: str | None, suffix: str) -> None:
    job_id = new_job_id()
    found = parse_tuned_model(tuned_model("local/tiny", "b.o-b@team", given, job_id))
    assert found == TunedModel("local/tiny", "b.o-b@team", suffix, job_id)


@pytest.mark.parametrize(
    "name",
    [
        "",
        BUNDLED_MODEL,
        "ft:",
        "ft:a:b:c:short",
        f"ft:a:b:c:{JOB}",
        "ft:a:b:c:0123456789abcdefghijklmn:ckpt-step-",
        "ft:a:b:c:0123456789abcdefghijklmn:ckpt-step-x",
        "ft:a:b:c:d:0123456789abcdefghijklmn",
        "ft:a:b:c:0123456789abcdefghijklmn\n",
    ],
)
def test_what_is_no_such_name_is_none(name: str) -> None:
    assert parse_tuned_model(name) is None
