"""A server, an inference process of its own, and finished jobs whose GGUF is the bundled model's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared.model_names import tuned_model
from shared.repository import keys
from shared.settings import Settings
from shared.valkey import EmbeddedValkey
from tests.api.conftest import SPEC, Live, finish, serve
from tests.conftest import Databases, wait_for
from tests.samples import put_gguf

# Tools and calls as many models' templates write them.
TEMPLATE = """{% if tools %}<|im_start|>system
You may call these functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if m.tool_calls %}{% for call in m.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass
class Box:
    """What the tests of one module share."""

    live: Live
    keys: dict[str, str]
    settings: Settings
    environment: dict[str, str]
    inference: subprocess.Popen[bytes] | None = None
    models: dict[str, str] = field(default_factory=dict)

    def start(self, **more: str) -> None:
        """Start the inference process."""
        self.inference = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "inference"], env=self.environment | more
        )
        wait_for(self.settings.inference_socket().exists)

    def stop(self) -> None:
        """Stop it, and see that it leaves nothing."""
        if self.inference is not None:
            children = self.children()
            self.inference.terminate()
            assert self.inference.wait(10) == 0
            assert not any(child.is_running() for child in children)
            self.inference = None

    def children(self) -> list[psutil.Process]:
        """The processes of the models that are loaded."""
        assert self.inference is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return [c for c in psutil.Process(self.inference.pid).children() if c.status() != "zombie"]
        return []

    def job(self, gguf: Path | None, step: int | None = None, **spec: Any) -> str:
        """A finished job of ann's; returns its model's name."""
        with self.live.client() as client:
            answer = client.post("/jobs", json=SPEC | spec)
        assert answer.status_code == 201, answer.text
        job = answer.json()
        finish(self.live.database, job["id"])
        if gguf is not None:
            put_gguf(self.live.database, self.live.context.store, job["id"], gguf, step)
        return tuned_model(job["spec"]["model"], "ann", job["spec"]["name"], job["id"], step)


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, databases: Databases
) -> Iterator[Box]:
    root = tmp_path_factory.mktemp("box") / "data"
    root.mkdir(mode=0o700)
    settings = Settings(data_dir=root, database_url=databases.create(), redis_url=valkey.url)
    database = databases.open(settings)
    with database.write() as session:
        made = {name: keys.create_key(session, name, admin=name == "root") for name in ("ann", "bob", "root")}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")}
    environment |= {"TUNEYARD_DATA_DIR": str(root), "TUNEYARD_DATABASE_URL": settings.database()}
    with serve(settings, database, made["ann"]) as live:
        box = Box(live, made, settings, environment)
        try:
            yield box
        finally:
            box.stop()
    database.close()
