"""The Modelfile and the model cards."""

from __future__ import annotations

from worker.training.exports.modelfile import modelfile, own_modelfile


def test_chatml_in_ollamas_words() -> None:
    assert modelfile("model-q8_0.gguf", "<|im_end|>") == (
        "# ollama create my-model -f Modelfile\n"
        "# Functions on offer go into the system message, as in the training data.\n"
        "FROM ./model-q8_0.gguf\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_start|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_a_model_with_an_end_of_its_own_writes_it_after_each_answer() -> None:
    text = modelfile("model-f16.gguf", "</s>")
    assert '{{ .Content }}<|im_end|>{{ if eq .Role "assistant" }}</s>{{ end }}\n' in text
    assert 'PARAMETER stop "</s>"\n' in text


def test_a_models_own_template_is_left_to_the_gguf() -> None:
    head = "# ollama create my-model -f Modelfile\nFROM ./model-f16.gguf\n"
    assert own_modelfile("model-f16.gguf", "<|eot|>") == f'{head}PARAMETER stop "<|eot|>"\n'
    assert own_modelfile("model-f16.gguf", None) == head
