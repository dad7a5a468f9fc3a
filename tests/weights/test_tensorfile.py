"""Our writer against safetensors' own; the lazy reader; what is refused."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from slam_jax.errors import UserError
from slam_jax.weights import tensorfile


def some_tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"b.weight": (3, 4), "a.weight": (2, 3, 3, 3), "c": (), "ü.bias": (5,), "d": (0, 2)}
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_writes_the_bytes_that_safetensors_writes(tmp_path, dtype):
    # Names of several lengths, for the header's padding.
    for name in ("x", "xx", "xxxx"):
        tensors = {**some_tensors(dtype), name: np.ones(2, dtype)}
        tensorfile.write(tmp_path / "ours", tensors)
        safetensors.numpy.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_torch_reads_what_is_written_with_any_strides_and_dtype(tmp_path):
    tensors = {name: tensor.T for name, tensor in some_tensors().items()}
    tensorfile.write(tmp_path / "file", tensors, ml_dtypes.bfloat16)
    read = safetensors.torch.load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = torch.from_numpy(np.ascontiguousarray(tensor)).reshape(tensor.shape)
        assert torch.equal(read[name], expected.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reads_what_torch_writes(tmp_path, dtype):
    tensors = {"x": torch.randn(3, 4).to(dtype), "y": torch.randn(2, 1, 3, 3).to(dtype)}
    safetensors.torch.save_file(tensors, tmp_path / "file")
    read = tensorfile.read(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, stored in read.items():
        assert stored.shape == tuple(tensors[name].shape)
        array = np.asarray(stored)
        assert str(dtype) == f"torch.{array.dtype}"
        np.testing.assert_array_equal(array.astype(np.float32), tensors[name].float().numpy())


def test_a_weight_too_large_for_the_dtype_is_named(tmp_path):
    tensors = {"small": np.ones(2, np.float32), "large": np.array([1.0, 7e4], np.float32)}
    with pytest.raises(UserError, match=r"'large' holds 70000.0, too large for float16"):
        tensorfile.write(tmp_path / "file", tensors, np.float16)
    tensorfile.write(tmp_path / "file", {"inf": np.array([np.inf], np.float32)}, np.float16)


def test_integers_are_refused_when_they_are_to_be_used(tmp_path):
    safetensors.numpy.save_file({"x": np.ones(3, np.int8)}, tmp_path / "file")
    stored = tensorfile.read(tmp_path / "file")["x"]
    with pytest.raises(UserError, match="'x' is I8; .* not quantized"):
        np.asarray(stored)


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    tensors = {f"{i}": np.ones((500, 500), np.float32).T for i in range(20)}
    tracemalloc.start()
    tensorfile.write(tmp_path / "file", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * tensors["0"].nbytes


def test_rows_and_transposes_are_read_as_such(tmp_path):
    tensorfile.write(tmp_path / "file", {"x": np.arange(12, dtype=np.float32).reshape(6, 2)})
    stored = tensorfile.read(tmp_path / "file")["x"]
    for tensor, expected in (
        (tensorfile.rows(stored, 1, 3), [[4, 5], [6, 7]]),
        (tensorfile.transposed(stored), [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]),
    ):
        assert tensor.shape == np.shape(expected) and tensor.name == "x"
        np.testing.assert_array_equal(np.asarray(tensor), expected)
        assert np.asarray(tensor, np.float16).dtype == np.float16


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_stacked_tensors_are_written_as_one(tmp_path, dtype):
    parts = tuple(some_tensors()["a.weight"] + i for i in range(3))
    stacked = tensorfile.Stacked(parts)
    tensorfile.write(tmp_path / "file", {"x": stacked}, dtype)
    read = safetensors.torch.load_file(tmp_path / "file")["x"]
    expected = torch.cat([torch.from_numpy(part) for part in parts])
    assert (
        torch.equal(read, expected.to(read.dtype)) and str(read.dtype)[6:] == np.dtype(dtype).name
    )
    assert stacked.shape == expected.shape and stacked.size == expected.numel()
    with pytest.raises(UserError, match="'x' holds 70000.0, too large for float16"):
        tensorfile.write(
            tmp_path / "file",
            {"x": tensorfile.Stacked((parts[0], 7e4 * parts[0] ** 0))},
            np.float16,
        )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut short"),
        (b"\x08\x00\x00", "cut short"),
        (b"not tensors at all, but text", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/file .*{words}"):
        tensorfile.read(tmp_path / "file")


def test_a_truncated_file_is_refused_before_any_tensor_is_read(tmp_path):
    tensorfile.write(tmp_path / "file", some_tensors())
    whole = (tmp_path / "file").read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 9):
        (tmp_path / "file").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut short .* download it again"):
            tensorfile.read(tmp_path / "file")
    with pytest.raises(UserError, match="No such file"):
        tensorfile.read(tmp_path / "none")
