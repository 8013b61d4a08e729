"""One engine on one model in a process of its own, for `test_engines`: `python -m tests.gpu.engine_run JSON`.

Prints one line of JSON: the losses of the first steps, and how far a document's states move when another
stands in front of it. The gradients of one batch and those states go into two safetensors files. An order
that says `float8` rounds the adapted matrices' products by the book. One that brings a whole `plan` and a
`cap_gib` just trains, in no more memory than that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from worker.training.stack import import_stack

LENGTH = 1024


def main() -> None:
    order = json.loads(sys.argv[1])
    import_stack(order["engine"])
    import torch
    from safetensors.torch import save_file

    from shared.events import GoOn, MemorySink
    from shared.plan import Plan
    from shared.spec import JobSpec
    from tests.gpu.float8 import round_products
    from worker.training.data import prepare_data
    from worker.training.engines import engine_of
    from worker.training.engines.adapters import start_adapter
    from worker.training.models import ResolvedModel, load_tokenizer, settle_tokenizer
    from worker.training.trainer import make_trainer, train

    model_folder, folder = Path(order["model"]), Path(order["folder"])
    if "cap_gib" in order:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(order["cap_gib"] * 2**30 / whole)
    fields: dict[str, Any] = order.get("spec") or {
        "dataset": {"source": "file", "file_id": "file-" + "0" * 24, "format": "messages"},
        "max_seq_length": LENGTH,
        "lora": {"dropout": 0.0},
        "training": {
            "max_steps": order["steps"],
            "logging_steps": 1,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-4,
        },
    }
    spec = JobSpec.from_json(fields)
    planned = {
        "engine": order["engine"],
        "device": order.get("device", "cuda"),
        "quantization": order.get("quantization", "none"),
        "precision": order.get("precision", "bf16"),
        "micro_batch": 1,
        "accumulation": 2,
        "gradient_checkpointing": order.get("checkpointing", "none"),
        "reason": "a test",
    }
    plan = Plan.model_validate(order.get("plan") or planned)

    config = json.loads((model_folder / "config.json").read_text())
    model = ResolvedModel("local/model", model_folder, config=config)
    tokenizer, sink = load_tokenizer(model), MemorySink()
    data = prepare_data(spec, Path(order["rows"]), tokenizer, sink, GoOn(), None, cache=folder / "cache")
    settle_tokenizer(tokenizer, data.chat_template, data.stop_token)
    trained = engine_of(plan).load_model(spec, plan, model)
    if order.get("float8"):
        round_products(trained)

    moved = None
    if "plan" not in order:
        trainer = make_trainer(spec, plan, trained, tokenizer, data, 1, folder / "aside", [])
        scramble(trainer.model.train())
        save_file(gradients_of(trainer, data.train[0]), folder / f"{order['name']}.safetensors")
        states, moved = isolation(trainer, data.train[0])
        save_file({"states": states}, folder / f"{order['name']}-states.safetensors")
        del trainer
        start_adapter(trained, spec.training.seed)
        trained.zero_grad(set_to_none=True)
    result = train(spec, plan, trained, tokenizer, data, folder / order["name"], sink, GoOn())
    losses = [row["loss"] for row in result.history]
    print(json.dumps({"losses": losses, "moved": moved, "used": result.used, "torch": torch.__version__}))


def scramble(network: Any) -> None:
    """Give every B matrix values, the same in every engine: fresh ones are zero, and so A's gradients."""
    import torch

    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in sorted(network.named_parameters()):
            if ".lora_B." in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.01)


def loss_of(trainer: Any, row: dict[str, Any]) -> Any:
    """The mean loss of one row as a step computes it, with the engine's own batches and autocast."""
    batch = {name: value.to(trainer.args.device) for name, value in trainer.data_collator([row]).items()}
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        return trainer.compute_loss(trainer.model, batch)


def gradients_of(trainer: Any, row: dict[str, Any]) -> dict[str, Any]:
    loss_of(trainer, row).backward()
    found = {n: p.grad.float().cpu() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return {name.replace(".default", ""): gradient for name, gradient in found.items()}


def isolation(trainer: Any, row: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """A row's second document's states when it is alone, and how far another in front of it moves them.

    `packed`: from those alone to those packed as training packs it. `swapped`: from there to those with other
    words in front, which no rounding explains, for the shapes are the same. `joined`: from those alone to
    those where the border is forgotten.
    """
    import torch

    first, second = row["seq_lengths"][:2]
    ids = row["input_ids"][: first + second]
    seen: list[Any] = []
    hook = trainer.model.get_base_model().model.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.last_hidden_state[0].float())
    )

    def states(ids: list[int], lengths: list[int], start: int) -> Any:
        with torch.no_grad():
            loss_of(trainer, {"input_ids": ids, "labels": ids, "seq_lengths": lengths})
        return seen.pop()[start : start + second]

    def apart(one: Any, other: Any) -> float:
        return float((one - other).norm() / alone.norm())

    alone = states(ids[first:], [second], 0)
    packed, joined = states(ids, [first, second], first), states(ids, [first + second], first)
    swapped = states(ids[:first][::-1] + ids[first:], [first, second], first)
    hook.remove()
    moved = {
        "packed": apart(packed, alone),
        "swapped": apart(swapped, packed),
        "joined": apart(joined, alone),
    }
    return alone.cpu(), moved


if __name__ == "__main__":
    main()
