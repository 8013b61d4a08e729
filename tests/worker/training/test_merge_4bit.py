"""A job on 4-bit weights: what it exports stands on the 16-bit ones."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.worker.training.samples import make_spec, new_workdir, run_job

pytestmark = pytest.mark.train


def test_a_4bit_job_is_merged_into_the_16_bit_weights(tmp_path: Path, tiny_model: Path) -> None:
    check_merge(tmp_path, tiny_model)


def check_merge(tmp_path: Path, tiny_model: Path, **plan: Any) -> None:
    """Train on 4-bit weights, and hold the merged ones to the 16-bit ones with the adapter."""
    spec = make_spec({"max_steps": 4}, exports=["adapter", "merged_16bit"])
    done = run_job(spec, new_workdir(tmp_path, tiny_model), quantization="4bit", **plan)
    for name in ("adapter.tar", "merged_16bit.tar"):
        with tarfile.open(done.path(name)) as tar:
            tar.extractall(tmp_path, filter="data")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    untouched = {name: weight.clone() for name, weight in base.named_parameters()}
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged_16bit", dtype=torch.float32)
    expected, moved = dict(adapted.named_parameters()), 0
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=2**-8, atol=1e-6, msg=name)
        moved += not torch.equal(expected[name], untouched[name])
    # Seven matrices a layer.
    assert moved == 7 * merged.config.num_hidden_layers
