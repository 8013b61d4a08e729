"""Every answer against the official client's own types: nothing missing, nothing of another type."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import openai

from bench.openai_compat import ENDED, probe
from bench.openai_reasons import ABSENT, DIFFERENT
from shared.storage import Store
from tests.clients.conftest import Box
from tests.clients.receiver import receiver
from tests.conftest import wait_for
from tests.samples import bundled_gguf, put_gguf

DOCS = Path(__file__).parents[2] / "docs"


def test_every_answer_is_of_the_clients_type(box: Box) -> None:
    with box.client() as client, receiver() as hook:

        def wait(job_id: str) -> None:
            wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status in ENDED)
            put_gguf(box.database, Store(box.settings.artifacts()), job_id, bundled_gguf())

        lines = probe(client, hook.url, wait)
    assert [line for line in lines if line.verdict == "WRONG"] == []
    counts = Counter(line.verdict for line in lines)
    page = re.sub(r"\s+", " ", (DOCS / "openai.md").read_text(encoding="utf-8"))
    told = (
        f"With openai {openai.__version__}: {counts['same']} fields the same, {counts['different']} "
        f"different and {counts['absent']} absent with the reason in the table, {counts['more']} of "
        "Tuneyard's own"
    )
    assert told in page
    # No reason is given for what is no difference.
    reasons = {line.why for line in lines}
    assert [key for key, why in (DIFFERENT | ABSENT).items() if why not in reasons] == []
