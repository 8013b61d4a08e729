"""The Modelfile with which Ollama runs a GGUF just as it was trained."""

from __future__ import annotations

from shared.data.chatml import END, START


def own_modelfile(gguf_name: str, stop_token: str | None) -> str:
    """A Modelfile for a model that was trained with its own chat template, which Ollama reads in the GGUF."""
    stop = f'PARAMETER stop "{stop_token}"\n' if stop_token else ""
    return f"# ollama create my-model -f Modelfile\nFROM ./{gguf_name}\n{stop}"


def modelfile(gguf_name: str, stop_token: str | None) -> str:
    """A Modelfile for the ChatML template, to be put beside the GGUF.

    Args:
        gguf_name: the GGUF's file name.
        stop_token: the token that ends an assistant's turn, where there is one. Where that is not ChatML's
            own, it follows the turn's text.
    """
    own_end = stop_token if stop_token not in (None, END) else None
    after = f'{{{{ if eq .Role "assistant" }}}}{own_end}{{{{ end }}}}' if own_end else ""
    # The text that the chat template gives, in Ollama's template language.
    turns = (
        f"{{{{- range .Messages }}}}{START}{{{{ .Role }}}}\n"
        f"{{{{ .Content }}}}{END}{after}\n"
        f"{{{{ end }}}}{START}assistant\n"
    )
    stops = "".join(f'PARAMETER stop "{text}"\n' for text in (START, END, own_end) if text)
    return f'''# ollama create my-model -f Modelfile
# Functions on offer go into the system message, as in the training data.
FROM ./{gguf_name}
TEMPLATE """{turns}"""
{stops}'''
