"""Counting what becomes of the rows: nothing is dropped without a reason and the first lines' numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from shared.data.conversation import REASONS, Conversation, Dropped

EXAMPLES = 5


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

    def keep(self, conversation: Conversation) -> None:
        self.used += 1
        self.turns += len(conversation.turns)
        self.tools += len(conversation.tools)
        self.rows_with_tools += bool(conversation.tools)
        self.calls += sum(len(turn.calls) for turn in conversation.turns)
        for name, times in Counter(conversation.notes).items():
            self.note(name, conversation.line, times)

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
