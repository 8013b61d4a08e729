"""The doorbell against a real Valkey, and what strangers may put into its queue."""

from __future__ import annotations

import os
import pickle
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis, RedisError
from rq import Callback, Queue
from rq.serializers import JSONSerializer, PickleSerializer

from shared.ids import new_job_id
from shared.queue import QUEUE, TASK, Doorbell
from shared.valkey import EmbeddedValkey
from tests.conftest import PATIENCE, wait_for


@pytest.fixture
def doorbell(valkey: EmbeddedValkey) -> Iterator[Doorbell]:
    with Redis.from_url(valkey.url) as redis:
        redis.flushall()
    bell = Doorbell(valkey.url)
    yield bell
    bell.close()


def test_a_ring_arrives_once_with_its_id(doorbell: Doorbell) -> None:
    job_id = new_job_id()
    assert doorbell.ring(job_id)
    assert doorbell.depth() == 1
    assert doorbell.wait(1) == job_id
    assert doorbell.depth() == 0
    assert list(doorbell.redis.scan_iter("rq:job:*")) == []


def test_whoever_waits_can_be_called_off(doorbell: Doorbell) -> None:
    told: list[str | None] = []
    thread = threading.Thread(target=lambda: told.append(doorbell.wait(5)))
    began = time.monotonic()
    thread.start()
    wait_for(lambda: doorbell.redis.info("clients")["blocked_clients"])
    doorbell.interrupt()
    thread.join(PATIENCE)
    assert (told, time.monotonic() - began < 4) == ([None], True)
    assert doorbell.ring(job_id := new_job_id())
    assert doorbell.wait(1) == job_id


def test_no_message_is_no_answer(doorbell: Doorbell) -> None:
    assert doorbell.wait(1) is None


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("serializer", [JSONSerializer, PickleSerializer])
@pytest.mark.parametrize("function", ["builtins.eval", "os.system", "builtins.exec", "subprocess.getoutput"])
def test_a_message_that_names_another_function_runs_nothing(
    doorbell: Doorbell, tmp_path: Path, function: str, serializer: type
) -> None:
    trap = tmp_path / "ran"
    argument = (
        f"touch {trap}" if "system" in function or "getoutput" in function else f"open({str(trap)!r},'w')"
    )
    Queue(QUEUE, connection=doorbell.redis, serializer=serializer).enqueue_call(function, args=(argument,))
    assert doorbell.wait(1) is None
    assert not trap.exists()


def test_a_message_with_callbacks_runs_none_of_them(doorbell: Doorbell, tmp_path: Path) -> None:
    job_id = new_job_id()
    Queue(QUEUE, connection=doorbell.redis, serializer=JSONSerializer).enqueue_call(
        TASK,
        args=(job_id,),
        on_success=Callback("os.system"),
        on_failure=Callback("os.system"),
        on_stopped=Callback("os.system"),
    )
    # It rings like any other, for a doorbell is all it is.
    assert doorbell.wait(1) == job_id


@pytest.mark.parametrize("field", ["data", "meta", "result"])
def test_a_pickle_in_any_field_is_never_loaded(doorbell: Doorbell, tmp_path: Path, field: str) -> None:
    trap = tmp_path / "ran"
    payload = pickle.dumps(Trap(trap))
    message = Queue(QUEUE, connection=doorbell.redis, serializer=JSONSerializer).enqueue_call(
        TASK, args=(new_job_id(),)
    )
    doorbell.redis.hset(message.key, field, zlib.compress(payload) if field == "data" else payload)
    doorbell.wait(1)
    assert not trap.exists()


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"data": b"\xff\xfe"},
        {"data": b"[]"},
        {"data": b'["worker.doorbell.answer", null, [["x"]], {}]'},
        {"data": b'["worker.doorbell.answer", null, ["ftjob-../../etc"], {}]'},
        {"data": b"{}", "created_at": b"no time", "timeout": b"never", "status": b"odd"},
    ],
)
def test_what_cannot_be_read_says_nothing_and_is_taken_off(doorbell: Doorbell, raw: dict[str, bytes]) -> None:
    if raw:
        doorbell.redis.hset("rq:job:strange", mapping=raw)
    doorbell.redis.rpush(f"rq:queue:{QUEUE}", b"strange", b"\xff\xfe")
    assert doorbell.wait(1) is None
    assert doorbell.wait(1) is None
    assert doorbell.depth() == 0
    assert doorbell.redis.exists("rq:job:strange") == 0


def test_performing_a_message_is_refused(doorbell: Doorbell) -> None:
    doorbell.ring(new_job_id())
    (message,) = doorbell._queue.jobs
    with pytest.raises(PermissionError, match="none of them is executed"):
        message.perform()
    assert (message.func, message.success_callback, message.failure_callback) == (None, None, None)


def test_with_redis_away_sending_says_so_and_waiting_raises(tmp_path: Path) -> None:
    bell = Doorbell(f"unix://{tmp_path}/nobody.sock")
    assert not bell.ring(new_job_id())
    assert not bell.tell(new_job_id())
    assert not bell.ping()
    assert bell.depth() is None
    with pytest.raises(RedisError):
        bell.wait(1)
    bell.close()


def test_messages_outlive_a_killed_valkey(tmp_path: Path) -> None:
    job_id = new_job_id()
    server = EmbeddedValkey(tmp_path / "v.sock", tmp_path / "data")
    with server:
        bell = Doorbell(server.url)
        assert bell.ring(job_id)
        wait_for(lambda: bell.redis.info("persistence")["aof_pending_bio_fsync"] == 0)
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        assert not bell.ping()
        server.start()
        assert wait_for(bell.ping)
        assert bell.wait(1) == job_id
        bell.close()


def test_the_socket_is_private(valkey: EmbeddedValkey) -> None:
    socket = Path(valkey.url.removeprefix("unix://"))
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert socket.stat().st_mode & 0o777 == 0o700
    with Redis.from_url(valkey.url) as redis:
        assert redis.config_get("port") == {"port": "0"}
