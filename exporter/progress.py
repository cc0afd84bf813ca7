"""What a long run says about itself while it runs, on stderr; results go to stdout."""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

PATIENCE_S = 2.0
"""A stage that takes no longer than this shows no bar."""

LONG_S = 10.0
"""A stage that takes longer than this is worth a line in a log."""


class Progress(Protocol):
    """Told by the compiler where it is."""

    def stage(self, name: str) -> None:
        """A stage begins; the one before it is over."""

    def step(self, text: str, done: int, total: int) -> None:
        """Inside the stage, `done` of `total` steps are over; `text` says which is next."""


class Silent:
    """Says nothing."""

    def stage(self, name: str) -> None:
        """Nothing."""

    def step(self, text: str, done: int, total: int) -> None:
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


class RichProgress:
    """A line and a bar with an estimate of the time left, on a terminal. A context manager: the bar goes at the end."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None
        self._started = 0.0

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
        self._started = time.monotonic()
        self._task = self._bars.add_task(name, total=None, text="")

    def step(self, text: str, done: int, total: int) -> None:
        """Move the stage's bar."""
        if self._task is not None and (done or time.monotonic() - self._started > PATIENCE_S):
            self._bars.update(self._task, completed=done, total=total, text=text)


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
