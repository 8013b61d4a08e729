"""A GGUF that answers, through llama.cpp: reads a prompt, samples, and tells the text as it comes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from cyllama.llama.llama_cpp import (
    LlamaContext,
    LlamaContextParams,
    LlamaModel,
    LlamaSampler,
    LlamaSamplerChainParams,
    LlamaVocab,
    llama_batch_get_one,
)

from shared.data.written_calls import CallStyle, held_back
from shared.inference import Done, Event, Failed, Generation, Started, Text
from worker.inference.prompt import PromptError, Prompts
from worker.training.generate import load_model

BATCH = 512
LEAST_CONTEXT = 256
# Keys and values are kept as 16-bit floats.
VALUE_BYTES = 2
# A character has at most four bytes, and a token at least one; some tokens are no text at all.
MOST_PENDING = 8
# Of the answer, how many tokens the penalties look back.
PENALTY_TOKENS = 4096

Tell = Callable[[Event], None]


class Model:
    """One loaded model with one context: one answer at a time."""

    def __init__(self, path: str, context_bytes: int, threads: int, gpu_layers: int) -> None:
        """
        Args:
            context_bytes: the most memory that the context's keys and values take.

        Raises:
            ValueError: llama.cpp can't load it; its words.
        """
        model = load_model(path, gpu_layers)
        params = LlamaContextParams()
        params.n_ctx = context_length(model, context_bytes)
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = LlamaContext(model, params)
        self._context.install_cancel_callback()
        self._vocab: LlamaVocab = model.get_vocab()
        self._prompts = Prompts(model, self._vocab)
        self._read: list[int] = []

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer together."""
        return int(self._context.n_ctx)

    def cancel(self, wanted: bool) -> None:
        """Give up the answer that is being made; from another thread."""
        self._context.cancel = wanted

    def answer(self, asked: Generation, tell: Tell) -> None:
        """Answer, or tell why not.

        Raises:
            InterruptedError: it was cancelled.
        """
        deadline = time.monotonic() + asked.seconds
        try:
            prompt = self._prompts.tokens(asked)
        except PromptError as error:
            tell(Failed("unusable", str(error)))
            return
        room = self.context_length - len(prompt)
        if room < 1 or not prompt:
            tell(Failed("too_long", self._refusal(len(prompt))))
            return
        style = self._prompts.style if asked.own_calls else None
        tell(Started(len(prompt), style))
        cached = self._read_prompt(prompt, reuse=asked.seed is None)
        limit = min(asked.max_tokens or room, room)
        # A text goes on with its own white space; an answer has none before it.
        before = prompt[-1:] if asked.messages is None else []
        words = _Words(self._vocab, self._prompts, style, asked.stop, before)
        tell(replace(self._speak(asked, words, limit, deadline, tell), cached=cached))

    def _refusal(self, tokens: int) -> str:
        if not tokens:
            return "The prompt is empty."
        return (
            f"This model's context is {self.context_length} tokens on this server, and the prompt alone has "
            f"{tokens}: shorten it."
        )

    def _read_prompt(self, prompt: list[int], *, reuse: bool) -> int:
        """Take the prompt in, but for what the context holds of it from the last answer: so many tokens.

        With a seed nothing is reused: batches of other lengths round otherwise, and the same must come again.
        """
        same = 0
        while reuse and same < min(len(self._read), len(prompt) - 1) and self._read[same] == prompt[same]:
            same += 1
        if not self._context.memory_seq_rm(0, same, -1):
            # Recurrent models can't forget a part.
            self._context.kv_cache_clear(True)
            same = 0
        self._read = prompt[:same]
        for start in range(same, len(prompt), BATCH):
            self._decode(prompt[start : start + BATCH])
        return same

    def _decode(self, tokens: list[int]) -> None:
        if self._context.cancel:
            raise InterruptedError
        self._context.decode(llama_batch_get_one(tokens, len(self._read)))
        self._read += tokens

    def _speak(self, asked: Generation, words: _Words, limit: int, deadline: float, tell: Tell) -> Done:
        sampler = _sampler(asked)
        count = 0
        reason: Literal["stop", "length"] = "length"
        while count < limit and time.monotonic() < deadline:
            token = sampler.sample(self._context, -1)
            count += 1
            if self._vocab.is_eog(token):
                reason = "stop"
                break
            if text := words.feed(token):
                tell(Text(text))
            if words.stopped:
                reason = "stop"
                break
            if count < limit:
                self._decode([token])
        if text := words.rest():
            tell(Text(text))
        return Done(reason, count)


class _Words:
    """Token ids to text that is whole characters and goes no further than a stop text."""

    def __init__(
        self,
        vocab: LlamaVocab,
        prompts: Prompts,
        style: CallStyle | None,
        stop: tuple[str, ...],
        before: list[int],
    ) -> None:
        self._vocab = vocab
        self._prompts = prompts
        self._style = style
        self._stop = stop
        # Ids whose text was told, kept because white space depends on what comes before; and those after.
        self._before = before
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """What can be told now."""
        if self._style is not None and (mark := self._prompts.is_mark(token, self._style)):
            self._held += self._settle() + mark
            self._before = []
        else:
            self._pending.append(token)
            self._held += self._settle(only_whole=True)
        at = min((i for i in map(self._held.find, self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            told, self._held = self._held[:at], ""
            return told
        keep = len(self._held) - held_back(self._held, self._stop)
        told, self._held = self._held[:keep], self._held[keep:]
        return told

    def rest(self) -> str:
        """What was held back, at the end: nothing after a stop text, and no half of a character."""
        return "" if self.stopped else self._held + self._settle().rstrip("\ufffd")

    def _settle(self, *, only_whole: bool = False) -> str:
        """The text of the pending ids; with `only_whole` nothing while a character is incomplete."""
        if not self._pending:
            return ""
        text = self._text([*self._before, *self._pending])
        if only_whole and text.endswith("\ufffd") and len(self._pending) < MOST_PENDING:
            return ""
        text = text[len(self._text(self._before)) :]
        self._before, self._pending = self._pending, []
        return text

    def _text(self, tokens: list[int]) -> str:
        return str(self._vocab.detokenize(tokens, len(tokens) * 64 + 64, False, False)) if tokens else ""


def context_length(model: LlamaModel, context_bytes: int) -> int:
    """Tokens whose keys and values take at most so many bytes, up to what the model was trained for."""
    heads = max(model.n_head_kv, 1)
    architecture = model.meta_val_str("general.architecture")
    try:
        width = int(model.meta_val_str(f"{architecture}.attention.key_length"))
    except ValueError:
        width = model.n_embd // max(model.n_head, 1)
    one = 2 * VALUE_BYTES * model.n_layer * heads * width
    affordable = context_bytes // one // LEAST_CONTEXT * LEAST_CONTEXT
    return max(LEAST_CONTEXT, min(int(model.n_ctx_train), int(affordable)))


def _sampler(asked: Generation) -> LlamaSampler:
    sampler = LlamaSampler(LlamaSamplerChainParams())
    if asked.presence_penalty or asked.frequency_penalty:
        sampler.add_penalties(PENALTY_TOKENS, 1.0, asked.frequency_penalty, asked.presence_penalty)
    if asked.temperature == 0:
        sampler.add_greedy()
        return sampler
    sampler.add_temp(asked.temperature)
    if asked.top_p < 1:
        sampler.add_top_p(asked.top_p, 1)
    sampler.add_dist(secrets.randbits(32) if asked.seed is None else asked.seed & 0xFFFFFFFF)
    return sampler
