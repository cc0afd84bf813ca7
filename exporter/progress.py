"""What a long run says about itself while it runs, on stderr; results go to stdout."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

PATIENCE_S = 2.0
"""A stage that takes no longer than this shows no bar."""

LONG_S = 10.0
"""A stage that takes longer than this is worth a line in a log."""

Unit = TypeVar("Unit")


class Progress(Protocol):
    """Told by the compiler where it is."""

    def stage(self, name: str) -> None:
        """A stage begins; the one before it is over."""

    def step(self, text: str, done: int, total: int) -> None:
        """Inside the stage, `done` of `total` units of work are over; `text` says what is next."""

    def part(self, text: str) -> None:
        """What is being done inside the step."""


def steps(
    on_step: Callable[[str, int, int], None], text: str, work: Iterable[Unit], total: int, start: int = 0
) -> Iterator[Unit]:
    """The units of work; `on_step` is told, first and after each, how many of `total` are over, from `start` on."""
    on_step(text, start, total)
    for done, unit in enumerate(work, start + 1):
        yield unit
        on_step(text, done, total)


class Silent:
    """Says nothing."""

    def stage(self, name: str) -> None:
        """Nothing."""

    def step(self, text: str, done: int, total: int) -> None:
        """Nothing."""

    def part(self, text: str) -> None:
        """Nothing."""


class Lines:
    """Where there is no terminal: a line on stderr for each stage that took long, when it is over."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = 0.0

    def stage(self, name: str) -> None:
        """Print the line of the stage before."""
        now = time.monotonic()
        if self._stage and now - self._started > LONG_S:
            print(f"{self._stage}: {now - self._started:.0f} s", file=sys.stderr, flush=True)
        self._stage, self._started = name, now

    def step(self, text: str, done: int, total: int) -> None:
        """Nothing: a log file is no place for a bar."""

    def part(self, text: str) -> None:
        """Nothing."""


class _TimeLeft(ProgressColumn):
    """The time until the end that a step foresaw. rich's own column forgets steps after half a minute."""

    def render(self, task: Task) -> Text:
        """Hours, minutes and seconds, once a step was measured."""
        end = task.fields["end"]
        if end is None:
            return Text("")
        seconds = max(0, round(end - time.monotonic()))
        return Text(f"{datetime.timedelta(seconds=seconds)} left", style="progress.remaining")


class RichProgress:
    """A line and a bar with an estimate of the time left, on a terminal. A context manager: the bar goes at the end.

    The estimate goes by the work that is done and the time since the stage's first step.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            _TimeLeft(),
            TextColumn("{task.fields[text]}"),  # last: what does not fit is cut off
            console=console or Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._started = 0.0
        self._first_step: float | None = None
        self._step = ""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, name: str) -> None:
        """Show the stage in place of the one before it."""
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._stage, self._started, self._first_step = name, time.monotonic(), None
        self._task = self._bars.add_task(name, total=None, text="", end=None)

    def step(self, text: str, done: int, total: int) -> None:
        """Move the stage's bar; when the work is over, what else the stage does has no end in sight."""
        if done >= total:
            self.stage(self._stage)
            return
        now = time.monotonic()
        if not done or self._first_step is None:
            self._first_step = now  # what took no time, as it was kept, is not work done
        if self._task is not None and (done or now - self._started > PATIENCE_S):
            end = now + (now - self._first_step) / done * (total - done) if done else None
            self._bars.update(self._task, completed=done, total=total, text=text, end=end)
        self._step = text

    def part(self, text: str) -> None:
        """Say it behind the step's text."""
        if self._task is not None and time.monotonic() - self._started > PATIENCE_S:
            self._bars.update(self._task, text=f"{self._step}, {text}")


@contextlib.contextmanager
def reporting(*, quiet: bool) -> Iterator[Progress]:
    """What fits the occasion: nothing with `quiet`, bars on a terminal, a few lines elsewhere."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        with RichProgress() as progress:
            yield progress
    else:
        lines = Lines()
        yield lines
        lines.stage("")
