"""Tools in processes of their own."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from shared.errors import JobFailure, JobStopped
from shared.lifecycle import FailureCode
from tests.worker.training.samples import Running
from worker.training.processes import run_tool


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_its_output_comes_back_and_nothing_stays(tmp_path: Path) -> None:
    output = run_tool("Saying", python("print('héllo')"), Running(), scratch=tmp_path, limit_seconds=30)
    assert output == "héllo\n"
    assert list(tmp_path.iterdir()) == []


def test_a_failure_tells_the_last_line(tmp_path: Path) -> None:
    code = "import sys; print('working'); sys.exit('Traceback\\nValueError: no such tensor\\n')"
    with pytest.raises(JobFailure) as caught:
        run_tool("Converting", python(code), Running(), scratch=tmp_path, limit_seconds=30)
    assert caught.value.code == FailureCode.EXPORT_FAILED
    assert caught.value.message == "Converting ended with exit code 1: ValueError: no such tensor"
    assert list(tmp_path.iterdir()) == []


def test_a_crash_is_told_by_its_signal(tmp_path: Path) -> None:
    with pytest.raises(JobFailure, match="signal 6"):
        run_tool("Loading", python("import os; os.abort()"), Running(), scratch=tmp_path, limit_seconds=30)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.exit('OSError: [Errno 28] No space left on device')"
    with pytest.raises(JobFailure) as caught:
        run_tool("Converting", python(code), Running(), scratch=tmp_path, limit_seconds=30)
    assert caught.value.code == FailureCode.OUT_OF_DISK


def test_a_tool_that_the_system_kills_ran_out_of_memory(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(JobFailure) as caught:
        run_tool("Converting", python(code), Running(), scratch=tmp_path, limit_seconds=30)
    assert caught.value.code == FailureCode.OUT_OF_MEMORY


class _StopWhenStarted(Running):
    def __init__(self, sign: Path) -> None:
        super().__init__()
        self._sign = sign

    def check(self) -> None:
        self.stop = self._sign.exists()
        super().check()


def test_a_stop_ends_the_tool_soon(tmp_path: Path) -> None:
    sign = tmp_path / "pid"
    code = f"import os, time; open({str(sign)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(JobStopped):
        run_tool("Sleeping", python(code), _StopWhenStarted(sign), scratch=tmp_path, limit_seconds=50)
    assert time.monotonic() - started < 10
    with pytest.raises(ProcessLookupError):
        os.kill(int(sign.read_text()), 0)
    assert list(tmp_path.iterdir()) == [sign]


def test_a_tool_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(JobFailure, match="more than 0 s"):
        run_tool(
            "Sleeping", python("import time; time.sleep(60)"), Running(), scratch=tmp_path, limit_seconds=0.3
        )
