"""Loaded once by the process that programs are forked from: what a rank and llama.cpp's converter import."""

from __future__ import annotations

from transformers import AutoConfig, AutoTokenizer

from worker.training.stack import import_stack

import_stack("reference")
# Named, so that transformers loads them.
LOADED: tuple[type, ...] = (AutoConfig, AutoTokenizer)
