"""Answers one chat prompt with a GGUF, through llama.cpp and the chat template that the file carries.

    python -m worker.training.generate MODEL.gguf "What can you do?" --max-tokens 64

Torch-free. It stands alone, so that it can also be run by its path, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NoReturn

from cyllama.llama.llama_cpp import (
    LlamaContext,
    LlamaContextParams,
    LlamaModel,
    LlamaModelParams,
    LlamaSampler,
    LlamaSamplerChainParams,
    LlamaVocab,
    disable_logging,
    ggml_backend_load_all,
    llama_batch_get_one,
    set_log_callback,
)
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# ggml.h's GGML_LOG_LEVEL_ERROR.
LOG_ERROR = 4


@dataclass(frozen=True)
class Answer:
    """What the model said.

    `tokens` counts what it generated, the end-of-turn token included; `ended` tells whether it came to one.
    """

    text: str
    prompt_tokens: int
    tokens: int
    ended: bool


def generate(path: str, prompt: str, system: str | None = None, max_tokens: int = 128) -> Answer:
    """Greedy decoding on the CPU.

    Raises:
        ValueError: llama.cpp can't load the file, it has no chat template, or the prompt with it is longer
            than the model's context.
        RuntimeError: llama.cpp can't compute with it.
    """
    model = load_model(path)
    vocab = model.get_vocab()
    prompt_tokens = tokenize_chat(model, vocab, prompt, system)
    length = len(prompt_tokens) + max_tokens
    if length > model.n_ctx_train:
        raise ValueError(f"{length} tokens are more than the model's context of {model.n_ctx_train}")
    context_params = LlamaContextParams()
    context_params.n_ctx = length
    context_params.n_batch = length
    context = LlamaContext(model, context_params)
    sampler = LlamaSampler(LlamaSamplerChainParams())
    sampler.add_greedy()
    context.decode(llama_batch_get_one(prompt_tokens, 0))
    tokens: list[int] = []
    ended = False
    while len(tokens) < max_tokens and not ended:
        token = sampler.sample(context, -1)
        tokens.append(token)
        ended = vocab.is_eog(token)
        if not ended and len(tokens) < max_tokens:
            context.decode(llama_batch_get_one([token], len(prompt_tokens) + len(tokens) - 1))
    said = tokens[:-1] if ended else tokens
    text = vocab.detokenize(said, len(said) * 64 + 64, False, False) if said else ""
    return Answer(text=text, prompt_tokens=len(prompt_tokens), tokens=len(tokens), ended=ended)


def load_model(path: str, gpu_layers: int = 0) -> LlamaModel:
    """The model on the CPU, or so many of its layers on the GPU, with nothing printed.

    Raises:
        ValueError: with what llama.cpp says of the file.
    """
    complaints: list[str] = []
    disable_logging()
    set_log_callback(lambda level, text: complaints.append(text.strip()) if level >= LOG_ERROR else None)
    ggml_backend_load_all()
    params = LlamaModelParams()
    params.n_gpu_layers = gpu_layers
    try:
        return LlamaModel(path, params)
    except ValueError as error:
        raise ValueError("; ".join(filter(None, complaints)) or str(error)) from error
    finally:
        disable_logging()


def tokenize_chat(model: LlamaModel, vocab: LlamaVocab, prompt: str, system: str | None) -> list[int]:
    """The prompt's token ids, rendered with the model's own chat template."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text, add_special = chat_text(model, vocab, messages)
    return list(vocab.tokenize(text, add_special, True))


def chat_text(
    model: LlamaModel,
    vocab: LlamaVocab,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    prompted: bool = True,
) -> tuple[str, bool]:
    """The conversation as the chat template writes it, and whether the tokenizer adds its first token.

    A template that writes that token itself must not get it from the tokenizer as well.

    Args:
        prompted: with the header of the answer to come.

    Raises:
        ValueError: the GGUF holds no chat template.
        TemplateError: the template refuses the conversation.
    """
    template = model.get_default_chat_template()
    if not template:
        raise ValueError("the GGUF holds no chat template")
    bos, eos = vocab.token_bos(), vocab.token_eos()
    bos_token = vocab.token_to_piece(bos, 0, True) if bos >= 0 else ""
    # What transformers gives its templates.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = datetime.now().astimezone().strftime
    text = environment.from_string(template).render(
        messages=messages,
        tools=tools,
        add_generation_prompt=prompted,
        bos_token=bos_token,
        eos_token=vocab.token_to_piece(eos, 0, True) if eos >= 0 else "",
    )
    return text, not (bos_token and text.startswith(bos_token))


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("prompt")
    parser.add_argument("--system")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="print counts beside the text")
    arguments = parser.parse_args()
    try:
        answer = generate(arguments.model, arguments.prompt, arguments.system, arguments.max_tokens)
    except (RuntimeError, ValueError, OSError, TemplateError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps(asdict(answer), ensure_ascii=False) if arguments.json else answer.text)


if __name__ == "__main__":
    main()
