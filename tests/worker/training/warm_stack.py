"""Loaded once by the process that programs are forked from: what a child of the supervisor, a rank and
llama.cpp's converter import."""

from __future__ import annotations

import gc

from transformers import AutoConfig, AutoTokenizer

from worker.child import Attempt
from worker.training.stack import import_stack

import_stack("reference")
# Named, so that transformers loads them.
LOADED: tuple[type, ...] = (AutoConfig, AutoTokenizer, Attempt)
# What has been loaded stays: to look for garbage in it would have every process copy it.
gc.freeze()
