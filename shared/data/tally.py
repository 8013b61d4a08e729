"""Counting what becomes of the rows: nothing is dropped without a reason and the first lines' numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shared.data.conversation import REASONS, Conversation, Dropped

EXAMPLES = 5


class Counts(NamedTuple):
    """What of a kept row is counted."""

    line: int
    turns: int
    tools: int
    calls: int
    notes: tuple[str, ...]


def counts_of(conversation: Conversation) -> Counts:
    return Counts(
        conversation.line,
        len(conversation.turns),
        len(conversation.tools),
        sum(len(turn.calls) for turn in conversation.turns),
        conversation.notes,
    )


@dataclass
class Counted:
    """How often something happened, and on which lines first."""

    count: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, line: int, times: int = 1) -> None:
        self.count += times
        if len(self.lines) < EXAMPLES:
            self.lines.append(line)


@dataclass
class Tally:
    """Rows read, kept and dropped, and what the kept ones hold."""

    read: int = 0
    used: int = 0
    turns: int = 0
    rows_with_tools: int = 0
    tools: int = 0
    calls: int = 0
    dropped: dict[str, Counted] = field(default_factory=dict)
    notes: dict[str, Counted] = field(default_factory=dict)

    def drop(self, row: Dropped) -> None:
        self.dropped.setdefault(row.reason, Counted()).add(row.line)

    def note(self, name: str, line: int, times: int = 1) -> None:
        self.notes.setdefault(name, Counted()).add(line, times)

    def keep(self, row: Counts) -> None:
        self.used += 1
        self.turns += row.turns
        self.tools += row.tools
        self.rows_with_tools += bool(row.tools)
        self.calls += row.calls
        for name, times in Counter(row.notes).items():
            self.note(name, row.line, times)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows_read": self.read,
            "rows_used": self.used,
            "rows_dropped": sum(counted.count for counted in self.dropped.values()),
            "dropped": {
                reason: {"count": counted.count, "lines": counted.lines, "meaning": REASONS[reason]}
                for reason, counted in sorted(self.dropped.items())
            },
            "notes": {
                name: {"count": counted.count, "lines": counted.lines}
                for name, counted in sorted(self.notes.items())
            },
            "turns": self.turns,
            "tools": self.tools,
            "rows_with_tools": self.rows_with_tools,
            "calls": self.calls,
        }
