"""Loading the model while the data is prepared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from shared.events import Control

POLL_SECONDS = 0.05


class Loading:
    """Something that is loaded on a thread of its own; a control that also stops when that has failed.

    The thread is left to itself when the job ends meanwhile, for a download can't be broken off: it dies with
    the job's process.
    """

    def __init__(self, load: Callable[[], Any], control: Control) -> None:
        self._load = load
        self._control = control
        self._loaded: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loading", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            JobStopped: the control said so. Whatever loading raised.
        """
        self._control.check()
        if self._error is not None:
            raise self._error

    def result(self) -> Any:
        """What was loaded, given once; waits for it.

        Raises:
            JobStopped: the control said so. Whatever loading raised.
        """
        while self._thread.is_alive():
            self.check()
            self._thread.join(POLL_SECONDS)
        self.check()
        loaded, self._loaded = self._loaded, None
        return loaded

    def _run(self) -> None:
        try:
            self._loaded = self._load()
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self._error = error
