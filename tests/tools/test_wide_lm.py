"""The wide language model's bench on a narrow one: training goes on where it stopped, no window is used twice."""

from pathlib import Path

import pytest
import torch

from tools.bench import lowbit_lm, wide_lm


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 16, "FFN": 32, "HEADS": 2, "BATCH": 2, "SAVED_EVERY": 2}.items():
        monkeypatch.setattr(wide_lm, name, value)
    text = torch.arange(9999) % 256
    monkeypatch.setattr(wide_lm, "library_bytes", lambda: (text, text))


def test_training_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch)
    whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    wide_lm.train(whole, steps=5)

    class StoppedError(Exception):
        pass

    real = torch.nn.utils.clip_grad_norm_
    calls = iter(range(10))

    def stop(*arguments: object) -> None:
        if next(calls) == 3:
            raise StoppedError
        real(*arguments)  # type: ignore[arg-type]  # as it is called

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
        with pytest.raises(StoppedError):
            wide_lm.train(stopped, steps=5)
    assert not stopped.exists()
    wide_lm.train(stopped, steps=5)
    assert stopped.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.safetensors", "whole.safetensors"]
    first, second = wide_lm.load(whole).state_dict(), wide_lm.load(stopped).state_dict()
    assert all(first[name].equal(second[name]) for name in first)


def text_of(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(wide_lm, "library_bytes", lambda: (torch.arange(length), torch.arange(length)))


def test_windows_to_choose_and_to_judge_by_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    text_of(monkeypatch, 1024 * 130 + 7)
    chosen, judged = wide_lm.held_out(choose=True), wide_lm.held_out(choose=False)
    assert (chosen.shape, judged.shape) == ((256, 129), (768, 129))
    assert len({*chosen.flatten().tolist(), *judged.flatten().tolist()}) == 1024 * 129


def test_shifted_windows_are_others_of_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text_of(monkeypatch, 256 * 1500)
    for shift in (0.0, 0.5, 0.9):
        windows = wide_lm.calibration(shift)["tokens"]
        assert windows.shape == (256, 128)
        begin = int((255 + shift) * 1500)
        assert torch.equal(windows[255], torch.arange(begin, begin + 128))


def test_more_windows_of_the_narrow_model_are_not_those_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.arange(64 * 520 + 7)
    monkeypatch.setattr(lowbit_lm, "documentation_bytes", lambda: (text, text))
    windows = lowbit_lm.held_out()
    committed = (torch.arange(64)[:, None] * (len(text) // 64) + torch.arange(129)).flatten()
    assert windows.shape == (192, 129)
    assert len({*windows.flatten().tolist(), *committed.tolist()}) == 256 * 129
