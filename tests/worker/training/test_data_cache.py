"""Prepared data is made once, found again, shared, and given up when it takes too much room."""

from __future__ import annotations

import copy
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from shared.errors import JobStopped
from shared.events import GoOn, MemorySink
from shared.spec import JobSpec
from tests.worker.training.data_samples import chat_row, tokenizer, write_jsonl
from worker.training import data_cache
from worker.training.data import PreparedData, prepare_data
from worker.training.data_cache import cached, key_of

ROWS = [chat_row(f"q{number}", f"a{number}") for number in range(20)]


def prepare(folder: Path, rows: list[dict[str, Any]], kind: str = "chatml", **spec: Any) -> PreparedData:
    path = write_jsonl(folder / "rows.jsonl", rows)
    job = JobSpec.model_validate({"max_seq_length": 64, **spec})
    return prepare_data(job, path, tokenizer(kind), MemorySink(), GoOn(), None, folder / "cache")


def write_file(folder: Path) -> None:
    (folder / "file").write_bytes(b"x" * 100)


def test_the_same_again_comes_from_the_cache(tmp_path: Path) -> None:
    first = prepare(tmp_path, ROWS)
    again = prepare(tmp_path, ROWS)
    assert (first.report["from_cache"], again.report["from_cache"]) == (False, True)
    assert again.train.to_list() == first.train.to_list()
    assert {**again.report, "from_cache": False} == first.report
    assert (again.sha256, again.longest, again.train_tokens) == (
        first.sha256,
        first.longest,
        first.train_tokens,
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": ROWS[:19]},
        {"kind": "plain"},
        {"max_seq_length": 63},
        {"train_on": "all"},
        {"packing": False},
        {"max_samples": 20},
        {"unparsable_calls": "drop"},
        {"overlong_rows": "cut"},
        {"training": {"seed": 7}},
    ],
)
def test_anything_that_matters_makes_it_anew(tmp_path: Path, changed: dict[str, Any]) -> None:
    prepare(tmp_path, ROWS)
    assert not prepare(tmp_path, **{"rows": ROWS, **changed}).report["from_cache"]


def test_what_the_rows_do_not_depend_on_changes_nothing(tmp_path: Path) -> None:
    prepare(tmp_path, ROWS)
    again = prepare(tmp_path, ROWS, name="another", training={"learning_rate": 1e-3, "max_steps": 7})
    assert again.report["from_cache"]
    assert again.report["total_steps"] == 7


def test_another_chat_template_makes_it_anew(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    spec = JobSpec().model_copy(update={"chat_template": "model"})
    found = []
    for role in ("assistant", "robot"):
        model = copy.deepcopy(tokenizer())
        model.chat_template = "{% for m in messages %}" + role + "{{ m.content }}<|im_end|>{% endfor %}"
        found.append(prepare_data(spec, path, model, MemorySink(), GoOn(), None, tmp_path / "cache"))
    assert [prepared.report["from_cache"] for prepared in found] == [False, False]
    assert found[0].sha256 != found[1].sha256


def test_other_code_makes_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of({"a": 1})
    monkeypatch.setattr(data_cache, "code_version", lambda: "another")
    assert key_of({"a": 1}) != before


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    made: list[Path] = []
    may_go_on = threading.Event()

    def make(folder: Path) -> None:
        made.append(folder)
        may_go_on.wait(10)
        (folder / "file").write_text("whole", encoding="utf-8")

    found: list[tuple[Path, bool]] = []

    def job() -> None:
        with cached(tmp_path, "key", make, GoOn()) as (folder, was_there):
            found.append((folder, was_there))

    threads = [threading.Thread(target=job) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert not (tmp_path / "key").exists()
    may_go_on.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(was_there for _, was_there in found) == [False, True, True]
    assert {(folder / "file").read_text(encoding="utf-8") for folder, _ in found} == {"whole"}


def test_a_job_that_waits_can_be_stopped(tmp_path: Path) -> None:
    class StopSoon:
        asked = 0

        def check(self) -> None:
            self.asked += 1
            if self.asked > 1:
                raise JobStopped

    inside = threading.Event()
    leave = threading.Event()

    def make(folder: Path) -> None:
        inside.set()
        leave.wait(10)

    def job(control: Any) -> None:
        with cached(tmp_path, "key", make, control):
            pass

    thread = threading.Thread(target=job, args=(GoOn(),))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(JobStopped):
        job(StopSoon())
    leave.set()
    thread.join()


def test_a_failure_leaves_nothing_and_the_next_one_makes_it(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("x", encoding="utf-8")
        raise ValueError

    with pytest.raises(ValueError), cached(tmp_path, "key", broken, GoOn()):  # noqa: PT011 - the one above
        pass
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    with cached(tmp_path, "key", write_file, GoOn()) as found:
        assert found == (tmp_path / "key", False)


def test_the_least_recently_used_is_given_up_first(tmp_path: Path) -> None:
    stale = tmp_path / ".old.half-made"
    stale.mkdir()
    os.utime(stale, (0, 0))

    def use(key: str, limit: int) -> Path:
        with cached(tmp_path, key, write_file, GoOn(), limit) as (folder, _):
            return folder

    for at, key in enumerate(("a", "b", "c")):
        os.utime(use(key, 300), (at + 1, at + 1))
    use("a", 300)
    use("d", 300)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"a", "c", "d"}
    use("e", 50)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"e"}


def test_what_a_job_is_about_to_open_is_not_given_up(tmp_path: Path) -> None:
    with cached(tmp_path, "a", write_file, GoOn(), 50) as (folder, _):
        with cached(tmp_path, "b", write_file, GoOn(), 50):
            pass
        assert (folder / "file").read_bytes()
    with cached(tmp_path, "c", write_file, GoOn(), 50):
        pass
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"c"}


def test_a_folder_renamed_by_another_job_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_made = tmp_path / ".another.half-made"
    half_made.mkdir()
    is_dir = Path.is_dir

    def renamed_meanwhile(path: Path) -> bool:
        found = is_dir(path)
        if path == half_made and found:
            path.rename(tmp_path / "another")
        return found

    monkeypatch.setattr(Path, "is_dir", renamed_meanwhile)
    with cached(tmp_path, "key", write_file, GoOn()) as found:
        assert found == (tmp_path / "key", False)


def test_rows_padded_in_other_batches_report_their_own_padding(tmp_path: Path) -> None:
    rows = [chat_row(f"q{number}", "long " * number) for number in range(16)]
    found = []
    for size, steps in ((2, 4), (8, 1)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        prepared = prepare(tmp_path, rows, packing=False, training=batch)
        found.append(prepared.report["packing"]["efficiency"])
    assert found[0] > found[1]
