"""The pipeline on a GPU: `python -m pytest tests/gpu` on a machine that has one; skipped elsewhere."""

from __future__ import annotations

import gc
import itertools
import json
from pathlib import Path

import pytest
import torch

from shared.events import MemorySink
from tests.worker.training.samples import (
    Running,
    conversations,
    make_spec,
    new_workdir,
    plan_for,
    run_job,
    write_rows,
)
from tests.worker.training.test_merge_4bit import check_merge
from worker.training.data import prepare_data
from worker.training.engines.reference import load_model
from worker.training.models import ResolvedModel, load_tokenizer, settle_tokenizer
from worker.training.trainer import make_trainer

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_every_export_comes_out_of_a_run_in_bf16(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_spec(
        {"max_steps": 8}, exports=["adapter", "merged_16bit", "gguf:f16", "gguf:q8_0", "gguf:q4_k_m"]
    )
    on_gpu = run_job(spec, new_workdir(tmp_path / "gpu", tiny_model), device="cuda", precision="bf16")
    on_cpu = run_job(make_spec({"max_steps": 8}), new_workdir(tmp_path / "cpu", tiny_model))
    manifest = json.loads(on_gpu.path("manifest.json").read_text())
    assert manifest["used"]["device"] == "cuda:0"
    assert manifest["used"]["dtype"] == "bfloat16"
    assert manifest["used"]["peak_memory_bytes"] > 1e6
    assert [a.kind for a in on_gpu.artifacts] == ["manifest", "metrics", *spec.exports, "modelfile"]
    losses = [float(row["loss"] or 0) for row in on_gpu.sink.rows]
    expected = [float(row["loss"] or 0) for row in on_cpu.sink.rows]
    assert losses[0] == pytest.approx(expected[0], rel=5e-3)
    assert losses == pytest.approx(expected, rel=5e-2)
    assert losses[-1] < losses[0] - 0.05


def test_a_4bit_job_is_merged_into_the_16_bit_weights(tmp_path: Path, tiny_model: Path) -> None:
    check_merge(tmp_path, tiny_model, device="cuda", precision="bf16")


def test_recomputing_activations_takes_less_memory(tmp_path: Path, tiny_model: Path) -> None:
    used = {}
    for checkpointing in ("none", "all"):
        gc.collect()
        torch.cuda.empty_cache()
        outcome = run_job(
            make_spec({"per_device_train_batch_size": 8}, max_seq_length=2048),
            new_workdir(tmp_path / checkpointing, tiny_model, rows=200),
            device="cuda",
            precision="bf16",
            gradient_checkpointing=checkpointing,
        )
        used[checkpointing] = json.loads(outcome.path("manifest.json").read_text())["used"]
    assert used["all"]["peak_memory_bytes"] < used["none"]["peak_memory_bytes"]


def test_packed_documents_do_not_see_each_other(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_spec()
    plan = plan_for(spec, device="cuda", precision="bf16")
    model = ResolvedModel("local/tiny", tiny_model)
    tokenizer = load_tokenizer(model)
    rows = write_rows(tmp_path / "rows.jsonl", conversations(12))
    data = prepare_data(spec, rows, tokenizer, MemorySink(), Running(), 2048)
    settle_tokenizer(tokenizer, data.chat_template, data.stop_token)
    trainer = make_trainer(spec, plan, load_model(spec, plan, model), tokenizer, data, 4, tmp_path, [])
    batch = {k: v.to("cuda") for k, v in next(iter(trainer.get_train_dataloader())).items()}
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    network = trainer.model.eval()
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        together = network(**inputs, use_cache=False).logits[0]
        mixed = network(input_ids=batch["input_ids"], use_cache=False).logits[0]
        for start, end in itertools.pairwise(starts):
            alone = network(input_ids=batch["input_ids"][:, start:end], use_cache=False).logits[0]
            apart = (together[start:end] - alone).abs().max()
            # In bfloat16 the two are rounded differently, and no more than that.
            assert apart < 0.05
            if start:
                assert (mixed[start:end] - alone).abs().max() > 5 * apart
