"""The wide language model's bench on a narrow one: training goes on where it stopped, no window is used twice."""

from pathlib import Path

import pytest
import torch

from tools.bench import lowbit_lm, wide_lm


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 16, "FFN": 32, "HEADS": 2, "BATCH": 2, "SAVED_EVERY": 2}.items():
        monkeypatch.setattr(wide_lm, name, value)


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


def test_windows_to_choose_and_to_judge_by_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.arange(64 * 520 + 7)
    for module in (lowbit_lm, wide_lm):
        monkeypatch.setattr(module, "documentation_bytes", lambda: (positions, positions))
    chosen, judged = (lowbit_lm.held_out(windows) for windows in (slice(1), slice(1, 4)))
    assert (chosen.shape, judged.shape) == ((64, 129), (192, 129))
    assert len({*chosen.flatten().tolist(), *judged.flatten().tolist()}) == 256 * 129
    assert wide_lm.calibration()["tokens"].shape == (256, 128)


def test_shifted_windows_are_others_of_the_same_text() -> None:
    text, _ = wide_lm.documentation_bytes()
    for shift in (0.0, 0.5, 0.9):
        windows = wide_lm.calibration(shift)["tokens"]
        assert windows.shape == (256, 128)
        begin = int((255 + shift) * (len(text) // 256))
        assert torch.equal(windows[255], text[begin : begin + 128])
