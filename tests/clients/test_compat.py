"""Every answer against the official client's own types: nothing missing, nothing of another type."""

from __future__ import annotations

from bench.openai_compat import ABSENT, DIFFERENT, ENDED, probe
from tests.clients.conftest import Box
from tests.clients.receiver import receiver
from tests.conftest import wait_for


def test_every_answer_is_of_the_clients_type(box: Box) -> None:
    with box.client() as client, receiver() as hook:

        def wait(job_id: str) -> None:
            wait_for(lambda: client.fine_tuning.jobs.retrieve(job_id).status in ENDED)

        lines = probe(client, hook.url, wait)
    assert [line for line in lines if line.verdict == "WRONG"] == []
    assert sum(line.verdict == "same" for line in lines) > 150
    # No reason is given for what is no difference.
    told = {line.why for line in lines}
    assert [key for key, why in (DIFFERENT | ABSENT).items() if why not in told] == []
