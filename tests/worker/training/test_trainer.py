"""What the trainer sees and does: isolation of packed documents, masks, arguments, steps."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl

from shared.events import MemorySink
from tests.worker.training.samples import Running, conversations, make_spec, plan_for, write_rows
from worker.training.data import PreparedData, prepare_data
from worker.training.engines.layers import fuse_adapters
from worker.training.engines.reference import load_model
from worker.training.models import ResolvedModel, load_tokenizer, settle_tokenizer
from worker.training.trainer import _what_ran, make_trainer, sft_config, total_steps

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ResolvedModel:
    return ResolvedModel("local/tiny", tiny_model, config={"max_position_embeddings": 2048})


@pytest.fixture(scope="module")
def data(model: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    rows = write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(12))
    return prepare_data(make_spec(), rows, load_tokenizer(model), MemorySink(), Running(), 2048)


def trainer_of(model: ResolvedModel, data: PreparedData, folder: Path) -> Any:
    spec = make_spec()
    plan = plan_for(spec)
    tokenizer = load_tokenizer(model)
    settle_tokenizer(tokenizer, data.chat_template, data.stop_token)
    return make_trainer(spec, plan, load_model(spec, plan, model), tokenizer, data, 4, folder, [])


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model takes of a batch."""
    return {name: batch[name] for name in ("input_ids", "position_ids")}


def test_a_packed_document_is_computed_as_if_it_were_alone(
    model: ResolvedModel, data: PreparedData, tmp_path: Path
) -> None:
    trainer = trainer_of(model, data, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 5
    network = trainer.model.eval()
    with torch.no_grad():
        together = network(**inputs_of(batch), use_cache=False).logits[0]
        without_positions = network(input_ids=batch["input_ids"], use_cache=False).logits[0]
        difference, contaminated = [], []
        for start, end in itertools.pairwise(starts):
            alone = network(input_ids=batch["input_ids"][:, start:end], use_cache=False).logits[0]
            difference.append((together[start:end] - alone).abs().max().item())
            contaminated.append((without_positions[start:end] - alone).abs().max().item())
    assert max(difference) < 1e-4
    # The same measurement tells when documents do see each other.
    assert min(contaminated[1:]) > 100 * max(difference)


def test_the_loss_is_of_the_assistants_tokens_alone(
    model: ResolvedModel, data: PreparedData, tmp_path: Path
) -> None:
    trainer = trainer_of(model, data, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = load_tokenizer(model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    trained, inside = [], None
    # Walks the row as a reader of ChatML would: `expected` is whether this token is the assistant's to say.
    header = {r: tokenizer(f"<|im_start|>{r}\n", add_special_tokens=False).input_ids for r in ROLES}
    position = 0
    while position < len(ids):
        role = next((r for r, h in header.items() if ids[position : position + len(h)] == h), None)
        if role is not None:
            inside = role
            assert all(label == -100 for label in labels[position : position + len(header[role])])
            position += len(header[role])
            continue
        expected = inside == "assistant"
        assert (labels[position] != -100) == expected, (position, tokenizer.decode(ids[position]))
        trained.append(expected)
        if ids[position] == end:
            inside = None
        position += 1
    assert 0.1 < sum(trained) / len(ids) < 0.6
    said = tokenizer.decode([label for label in labels if label != -100])
    assert said.count("<|im_end|>") == 2 * len((batch["position_ids"][0] == 0).nonzero())
    assert said.startswith('<functioncall> {"name": "get_tide"')


ROLES = ("system", "user", "assistant", "tool")


@pytest.mark.parametrize("packing", [True, False])
def test_every_engine_trains_on_the_rows_in_one_order(
    model: ResolvedModel, tmp_path: Path, packing: bool
) -> None:
    """Also the one that joins the single documents of a micro-batch rather than padding them."""
    spec = make_spec({"gradient_accumulation_steps": 2}, packing=packing)
    tokenizer = load_tokenizer(model)
    rows = write_rows(tmp_path / "rows.jsonl", conversations(50 if packing else 12))
    data = prepare_data(spec, rows, tokenizer, MemorySink(), Running(), 2048)
    settle_tokenizer(tokenizer, data.chat_template, data.stop_token)
    orders = []
    for engine in ("reference", "compiled"):
        plan = plan_for(spec, engine=engine)
        trainer = make_trainer(
            spec, plan, load_model(spec, plan, model), tokenizer, data, 4, tmp_path / engine, []
        )
        order = trainer._get_train_sampler()
        order.set_epoch(1)
        orders.append(list(order))
    fuse_adapters(trainer.model)
    speed = SimpleNamespace(tokens=0, mean=lambda: None, seconds=lambda: 0.0)
    assert _what_ran(plan, trainer, SimpleNamespace(speed=speed), 0)["packing"] is packing
    assert len(orders[0]) > 4
    assert orders[0] == orders[1] != sorted(orders[0])


def test_a_loss_over_packed_rows_is_the_mean_over_trained_tokens(
    model: ResolvedModel, data: PreparedData, tmp_path: Path
) -> None:
    trainer = trainer_of(model, data, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    network = trainer.model.eval()
    with torch.no_grad():
        logits = network(**inputs_of(batch), use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
        loss = trainer.compute_loss(network, dict(batch))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "training", "expected"),
    [
        (10, {"num_train_epochs": 1}, 2),  # 5 micro-batches of 2, 4 to a step: the last step is a short one
        (10, {"num_train_epochs": 3}, 6),
        (16, {"num_train_epochs": 0.5}, 1),
        (24, {"num_train_epochs": 1.1}, 4),
        (1, {"num_train_epochs": 1}, 1),
        (10, {"num_train_epochs": 1, "max_steps": 77}, 77),
    ],
)
def test_steps_are_counted_as_transformers_counts_them(
    model: ResolvedModel, tmp_path: Path, rows: int, training: dict[str, Any], expected: int
) -> None:
    short = {"max_steps": None, "gradient_accumulation_steps": 4}
    spec = make_spec(short | training)
    plan = plan_for(spec)
    steps = total_steps(spec, plan, rows)
    assert steps == expected
    if spec.training.max_steps is not None:
        return
    row = {"input_ids": [5, 6], "labels": [5, 6], "seq_lengths": [2]}
    arguments = dataclasses.replace(
        sft_config(spec, plan, steps, tmp_path), max_steps=-1, num_train_epochs=spec.training.num_train_epochs
    )
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model.path),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([row] * rows),
        processing_class=load_tokenizer(model),
    )
    loader = trainer.get_train_dataloader()
    assert trainer.set_initial_training_values(trainer.args, loader)[-1] == expected


def test_how_a_batch_is_split_changes_nothing_in_the_order_of_rows(
    model: ResolvedModel, data: PreparedData, tmp_path: Path
) -> None:
    def order(micro_batch: int) -> list[list[list[int]]]:
        spec = make_spec(packing=False)
        plan = plan_for(spec, micro_batch=micro_batch, accumulation=4 // micro_batch)
        tokenizer = load_tokenizer(model)
        settle_tokenizer(tokenizer, data.chat_template, data.stop_token)
        rows = [{"input_ids": [n + 5], "labels": [n + 5], "seq_lengths": [1]} for n in range(43)]
        trainer = make_trainer(
            spec,
            plan,
            load_model(spec, plan, model),
            tokenizer,
            dataclasses.replace(data, train=datasets.Dataset.from_list(rows)),
            9,
            tmp_path,
            [],
        )
        loader = trainer.get_train_dataloader()
        epochs = []
        for epoch in range(3):
            loader.set_epoch(epoch)
            epochs.append([row for batch in loader for row in batch["input_ids"].tolist()])
        return epochs

    first, *later = order(1)
    assert order(2) == order(4) == [first, *later]
    assert first not in later
    assert later[0] != later[1]


def test_the_schedule_warms_up_for_the_named_share(tmp_path: Path) -> None:
    spec = make_spec({"max_steps": 100, "warmup_ratio": 0.03, "lr_scheduler_type": "cosine"})
    arguments = sft_config(spec, plan_for(spec), 100, tmp_path)
    assert arguments.warmup_steps == 3
    # The first warm-up step would be one at a rate of zero.
    assert sft_config(spec, plan_for(spec), 20, tmp_path).warmup_steps == 0
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.optim == "adamw_8bit"
