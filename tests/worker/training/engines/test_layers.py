"""The compiled engine's parts on the CPU: LoRA, its dropout, float8 rounding, and a layer in one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import varlen

from shared.planner import COMPILED_ARCHITECTURES
from tests.gpu.float8 import round_products
from worker.training.collate import FlatCollator
from worker.training.engines import layers
from worker.training.engines.adapters import decoder_layers
from worker.training.engines.attention import register_attention
from worker.training.engines.compiled import compile_layers
from worker.training.engines.layers import (
    fuse_adapters,
    quantize_rows,
    ready_adapters,
    seeded_dropout,
    side_by_side,
)
from worker.training.head_loss import learn_through_head

pytestmark = pytest.mark.train

ROW = {"input_ids": list(range(20, 50)), "labels": list(range(20, 50)), "seq_lengths": [12, 18]}


def adapted(
    source: Path | Any, dropout: float, attention: str = "sdpa", modules: list[str] | None = None
) -> Any:
    """A model with adapters that do something: the one in a folder, or a random one of a config."""
    auto = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    if isinstance(source, Path):
        base = auto.from_pretrained(source, dtype=torch.float32, attn_implementation=attention)
    else:
        base = auto.from_config(source, dtype=torch.float32, attn_implementation=attention)
    torch.manual_seed(0)
    modules = modules or ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=modules)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    return model


def small(architecture: str, **changes: Any) -> Any:
    """A config of three layers."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 200,
        "pad_token_id": 0,
    }
    return transformers.AutoConfig.for_model(architecture, **sizes | changes)


def learn(model: Any) -> None:
    """Let a fused model give its loss, as the engine does."""

    def arguments(batch: dict[str, Any]) -> dict[str, Any]:
        ready_adapters(model)
        return {"cu_seq_lens_q": batch["cu_seqlens"], "max_length_q": 64}

    learn_through_head(model.get_base_model(), arguments)


@pytest.fixture
def simple_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel's arithmetic for the CPU, which has no kernel of variable length."""

    def attend(
        q: Any, k: Any, v: Any, ends: Any, *_: Any, scale: float, window_size: tuple[int, int], **__: Any
    ) -> torch.Tensor:
        assert q.shape[-1] % 8 == 0, "the kernel's own condition"
        tokens = torch.arange(q.shape[0])
        document = torch.bucketize(tokens, ends[1:], right=True)
        mask = (document[:, None] == document[None]).tril()
        if window_size[0] >= 0:
            mask = mask & (tokens[:, None] - tokens[None] <= window_size[0])
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out.transpose(0, 1)

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    yield
    torch._dynamo.reset()


@pytest.fixture
def exact_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """float8 products without their rounding, and without the GPU that they want."""

    def rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return matrix.contiguous(), torch.full((matrix.shape[0], 1), 0.5)

    def product(a: Any, b: Any, *, scale_a: Any, scale_b: Any, **_: Any) -> torch.Tensor:
        found: torch.Tensor = (a @ b) * scale_a * 2 * scale_b * 2
        return found

    monkeypatch.setattr(layers, "_rows_to_float8", rows)
    monkeypatch.setattr(torch, "_scaled_mm", product)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_fused_lora_computes_what_peft_does(tiny_model: Path, exact_float8: None, precision: str) -> None:
    model = adapted(tiny_model, dropout=0.0)
    fused = copy.deepcopy(model)
    fuse_adapters(fused)
    if precision == "fp8":
        quantize_rows(fused)
    ids = torch.tensor([ROW["input_ids"]])
    outputs = []
    for each in (model, fused):
        each.train()
        if each is fused:
            ready_adapters(fused)
        out = each(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        outputs.append(out)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-5, atol=1e-5)
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in fused.named_parameters() if p.requires_grad}
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_float8_gradients_are_off_by_its_rounding_and_no_more(tiny_model: Path) -> None:
    """Against float32, the engine's are as far off as those of products that are rounded by the book."""
    model = adapted(tiny_model, dropout=0.0)
    fused, by_the_book = copy.deepcopy(model), copy.deepcopy(model)
    fuse_adapters(fused)
    quantize_rows(fused)
    round_products(by_the_book)
    ids = torch.tensor([ROW["input_ids"]])
    gradients = []
    for each in (model, by_the_book, fused):
        each.train()
        if each is fused:
            ready_adapters(fused)
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found = [p.grad.flatten() for _, p in sorted(each.named_parameters()) if p.grad is not None]
        gradients.append(torch.cat(found))
    exact, expected, found = gradients
    off, allowed = ((each - exact).norm() / exact.norm() for each in (found, expected))
    assert 0.01 < allowed < 0.3
    assert off < 1.25 * allowed
    assert (found * exact).sum() / (exact * exact).sum() == pytest.approx(1, abs=0.02)


def made_by_the_compiler(join: Callable[[list[torch.Tensor]], torch.Tensor]) -> list[str]:
    """What the compiler makes, for a GPU, of two pieces that are computed and joined."""
    with FakeTensorMode() as mode:
        pieces = [torch.empty(8, columns, device="cuda") for columns in (24, 40)]
    traced = make_fx(lambda gate, up: join([gate.sin(), up.exp()]), tracing_mode="fake")(*pieces)
    graph = GraphLowering(traced)
    with V.set_graph_handler(graph), V.set_fake_mode(mode):
        graph.run(*pieces)
    return [type(operation).__name__ for operation in graph.operations]


def test_each_piece_is_computed_once_and_written_where_it_belongs() -> None:
    assert made_by_the_compiler(side_by_side) == ["ComputedBuffer", "ComputedBuffer", "ConcatKernel"]
    # One loop over all columns: else there would be no need for an operation of our own.
    assert made_by_the_compiler(lambda pieces: torch.cat(pieces, dim=-1)) == ["ComputedBuffer"]


def test_dropout_zeroes_its_share_keeps_the_mean_and_follows_the_seed() -> None:
    x = torch.ones(400, 500)
    seeds = torch.tensor([3, 3, 4], dtype=torch.int32)
    first, same, other = (seeded_dropout(x, seed, 0.05) for seed in seeds)
    assert torch.equal(first, same)
    assert (first == 0).float().mean().item() == pytest.approx(0.05, abs=0.002)
    assert first.mean().item() == pytest.approx(1, abs=0.003)
    # Masks of two seeds, of neighbouring rows and of neighbouring columns have nothing to do with each other.
    for one, two in ((first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        both = ((one == 0) & (two == 0)).float().mean().item()
        assert both == pytest.approx(0.05**2, abs=0.0006)


def test_each_micro_batch_draws_new_masks_and_evaluation_none(tiny_model: Path) -> None:
    model = adapted(tiny_model, dropout=0.3)
    fuse_adapters(model)
    ids = torch.tensor([ROW["input_ids"]])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    model.train()
    ready_adapters(model)
    first, same = logits(), logits()
    ready_adapters(model)
    assert torch.equal(first, same)
    assert not torch.equal(first, logits())
    seeds = model.lora_seeds[:, 0].tolist()
    assert len(set(seeds)) == len(seeds) > 4
    # What reads one input drops the same of it.
    names = {name: module.group for name, module in model.named_modules() if hasattr(module, "group")}
    together = [
        {name.rpartition(".")[2] for name, group in names.items() if group is each}
        for each in model.input_groups[:4]
    ]
    assert together == [{"q_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    model.eval()
    ready_adapters(model)
    assert model.lora_seeds[:, 0].tolist() == seeds


# The tracer itself looks at the gradients of its inputs, and hides that warning unless it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("architecture", sorted(COMPILED_ARCHITECTURES))
def test_a_layer_is_one_graph_and_batches_of_any_documents_use_it(
    architecture: str, simple_attention: None
) -> None:
    register_attention("packed_varlen")
    model = adapted(small(architecture), dropout=0.1, attention="packed_varlen")
    plain = copy.deepcopy(model)
    fuse_adapters(model)
    base = model.get_base_model()
    compile_layers(decoder_layers(base), backend="aot_eager")
    learn(model)
    collate = FlatCollator(0, pad_to=64, longest=32, documents=8, boundaries=True)
    batches = [collate([ROW]), collate([ROW | {"seq_lengths": [7, 3, 20]}]), collate([ROW, ROW])]
    model.train()
    torch._dynamo.utils.counters.clear()
    for batch in batches:
        model(**batch).loss.backward()
    # The first layer has a graph of its own: its input needs no gradient.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    model.eval()
    plain.set_attn_implementation("sdpa")
    plain.eval()
    for batch in batches:
        with torch.no_grad():
            logits = plain(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits[0]
            expected = torch.nn.functional.cross_entropy(logits[batch["kept"]], batch["targets"])
            assert model(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-4)


GROWING = {"rope_theta": 10_000.0, "factor": 4.0}
ODD = {
    "biases, tied, a head of 20": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 20},
    ),
    # Documents of 12 and 18 tokens; what is filled in is longer.
    "rope by the longest": (
        "llama",
        {"max_position_embeddings": 15, "rope_parameters": GROWING | {"rope_type": "dynamic"}},
    ),
    "rope of two kinds": (
        "llama",
        {
            "rope_parameters": GROWING
            | {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [9.0] * 8,
                "original_max_position_embeddings": 20,
            }
        },
    ),
    "a window": ("mistral", {"sliding_window": 5}),
    "a window in the upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "a window in some layers": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
        },
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_configs_may_say_changes_losses_and_gradients_as_in_transformers(
    name: str, simple_attention: None
) -> None:
    """The whole batch of the engine, filled up, against plain transformers and PEFT on what is not filler."""
    register_attention("packed_varlen")
    architecture, changes = ODD[name]
    plain = adapted(small(architecture, **changes), dropout=0.0)
    with torch.no_grad():
        for weight_name, weight in plain.named_parameters():
            if weight_name.endswith("bias"):
                weight.normal_()
            elif "layers" in weight_name:
                # Random weights are small, and attention with them is nearly uniform.
                weight.mul_(4)
    model = copy.deepcopy(plain)
    model.set_attn_implementation("packed_varlen")
    fuse_adapters(model)
    learn(model)
    batch = FlatCollator(0, pad_to=64, longest=32, documents=8, boundaries=True)([ROW])
    found = model(**batch).loss
    found.backward()
    ids, positions = (batch[n][:, : len(ROW["input_ids"])] for n in ("input_ids", "position_ids"))
    logits = plain(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[batch["kept"]], batch["targets"])
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for parameter_name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            off = (gradients[parameter_name] - parameter.grad).norm() / parameter.grad.norm()
            assert off < 1e-3, parameter_name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_layers_of_which_no_two_are_alike_are_compiled_one_by_one(simple_attention: None) -> None:
    register_attention("packed_varlen")
    names = ["layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.2.mlp.down_proj"]
    model = adapted(small("llama"), dropout=0.0, attention="packed_varlen", modules=names)
    fuse_adapters(model)
    learn(model)
    batch = FlatCollator(0, pad_to=64, longest=32, documents=8, boundaries=True)([ROW])
    with torch._dynamo.config.patch(recompile_limit=2):
        compile_layers(decoder_layers(model.get_base_model()), backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        model(**batch).loss.backward()
        model.eval()
        with torch.no_grad():
            model(**batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6


def test_float8_rows_keep_two_digits_whatever_their_scale() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(64, 128) * torch.logspace(-4, 3, 64)[:, None]
    rounded, scale = layers._rows_to_float8(matrix)
    assert rounded.dtype == torch.float8_e4m3fn
    error = (rounded.float() * scale - matrix).norm(dim=1) / matrix.norm(dim=1)
    assert error.max().item() < 0.04
    zeros, _ = layers._rows_to_float8(torch.zeros(2, 16))
    assert not zeros.float().any()
