"""`tuneyard demo`: one small real job from nothing to an answer, on a server of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cli.client import Client
from cli.jobs import follow_job
from cli.render import human_bytes, human_seconds, table
from shared.errors import TuneyardError
from shared.settings import Settings
from shared.spec import BUNDLED_MODEL

DATA = Path(__file__).parent / "demo_data" / "function_calling.jsonl"
SYSTEM = (
    "You are a helpful assistant with access to the following functions. Use them if required -\n"
    '{"name": "find_parcel", "description": "Look up where a parcel is", "parameters": {"type": "object", '
    '"properties": {"tracking_number": {"type": "string"}}, "required": ["tracking_number"]}}'
)
QUESTION = "Where is my parcel TY-20417?"
ANSWER_SECONDS = 60
MADE_BY = "tuneyard demo"

SPEC: dict[str, Any] = {
    "name": "demo",
    "model": BUNDLED_MODEL,
    "max_seq_length": 512,
    "lora": {"dropout": 0},
    "training": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    },
    "exports": ["adapter", "gguf:q4_k_m"],
    "metadata": {"made-by": MADE_BY},
}

console = Console()


def demo(
    data_dir: Annotated[Path, typer.Option(help="Folder for the demo's server and its results.")] = Path(
        "demo-data"
    ),
) -> None:
    """Fine-tune a small model on this machine, from upload to an answer, in a few minutes."""
    from cli.tree import ProcessTree

    began = time.monotonic()
    # As Ctrl-C does: what was started is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    settings = Settings(data_dir=data_dir, port=0)
    log_file = settings.root / "server.log"
    tree = ProcessTree(settings, workers=1, with_worker=True, log_file=log_file)
    try:
        console.print("Starting a server and a worker on this machine …")
        url = tree.start()
        if url is None:
            raise TuneyardError("The server was stopped before it was ready.")
        console.print(f"  ready at {url}", highlight=False)
        key = settings.local_key_file.read_text(encoding="utf-8").strip()
        with Client(url, key) as client:
            results = _run_job(client, settings.root / "results")
    finally:
        tree.close()
    console.print(f"Done in {human_seconds(time.monotonic() - began)}. What the demo made:")
    rows = ((path.name, human_bytes(path.stat().st_size), str(path)) for path in results)
    table(console, ("file", "size", "path"), rows)
    console.print(f"The server's own log: {log_file}", highlight=False, soft_wrap=True)


def _run_job(client: Client, folder: Path) -> list[Path]:
    # What an interrupted demo left: it would run first.
    for status in ("queued", "running"):
        for left in client.jobs(status=status, **{"metadata[made-by]": MADE_BY})["data"]:
            client.cancel(left["id"])
    uploaded = client.upload(DATA)
    if uploaded["status"] == "error":
        raise TuneyardError(f"The demo's data set was refused: {uploaded['error']}")
    console.print(f"Uploaded {DATA.name}: {uploaded['report']['rows_used']} conversations.", highlight=False)
    job = client.submit(SPEC | {"dataset": {"source": "file", "file_id": uploaded["id"]}})
    console.print(f"Submitted job {job['id']}. Its log:", highlight=False)
    follow_job(client, job["id"])
    target = folder / job["id"]
    names = [a["name"] for a in client.artifacts(job["id"])]
    results = [client.download(job["id"], name, target) for name in names]
    losses = [row["loss"] for row in client.metrics(job["id"]) if row.get("loss") is not None]
    console.print(f"Loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last.", highlight=False)
    console.print(f"Asking the GGUF, in llama.cpp: {QUESTION}", highlight=False)
    gguf = next(path for path in results if path.suffix == ".gguf")
    console.print(f"  {_answer(gguf)}", markup=False, highlight=False, soft_wrap=True)
    return results


def _answer(gguf: Path) -> str:
    command = [sys.executable, "-m", "worker.training.generate", str(gguf), QUESTION, "--system", SYSTEM]
    done = subprocess.run(
        [*command, "--max-tokens", "60"], capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
    )
    if done.returncode != 0 or not done.stdout.strip():
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise TuneyardError(f"llama.cpp did not answer from {gguf.name}: {last[0]}")
    return done.stdout.strip()
