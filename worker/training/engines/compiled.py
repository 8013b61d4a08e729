"""The compiled engine: transformers and PEFT with every decoder layer compiled as one graph, for speed.

What makes it fast: attention of variable length over the packed row, layers without a break in their graph,
shapes that never change, LoRA whose dropout costs no memory, and a head that sees only the tokens that are
learnt. With `precision: fp8` the frozen matrices are quantised once to float8, row by row.
"""

from __future__ import annotations

from typing import Any

from shared.plan import Plan
from shared.spec import JobSpec
from worker.training.collate import FlatCollator
from worker.training.engines.adapters import (
    add_adapter,
    check_kind,
    checkpoint_layers,
    checkpointed,
    decoder_layers,
)
from worker.training.engines.reference import load_base
from worker.training.models import ResolvedModel

ATTENTION = "packed_varlen"
# Documents of a batch are filled up to a multiple of this.
DOCUMENTS = 8
# Of one layer: training, where its input needs no gradient and where it does, and evaluation.
GRAPHS = 3
# Tokens that one block of the attention kernel takes.
TILE = 128


def load_model(spec: JobSpec, plan: Plan, model: ResolvedModel) -> Any:
    """The base model in bfloat16 on the GPU with fresh adapters, its layers set up to be compiled.

    Returns:
        a `peft.PeftModel`.

    Raises:
        JobFailure: `model_unavailable`: a model that is none for this engine, weights that can't be read, or
            target modules that the model lacks.
    """
    check_kind("compiled", model)
    import torch

    from worker.training.engines.attention import register_attention
    from worker.training.engines.layers import fuse_adapters, quantize_rows

    register_attention(ATTENTION)
    base = load_base(model, torch.bfloat16, device="cuda:0", attention=ATTENTION)
    checkpoint_layers(base, plan)
    adapted = add_adapter(spec, base)
    fuse_adapters(adapted)
    if plan.precision == "fp8":
        quantize_rows(adapted)
    compile_layers(decoder_layers(base))
    return adapted


def compile_layers(layers: list[Any], backend: str = "inductor") -> None:
    """Each layer in one graph, or an error: a break would cost speed silently.

    Like layers share one. Target modules may be named layer by layer, and then no two need be alike.
    """
    import torch

    limit = max(torch._dynamo.config.recompile_limit, GRAPHS * len(layers))
    torch._dynamo.config.recompile_limit = limit
    for layer in layers:
        layer.compile(backend=backend, dynamic=False, fullgraph=True)


def wire(trainer: Any, spec: JobSpec, plan: Plan) -> None:
    """Give the trainer this engine's batches and loss."""
    from worker.training.engines.graphs import Graphs
    from worker.training.engines.layers import ready_adapters
    from worker.training.head_loss import learn_through_head

    capacity = plan.micro_batch * spec.max_seq_length
    longest, most = _documents([trainer.train_dataset, trainer.eval_dataset], plan.micro_batch)
    # A batch of few rows is filled up with documents of the longest kind.
    most += -(-capacity // longest)
    trainer.data_collator = FlatCollator(
        trainer.processing_class.pad_token_id,
        pad_to=capacity,
        longest=longest,
        documents=-(-most // DOCUMENTS) * DOCUMENTS,
        boundaries=True,
    )
    model = trainer.model

    def decoder_arguments(batch: dict[str, Any]) -> dict[str, Any]:
        ready_adapters(model)
        return {"cu_seq_lens_q": batch["cu_seqlens"], "max_length_q": longest}

    learn_through_head(model.get_base_model(), decoder_arguments)
    trainer.add_callback(Graphs())


def read_back(trainer: Any) -> dict[str, Any]:
    """What really ran, of this engine."""
    from worker.training.engines.graphs import Graphs, graph_breaks, graphs
    from worker.training.engines.layers import frozen_dtype

    base = trainer.model.get_base_model()
    return {
        "attention": base.config._attn_implementation,
        "gradient_checkpointing": checkpointed(base),
        "matrices": frozen_dtype(trainer.model),
        "graphs": graphs(),
        "graph_breaks": graph_breaks(),
        "recompiled": next(c for c in trainer.callback_handler.callbacks if isinstance(c, Graphs)).recompiled,
    }


def shortfalls(used: dict[str, Any]) -> list[str]:
    """What the job's log warns of, given what `read_back` found."""
    found = []
    if used["graph_breaks"]:
        found.append(
            f"The compiler broke its graphs in {used['graph_breaks']} places: training was slower for it."
        )
    if used["recompiled"]:
        found.append(
            f"{used['recompiled']} graphs were compiled after the first step: training waited for it."
        )
    return found


def _documents(datasets: list[Any], micro_batch: int) -> tuple[int, int]:
    """Tokens of the longest document, and the most documents that any `micro_batch` rows can hold.

    The kernel starts threads for every document as if it were as long as the longest may be, so the limit is
    what the job's data needs and no more.
    """
    rows = [lengths for dataset in datasets if dataset is not None for lengths in dataset["seq_lengths"]]
    longest = max(int(max(lengths)) for lengths in rows)
    counts = sorted((len(lengths) for lengths in rows), reverse=True)
    return -(-longest // TILE) * TILE, sum(counts[:micro_batch])
