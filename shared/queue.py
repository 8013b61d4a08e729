"""The doorbell: RQ messages that wake supervisors, and pub/sub news that wakes waiting API processes.

The database is the truth. A message carries a job's id and nothing else, and nothing that it says is ever
executed: a lost, doubled or forged message makes a supervisor look into the database, and that is all.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue
from rq.exceptions import DequeueTimeout, DeserializationError, NoSuchJobError
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from shared.ids import JOB_ID, new_token

QUEUE = "tuneyard"
TASK = "worker.doorbell.answer"
NEWS_CHANNEL = "tuneyard:news"
CONNECT_TIMEOUT_SECONDS = 1.0
READ_TIMEOUT_SECONDS = 6.0
# A doorbell that nobody answered for a day tells nothing that the database does not.
MESSAGE_TTL_SECONDS = 86_400
# Longer than anybody waits.
INTERRUPTION_SECONDS = 10

logger = logging.getLogger(__name__)


class Message(RqJob):
    """An RQ job that can't be performed: whatever function or callback it names, nothing resolves it."""

    def perform(self) -> Any:
        raise PermissionError("Tuneyard's queue holds doorbells; none of them is executed.")

    @property
    def func(self) -> None:
        return None

    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None

    def job_id_told(self) -> str | None:
        """The id that a well-formed doorbell carries; None for any other message."""
        try:
            name, args = self.func_name, self.args
        except (DeserializationError, AttributeError, TypeError):
            return None
        if name != TASK or len(args) != 1 or self.kwargs or self.instance is not None:
            return None
        told = args[0]
        return told if isinstance(told, str) and JOB_ID.fullmatch(told) else None


class Doorbell:
    """Both directions of the doorbell. Sending never raises: with Redis away, the database still tells."""

    def __init__(self, url: str) -> None:
        self.redis = Redis.from_url(
            url,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            socket_timeout=CONNECT_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        # Blocking reads wait longer than a send may take, but never for ever: a Redis that is frozen or cut
        # off sends nothing.
        self._reader = Redis.from_url(
            url,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            socket_timeout=READ_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._queue = Queue(QUEUE, connection=self.redis, serializer=JSONSerializer, job_class=Message)
        self._interruption = f"{self._queue.key}:{new_token()}"

    def ring(self, job_id: str) -> bool:
        """Wake a supervisor for this job; False when Redis did not take the message."""
        try:
            self._queue.enqueue_call(TASK, args=(job_id,), timeout=-1, result_ttl=0, ttl=MESSAGE_TTL_SECONDS)
        except RedisError as error:
            logger.warning("The doorbell for %s did not ring: %s", job_id, error)
            return False
        return True

    def tell(self, job_id: str) -> bool:
        """Tell API processes that there is news of this job."""
        try:
            self.redis.publish(NEWS_CHANNEL, job_id)
        except RedisError:
            return False
        return True

    def wait(self, seconds: int) -> str | None:
        """Wait for at most 5 seconds for a message and take it off; the job id it carries, or None.

        Raises:
            RedisError: Redis is away.
        """
        try:
            key, message_id = Queue.lpop(
                [self._interruption, self._queue.key], seconds, connection=self._reader
            )
        except DequeueTimeout:
            return None
        if key.decode() == self._interruption:
            return None
        try:
            message = Message.fetch(message_id.decode(), connection=self.redis, serializer=JSONSerializer)
        except (NoSuchJobError, ValueError, TypeError, AttributeError, KeyError):
            # A stranger's hash may hold anything; what can't be read says nothing.
            self.redis.delete(RqJob.key_for(message_id.decode(errors="replace")))
            return None
        if not isinstance(message, Message):
            raise TypeError(f"RQ gave a {type(message)}")
        told = message.job_id_told()
        self.redis.delete(message.key)
        if told is None:
            logger.warning("Dropped a queue message that is no doorbell: %r", message.id)
        return told

    def interrupt(self) -> None:
        """End a `wait` of another thread at once; with Redis away, it ends by itself."""
        with suppress(RedisError), self.redis.pipeline() as pipeline:
            pipeline.rpush(self._interruption, "")
            pipeline.expire(self._interruption, INTERRUPTION_SECONDS)
            pipeline.execute()

    def depth(self) -> int | None:
        """Messages that wait, or None with Redis away."""
        try:
            return int(self.redis.llen(self._queue.key))
        except RedisError:
            return None

    def ping(self) -> bool:
        try:
            return bool(self.redis.ping())
        except RedisError:
            return False

    def close(self) -> None:
        self.redis.close()
        self._reader.close()
