"""Several adapters on one pipeline: scales that change, and a pipeline as it was once they are removed."""

import pytest
import torch

from tests.adapters import Adapted
from utils.formats.adapter_writer import write_diffusers, write_kohya


@pytest.fixture(scope="module")
def files(pipelines, tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for kind in ("lora", "dora", "loha", "lokr"):
        adapted = Adapted(pipelines["sd"], kind)
        write_kohya(adapted.layers, adapted.components, folder / f"{kind}.safetensors", torch.float32, {})
        found[kind] = (folder / f"{kind}.safetensors", adapted)
    write_diffusers(found["dora"][1].layers, folder / "dora of diffusers.safetensors")
    found["dora of diffusers"] = (folder / "dora of diffusers.safetensors", found["dora"][1])
    return found


@pytest.fixture
def pipeline(pipelines):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(pipelines["sd"])


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}


def read(pipeline, file):
    from utils.models.adapter_components import components_of
    from utils.models.lora_files import read_checked

    return read_checked(file, components_of(pipeline), "--lora x").layers


def noise_of(pipeline) -> torch.Tensor:
    torch.manual_seed(0)
    latents, states = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 32)
    with torch.no_grad():
        return pipeline.unet(latents, 7, states).sample


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "dora of diffusers"])
def test_a_strength_of_1_is_the_adapter_and_0_the_base(files, pipeline, kind):
    from utils.models.adapter_layers import MergedAdapters

    base, plain = weights(pipeline), noise_of(pipeline)
    file, adapted = files[kind]
    adapters = MergedAdapters(pipeline)
    adapters.add("a", read(pipeline, file))
    assert torch.equal(noise_of(pipeline), plain)
    adapters.set_strengths({"a": 1.0})
    wanted = noise_of(adapted.pipeline)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    torch.testing.assert_close(noise_of(pipeline), wanted, atol=1e-4, rtol=1e-4)
    adapters.set_strengths({"a": 0.5})
    half = noise_of(pipeline)
    assert not torch.allclose(half, wanted, atol=1e-4)
    assert not torch.allclose(half, plain, atol=1e-4)
    adapters.remove()
    assert all(torch.equal(tensor, base[name]) for name, tensor in weights(pipeline).items())


def test_adapters_of_several_kinds_add_up_whatever_was_set_before(files, pipeline):
    from utils.models.adapter_layers import MergedAdapters

    adapters = MergedAdapters(pipeline)
    for kind in ("lora", "loha", "lokr"):
        adapters.add(kind, read(pipeline, files[kind][0]))
    strengths = {"lora": 0.5, "loha": 0.5, "lokr": 0.5}
    adapters.set_strengths(strengths)
    first = noise_of(pipeline)
    adapters.set_strengths({"loha": 2.0, "lora": 0.0})
    assert not torch.allclose(noise_of(pipeline), first, atol=1e-4)
    adapters.set_strengths(strengths)
    assert torch.equal(noise_of(pipeline), first)


def test_adapters_add_precisely_and_are_rounded_once(files, pipeline):
    from utils.models.adapter_layers import MergedAdapters

    pipeline.unet.half()
    layers = files["loha"][1].layers
    name = next(layer.name for layer in layers if layer.component == "unet")
    base = pipeline.unet.get_submodule(name).weight.clone()
    merged = MergedAdapters(pipeline)
    for adapter in ("a", "b", "c"):
        merged.add(adapter, [layer for layer in layers if layer.component == "unet"])
    merged.set_strengths({"a": 0.1, "b": 0.1, "c": 0.1})
    delta = next(layer for layer in layers if layer.name == name).delta()
    wanted = (base.double() + 3 * (0.1 * delta.double())).half()
    assert torch.equal(pipeline.unet.get_submodule(name).weight, wanted)


def test_dora_is_relative_to_the_base_in_any_order_and_as_the_tools_merge_it(files, pipeline):
    from utils.models.adapter_components import base_of
    from utils.models.adapter_layers import MergedAdapters, modules_of

    strengths = {"lora": 0.5, "dora": 0.75, "loha": -1.5}
    layers = {kind: read(pipeline, files[kind][0]) for kind in strengths}
    changed = [layer for layer in layers["dora"] if layer.component == "unet"]
    base = [base_of(module).weight.detach().clone() for module in modules_of(pipeline, changed)]
    found = []
    for order in (("lora", "dora", "loha"), ("loha", "dora", "lora"), ("dora", "loha", "lora")):
        merged = MergedAdapters(pipeline)
        for kind in order:
            merged.add(kind, layers[kind])
        merged.set_strengths(strengths)
        found.append(weights(pipeline))
        merged.remove()
    for layer, weight in zip(changed, base, strict=True):
        own = [
            (each, strengths[kind])
            for kind in strengths
            for each in layers[kind]
            if (each.component, each.name) == (layer.component, layer.name)
        ]
        wanted = weight + sum(strength * (each.merged(weight) - weight) for each, strength in own)
        torch.testing.assert_close(found[0][f"{layer.name}.weight"], wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(each[name], found[0][name]) for each in found[1:] for name in each)
