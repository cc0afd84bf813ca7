"""What a run says about itself: bars on a terminal, a few lines in a log, nothing when told to be quiet."""

import io
import itertools

import pytest
from rich.console import Console

from exporter import progress
from exporter.progress import Lines, RichProgress, Silent, reporting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds a minute gone."""
    minutes = itertools.count(0.0, 60.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(minutes))


@pytest.mark.usefixtures("clock")
def test_a_log_gets_a_line_for_each_stage_that_took_long(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(quiet=False) as lines:
        assert isinstance(lines, Lines)  # pytest's stderr is no terminal
        lines.stage("load")
        lines.step("layer", 1, 2)
        lines.stage("capture")
    assert capsys.readouterr() == ("", "load: 60 s\ncapture: 60 s\n")


def test_a_log_gets_nothing_of_a_short_run(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(quiet=False) as lines:
        lines.stage("load")
        lines.stage("capture")
    assert capsys.readouterr() == ("", "")


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(quiet=True) as silent:
        assert isinstance(silent, Silent)
        silent.stage("load")
        silent.step("layer", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_the_stage_and_its_step() -> None:
    terminal = io.StringIO()
    with RichProgress(Console(file=terminal, force_terminal=True, width=100)) as bars:
        bars.stage("load")
        bars.stage("gptq")
        bars.step("blocks.0.fc1", 3, 8)
    written = terminal.getvalue()
    assert "gptq" in written
    assert "blocks.0.fc1" in written


def test_a_terminal_gets_the_part_of_a_long_step_and_keeps_its_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    terminal = io.StringIO()
    with RichProgress(Console(file=terminal, force_terminal=True, width=100)) as bars:
        bars.stage("aq")
        bars.step("blocks.0.fc1", 0, 2)
        bars.part("too soon")
        now = 60.0
        bars.part("round 2")
        now = 100.0
        bars.step("blocks.0.fc2", 1, 2)
        now = 120.0
        bars.part("first codes")
        bars._bars.refresh()
    written = terminal.getvalue()
    assert "too soon" not in written
    assert "blocks.0.fc2, first codes" in written
    assert "0:01:20 left" in written  # 100 seconds a step, 20 of the second are gone


def test_a_terminal_sees_that_a_stage_goes_on_after_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with RichProgress(Console(file=io.StringIO(), force_terminal=True, width=100)) as bars:
        bars.stage("validate")
        for done in range(5):
            now += 10.0
            bars.step("layers", done, 4)
        (task,) = bars._bars.tasks
        assert (task.description, task.total, task.fields["text"], task.fields["end"]) == ("validate", None, "", None)
        assert not task.finished
        now += 10.0
        bars.step("weights", 1, 4)
        (task,) = bars._bars.tasks
        assert (task.completed, task.total, task.fields["text"]) == (1, 4, "weights")


def test_a_terminal_gets_the_time_left_by_the_work_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    terminal = io.StringIO()
    with RichProgress(Console(file=terminal, force_terminal=True, width=100)) as bars:
        bars.stage("gptq")
        now = 100.0
        bars.step("a", 0, 50)  # the walk to the first layer is no measure of layers
        bars._bars.refresh()
        assert "left" not in terminal.getvalue()
        now = 160.0
        bars.step("b", 1, 50)
        bars._bars.refresh()
        assert "0:49:00 left" in terminal.getvalue()
        now = 190.0  # between two steps it counts down
        bars._bars.refresh()
        assert "0:48:30 left" in terminal.getvalue()
        now = 280.0
        bars.step("c", 3, 50)
        bars._bars.refresh()
        assert "0:47:00 left" in terminal.getvalue()
