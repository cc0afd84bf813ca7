"""The committed reference networks are what their training printed, and have what other tests rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tools import data, models
from tools.train_reference_models import jitter_images, predictor, train_classifier, train_lm

# printed by `python -m tools.train_reference_models`
ACCURACY = {
    "mobilenet": 0.9957,
    "mobilenet_relu": 0.9943,
    "mobilenet_spread": 0.9943,
    "mobilenet_high_bias": 0.9929,
    "residual_cnn": 0.9914,
}
# another processor's rounding may turn one undecided image of the 700; the table has four digits
ACCURACY_TOLERANCE = 1 / 700 + 5e-5
PERPLEXITY = 3.7118
CONV_NETS = list(ACCURACY)


def _inner_layers(model: nn.Module) -> list[models.ConvNormAct]:
    blocks = [m for m in model.modules() if isinstance(m, models.InvertedResidual)]
    return [layer for block in blocks for layer in (block.expand, block.depthwise)]


def _relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", models.FACTORIES)
def test_checkpoint_fits_its_factory(name: str) -> None:
    stored = load_file(models.CHECKPOINT_DIR / f"{name}.safetensors")
    model = models.load_reference(name)
    assert stored.keys() == model.state_dict().keys()
    assert not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, stored[key].to(value.dtype)), key
        assert bool(value.isfinite().all()), key
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", models.FACTORIES)
def test_factory_is_deterministic_and_leaves_the_random_state_alone(name: str) -> None:
    state = torch.get_rng_state()
    first = models.FACTORIES[name]().state_dict()
    torch.rand(1)
    second = models.FACTORIES[name]().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.set_rng_state(state)
    models.FACTORIES[name]()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CONV_NETS)
def test_accuracy_is_the_printed_one(name: str) -> None:
    measured = data.digits_accuracy(predictor(models.load_reference(name)))
    assert measured["accuracy"] == pytest.approx(ACCURACY[name], abs=ACCURACY_TOLERANCE)


def test_perplexity_is_the_printed_one() -> None:
    measured = data.lm_perplexity(predictor(models.load_reference("opt_lm")))
    # the table's last digit; float32 rounding of the logits moves the mean log-likelihood by about 1e-6
    assert measured["perplexity"] == pytest.approx(PERPLEXITY, abs=1e-4)


@pytest.mark.parametrize("name", [*CONV_NETS, "opt_lm"])
def test_exports_with_dynamic_axes(name: str) -> None:
    model = models.load_reference(name)
    batch = torch.export.Dim("batch")
    if name == "opt_lm":
        inputs = data.lm_calibration()["tokens"]
        # export guards on the example's strides, so a slice of a longer window would not do
        example, other = inputs[:2, :64].contiguous(), inputs[:5]
        shapes = {"tokens": {0: batch, 1: torch.export.Dim("seq", max=models.CONTEXT)}}
    else:
        inputs = data.digits_calibration()["x"]
        example, other = inputs[:2], inputs[:7]
        shapes = {"x": {0: batch}}
    program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    with torch.no_grad():
        exported, eager = program.module()(other), model(other)
    # the same float32 kernels on the same numbers; only their order of summation may differ
    assert _relative_difference(exported, eager) < 1e-5


def test_spread_keeps_the_function() -> None:
    x = load_file(data.DIGITS_TEST_FILE)["x"]
    with torch.no_grad():
        reference = models.load_reference("mobilenet_relu")(x)
        committed = models.load_reference("mobilenet_spread")(x)
        made = models.spread(models.load_reference("mobilenet_relu"), seed=3)(x)
    # each of the 12 rescaled layers rounds its weights and sums anew, at float32's 6e-8 times sqrt(288 terms) ~ 1e-6
    assert _relative_difference(committed, reference) < 2e-5
    assert _relative_difference(made, reference) < 2e-5


def test_spread_does_not_change_its_argument() -> None:
    model = models.mobilenet_relu()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    models.spread(model)
    models.raise_biases(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def _accuracy_with_int8_weights(name: str) -> float:
    """Accuracy with batch norm folded and each convolution's weight rounded to int8 by one scale."""
    model = models.load_reference(name)
    for layer in [m for m in model.modules() if isinstance(m, models.ConvNormAct)]:
        layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()  # type: ignore[assignment]
        scale = layer.conv.weight.abs().max() / 127
        layer.conv.weight.copy_((layer.conv.weight / scale).round() * scale)
    return data.digits_accuracy(predictor(model))["accuracy"]


def test_int8_weights_per_tensor_ruin_only_the_spread_variant() -> None:
    # rounding flips some of the images near a decision boundary: well under one in a hundred on a healthy network
    assert _accuracy_with_int8_weights("mobilenet_relu") > ACCURACY["mobilenet_relu"] - 0.01
    # ten classes: chance is 0.1
    assert _accuracy_with_int8_weights("mobilenet_spread") < 0.3


def test_high_bias_variant_has_channels_that_are_never_cut() -> None:
    for layer in _inner_layers(models.load_reference("mobilenet_high_bias")):
        high = layer.bn.bias > 3 * layer.bn.weight.abs()
        # a quarter was raised to 4 sigma and more; fine-tuning may take some of it back
        assert float(high.float().mean()) > 0.2


def test_raised_biases_are_compensated_where_nothing_is_cut_or_padded() -> None:
    x = data.digits_calibration()["x"][:32]
    model = models.load_reference("mobilenet_relu")
    for layer in [m for m in model.modules() if isinstance(m, models.ConvNormAct)]:
        if layer.conv.kernel_size == (3, 3):
            layer.conv.padding = (0, 0)
        layer.conv.stride = (1, 1)
        layer.act = nn.Identity()
    for block in [m for m in model.modules() if isinstance(m, models.InvertedResidual)]:
        block.residual = False
    x = x.repeat(1, 1, 2, 2)  # seven 3x3 convolutions without padding take 14 of the 16 pixels
    with torch.no_grad():
        # shifts of up to 10 sigma cancel again at every layer, so float32's 6e-8 is amplified some hundred times
        assert _relative_difference(models.raise_biases(model)(x), model(x)) < 1e-4


def test_calibration_images_are_not_test_images() -> None:
    calibration = data.digits_calibration()["x"].flatten(1)
    test = load_file(data.DIGITS_TEST_FILE)["x"].flatten(1)
    assert calibration.shape == (256, 64)
    assert test.shape == (700, 64)
    assert bool((torch.cdist(calibration, test) > 0).all())


def test_calibration_text_is_not_test_text() -> None:
    calibration = data.lm_calibration()["tokens"]
    test = load_file(data.LM_TEST_FILE)["tokens"]
    assert calibration.shape == (96, 128)
    assert calibration.dtype == torch.int64
    runs = {row[i : i + 64] for row in (bytes(row.tolist()) for row in calibration) for i in range(128 - 63)}
    assert not any(row[i : i + 64] in runs for row in (bytes(row.tolist()) for row in test) for i in range(129 - 63))


def test_committed_digits_come_from_scikit_learn() -> None:
    made = data.committed_data()
    for path in (data.DIGITS_CALIBRATION_FILE, data.DIGITS_TEST_FILE):
        committed = load_file(path)
        assert committed.keys() == made[path.name].keys()
        assert all(torch.equal(committed[key], made[path.name][key]) for key in committed)


def test_held_out_text_repeats_no_trained_paragraph() -> None:
    train, held_out = data.documentation_bytes()
    assert len(held_out) == (len(train) + len(held_out)) // 10
    trained, kept = (bytes(part.tolist()).split(b"\n\n") for part in (train, held_out))
    normal = [b" ".join(paragraph.split()) for paragraph in (*trained, *kept)]
    # the cut falls inside a paragraph and may leave a short piece that equals another
    assert len(normal) - len(set(normal)) <= 2


def test_every_tenth_file_of_the_library_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(f"{letter}.py" for letter in "abcdefghi"), "j/k.py", "l.txt", "test/m.py", "site-packages/n.py"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.stem)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    train, held_out = data.library_bytes()
    assert (bytes(train.tolist()), bytes(held_out.tolist())) == (b"abcdefghi", b"k")


def test_metrics_read_the_only_output_whatever_its_name() -> None:
    labels = load_file(data.DIGITS_TEST_FILE)["labels"]
    answers = iter(nn.functional.one_hot(labels, 10).split(100))
    assert data.digits_accuracy(lambda inputs: {"anything": next(answers).numpy()}) == {"accuracy": 1.0}
    uniform = data.lm_perplexity(lambda inputs: {"y": torch.zeros(*inputs["tokens"].shape, 256)})
    assert uniform["perplexity"] == pytest.approx(256, rel=1e-9)
    with pytest.raises(ValueError, match="too many values"):
        data.digits_accuracy(lambda inputs: {"a": inputs["x"], "b": inputs["x"]})


def test_jitter_keeps_shape_range_and_background() -> None:
    torch.manual_seed(0)
    x = data.digits_calibration()["x"]
    moved = jitter_images(x)
    assert moved.shape == x.shape
    # interpolation stays between its neighbours, up to rounding
    assert float(moved.min()) >= -1 - 1e-6
    assert float(moved.max()) <= 1 + 1e-6
    blank = torch.full((4, 1, 8, 8), -1.0)
    assert torch.equal(jitter_images(blank), blank)


def test_training_is_deterministic_and_learns() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(train_classifier(models.residual_cnn(), epochs=3, learning_rate=3e-3))
    first, second = (net.state_dict() for net in nets)
    assert all(torch.equal(first[key], second[key]) for key in first)
    # three of the sixty epochs: far from trained, far above the 0.1 of chance
    assert data.digits_accuracy(predictor(nets[0]))["accuracy"] > 0.5


def test_trained_language_model_is_exact_in_float16() -> None:
    torch.manual_seed(0)
    model = train_lm(models.opt_lm(), steps=2)
    assert not model.training
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())
