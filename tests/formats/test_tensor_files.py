"""Tensors read one by one into fresh memory."""

import pytest
import torch
from safetensors.torch import save_file

from utils.config.user_files import FileError
from utils.formats.tensor_files import TensorFile

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, 2], dtype=torch.int64),
    "c": torch.randn(3).bfloat16(),
    "d": torch.randn(3).half(),
    "e": torch.empty(0),
    "f": torch.tensor(2.5),
    "g": torch.tensor([True, False]),
    "h": torch.randn(4).to(torch.float8_e4m3fn),
}


def test_tensors_are_those_that_were_written(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"said": "so"})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert sorted(file.names) == sorted(TENSORS)
        assert file.metadata == {"said": "so"}
        for name, tensor in TENSORS.items():
            read = file.read(name)
            assert file.shape(name) == tuple(tensor.shape) == tuple(read.shape)
            assert read.dtype == tensor.dtype
            assert torch.equal(read.float(), tensor.float())


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b'\x09\0\0\0\0\0\0\0{"a":{}} '])
def test_a_broken_file_is_one_error(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FileError, match="whole safetensors"):
        TensorFile(tmp_path / "x.safetensors")


def test_a_file_that_ends_early_says_so(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-30])
    with TensorFile(tmp_path / "x.safetensors") as file, pytest.raises(FileError, match="ends before"):
        [file.read(name) for name in file.names]
