"""Where samples come from, what does not fit, and who sees which."""

import io
import json
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter import sample_files
from exporter.capture import flatten
from exporter.errors import InputError
from exporter.recipe_values import InputSpec
from exporter.sample_inputs import Wanted, example_of, index_bounds, wanted_of
from exporter.samples import Samples, fixed_batch, from_example, gather, load_samples, split, synthetic

X = torch.arange(48, dtype=torch.float32).view(12, 4)
WANTED = [Wanted("x", (None, 4), torch.float32)]


def refusal(value: object, wanted: list[Wanted] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        gather(value, WANTED if wanted is None else wanted, 512, source="data")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path: Path, kind: str) -> Path:
    arrays = {"x": X.numpy()}
    if kind == "safetensors":
        save_file({"x": X}, path)
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **arrays)
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, X.numpy())
    elif kind == "pt":
        torch.save({"x": X}, path)
    else:
        torch.save({"x": X}, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "npz", "npy", "pt", "legacy"])
def test_a_file_is_told_by_its_bytes_and_read_up_to_the_count(tmp_path: Path, kind: str) -> None:
    samples = load_samples(str(save(tmp_path / "calibration.bin", kind)), WANTED, 10)
    assert torch.equal(samples.values["x"], X[:10])
    assert samples.source == "calibration.bin"


def test_the_hash_is_of_the_contents_whatever_carries_them(tmp_path: Path) -> None:
    hashes = {load_samples(str(save(tmp_path / kind, kind)), WANTED, 512).sha256 for kind in ("npz", "pt", "npy")}
    assert len(hashes) == 1
    assert gather({"x": X + 1}, WANTED, 512, source="").sha256 not in hashes


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_in_another_order_or_byte_order_keep_their_values(tmp_path: Path, order: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.asarray(X.numpy(), dtype=">f4", order=order))
    assert torch.equal(load_samples(str(path), WANTED, 512).values["x"], X)


class Marker:
    """Leaves a mark when it is unpickled."""

    path = ""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("kind", ["pt", "npy", "npz"])
def test_nothing_is_unpickled(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil"
    evil = Marker()
    evil.path = str(mark)
    with path.open("wb") as file:
        if kind == "pt":
            torch.save({"x": evil}, file)
        elif kind == "npy":
            np.save(file, np.array([evil], dtype=object), allow_pickle=True)
        else:
            np.savez(file, x=np.array([evil], dtype=object))
    with pytest.raises(InputError, match="--calib"):
        load_samples(str(path), WANTED, 512)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04 cut off", "damaged"),
        (bytes(range(128, 256)), "neither arrays nor text"),
        (b"\x93NUMPY\x01", "damaged"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "damaged safetensors"),
        (b"some text to read", "tokenizer"),
    ],
)
def test_files_that_hold_no_arrays_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_samples(str(path), WANTED, 512)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"--calib nowhere\.npz: no such file"):
        load_samples("nowhere.npz", WANTED, 512)


# What a user's function or loader gives.


def test_batches_are_joined_and_reading_stops_at_the_count() -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield X, torch.zeros(12)  # inputs, labels

    assert gather(endless(), WANTED, 30, source="loader").count == 30


def test_two_inputs_take_the_entries_of_a_batch_in_order() -> None:
    wanted = [Wanted("a", (None, 4)), Wanted("b", (None,))]
    samples = gather([(X, torch.arange(12)), (X, torch.arange(12))], wanted, 512, source="loader")
    assert samples.values["b"].tolist() == [*range(12), *range(12)]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("calibration_functions")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def test_a_function_is_called(module: types.ModuleType) -> None:
    module.batches = lambda: [{"x": X}, {"x": X}]
    assert load_samples("calibration_functions:batches", WANTED, 512).count == 24


def test_a_function_that_fails_is_the_users_to_mend(module: types.ModuleType) -> None:
    def fails() -> None:
        raise RuntimeError("no data\nhere")

    module.fails = fails
    with pytest.raises(InputError, match="calibration_functions:fails failed: RuntimeError: no data here"):
        load_samples("calibration_functions:fails", WANTED, 512)
    with pytest.raises(InputError, match="has no nothing"):
        load_samples("calibration_functions:nothing", WANTED, 512)


# What does not fit the model.


def test_names_shapes_and_types_are_checked() -> None:
    assert "no input 'y'; did you mean" not in refusal({"y": X})
    assert "no input 'xx'; did you mean x?" in refusal({"x": X, "xx": X})
    assert "nothing for input 'x'" in refusal({})
    assert "x has shape [12, 5], the model takes [samples, 4]" in refusal({"x": torch.ones(12, 5)})
    assert "x has shape [12], the model takes [samples, 4]" in refusal({"x": torch.ones(12)})
    assert "x is int64, the model takes float32" in refusal({"x": X.long()})
    assert "ids is float32, the model takes int64" in refusal({"ids": X}, [Wanted("ids", (None, 4), torch.int64)])
    assert "different numbers of samples: a 12, b 3" in refusal({"a": X, "b": X[:3]}, [Wanted("a"), Wanted("b")])
    assert "x is an array of type <U1" in refusal({"x": np.array(["a"])})
    assert "a list, not an array" in refusal({"x": [1.0]})


def test_no_samples_are_refused() -> None:
    assert "x has no samples" in refusal({"x": X[:0]})
    assert "gives no batches" in refusal([])
    assert "gives a NoneType" in refusal(None)
    assert "its samples are empty" in refusal({"x": torch.ones(3, 0)}, [Wanted("x")])
    assert "axis 0 must count samples" in refusal({"x": torch.tensor(1.0)})


def test_batches_that_do_not_go_together_are_refused() -> None:
    assert "different shapes: [12, 4] and [3, 5]" in refusal([X, X, torch.ones(3, 5)])
    assert "batch 1 has other inputs" in refusal([{"x": X}, {"z": X}])
    assert "1 array for the inputs a, b" in refusal(X, [Wanted("a"), Wanted("b")])


def test_an_array_needs_a_name_when_the_inputs_are_not_known() -> None:
    with pytest.raises(InputError, match="an array without a name"):
        gather(X, None, 512, source="data")
    assert list(gather({"any": X}, None, 512, source="data").values) == ["any"]


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
def test_values_that_are_not_finite_are_named(value: float, said: str) -> None:
    faulty = X.clone()
    faulty[7, 2] = value
    assert f"x holds {said} in 1 of 12 samples, the first is sample 7" in refusal({"x": faulty})


def test_a_type_of_the_same_kind_is_converted_if_it_holds_the_values() -> None:
    assert gather({"x": X.double()}, WANTED, 512, source="").values["x"].dtype == torch.float32
    assert "x as float32 holds infinity" in refusal({"x": X.double() * 1e300})
    small = [Wanted("ids", (None,), torch.int8)]
    assert "ids holds values beyond int8" in refusal({"ids": torch.tensor([1, 300])}, small)


def test_an_axis_that_is_free_takes_any_size() -> None:
    assert gather({"x": torch.ones(2, 9)}, [Wanted("x", (None, None))], 512, source="").count == 2


# Who sees which.


def samples_of(count: int) -> Samples:
    return gather({"i": torch.arange(count)}, None, 512, source="data")


def rows(batches: Sequence[Mapping[str, Tensor]]) -> list[int]:
    return [int(value) for batch in batches for value in batch["i"]]


def test_every_fifth_sample_is_held_out() -> None:
    calibration, warnings = split(samples_of(12), batch=4)
    assert rows(calibration.holdout) == [4, 9]
    assert rows(calibration.batches) == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert [len(batch["i"]) for batch in calibration.batches] == [4, 4, 2]
    assert warnings == ()


def test_fewer_than_five_samples_serve_as_both_with_a_warning() -> None:
    calibration, warnings = split(samples_of(4))
    assert rows(calibration.batches) == rows(calibration.holdout) == [0, 1, 2, 3]
    assert "only 4 samples" in warnings[0]


def test_a_fixed_batch_is_held_out_whole_and_the_rest_dropped() -> None:
    calibration, _ = split(samples_of(11), batch=2, fixed=True)
    assert rows(calibration.holdout) == [8, 9]
    assert all(len(batch["i"]) == 2 for batch in (*calibration.batches, *calibration.holdout))
    with pytest.raises(InputError, match="3 samples of data, but the model takes batches of 4"):
        split(samples_of(3), batch=4, fixed=True)


def test_the_fixed_batch_is_that_of_all_inputs() -> None:
    assert fixed_batch([Wanted("a", (None, 3)), Wanted("b", (None,))]) is None
    assert fixed_batch([Wanted("a", (2, 3)), Wanted("b", (2,))]) == 2
    with pytest.raises(InputError, match="a 2, b free"):
        fixed_batch([Wanted("a", (2, 3)), Wanted("b", (None,))])


# Without data.


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.scale = nn.Linear(4, 4)

    def forward(self, input: Tensor, ids: Tensor) -> Tensor:
        value: Tensor = self.scale(input) + self.table(ids.long())
        return value


def exported() -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim.DYNAMIC}
    example = (torch.ones(2, 4), torch.zeros(2, dtype=torch.int32))
    return torch.export.export(TwoInputs(), example, dynamic_shapes=(batch, batch))


def test_the_inputs_and_examples_of_an_exported_program() -> None:
    program = exported()
    assert wanted_of(program) == (
        Wanted("input", (None, 4), torch.float32),
        Wanted("ids", (None,), torch.int32),
    )
    assert {name: tuple(value.shape) for name, value in example_of(program).items()} == {"input": (2, 4), "ids": (2,)}


def test_synthetic_indices_stay_inside_the_table() -> None:
    bounds = index_bounds(flatten(exported())[0])
    assert bounds == {"ids": 7}
    inputs = [InputSpec("input", (2, 4)), InputSpec("ids", (2,), "int32"), InputSpec("mask", (2,), "int64")]
    samples = synthetic(inputs, 200, seed=0, bounds=bounds)
    assert sorted(set(samples.values["ids"].tolist())) == list(range(7))
    assert bool((samples.values["mask"] == 1).all())
    assert "no calibration data" in samples.warnings[0]
    assert samples.sha256 == synthetic(inputs, 200, seed=0, bounds=bounds).sha256
    assert samples.sha256 != synthetic(inputs, 200, seed=1, bounds=bounds).sha256


def test_the_warning_about_synthetic_data_outlives_the_split() -> None:
    _, warnings = split(synthetic([InputSpec("x", (1, 4))], 8, seed=0))
    assert "random numbers" in warnings[0]
    calibration, warnings = from_example({"x": X})
    assert calibration.batches == calibration.holdout
    assert "example inputs" in warnings[0]


# Text.


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<eos>": 0, "a": 1, "b": 2, "c": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="?").save_pretrained(folder)
    return folder


@pytest.mark.hf
def test_text_is_cut_into_windows_of_tokens(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "text"
    path.write_text("a b c a b c a b")
    wanted = [Wanted("input_ids", (None, 3), torch.int64), Wanted("attention_mask", (None, 3), torch.int64)]
    samples = load_samples(str(path), wanted, 512, tokenizer=tokenizer_folder)
    assert samples.values["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert samples.values["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.hf
def test_lines_of_json_follow_each_other_with_the_end_token_between(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("a b", "c")))
    wanted = [Wanted("input_ids", (None, None), torch.int64)]
    samples = load_samples(str(path), wanted, 512, tokenizer=tokenizer_folder)
    assert samples.values["input_ids"].tolist() == [[1, 2, 0, 3, 0]]
    path.write_text('{"text": "a"}\n{"txt": "b"}')
    with pytest.raises(InputError, match="line 2"):
        load_samples(str(path), wanted, 512, tokenizer=tokenizer_folder)


@pytest.mark.hf
def test_too_little_text_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "text"
    path.write_text("a b")
    with pytest.raises(InputError, match="2 tokens, a sample needs 3"):
        load_samples(str(path), [Wanted("input_ids", (None, 3))], 512, tokenizer=tokenizer_folder)
    with pytest.raises(InputError, match="no tokenizer in"):
        load_samples(str(path), [Wanted("input_ids", (None, 3))], 512, tokenizer=tmp_path)


# Damage, and what takes more than a file has bytes.


def test_a_npz_that_would_swell_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "swollen.npz"
    np.savez_compressed(path, x=np.zeros((1 << 20, 4), np.float32))
    assert len(load_samples(str(path), WANTED, 10).values["x"]) == 10
    monkeypatch.setattr(sample_files, "MAX_EXPANDED", 1 << 20)
    with pytest.raises(InputError, match=r"damaged: \d+ bytes that expand to 16777344"):
        load_samples(str(path), WANTED, 10)


def test_a_npz_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "claims.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50, 4)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content.getvalue() + bytes(64))
    with pytest.raises(InputError, match=r"\[1125899906842624, 4\] of float32 are not its 64 bytes"):
        load_samples(str(path), WANTED, 1)


def test_a_pt_that_would_swell_is_refused(tmp_path: Path) -> None:
    stored = save(tmp_path / "stored", "pt")
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(InputError, match="compressed members"):
        load_samples(str(tmp_path / "a"), WANTED, 1)


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("x.npy", b"nothing")
    with pytest.raises(InputError, match="damaged"):
        load_samples(str(tmp_path / "a"), WANTED, 1)


def test_a_file_is_not_told_by_its_ending(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", "pt")
    assert torch.equal(load_samples(str(path), WANTED, 10).values["x"], X[:10])


def test_members_that_point_elsewhere_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.npz"
    path.parent.mkdir()
    array = io.BytesIO()
    np.save(array, X.numpy())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../x.npy", array.getvalue())
    with pytest.raises(InputError, match="no input"):
        load_samples(str(path), WANTED, 10)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.npz", "folder"]


def test_lines_nested_too_deep_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match="--calib"):
        load_samples(str(tmp_path / "a.jsonl"), WANTED, 10)
