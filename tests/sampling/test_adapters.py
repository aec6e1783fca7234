"""Adapters of all kinds and formats at scales: what they make of a pipeline's weights."""

from dataclasses import replace

import pytest
import torch

from tests.adapters import Adapted
from utils.config.options import UserError
from utils.formats.adapter_writer import write_diffusers, write_kohya
from utils.models.adapter_components import base_of
from utils.models.adapter_layers import modules_of
from utils.models.scaled_adapters import ScaledAdapter
from utils.sampling.pipelines import PipelineSpec, load_pipeline

KINDS = ("lora", "dora", "loha", "lokr")


@pytest.fixture(scope="module")
def adapted(pipelines, tmp_path_factory):
    """For each kind a file in the UIs' names, the base's weights, and the changes by PEFT's own merge."""
    found = {}
    for kind in KINDS:
        made = Adapted(pipelines["sd"], kind)
        file = tmp_path_factory.mktemp("adapters") / f"{kind}.safetensors"
        write_kohya(made.layers, made.components, file, torch.float32, {})
        merged = made.merged()
        changes = {key: weight - made.weights[key] for key, weight in merged.items()}
        found[kind] = (str(file), made, changes)
    return found


def weights_with(folder, made, *adapters, scale=1.0):
    """The weights of a pipeline with adapters, by component and layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    pipeline = load_pipeline(PipelineSpec(str(folder), tuple(adapters), scale), torch.float32)
    found = {}
    for layer, module in zip(made.layers, modules_of(pipeline, made.layers), strict=True):
        if isinstance(module, BaseTunerLayer):
            module.merge()
        found[layer.component, layer.name] = base_of(module).weight.detach()
    return found


@pytest.mark.parametrize("scale", [1.0, 0.4, -0.5, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_is_a_factor_on_the_change_of_the_weights(adapted, pipelines, kind, scale):
    file, made, changes = adapted[kind]
    found = weights_with(pipelines["sd"], made, ScaledAdapter(file, 2 * scale), scale=0.5)
    for key, weight in found.items():
        expected = made.weights[key] + scale * changes[key]
        assert torch.equal(weight, made.weights[key]) if scale == 0 else torch.allclose(weight, expected, atol=1e-5), (
            key
        )


@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, "kohya") for kind in KINDS), ("lora", "diffusers"), ("dora", "diffusers")]
)
def test_all_layers_draw_and_none_trains(adapted, pipelines, tmp_path, kind, form):
    file = adapted[kind][0]
    if form == "diffusers":
        file = str(tmp_path / "lora.safetensors")
        write_diffusers(adapted[kind][1].layers, tmp_path / "lora.safetensors")
    pipeline = load_pipeline(PipelineSpec(str(pipelines["sd"]), (ScaledAdapter(file),)), torch.float32)
    modules = [module for root in (pipeline.unet, pipeline.text_encoder) for module in root.modules()]
    assert not any(module.training for module in modules)


def test_adapters_of_different_kinds_add_up(adapted, pipelines):
    scales = {"lora": 0.5, "loha": -0.25, "lokr": 2.0}
    found = weights_with(
        pipelines["sd"], adapted["lora"][1], *(ScaledAdapter(adapted[kind][0], each) for kind, each in scales.items())
    )
    for key, weight in found.items():
        change = sum(each * adapted[kind][2].get(key, 0) for kind, each in scales.items())
        assert torch.allclose(weight, adapted["lora"][1].weights[key] + change, atol=1e-5), key


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_model_is_refused_in_one_line(adapted, pipelines, kind):
    with pytest.raises(UserError, match=r"--lora .*another model") as raised:
        load_pipeline(PipelineSpec(str(pipelines["sdxl"]), (ScaledAdapter(adapted[kind][0], 0.0),)), torch.float32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("odd", ["magnitudes of inputs", "kinds"])
def test_what_peft_has_no_layers_for_is_merged_at_every_scale(adapted, pipelines, tmp_path, odd, scale):
    made = adapted["dora"][1]
    layers = [replace(layer, tensors=_with_inputs(layer)) for layer in made.layers]
    if odd == "kinds":
        layers = [
            *made.layers[:2],
            *(layer for layer in adapted["loha"][1].layers if layer.name != made.layers[0].name),
        ]
        layers = list({(layer.component, layer.name): layer for layer in layers}.values())
    write_kohya(layers, made.components, tmp_path / "odd.safetensors", torch.float32, {})
    found = weights_with(pipelines["sd"], made, ScaledAdapter(str(tmp_path / "odd.safetensors"), scale))
    for layer in layers:
        key = layer.component, layer.name
        torch.testing.assert_close(found[key], layer.merged(made.weights[key], scale) if scale else made.weights[key])


def _with_inputs(layer):
    return {**layer.tensors, "magnitude": torch.rand(1, layer.shape[1]) + 0.5}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_one_adapter_in_two_files_is_refused(adapted, pipelines, tmp_path, kind):
    file, made, _ = adapted[kind]
    write_diffusers(made.layers, tmp_path / "lora.safetensors", torch.float16)
    adapters = (ScaledAdapter(file, 0.5), ScaledAdapter(str(tmp_path / "lora.safetensors")))
    with pytest.raises(UserError, match=r"--lora .* is the same adapter as --lora "):
        load_pipeline(PipelineSpec(str(pipelines["sd"]), adapters), torch.float32)
