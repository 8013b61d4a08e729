"""Quantises one GGUF with llama.cpp: `python quantize_gguf.py SOURCE TARGET FTYPE THREADS`.

Run as a program of its own, by its path: llama.cpp ends the process on some errors, and can be killed.
"""

from __future__ import annotations

import sys

from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize, set_log_callback

# ggml.h's GGML_LOG_LEVEL_ERROR.
LOG_ERROR = 4


def main(source: str, target: str, ftype: str, threads: str) -> None:
    complaints: list[str] = []
    set_log_callback(lambda level, text: complaints.append(text.strip()) if level >= LOG_ERROR else None)
    params = LlamaModelQuantizeParams()
    params.ftype = int(ftype)
    params.nthread = int(threads)
    try:
        model_quantize(source, target, params)
    except RuntimeError as error:
        sys.exit("; ".join(filter(None, complaints)) or str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
