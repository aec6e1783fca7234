"""utils.tools.resize: smaller ranks in the names of the input."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import random_adapters
from tests.conftest import message
from utils.formats.adapter_files import read_adapter
from utils.tools.convert import main as convert
from utils.tools.resize import main


def resize(*words: object, expect: int = 0) -> None:
    assert main([str(word) for word in words]) == expect


@pytest.mark.parametrize(("name", "form"), [("sd", "kohya"), ("sd", "diffusers"), ("sdxl", "kohya")])
def test_each_layer_is_the_best_of_its_rank(name, form, pipelines, tmp_path):
    layers = random_adapters.write(pipelines[name], tmp_path / "a.safetensors", form, rank=6)
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--rank", 2)
    found = read_adapter(tmp_path / "b.safetensors", random_adapters.components(pipelines[name])).layers
    for each, layer in zip(found, layers, strict=True):
        assert each.rank == min(2, *layer.shape[:2])
        left, values, right = torch.linalg.svd(layer.delta().flatten(1), full_matrices=False)
        best = left[:, :2] @ torch.diag(values[:2]) @ right[:2]
        torch.testing.assert_close(each.delta().flatten(1), best, rtol=1e-3, atol=1e-4)
        assert each.scale == pytest.approx(layer.scale)


def test_names_metadata_and_smaller_layers_stay(pipelines, tmp_path):
    random_adapters.write(pipelines["sdxl"], tmp_path / "a.safetensors", rank=4)
    resize(tmp_path / "a.safetensors", tmp_path / "same.safetensors", "--rank", 4)
    resize(tmp_path / "a.safetensors", tmp_path / "small.safetensors", "--rank", 1, "--dtype", "bf16")
    before, same, small = (load_file(tmp_path / f"{name}.safetensors") for name in ("a", "same", "small"))
    assert before.keys() == same.keys() == small.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in before.items())
    with safe_open(tmp_path / "small.safetensors", "pt") as opened:
        said = opened.metadata()
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("1", "0.5")
    assert said["modelspec.merged_from"] == "a"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_stays(dtype, pipelines, tmp_path):
    random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", rank=4)
    held = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "a.safetensors").items()}
    save_file(held, tmp_path / "b.safetensors")
    resize(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--rank", 1)
    found = load_file(tmp_path / "c.safetensors")
    assert {tensor.dtype for name, tensor in found.items() if not name.endswith(".alpha")} == {dtype}


def test_energy_is_a_share_of_each_update(pipelines, tmp_path):
    layers = random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", rank=8)
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--energy", 0.7)
    found = read_adapter(tmp_path / "b.safetensors", random_adapters.components(pipelines["sd"])).layers
    for each, layer in zip(found, layers, strict=True):
        assert each.rank <= layer.rank
        lost = (each.delta() - layer.delta()).square().sum() / layer.delta().square().sum()
        assert lost <= 0.3 + 1e-4


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_kinds_become_lora_only_when_asked(kind, pipelines, tmp_path, capsys):
    layers = random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", kind=kind)
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--rank", 2, expect=2)
    assert "--to_lora" in message(capsys)
    resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--rank", 999, "--to_lora")
    found = read_adapter(tmp_path / "b.safetensors", random_adapters.components(pipelines["sd"])).layers
    for each, layer in zip(found, layers, strict=True):
        assert each.kind == "lora"
        torch.testing.assert_close(each.delta(), layer.delta(), rtol=1e-3, atol=1e-5)


def test_a_dora_keeps_its_magnitudes(pipelines, tmp_path, caplog):
    layers = random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors", kind="dora")
    with caplog.at_level("INFO"):
        resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--rank", 2)
    found = read_adapter(tmp_path / "b.safetensors", random_adapters.components(pipelines["sd"])).layers
    for each, layer in zip(found, layers, strict=True):
        assert torch.equal(each.tensors["magnitude"], layer.tensors["magnitude"])
    assert "magnitudes" in caplog.text


def flattened(pipeline, kind: str, scale: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A LoHa or LoKr of a convolution, with its kernel flattened into the factors; `scale` is a DoRA scale's shape."""
    (component, *_), layer = random_adapters.components(pipeline), "down_blocks.0.resnets.0.conv1"
    out, inner = component.shapes[layer][0], component.shapes[layer][1] * 9
    sizes = {f"hada_w{each}_{end}": shape for each in "12" for end, shape in (("a", (out, 2)), ("b", (2, inner)))}
    if kind == "lokr":
        sizes = {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, 2), "lokr_w2_b": (2, inner // 2)}
    dora = {"dora_scale": tuple({-1: out, -2: inner // 9}.get(size, size) for size in scale)} if scale else {}
    return {f"{component.ui_name(layer)}.{role}": torch.randn(shape) for role, shape in {**sizes, **dora}.items()}


@pytest.mark.parametrize("scale", [(-1, 1, 1, 1), (1, -2, 1, 1)])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_magnitudes_of_flattened_convolutions_keep_their_shape_without_the_base(kind, scale, pipelines, tmp_path):
    tensors = flattened(pipelines["sd"], kind, scale)
    save_file(tensors, tmp_path / "a.safetensors")
    given = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "kohya"]
    assert convert([str(each) for each in given]) == 0
    found = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_lora_of_flattened_convolutions_gets_their_kernel_from_the_base(kind, pipelines, tmp_path, capsys):
    save_file(flattened(pipelines["sd"], kind, (-1, 1, 1, 1)), tmp_path / "a.safetensors")
    given = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--rank", 999, "--to_lora"]
    resize(*given, expect=2)
    assert "--pipeline" in message(capsys)
    resize(*given, "--pipeline", pipelines["sd"])
    components = random_adapters.components(pipelines["sd"])
    (before,), (after,) = (read_adapter(tmp_path / f"{name}.safetensors", components).layers for name in "ab")
    shapes = {name.split(".", 1)[1]: each.shape for name, each in load_file(tmp_path / "b.safetensors").items()}
    assert shapes["lora_down.weight"][2:] == (3, 3)
    assert shapes["dora_scale"][1:] == (1, 1, 1)
    torch.testing.assert_close(after.delta(), before.delta(), rtol=1e-3, atol=1e-3)


def test_what_can_not_be_resized_is_one_line(pipelines, tmp_path, capsys):
    random_adapters.write(pipelines["sd"], tmp_path / "a.safetensors")
    for words, said in {
        (tmp_path / "a.safetensors", tmp_path / "b.safetensors"): "--rank",
        (tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--rank", 0): "--rank",
        (tmp_path / "a.safetensors", tmp_path / "a.safetensors", "--rank", 1): "would replace",
        (tmp_path / "a.safetensors", tmp_path / "b", "--rank", 1): "OUT",
        (pipelines["sd"], tmp_path / "b.safetensors", "--rank", 1): "IN",
    }.items():
        resize(*words, expect=2)
        assert said in message(capsys), words
