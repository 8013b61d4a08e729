"""The documentation against the code: links, commands, settings, fields, routes, codes and words."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic_core import PydanticUndefined

from api import errors as api_errors
from api.app import create_app
from api.schemas import ExportIn
from cli.main import app
from shared import errors
from shared.data.conversation import REASONS
from shared.lifecycle import FailureCode
from shared.settings import Settings
from shared.spec import ExportFormat, FileDataset, JobSpec

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
# What typer's parser raises: BadParameter is one of them.
USAGE_ERRORS = typer.BadParameter.__mro__[1]
# Read by clients and by the test suite, not by a server.
OTHER_VARIABLES = {"TUNEYARD_URL", "TUNEYARD_API_KEY"}
# The project speaks of itself alone. Each word in pieces, so that this file may be searched too.
FORBIDDEN = re.compile(
    "|".join(
        "".join(pieces)
        for pieces in (
            ("/wo", "rk/"), (r"\.lib", "rary/"), (r"\bissue", r"s? #?\d"), ("issues ", "show"),
            (r"pypi\.", "org"), ("python", "hosted"), ("/opt/", "pypi"), ("/opt/", "wheels"),
            ("this ", "session"),            ("DESIGN", r"\.md"), ("FACTS", r"\.md"), ("STYLE", r"\.md"),
        )
    )
)  # fmt: skip


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row that begins with code; `\\|` is no border."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def first_codes(text: str) -> dict[str, list[str]]:
    """Row by the code words of its first cell."""
    return {word: cells for cells in rows(text) for word in re.findall(r"`([^`]+)`", cells[0])}


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of the same level."""
    return re.split(r"^## ", text.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = path.parent / target if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[str]:
    """Every `tuneyard …` in code blocks and code spans."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|[ /(])tuneyard( [^|;&>)]*)", line)
            if found and not line.startswith(("git ", "#")):
                yield found.group(1)
    yield from re.findall(r"`tuneyard( [a-z][^`]*)`", text)


def subcommands(command: Any) -> dict[str, Any]:
    """By name; none for a command that is no group. Which click this is, is typer's business."""
    found: dict[str, Any] = getattr(command, "commands", {})
    return found


def problem(command: Any, words: list[str]) -> str | None:
    """What is wrong with these words after the command's name; None if they parse."""
    inner = subcommands(command)
    if inner and words:
        return problem(inner[words[0]], words[1:]) if words[0] in inner else f"no command {words[0]}"
    try:
        given, rest, _ = command.make_parser(command.context_class(command)).parse_args(list(words))
    except USAGE_ERRORS as error:
        return str(error)
    missing = [p.name for p in command.params if p.required and not given.get(p.name or "") and words]
    return f"left over: {rest}" if rest else f"missing: {missing}" if missing else None


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_parse(path: Path) -> None:
    group = typer.main.get_command(app)
    wrong = {}
    for text in commands(path.read_text(encoding="utf-8")):
        words = shlex.split(text, comments=True)
        if words == ["COMMAND", "--help"]:
            continue
        why = problem(group, words)
        if why:
            wrong[text] = why
    assert wrong == {}


def test_a_command_that_there_is_not_is_found() -> None:
    group = typer.main.get_command(app)
    assert problem(group, ["submit", "--no-such-option"])
    assert problem(group, ["no-such-command"])
    assert problem(group, ["keys", "revoke", "1", "2"])


def test_every_command_is_in_the_guide() -> None:
    told = " ".join(" ".join(cells) for cells in rows(section(page("guide.md"), "Commands")))
    for name, command in subcommands(typer.main.get_command(app)).items():
        assert f"`tuneyard {name}" in told
        for inner in subcommands(command):
            assert f" {inner}`" in told or f"`{inner}`" in told


def test_variables_exist() -> None:
    known = {f"TUNEYARD_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    for path in PAGES:
        named = set(re.findall(r"TUNEYARD_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8")))
        assert named <= known, path


def test_every_setting_is_in_the_table_with_its_default() -> None:
    table = {cells[0].strip("`"): cells[1] for cells in rows(section(page("operations.md"), "Settings"))}
    for name, field in Settings.model_fields.items():
        default = (
            "unset" if field.default is None else f"`{field.default}`" if field.default != "" else "empty"
        )
        assert table.get(f"TUNEYARD_{name.upper()}") == default, name


def leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


def test_every_field_of_the_spec_is_in_the_guide_with_its_default() -> None:
    text = section(page("guide.md"), "The job spec")
    table = first_codes(text)
    for name, default in leaves(JobSpec().to_json()):
        shown = re.search(rf"`{re.escape(name)}` \(`([^`]*)`\)", text)
        told = table[name][1].strip("`") if name in table else shown.group(1) if shown else "absent"
        assert json.loads(told) == default, name
    assert table["dataset.file_id"][1] == "required"
    assert FileDataset.model_fields["file_id"].default is PydanticUndefined


def bounds(schema: dict[str, Any], defs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every limit that the spec's JSON schema has, as field and value."""
    for name, field in schema["properties"].items():
        for part in [field, *field.get("anyOf", []), field.get("items", {})]:
            if "$ref" in part and "oneOf" not in part:
                yield from bounds(defs[part["$ref"].rsplit("/", 1)[-1]], defs, f"{prefix}{name}.")
            for key in (
                "minimum",
                "maximum",
                "exclusiveMinimum",
                "exclusiveMaximum",
                "maxLength",
                "maxItems",
            ):
                if key in part and not (key == "maxLength" and "pattern" in part):
                    yield prefix + name, str(part[key]).removesuffix(".0")
            for choice in part.get("enum", []):
                yield prefix + name, f"`{choice}`"


def test_every_limit_of_the_spec_is_in_the_guide() -> None:
    table = first_codes(section(page("guide.md"), "The job spec"))
    schema = JobSpec.model_json_schema()
    named = {"model", "model_revision"}  # the longest id: nobody needs to be told
    found = [(name, value) for name, value in bounds(schema, schema["$defs"]) if name in table]
    assert ("lora.r", "512") in found
    for name, value in found:
        assert name in named or re.search(rf"(?<![\d.]){re.escape(value)}(?![\d.]\d)", table[name][2]), (
            name,
            value,
        )


def test_exports_reasons_and_failures_are_in_the_guide() -> None:
    guide = page("guide.md")
    table = first_codes(guide)
    assert {cells[1] for cells in rows(section(guide, "Results"))} >= {
        f"`{kind}`" for kind in get_args(ExportFormat)
    }
    assert {reason: table[reason][1] for reason in REASONS} == REASONS
    failures = first_codes(section(guide, "When a job fails"))
    assert set(failures) >= set(FailureCode)


def test_the_api_page_has_exactly_the_routes() -> None:
    schema = create_app(Settings(data_dir=ROOT / "nowhere")).openapi()
    routes = {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}
    told = set(re.findall(r"^### `([A-Z]+ /\S*)`$", page("api.md"), re.MULTILINE))
    assert told == routes


def test_the_bodies_of_the_api_page_are_specs() -> None:
    bodies = [*re.findall(r"(/jobs[^'\n]*?)-d '(\{.*?\})'", both_pages(), re.DOTALL)]
    assert len(bodies) >= 5
    for path, body in bodies:
        if "/exports" in path:
            ExportIn.model_validate_json(body)
            continue
        JobSpec.model_validate_json(body.replace("'$FILE'", "file-" + "0" * 24))


def both_pages() -> str:
    text = page("api.md") + (ROOT / "README.md").read_text(encoding="utf-8")
    return text.replace("\\\n    ", "")


def error_classes(
    base: type[errors.TuneyardError] = errors.TuneyardError,
) -> Iterator[type[errors.TuneyardError]]:
    yield base
    for child in base.__subclasses__():
        yield from error_classes(child)


def test_the_api_page_has_exactly_the_error_codes() -> None:
    given = {cls.code for cls in error_classes()} | set(api_errors.CODES.values()) | {"invalid_type"}
    for folder in ("api", "shared"):
        for path in (ROOT / folder).rglob("*.py"):
            given |= set(re.findall(r"\bcode=\"([a-z_]+)\"", path.read_text(encoding="utf-8")))
            given |= set(re.findall(r"code = \"([a-z_]+)\"", path.read_text(encoding="utf-8")))
    assert set(error_table()) == given


def error_table() -> dict[str, list[str]]:
    """Statuses by code."""
    told = re.findall(r"^\| ([\d, ]+) \| `([a-z_]+)`", section(page("api.md"), "Errors"), re.MULTILINE)
    return {code: statuses.split(", ") for statuses, code in told}


def test_statuses_of_the_error_table_are_the_classes() -> None:
    table = error_table()
    for cls in error_classes():
        assert str(cls.status) in table[cls.code], cls


def test_every_line_of_the_security_page_names_tests_that_there_are() -> None:
    text = page("security.md")
    lines = [line for line in text.splitlines() if line.startswith("| ") and "| threat |" not in line]
    assert len(lines) > 30
    for line in lines:
        named = re.findall(r"\[(test_\w+)\]\(\.\./(tests/\S+?\.py)\)", line)
        assert named, line
        for name, file in named:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (name, file)


def test_decisions_have_their_three_parts() -> None:
    pages = sorted((DOCS / "decisions").glob("*.md"))
    assert [int(path.name[:4]) for path in pages] == list(range(1, len(pages) + 1))
    for path in pages:
        headings = re.findall(r"^## (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences"], path


def test_the_project_speaks_of_itself_alone() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - whichever git there is
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = {}
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file() or path.is_symlink():
            continue
        text = path.read_bytes().decode("utf-8", "ignore")
        if words := FORBIDDEN.findall(text):
            found[name] = words
    assert found == {}
