"""Adapters written in the names of UIs and of diffusers, read back by both readers, and applied by hand."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.adapters import Adapted, configs
from tests.conftest import mostly_slow
from utils.formats.adapter_files import read_adapter
from utils.formats.adapter_writer import kohya_tensors, write_diffusers, write_kohya
from utils.formats.ui_reader import read_as_ui, ui_names

ROUNDING = 2e-7  # of float32 products in another order, of values below 1


def table_of(adapted: Adapted) -> dict:
    unet, *encoders = adapted.components
    return ui_names(unet.shapes, [each.shapes for each in encoders])


def closest(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("base", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", mostly_slow(configs(), "lora", "lokr"))
def test_a_file_for_uis_is_read_completely_and_changes_the_weights_as_peft_does(pipelines, tmp_path, base, kind):
    adapted = Adapted(pipelines[base], kind)
    file = tmp_path / "adapter.safetensors"
    write_kohya(adapted.layers, adapted.components, file, torch.float32, {})

    # Nothing is unknown to the UIs, and no tensor is left out.
    found = read_as_ui(file, table_of(adapted))
    assert not found.unknown
    assert not found.unread
    assert len(found.updates) == len(adapted.layers)

    # The tensors are the run's, and both readers change the weights as PEFT does.
    again = read_adapter(file, adapted.components).layers
    merged = adapted.merged()
    order = [each.name for each in adapted.components]
    by_place = {(layer.component, layer.name): layer for layer in again}
    for layer in adapted.layers:
        place = (layer.component, layer.name)
        back = by_place[place]
        assert set(back.tensors) == set(layer.tensors)
        if not layer.has_whole_factors:  # their scale is multiplied into one of them
            assert all(torch.equal(back.tensors[role], each) for role, each in layer.tensors.items())
        update = found.updates[order.index(layer.component), layer.name]
        for weight in (back.merged(adapted.weights[place]), update.merged(adapted.weights[place])):
            assert closest(weight, merged[place]) < ROUNDING * max(1.0, float(merged[place].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_has_the_tensors_rounded_once(pipelines, dtype):
    adapted = Adapted(pipelines["sd"], "lokr of whole factors")
    tensors = kohya_tensors(adapted.layers, adapted.components, dtype)
    layer = adapted.layers[0]
    owner = adapted.components[0].ui_name(layer.name)
    assert layer.scale != 1.0
    assert torch.equal(tensors[f"{owner}.lokr_w1"], (layer.tensors["lokr_w1"] * layer.scale).to(dtype))
    assert torch.equal(tensors[f"{owner}.lokr_w2"], layer.tensors["lokr_w2"].to(dtype))


def test_an_alpha_that_half_precision_can_not_represent_stays_in_float32(pipelines):
    adapted = Adapted(pipelines["sd"], "rslora", text_encoders=False)
    tensors = kohya_tensors(adapted.layers, adapted.components, torch.float16)
    alphas = [each for name, each in tensors.items() if name.endswith(".alpha")]
    assert all(float(each) == pytest.approx(5 * 3**0.5, rel=1e-6) for each in alphas)
    assert all(each.dtype == torch.float16 for name, each in tensors.items() if not name.endswith(".alpha"))


@pytest.mark.parametrize("kind", ["patterns", "rslora", "dora"])
def test_a_file_for_diffusers_has_each_layers_rank_and_alpha(pipelines, tmp_path, kind):
    adapted = Adapted(pipelines["sdxl"], kind)
    write_diffusers(adapted.layers, tmp_path / "lora.safetensors")
    again = {
        (each.component, each.name): each
        for each in read_adapter(tmp_path / "lora.safetensors", adapted.components).layers
    }
    assert len(again) == len(adapted.layers)
    for layer in adapted.layers:
        back = again[layer.component, layer.name]
        assert (back.rank, back.alpha) == (layer.rank, layer.alpha)
        assert all(torch.equal(back.tensors[role], each) for role, each in layer.tensors.items())


def test_uis_know_a_file_by_the_hash_of_its_data(pipelines, tmp_path):
    import hashlib

    adapted = Adapted(pipelines["sd"], "lora", text_encoders=False)
    write_kohya(adapted.layers, adapted.components, tmp_path / "a.safetensors", torch.float16, {"ss_v2": "False"})
    content = (tmp_path / "a.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[begin:]).hexdigest()
    assert len(metadata["sshs_legacy_hash"]) == 8


REFUSED = {
    "a tensor of another kind": (lambda name: name.replace("lora_down", "oft_blocks"), "OFT file of another tool"),
    "an unknown tensor": (lambda name: name.replace("lora_down", "lora_sideways"), "are not of an adapter"),
    "another layer": (lambda name: name.replace("to_k", "to_j"), "are not in this model"),
    "no factor": (lambda name: name.replace(".lora_down.weight", ".hada_w1_a"), "it lacks hada_w1_b"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_file_that_would_be_read_in_part_is_refused(pipelines, tmp_path, change):
    rename, said = REFUSED[change]
    adapted = Adapted(pipelines["sd"], "lora", text_encoders=False)
    tensors = kohya_tensors(adapted.layers, adapted.components, torch.float32)
    save_file({rename(name): each for name, each in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=said):
        read_adapter(tmp_path / "a.safetensors", adapted.components)


def test_both_spellings_of_the_unet_and_flat_matrices_of_convolutions_are_read(pipelines, tmp_path):
    adapted = Adapted(pipelines["sdxl"], "lora", text_encoders=False)
    unet = adapted.components[0]
    write_kohya(adapted.layers, adapted.components, tmp_path / "a.safetensors", torch.float32, {})
    tensors = load_file(tmp_path / "a.safetensors")
    spelled = {unet.ui_name(name): f"lora_unet_{name.replace('.', '_')}" for name in unet.original}
    others = {f"{spelled[name.partition('.')[0]]}.{name.partition('.')[2]}": each for name, each in tensors.items()}
    flat = {
        name: each.flatten(1) if each.dim() == 4 and each.shape[2:] == (1, 1) else each for name, each in others.items()
    }
    assert set(flat) != set(tensors)
    save_file({name: each.contiguous() for name, each in flat.items()}, tmp_path / "b.safetensors")
    one, other = (read_adapter(tmp_path / f"{each}.safetensors", adapted.components).layers for each in "ab")
    for first, second in zip(one, other, strict=True):
        assert (first.name, first.alpha) == (second.name, second.alpha)
        assert all(torch.equal(first.tensors[role], second.tensors[role]) for role in first.tensors)
