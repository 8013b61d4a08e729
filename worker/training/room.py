"""The disk that an attempt needs: promised to it before it trains, watched while it does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shared.disk import DiskNeed
from shared.errors import JobFailure, NoRoomYet
from shared.events import Entry, EventSink
from shared.lifecycle import FailureCode
from worker.checkpoints import FOLDER, complete_checkpoints, discard
from worker.reservations import RESERVED, Promise, Reservation, free_bytes, nearest, size_of
from worker.training.checkpoints import read_checkpoint
from worker.training.failures import DISK_ADVICE
from worker.training.workdir import Workdir

# The folders of an attempt that grow; its data and its tools' files are small, or there before it is counted.
GROWING = (FOLDER, "adapter", "merged", "exports")
WATCH_SECONDS = 30.0


@dataclass(frozen=True)
class _Place:
    """A disk: what users call it, folders on it, and what is needed there, in all and by the exports alone.

    `before` is what was in the folders but for checkpoints when it was counted.
    """

    name: str
    folders: tuple[Path, ...]
    needed: int
    exports: int
    before: int

    @property
    def disk(self) -> int:
        return nearest(self.folders[0]).stat().st_dev


class Room:
    """The disk room of one attempt, among those of the other attempts of this box.

    A checkpoint that does not fit is left out rather than failing the job, after older ones have been given
    up for it; only exports that would not fit end it.
    """

    def __init__(self, workdir: Workdir, sink: EventSink) -> None:
        self._output = workdir.root / FOLDER
        self._workdir = workdir
        self._sink = sink
        self._reservation = Reservation(workdir.cache / RESERVED)
        self._need: DiskNeed | None = None
        self._places: list[_Place] = []
        self._look_at = 0.0
        self._short = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reservation.close()

    def reserve(self, need: DiskNeed) -> None:
        """Have the need promised.

        Raises:
            JobFailure: `out_of_disk`: so much would not be free without other jobs either.
            NoRoomYet: it is promised to other jobs, or they have filled it and may give it back.
        """
        self._need = need
        self._places = self._divide(need)
        with self._reservation.alone():
            short = next((p for p in self._places if p.needed > self._unpromised(p)), None)
            if short is None:
                self._reservation.hold(Promise.of(p.needed, p.folders) for p in self._places)
                return
            others = self._reservation.others(short.disk)
        free = free_bytes(short.folders[0])
        if short.needed > free + others.filled:
            raise JobFailure(
                FailureCode.OUT_OF_DISK,
                f"The job needs about {gigabytes(short.needed)} in the server's {short.name}, and "
                f"{gigabytes(free)} are free. At most there will be: {_parts(need)}.",
                DISK_ADVICE,
            )
        raise NoRoomYet(
            f"About {gigabytes(short.needed)} are needed in the server's {short.name}. {gigabytes(free)} are "
            f"free, of which jobs that run have been promised {gigabytes(others.open)}: it waits for them.",
            {str(place.folders[0]): place.needed for place in self._places},
        )

    def watch(self) -> None:
        """Say so as soon as the next checkpoint and the exports would not fit any more; for every step."""
        now = time.monotonic()
        if self._need is None or now < self._look_at:
            return
        self._look_at = now + WATCH_SECONDS
        short = self._short_of_next_checkpoint()
        if short is not None and not self._short:
            place, wanted, free = short
            self._sink.log(
                Entry(
                    f"The disk fills up: the next checkpoint and the exports need about {gigabytes(wanted)} "
                    f"in the server's {place.name}, and {gigabytes(max(free, 0))} are free and promised to "
                    "no other job. Training goes on; it ends with fewer checkpoints, or without exports, "
                    "unless space is freed.",
                    level="warning",
                    data={"needed_bytes": wanted, "free_bytes": max(free, 0)},
                )
            )
        elif short is None and self._short:
            self._sink.log(Entry("There is room for the next checkpoint and the exports again."))
        self._short = short is not None

    def fits_checkpoint(self, step: int, best: int | None) -> bool:
        """Whether a checkpoint can be written; older ones but `best` are given up where that helps."""
        if self._checkpoint_bytes() <= free_bytes(self._output):
            return True
        self._give_up_older(best)
        if self._checkpoint_bytes() <= free_bytes(self._output):
            return True
        self.left_out(step)
        return False

    def left_out(self, step: int) -> None:
        """Tell that a step has no checkpoint."""
        last = max(complete_checkpoints(self._output), default=None)
        goes_on = f"goes on from step {last}" if last is not None else "begins anew"
        self._sink.log(
            Entry(
                f"Step {step} gets no checkpoint: it would take about {gigabytes(self._checkpoint_bytes())}, "
                f"and {gigabytes(free_bytes(self._output))} are free. Training goes on; if it is "
                f"interrupted, it {goes_on}.",
                level="warning",
            )
        )

    def fit_exports(self) -> None:
        """Training is over: give up all checkpoints but the last where the exports need their room.

        Raises:
            JobFailure: `out_of_disk`: the exports would not fit.
        """
        if self._need is None:
            return
        short = self._short_of_exports()
        if short is not None:
            self._give_up_older(None)
            short = self._short_of_exports()
        if short is not None:
            place, needed = short
            raise JobFailure(
                FailureCode.OUT_OF_DISK,
                f"The exports need about {gigabytes(needed)} more in the server's {place.name}, and "
                f"{gigabytes(free_bytes(place.folders[0]))} are free. The adapter is there.",
                DISK_ADVICE,
            )

    def _short_of_next_checkpoint(self) -> tuple[_Place, int, int] | None:
        """Where it and the exports have no room, the bytes that they need there, and those that are free."""
        checkpoint = self._checkpoint_bytes()
        with self._reservation.alone():
            for place in self._places:
                wanted = place.exports + (checkpoint if self._output in place.folders else 0)
                free = self._unpromised(place)
                if wanted > free:
                    return place, wanted, free
        return None

    def _short_of_exports(self) -> tuple[_Place, int] | None:
        for place in self._places:
            needed = place.exports + place.before - self._beside_checkpoints(place.folders)
            if needed > free_bytes(place.folders[0]):
                return place, needed
        return None

    def _divide(self, need: DiskNeed) -> list[_Place]:
        # Checkpoints of an attempt that this one goes on from are there already.
        there = size_of([self._output])
        # One that is there until the next one is.
        copies = 2 * need.one_checkpoint if self._workdir.copies and need.checkpoints else 0
        work = tuple(self._workdir.root / name for name in GROWING)
        store = self._workdir.store
        if store is not None and nearest(store).stat().st_dev == self._workdir.root.stat().st_dev:
            total = need.total + copies
            exports = total - need.checkpoints
            return [self._place("data folder", (*work, store), total - there, exports)]
        places = [self._place("work folder", work, need.work - there, need.work - need.checkpoints)]
        if store is not None:
            places.append(self._place("store", (store,), need.store + copies, need.store + copies))
        return places

    def _place(self, name: str, folders: tuple[Path, ...], needed: int, exports: int) -> _Place:
        return _Place(name, folders, needed, exports, self._beside_checkpoints(folders))

    def _beside_checkpoints(self, folders: tuple[Path, ...]) -> int:
        return size_of(folder for folder in folders if folder != self._output)

    def _unpromised(self, place: _Place) -> int:
        return free_bytes(place.folders[0]) - self._reservation.others(place.disk).open

    def _checkpoint_bytes(self) -> int:
        """Of the next one: as the largest there is, if there is any."""
        there = [size_of([path]) for path in complete_checkpoints(self._output).values()]
        return max(there, default=self._need.one_checkpoint if self._need else 0)

    def _give_up_older(self, best: int | None) -> None:
        there = complete_checkpoints(self._output)
        newest = max(there, default=None)
        given_up = [step for step in there if step not in (newest, best)]
        if newest is None or not given_up:
            return
        for step in given_up:
            discard(there[step])
        self._sink.log(
            Entry(
                f"The checkpoints of steps {', '.join(map(str, given_up))} were given up: the disk is full.",
                level="warning",
            )
        )
        # With this, the others are forgotten.
        self._sink.checkpoint(read_checkpoint(there[newest]))


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _parts(need: DiskNeed) -> str:
    parts = {
        "checkpoints": need.checkpoints,
        "the merged model": need.merged,
        "the 16-bit GGUF that others are made from": need.conversion,
        **need.files,
    }
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
