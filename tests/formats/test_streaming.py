"""Safetensors files written tensor by tensor."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils.formats.streaming import DTYPES, HASH_KEY, StreamedTensor, write_streamed


def values_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) * 37 % 11 - 3).reshape(shape).to(dtype)


TENSORS = {f"{index} {dtype}": values_of(dtype, 3, index + 1) for index, dtype in enumerate(DTYPES)}
TENSORS |= {"a scalar": torch.tensor(2.5), "empty": torch.zeros(0), "b.weight": torch.ones(2, 2).half()}


def streamed(tensors: dict[str, torch.Tensor]) -> list[StreamedTensor]:
    return [
        StreamedTensor(name, each.dtype, tuple(each.shape), lambda each=each: each) for name, each in tensors.items()
    ]


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_files_are_those_of_the_library_byte_for_byte(tmp_path, metadata):
    write_streamed(streamed(TENSORS), tmp_path / "own", metadata)
    save_file(TENSORS, tmp_path / "library", metadata or None)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "library").read_bytes()


def test_values_are_read_when_written_and_converted(tmp_path):
    read = []

    def values(name: str) -> torch.Tensor:
        read.append(name)
        return torch.full((2, 3), 1.0 + 2**-9).t()

    tensors = [StreamedTensor(name, torch.float16, (3, 2), lambda name=name: values(name)) for name in "ba"]
    write_streamed(tensors, tmp_path / "new" / "x.safetensors", {})
    assert read == ["a", "b"]
    found = load_file(tmp_path / "new" / "x.safetensors")
    assert all(torch.equal(each, torch.full((3, 2), 1.0 + 2**-9).half()) for each in found.values())
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_the_hash_is_of_all_bytes_after_the_header(tmp_path):
    file = tmp_path / "x"
    metadata = {"modelspec.title": "Größe \U0001f600 \n", HASH_KEY: "anything"}
    returned = write_streamed(streamed(TENSORS), file, metadata)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert hashlib.sha256(data[8 + length :]).hexdigest() == returned
    assert json.loads(data[8 : 8 + length])["__metadata__"] == metadata | {HASH_KEY: f"0x{returned}"}
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == metadata | {HASH_KEY: f"0x{returned}"}


@pytest.mark.parametrize("wrong", ["name", "shape", "reading"])
def test_a_file_that_cannot_be_written_leaves_the_earlier_one(tmp_path, wrong):
    file = tmp_path / "x"
    file.write_text("earlier")
    tensors = streamed({"a": torch.ones(2), "b": torch.ones(2)})

    def fail() -> torch.Tensor:
        raise ValueError("no")

    if wrong == "name":
        tensors[1] = tensors[0]
    elif wrong == "shape":
        tensors[1] = StreamedTensor("b", torch.float32, (3,), lambda: torch.ones(2))
    else:
        tensors[1] = StreamedTensor("b", torch.float32, (3,), fail)
    with pytest.raises(ValueError):
        write_streamed(tensors, file, {})
    assert file.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
