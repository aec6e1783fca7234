"""The check of an adapter's effect allows what rounding explains, and no more."""

from dataclasses import replace

import pytest
import torch

from tests.adapters import Adapted, configs
from utils.exports import adapter_check
from utils.exports.adapter_check import check_adapter_files
from utils.exports.adapter_effect import rounding_error
from utils.formats.adapter_writer import write_kohya

KINDS, FAST = configs(), ("dora", "lokr of whole factors")
HALVES = [torch.float16, torch.bfloat16]


def checked(adapted: Adapted, file, dtype: torch.dtype) -> list[str]:
    write_kohya(adapted.layers, adapted.components, file, dtype, {})
    return check_adapter_files(adapted.layers, adapted.pipeline, {}, {file: dtype})


def shrink(adapted: Adapted, factor: float) -> None:
    """Multiplies all tensors, which PEFT's modules share with the layers."""
    modules = adapter_check.modules_of(adapted.pipeline, adapted.layers)
    for number, (layer, module) in enumerate(zip(adapted.layers, modules, strict=True)):
        held = adapter_check._held(layer, module)
        for role, tensor in held.tensors.items():
            if role != "magnitude":
                tensor.mul_(factor)
        adapted.layers[number] = replace(layer, tensors=held.tensors)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_error_of_rounding_is_half_a_step(dtype):
    values = torch.logspace(-12, 4, 1000) * torch.linspace(1, 1.9, 1000)
    assert bool(((values.to(dtype).float() - values).abs() <= rounding_error(values, dtype)).all())
    assert rounding_error(torch.tensor([1e5]), torch.float16).isinf()


@pytest.mark.parametrize(
    "kind", [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in KINDS]
)
def test_small_values_are_right_in_every_dtype(pipelines, tmp_path, kind):
    adapted = Adapted(pipelines["sd"], kind, text_encoders=False)
    for factor, dtype in ((1.0, torch.bfloat16), (1e-5, torch.float16)):
        shrink(adapted, factor)
        assert checked(adapted, tmp_path / "a.safetensors", dtype) == []


def test_values_that_become_0_are_one_warning(pipelines, tmp_path, caplog):
    adapted = Adapted(pipelines["sd"], "loha", text_encoders=False)
    shrink(adapted, 1e-9)
    assert checked(adapted, tmp_path / "a.safetensors", torch.float16) == []
    (record,) = [each.getMessage() for each in caplog.records if "are 0 in fp16" in each.getMessage()]
    assert "give --export_dtype bf16" in record


@pytest.mark.parametrize("kind", ["dora", pytest.param("lokr with cores", marks=pytest.mark.slow)])
def test_another_effect_is_found_in_every_layer(pipelines, tmp_path, kind, monkeypatch):
    adapted = Adapted(pipelines["sd"], kind, text_encoders=False)
    full: list[object] = []
    effect = adapter_check._has_same_effect
    monkeypatch.setattr(adapter_check, "_has_same_effect", lambda *given: full.append(given) or effect(*given))
    assert checked(adapted, tmp_path / "a.safetensors", torch.float32) == []
    assert 0 < len(full) < len(adapted.layers)
    for module in adapter_check.modules_of(adapted.pipeline, adapted.layers):
        module.scaling[next(iter(module.r))] *= 1.001
    (fault,) = checked(adapted, tmp_path / "a.safetensors", torch.float32)
    assert f"{len(adapted.layers)} layers or tensors change the weights in another way" in fault
