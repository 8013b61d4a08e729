"""The planner's bench: what its points span, and its table, which loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from bench.planner import POINTS, compared
from bench.standins import CONFIGS
from shared.cost import GIB
from shared.planner import way_of
from shared.shape import NEMOTRON_NANO_4B, ModelShape


def test_the_points_span_what_the_planner_chooses_between() -> None:
    assert len(set(POINTS)) == 24
    assert {point.model for point in POINTS} == {"4b", "1b"}
    assert {point.engine for point in POINTS} == {"reference", "compiled", "unsloth"}
    assert {point.quantization for point in POINTS} == {"none", "4bit"}
    assert {point.checkpointing for point in POINTS} == {"none", "some", "all"}
    assert {point.micro_batch for point in POINTS} == {1, 2, 4}
    assert {point.length for point in POINTS} == {1024, 2048, 4096, 8192}
    assert all(way_of(point.plan()) == point.way() for point in POINTS)
    assert ModelShape.from_config(CONFIGS["4b"]) == NEMOTRON_NANO_4B


def test_the_table_stands_predictions_beside_measurements(tmp_path: Path) -> None:
    point = next(p for p in POINTS if p.engine == "compiled")
    line = {
        "point": asdict(point), "tokens_per_second": 21_500.0, "peak_memory_bytes": 36 * GIB,
        "torch": "2.13.0", "gpu": "NVIDIA H100 80GB HBM3", "gpu_bytes": 80 * GIB,
    }  # fmt: skip
    assert [peak > 25 * GIB and speed > 15_000 for _, _, peak, speed in compared([line])] == [True]
    file = tmp_path / "measured.jsonl"
    file.write_text(json.dumps({"point": asdict(point), "error": "none"}) + "\n" + json.dumps(line) + "\n")
    program = (
        "import sys; sys.argv = ['planner', '--table', sys.argv[1]]\n"
        "from bench.planner import main; main()\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "compiled" in done.stdout
    assert "1 points on NVIDIA H100" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
