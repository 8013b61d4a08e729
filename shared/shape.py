"""The shape of a decoder: what of its config decides how much memory and arithmetic training it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

# Configs that describe several networks, or experts of which a token sees some: their sizes say less.
UNLIKE = ("text_config", "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
MAX_SIZE = 100_000_000


@dataclass(frozen=True)
class ModelKind:
    """What of a model's config decides which engines can train it.

    `attention_dropout`: attention drops some of its weights in training; `quantized`: the files hold other
    weights than plain numbers of 16 or 32 bits.
    """

    model_type: str
    attention_dropout: bool = False
    quantized: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(
            str(config.get("model_type")),
            bool(config.get("attention_dropout")),
            bool(config.get("quantization_config")),
        )


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with gated MLPs, as its config.json has them.

    `model_type` is transformers' name of the architecture (`llama`, `qwen2`, …); `tied`: the output head
    shares the embeddings' weights; `attention_dropout` and `quantized` are those of `ModelKind`.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    context_length: int | None = None
    attention_dropout: bool = False
    quantized: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """The shape that a config.json describes; None for a kind of model whose cost it does not tell."""
        if any(config.get(name) for name in UNLIKE) or not isinstance(config.get("model_type"), str):
            return None
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        sizes: dict[str, Any] = {
            "hidden": hidden,
            "layers": config.get("num_hidden_layers"),
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "intermediate": config.get("intermediate_size"),
            "vocab": config.get("vocab_size"),
        }
        # Sizes from somebody else's file: a number that no model has is no number to plan with.
        if not all(is_size(size) for size in sizes.values()):
            return None
        head_dim = config.get("head_dim") or sizes["hidden"] // sizes["heads"]
        if not is_size(head_dim):
            return None
        context = config.get("max_position_embeddings")
        kind = ModelKind.from_config(config)
        return cls(
            model_type=kind.model_type,
            head_dim=head_dim,
            # What the architectures' own defaults are where the file says nothing.
            tied=config.get("tie_word_embeddings", config["model_type"].startswith("gemma")) is True,
            context_length=context if is_size(context) else None,
            attention_dropout=kind.attention_dropout,
            quantized=kind.quantized,
            **sizes,
        )

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        return cls(**stored)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def kind(self) -> ModelKind:
        return ModelKind(self.model_type, self.attention_dropout, self.quantized)

    @cached_property
    def queries(self) -> int:
        """Width of the queries and of the attention's output."""
        return self.heads * self.head_dim

    @cached_property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of one layer's weight matrices."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @cached_property
    def linear_parameters(self) -> int:
        """Weights of all layers' matrices: what is quantised."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @cached_property
    def head_parameters(self) -> int:
        return self.hidden * self.vocab

    @cached_property
    def other_parameters(self) -> int:
        """Embeddings, the head where it has weights of its own, and the norms: never quantised."""
        return self.head_parameters * (1 if self.tied else 2) + self.hidden * (2 * self.layers + 1)

    @cached_property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    def adapter_parameters(self, r: int, modules: Iterable[str]) -> int:
        """Weights of LoRA matrices of rank r on the named modules; names that no layer has count for none."""
        widths = (sum(self.linears[name]) for name in modules if name in self.linears)
        return self.layers * r * sum(widths)

    def adapter_inputs(self, modules: Iterable[str]) -> int:
        """Values that go into one layer's adapters, for one token."""
        return sum(self.linears[name][0] for name in modules if name in self.linears)


def is_size(value: object) -> bool:
    """Whether a number from somebody else's file can be a model's size."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE


# The default model, for a server that can't reach the hub.
NEMOTRON_NANO_4B = ModelShape(
    model_type="llama",
    hidden=3072,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=9216,
    vocab=128_256,
    tied=False,
    context_length=131_072,
)
SMOLLM2_135M = ModelShape(
    model_type="llama",
    hidden=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab=49_152,
    tied=True,
    context_length=8192,
)
