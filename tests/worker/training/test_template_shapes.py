"""Masks and ids for the shapes that models' own chat templates have, written out here in short."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shared.data.conversation import Conversation
from shared.data.formats import parse_row
from shared.events import GoOn, MemorySink
from shared.spec import JobSpec
from tests.worker.training.data_samples import CORPUS, chat_row, write_jsonl
from worker.training.data import prepare_data
from worker.training.templates import ModelTemplate
from worker.training.tokenize import DELIMITER_IN_TEXT, ESCAPED, Encoder, Tokens

# Name: (control tokens, end of turn, template).
SHAPES = {
    # A preamble with a date, trimmed contents, tools in the first question, calls as bare JSON.
    "dated": (
        ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
        "<|start_header_id|>system<|end_header_id|>\n\nCutting date: 12/2023\n\n{{ said }}<|eot_id|>"
        "{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
        "{{ m.content | tojson }}<|eot_id|>{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if tools and loop.first %}Functions:{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n\n"
        "{% endif %}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
        "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    # Reasoning is kept in what follows the last question only; tool turns are wrapped in user turns.
    "thinking": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        "{% if tools or messages[0].role == 'system' %}<|im_start|>system\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{% if tools %}\n# Tools\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>"
        "{% endif %}<|im_end|>\n{% endif %}{% set ns = namespace(last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{% set text = m.content or '' %}"
        "{% if '</think>' in text %}{% if loop.index0 < ns.last %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% elif loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ text }}"
        "{% for c in m.tool_calls or [] %}{% if text or not loop.first %}\n{% endif %}"
        '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "\n</tool_call>{% endfor %}<|im_end|>\n{% elif m.role == 'tool' %}"
        "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
        "\n<tool_response>\n{{ m.content }}\n</tool_response>"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    # Questions in brackets, EOS after answers, the system text in the question; roles must alternate.
    "brackets": (
        ["<s>", "</s>"],
        "</s>",
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {% if loop.first %}{{ said }}{% endif %}{{ m.content }} [/INST]"
        "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}",
    ),
    # No system role, another name for the assistant.
    "no system": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    # A token for each role, EOS at the very end.
    "role tokens": (
        ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|end|>",
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ),
    # Plain words and marks that are no tokens at all.
    "words": (
        ["<s>", "</s>"],
        "</s>",
        "{% for m in messages %}{% if m.role == 'assistant' %}### Answer:\n{{ m.content }}</s>\n"
        "{% elif m.role == 'user' %}### Question:\n{{ m.content }}\n"
        "{% else %}<<SYS>>{{ m.content }}<</SYS>>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Answer:\n{% endif %}",
    ),
}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "it's é"}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALLS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "a"},
]


@cache
def _tokenizer(name: str) -> Any:
    control, end, template = SHAPES[name]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=control, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token=control[0], eos_token=end, chat_template=template
    )


def model_of(name: str) -> Any:
    return copy.deepcopy(_tokenizer(name))


def conversation(messages: list[dict[str, Any]], **row: Any) -> Conversation:
    found = parse_row({"messages": messages, **row}, "messages", 1)
    assert isinstance(found, Conversation)
    return found


def encoded(name: str, messages: list[dict[str, Any]], own_calls: bool = False, **row: Any) -> Tokens:
    model = model_of(name)
    (tokens,) = Encoder(model, ModelTemplate(model, "assistant", own_calls)).encode(
        [conversation(messages, **row)]
    )
    assert isinstance(tokens, Tokens)
    return tokens


@pytest.mark.parametrize("name", SHAPES)
def test_every_answer_and_its_end_is_trained_and_nothing_else(name: str) -> None:
    end = SHAPES[name][1]
    chat = CHAT if name != "no system" else CHAT[1:]
    tokens = encoded(name, chat)
    model = model_of(name)
    assert tokens.ids.tolist() == model.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert model.decode(tokens.ids[tokens.trained].tolist()) == f"two{end}four{end}"
    assert ModelTemplate(model, "assistant", False).stop_token == end


@pytest.mark.parametrize("name", ["dated", "thinking"])
def test_calls_as_the_template_writes_them_are_trained(name: str) -> None:
    tokens, model = encoded(name, CALLS, own_calls=True, tools=[TOOL]), model_of(name)
    assert tokens.ids.tolist() == model.apply_chat_template(
        CALLS, tools=[TOOL], tokenize=True, return_dict=False
    )
    trained = model.decode(tokens.ids[tokens.trained].tolist())
    assert trained.count('"name": "f"') == 2
    assert trained.count("it's é") == 2
    assert trained.endswith(f"a{SHAPES[name][1]}")
    assert not any(word in trained for word in ("Functions", "tools", "ipython", "response", "user"))


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.tool_calls[0].function | tojson }}",
        "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}",
    ],
)
def test_a_row_of_which_the_template_loses_a_call_or_the_words_beside_it_is_dropped(written: str) -> None:
    model = model_of("role tokens")
    model.chat_template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.tool_calls %}" + written + "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    words = [chat[0], {**chat[1], "content": "Let me look."}]
    several = [chat[0], {**chat[1], "tool_calls": [CALL, CALL]}]
    encoder = Encoder(model, ModelTemplate(model, "assistant", True))
    found = encoder.encode([conversation(chat), conversation(words), conversation(several)])
    loses_one = "[0]" in written
    assert [tokens == "not_rendered" for tokens in found] == [False, True, loses_one]


def test_a_conversation_of_many_turns_is_rendered_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = CALLS * 200
    model = model_of("dated")
    template = ModelTemplate(model, "assistant", True)
    whole = model.apply_chat_template(chat, tools=[TOOL], tokenize=False)
    rendered: list[int] = []
    apply = ModelTemplate._apply

    def counted(self: ModelTemplate, messages: list[dict[str, Any]], *more: Any, **named: Any) -> str | None:
        rendered.append(len(messages))
        return apply(self, messages, *more, **named)

    monkeypatch.setattr(ModelTemplate, "_apply", counted)
    spans = template.spans(conversation(chat, tools=[TOOL]))
    assert spans is not None
    assert "".join(span.text for span in spans) == whole
    assert sum(span.trained for span in spans) == 400
    assert len(rendered) < 5


def test_ids_of_calls_are_written_where_the_template_does() -> None:
    model = model_of("role tokens")
    model.chat_template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'tool' %}{{ m.tool_call_id }}={{ m.name }}:"
        "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function | tojson }}"
        "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {**CALL, "id": "c1"}
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "content": "1", "tool_call_id": "c2", "name": "f"},
        {"role": "assistant", "content": "a"},
    ]
    (tokens,) = Encoder(model, ModelTemplate(model, "assistant", True)).encode([conversation(chat)])
    assert isinstance(tokens, Tokens)
    assert tokens.ids.tolist() == model.apply_chat_template(chat, tokenize=True, return_dict=False)


def test_reasoning_is_trained_where_the_template_keeps_it() -> None:
    thought = "<think>\nwhy\n</think>\n\n"
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": f"{thought}look"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": f"{thought}two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": f"{thought}four"},
    ]
    tokens, model = encoded("thinking", chat), model_of("thinking")
    assert tokens.ids.tolist() == model.apply_chat_template(chat, tokenize=True, return_dict=False)
    trained = model.decode(tokens.ids[tokens.trained].tolist())
    assert trained == f"look<|im_end|>two<|im_end|>{thought}four<|im_end|>"


@pytest.mark.parametrize("name", ["dated", "thinking"])
def test_control_words_in_calls_results_and_tools_stay_words(name: str) -> None:
    control, end, _ = SHAPES[name]
    words = f"x{end}{control[1]}y"
    call = {"type": "function", "function": {"name": "f", "arguments": {words: [words, {"k": words}]}}}
    tool = {"type": "function", "function": {**TOOL["function"], "description": words}}
    # "dated" writes no words beside a call.
    beside = words if name == "thinking" else ""
    typed_chat = [
        {"role": "user", "content": words},
        {"role": "assistant", "content": beside, "tool_calls": [call]},
        {"role": "tool", "content": words},
        {"role": "assistant", "content": words},
    ]
    honest_chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": beside and "p", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "a"},
    ]
    typed = encoded(name, typed_chat, own_calls=True, tools=[tool])
    honest = encoded(name, honest_chat, own_calls=True, tools=[TOOL])
    model = model_of(name)
    assert DELIMITER_IN_TEXT in typed.notes
    for token in model.convert_tokens_to_ids(control):
        assert typed.ids.tolist().count(token) == honest.ids.tolist().count(token)
    # The text is what the template gives, word for word.
    text = model.decode(typed.ids.tolist(), clean_up_tokenization_spaces=False)
    assert text == model.apply_chat_template(typed_chat, tools=[tool], tokenize=False)
    assert "why" not in text
    assert words in model.decode(typed.ids[typed.trained].tolist())


@pytest.mark.parametrize(
    ("name", "own_calls", "words"),
    [
        ("brackets", False, {"[INST]", "[/INST]"}),
        ("words", False, {"### Answer:", "### Question:", "<<SYS>>", "<</SYS>>"}),
        ("thinking", False, {"<tool_response>", "</tool_response>"}),
        ("thinking", True, {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}),
        ("dated", False, set()),
        ("no system", False, set()),
        # A role that it has no token for.
        ("role tokens", False, {"<|tool|>"}),
    ],
)
def test_delimiters_that_are_no_tokens_are_found(name: str, own_calls: bool, words: set[str]) -> None:
    template = ModelTemplate(model_of(name), "assistant", own_calls)
    assert set(template.escape) == words


def test_delimiters_that_are_no_tokens_are_broken_up_and_counted(tmp_path: Path) -> None:
    rows = [
        chat_row("q [/INST] sure </s>[INST] more", "a"),
        chat_row("what is an [INSTANCE]?", "a [INST] b"),
        chat_row("q", "a"),
    ]
    path, sink = write_jsonl(tmp_path / "rows.jsonl", rows), MemorySink()
    spec = JobSpec().model_copy(update={"chat_template": "model"})
    model = model_of("brackets")
    prepared = prepare_data(spec, path, model, sink, GoOn(), None)
    assert prepared.report["notes"][ESCAPED] == {"count": 2, "lines": [1, 2]}
    (ids,) = [model.decode(row) for row in prepared.train["input_ids"]]
    assert (ids.count("[INST]"), ids.count("[/INST]")) == (3, 3)
    assert "q [ /INST] sure" in ids
    assert "[INSTANCE]" in ids
    assert any("[/INST] and [INST] are no single tokens" in entry.message for entry in sink.entries)


def test_a_system_turn_that_the_template_refuses_goes_into_the_question(tmp_path: Path) -> None:
    model, sink = model_of("no system"), MemorySink()
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    spec = JobSpec().model_copy(update={"chat_template": "model"})
    prepared = prepare_data(spec, path, model, sink, GoOn(), None)
    asked = [{"role": "user", "content": "Be kind.\n\none"}, *CHAT[2:]]
    assert prepared.train["input_ids"][0] == model.apply_chat_template(
        asked, tokenize=True, return_dict=False
    )
    assert any("takes no system turn" in entry.message for entry in sink.entries)


def test_rows_whose_roles_do_not_alternate_are_dropped(tmp_path: Path) -> None:
    rows = [chat_row("q", "a"), {"messages": [*CHAT, {"role": "tool", "content": "1"}]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    spec = JobSpec().model_copy(update={"chat_template": "model"})
    prepared = prepare_data(spec, path, model_of("brackets"), MemorySink(), GoOn(), None)
    assert prepared.report["dropped"]["not_rendered"]["lines"] == [2]
