"""prepare_data on small files, with tokenizers made here."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from shared.data.chatml import render
from shared.data.conversation import Conversation
from shared.data.formats import parse_row
from shared.errors import JobFailure, JobStopped
from shared.events import GoOn, MemorySink
from shared.lifecycle import FailureCode
from shared.spec import JobSpec
from tests.worker.training.data_samples import chat_row, tokenizer, write_jsonl
from worker.training.data import PreparedData, prepare_data


def prepare(
    folder: Path, rows: list[dict[str, Any]], sink: MemorySink | None = None, **spec: Any
) -> PreparedData:
    path = write_jsonl(folder / "rows.jsonl", rows)
    data = {"source": "file", "file_id": "file-" + "a" * 24}
    job = JobSpec.model_validate({"max_seq_length": 128, "dataset": data, **spec})
    return prepare_data(job, path, tokenizer(), sink or MemorySink(), GoOn(), None, folder / "cache")


def documents(prepared: PreparedData) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each document, out of the packed rows."""
    found = []
    for row in prepared.train:
        at = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][at : at + length], row["labels"][at : at + length]))
            at += length
        assert at == len(row["input_ids"]) == len(row["labels"])
    return found


def test_packed_rows_hold_every_document_once_with_its_mask(tmp_path: Path) -> None:
    rows = [chat_row(f"question {n}", f"answer {n} " * (n % 5 + 1)) for n in range(40)]
    prepared = prepare(tmp_path, rows)
    model = tokenizer()
    found = {model.decode(ids): labels for ids, labels in documents(prepared)}
    assert len(found) == 40
    for row in rows:
        spans = render(parse_row(row, "messages", 1))
        labels = found["".join(span.text for span in spans)]
        trained = model.decode([label for label in labels if label != -100])
        assert trained == "".join(span.text for span in spans if span.trained)
    report = prepared.report
    assert report["packing"]["rows"] == len(prepared.train) < 40
    assert all(len(row["input_ids"]) <= 128 for row in prepared.train)
    total = sum(len(ids) for ids, _ in documents(prepared))
    assert prepared.train_tokens == report["tokens"]["total"] == total
    assert report["packing"]["efficiency"] == round(total / (128 * len(prepared.train)), 4) > 0.9


def test_the_longest_rows_come_first(tmp_path: Path) -> None:
    rows = [chat_row("q", "word " * n) for n in range(5, 60)]
    prepared = prepare(tmp_path, rows, packing=False)
    lengths = [len(row["input_ids"]) for row in prepared.train]
    assert all(len(row["seq_lengths"]) == 1 for row in prepared.train)
    assert lengths[:2] == sorted(lengths, reverse=True)[:2]
    assert prepared.longest == lengths[0]
    assert lengths[2:] != sorted(lengths[2:], reverse=True)


def test_every_dropped_row_is_counted_with_its_line(tmp_path: Path) -> None:
    sink = MemorySink()
    rows = [
        chat_row("a", "b"),
        chat_row("a", " b\n"),
        chat_row("long", "word " * 400),
        chat_row("", ""),
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"messages": [{"role": "narrator", "content": "x"}]},
        chat_row("half", "\ud800"),
        {"messages": [{"role": "user", "content": 5}]},
        chat_row("c", "d"),
    ]
    prepared = prepare(tmp_path, rows, sink)
    report = prepared.report
    assert (report["rows_read"], report["rows_used"], report["rows_dropped"]) == (9, 2, 7)
    assert {reason: counted["lines"] for reason, counted in report["dropped"].items()} == {
        "duplicate": [2],
        "too_long": [3],
        "empty": [4],
        "nothing_to_train_on": [5],
        "unknown_role": [6],
        "invalid_text": [7],
        "not_text": [8],
    }
    assert sink.reports == [report]
    assert sink.entries[-1].level == "warning"
    assert "dropped: 1 duplicate, 1 empty" in sink.entries[-1].message
    assert json.loads(json.dumps(report)) == report


def test_max_samples_takes_the_first_usable_rows(tmp_path: Path) -> None:
    rows = [chat_row("", ""), *[chat_row(f"q{n}", f"a{n}") for n in range(20)]]
    prepared = prepare(tmp_path, rows, max_samples=3)
    texts = {tokenizer().decode(ids) for ids, _ in documents(prepared)}
    assert texts == {"".join(s.text for s in render(parse_row(row, "messages", 1))) for row in rows[1:4]}
    assert prepared.report["rows_read"] == 4
    assert prepared.sha256 == prepare(tmp_path, rows[:4]).sha256 != prepare(tmp_path, rows[:5]).sha256


def test_weight_zero_is_not_trained_and_all_trains_everything_else(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two", "weight": 0},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": "four", "weight": 1},
        ]
    }
    model = tokenizer()

    def trained(**spec: Any) -> str:
        ((_, labels),) = documents(prepare(tmp_path, [row], **spec))
        return str(model.decode([label for label in labels if label != -100]))

    assert trained() == "four<|im_end|>"
    everything = trained(train_on="all")
    assert "two" not in everything
    # The very first token has nothing before it that could predict it.
    assert everything.startswith("user\none<|im_end|>\n")
    assert everything.endswith("<|im_start|>assistant\nfour<|im_end|>")


def test_overlong_rows_are_cut_at_a_turns_end_if_asked(tmp_path: Path) -> None:
    turns = [*chat_row("q", "a")["messages"], *chat_row("r", "word " * 400)["messages"]]
    rows = [{"messages": turns}, chat_row("long", "word " * 400)]
    report = prepare(tmp_path, rows, overlong_rows="cut").report
    assert report["dropped"]["too_long"]["lines"] == [2]
    assert report["notes"]["cut_at_a_turns_end"] == {"count": 1, "lines": [1]}
    assert report["rows_used"] == 1


def test_rows_that_only_what_was_cut_told_apart_are_on_one_side(tmp_path: Path) -> None:
    rows = []
    for number in range(60):
        start = chat_row(f"q{number}", f"a{number}")["messages"]
        ends = [chat_row("r", f"{word} " * 400)["messages"] for word in ("word", "answer")]
        rows += [{"messages": [*start, *end]} for end in ends]
    data = {"source": "file", "file_id": "file-" + "a" * 24}
    spec = JobSpec.model_validate({"max_seq_length": 128, "dataset": data, "overlong_rows": "cut"})
    spec = spec.model_copy(update={"validation_fraction": 0.3})
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare_data(spec, path, tokenizer(), MemorySink(), GoOn(), None, tmp_path / "cache")
    train, held_out = texts(prepared.train), texts(prepared.validation)
    assert train
    assert held_out
    assert not train & held_out
    assert prepared.report["dropped"]["duplicate"]["count"] == 60
    with_others = with_validation(tmp_path, rows[1::2], rows[:10:2], overlong_rows="cut")
    assert not texts(with_others.train) & texts(with_others.validation)


def test_other_weights_do_not_take_a_row_to_the_other_side(tmp_path: Path) -> None:
    rows = []
    for number in range(60):
        turns = [*chat_row(f"q{number}", "a")["messages"], *chat_row("r", f"a{number}")["messages"]]
        weighed = [turns[0], {**turns[1], "weight": 0}, *turns[2:]]
        rows += [{"messages": turns}, {"messages": weighed}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = prepare_data(held_out_spec(tmp_path, 0.3), path, tokenizer(), MemorySink(), GoOn(), None)
    assert prepared.report["rows_used"] == 120
    assert texts(prepared.validation)
    assert not texts(prepared.train) & texts(prepared.validation)


def test_white_space_in_a_text_tells_rows_apart(tmp_path: Path) -> None:
    code = "if x:\n    a()\nb()"
    answers = [code, code.replace("b()", "    b()"), code.replace("\n", "\r\n"), f" {code}\n", f"{code}\x1f"]
    found = [parse_row(chat_row("q", answer), "messages", 1) for answer in answers]
    keys = [row.key() for row in found if isinstance(row, Conversation)]
    assert keys[0] != keys[1]
    assert keys[0] == keys[2] == keys[3]
    prepared = prepare(tmp_path, [chat_row("q", answer) for answer in answers[:3]])
    assert prepared.report["dropped"]["duplicate"]["lines"] == [3]


def test_the_steps_are_the_trainers(tmp_path: Path) -> None:
    rows = [chat_row(f"q{n}", f"a{n}") for n in range(21)]
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3}
    report = prepare(tmp_path, rows, packing=False, training=training).report
    assert (report["steps_per_epoch"], report["total_steps"]) == (3, 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b'{"messages": []}\n', "None of the 1 rows"),
        (b'{"a": 1}\n', "no known format"),
        (b'{"messages": [}\n', "Not valid JSON at line 1"),
    ],
)
def test_a_file_without_a_usable_row_fails_the_job(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    spec = JobSpec.model_validate({"dataset": {"source": "file", "file_id": "file-" + "a" * 24}})
    with pytest.raises(JobFailure) as failure:
        prepare_data(spec, path, tokenizer(), MemorySink(), GoOn(), None, tmp_path / "cache")
    assert failure.value.code is FailureCode.INVALID_DATASET
    assert message in failure.value.message
    assert failure.value.advice


def test_a_job_whose_rows_are_all_unusable_reports_why(tmp_path: Path) -> None:
    sink = MemorySink()
    rows = [chat_row("", ""), {"messages": [{"role": "user", "content": "x"}]}, chat_row("", " ")]
    with pytest.raises(
        JobFailure, match=r"None of the 3 rows can be used. Most often \(2 rows\): no turn has any"
    ):
        prepare(tmp_path, rows, sink)
    assert sink.reports[0]["dropped"]["empty"]["lines"] == [1, 3]
    assert sink.reports[0]["rows_used"] == 0


def test_preparation_can_be_stopped_and_leaves_nothing(tmp_path: Path) -> None:
    class Stop:
        def check(self) -> None:
            raise JobStopped

    path = write_jsonl(tmp_path / "rows.jsonl", [chat_row("q", "a")])
    with pytest.raises(JobStopped):
        prepare_data(JobSpec(), path, tokenizer(), MemorySink(), Stop(), None, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_collator_takes_the_rows(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, [chat_row(f"q{n}", f"a{n}") for n in range(6)])
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([prepared.train[0]])
    lengths = prepared.train[0]["seq_lengths"]
    expected = np.concatenate([np.arange(length) for length in lengths])
    assert batch["position_ids"][0].tolist() == expected.tolist()


def test_without_a_cache_the_files_go_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    path = write_jsonl(tmp_path / "rows.jsonl", [chat_row("q", "a")])
    prepared = prepare_data(JobSpec(), path, tokenizer(), MemorySink(), GoOn(), None)
    assert len(prepared.train) == 1
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    del prepared
    gc.collect()
    assert list((tmp_path / "tmp").iterdir()) == []
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(JobFailure):
        prepare_data(JobSpec(), path, tokenizer(), MemorySink(), GoOn(), None)
    assert list((tmp_path / "tmp").iterdir()) == []


def held_out_spec(tmp_path: Path, fraction: float) -> JobSpec:
    # A copy is not validated: the spec's own limit of the fraction is lower.
    return JobSpec().model_copy(update={"validation_fraction": fraction})


def texts(rows: Any) -> set[str]:
    found = set()
    for row in rows or ():
        at = 0
        for length in row["seq_lengths"]:
            found.add(str(tokenizer().decode(row["input_ids"][at : at + length])))
            at += length
    return found


def test_held_out_rows_are_never_trained_on_and_never_move(tmp_path: Path) -> None:
    rows = [chat_row(f"q{number}", f"a{number}") for number in range(200)]
    spec = held_out_spec(tmp_path, 0.2)
    found = []
    for count in (100, 200):
        path = write_jsonl(tmp_path / "rows.jsonl", rows[:count])
        prepared = prepare_data(spec, path, tokenizer(), MemorySink(), GoOn(), None, tmp_path / "cache")
        train, held_out = texts(prepared.train), texts(prepared.validation)
        assert not train & held_out
        assert len(train | held_out) == count
        assert len(held_out) == prepared.report["validation"]["rows_used"]
        found.append((train, held_out))
    assert found[0][0] < found[1][0]
    assert found[0][1] < found[1][1]
    assert 20 < len(found[1][1]) < 60
    # A white-space variant of a held-out row is a duplicate of it, so it can't come in by the back door.
    twice = [*rows, *[chat_row(f" q{number} ", f"a{number}\n") for number in range(200)]]
    path = write_jsonl(tmp_path / "rows.jsonl", twice)
    prepared = prepare_data(spec, path, tokenizer(), MemorySink(), GoOn(), None, tmp_path / "cache")
    assert texts(prepared.validation) == found[1][1]
    assert texts(prepared.train) == found[1][0]


def test_a_split_that_holds_out_nothing_fails(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat_row("q", "a")])
    with pytest.raises(JobFailure, match="None of the 1 usable rows is held out") as failure:
        prepare_data(held_out_spec(tmp_path, 1e-9), path, tokenizer(), MemorySink(), GoOn(), None)
    assert failure.value.code is FailureCode.INVALID_DATASET


def test_a_split_that_leaves_nothing_to_train_on_fails(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat_row("q", "a")])
    with pytest.raises(JobFailure, match="held out"):
        prepare_data(held_out_spec(tmp_path, 1.0), path, tokenizer(), MemorySink(), GoOn(), None)


def with_validation(
    folder: Path, rows: list[dict[str, Any]], others: list[dict[str, Any]], **spec: Any
) -> PreparedData:
    held_out = {"source": "file", "file_id": "file-" + "b" * 24}
    job = JobSpec.model_validate({"max_seq_length": 128, "validation_dataset": held_out, **spec})
    return prepare_data(
        job,
        write_jsonl(folder / "rows.jsonl", rows),
        tokenizer(),
        MemorySink(),
        GoOn(),
        None,
        folder / "cache",
        validation_file=write_jsonl(folder / "validation.jsonl", others),
    )


def test_rows_of_the_validation_data_are_never_trained_on(tmp_path: Path) -> None:
    weighed = chat_row("q3", "a3")
    weighed["messages"][-1]["weight"] = 1
    rows = [*[chat_row(f"q{n}", f"a{n}") for n in range(10)], chat_row(" q4", "a4\n")]
    others = [chat_row("q2", "a2"), weighed, chat_row("q4", "a4"), chat_row("new", "row"), chat_row("", "")]
    prepared = with_validation(tmp_path, rows, others)
    train, held_out = texts(prepared.train), texts(prepared.validation)
    assert (len(train), len(held_out)) == (7, 4)
    assert not train & held_out
    report = prepared.report
    assert report["dropped"]["in_validation"]["lines"] == [3, 4, 5]
    assert (report["rows_used"], report["rows_dropped"]) == (7, 4)
    told = report["validation"]
    assert (told["rows_read"], told["rows_used"], told["file_id"]) == (5, 4, "file-" + "b" * 24)
    assert told["dropped"]["empty"]["lines"] == [5]
    assert json.loads(json.dumps(report)) == report
    # The cache knows one validation file from another.
    again = with_validation(tmp_path, rows, others)
    assert again.report["from_cache"]
    other = with_validation(tmp_path, rows, others[:1])
    assert not other.report["from_cache"]
    assert len(texts(other.train)) == 9


def test_max_samples_counts_both_data_sets_by_themselves(tmp_path: Path) -> None:
    rows = [chat_row(f"q{n}", f"a{n}") for n in range(10)]
    prepared = with_validation(tmp_path, rows, rows[:3], max_samples=2)
    assert len(texts(prepared.validation)) == 2
    assert prepared.report["dropped"]["in_validation"]["lines"] == [1, 2]
    assert prepared.report["rows_used"] == 2


def test_unusable_validation_data_says_that_it_is_that(tmp_path: Path) -> None:
    rows = [chat_row(f"q{n}", f"a{n}") for n in range(3)]
    with pytest.raises(JobFailure, match="Validation data: None of the 1 rows can be used") as failure:
        with_validation(tmp_path, rows, [chat_row("", "")])
    assert failure.value.code is FailureCode.INVALID_DATASET
    with pytest.raises(JobFailure, match=r"None of the 3 rows can be used.*also in the validation data"):
        with_validation(tmp_path, rows, rows)
