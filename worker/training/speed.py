"""How fast training goes and how long it will take."""

from __future__ import annotations

import time


class Speed:
    """Tokens a second and the time that is left, by the steps of this attempt.

    Its first step also warms things up and counts only while there is no other. `tokens` and `seconds` are of
    the whole job: they go on from what attempts before this one had.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._seconds_before = 0.0
        self._rate_before: float | None = None
        self._counted = 0
        self._steps = 0
        self._started = self._last = time.monotonic()
        self._first_end: float | None = None
        self._first_tokens = 0

    def resume(self, tokens: int, seconds: float, rate: float | None) -> None:
        """Go on after attempts that had trained on so many tokens, for so long."""
        self.tokens, self._seconds_before, self._rate_before = tokens, seconds, rate

    def start(self) -> None:
        self._started = self._last = time.monotonic()

    def end_step(self, counted: int) -> float:
        """A step has ended; returns its tokens a second.

        Args:
            counted: tokens since the start of this attempt.
        """
        now = time.monotonic()
        tokens, self._counted = counted - self._counted, counted
        self.tokens += tokens
        rate = tokens / max(now - self._last, 1e-9)
        self._last = now
        self._steps += 1
        if self._first_end is None:
            self._first_end, self._first_tokens = now, counted
        return rate

    def leave_out(self) -> None:
        """Let the time since the last step's end count for neither speed nor time left."""
        seconds = time.monotonic() - self._last
        self._last += seconds
        self._started += seconds
        if self._first_end is not None:
            self._first_end += seconds

    def mean(self) -> float | None:
        """Tokens a second over all steps but the first; None before the first step ended."""
        if self._first_end is None:
            return self._rate_before
        if self._last > self._first_end:
            rate = (self._counted - self._first_tokens) / (self._last - self._first_end)
        else:
            rate = self._counted / max(self._last - self._started, 1e-9)
        return round(rate, 2)

    def seconds(self) -> float:
        """From the start of training to the last step's end, in all attempts."""
        return self._seconds_before + self._last - self._started

    def eta(self, steps_left: int) -> float | None:
        """Seconds that so many steps will take; None before the first step of this attempt ended."""
        if self._first_end is None:
            return None
        if self._steps > 1:
            per_step = (self._last - self._first_end) / (self._steps - 1)
        else:
            per_step = self._last - self._started
        return round(steps_left * per_step, 1)
