"""Compiled denoisers: their blocks, their graphs, and the gate that their gradients pass."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.comparing import losses, weights
from tests.unets import NAMES, unet_and_inputs
from utils.config.options import UserError
from utils.training.backward import Gradients
from utils.training.speed import (
    Compilation,
    Reference,
    check_errors,
    compile_checked,
    compile_denoiser,
    compiled_part,
    repeated_blocks,
)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile by Dynamo and AOTAutograd, which take seconds, with eager kernels."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **named: compile_(*given, backend="aot_eager", **named))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_a_compiled_run_is_the_plain_one(train, name, caplog, without_inductor):
    """By Dynamo and AOTAutograd; Inductor's own kernels are the slow test's."""
    flags = ["--max_train_steps", 3, "--train_batch_size", 2, "--adam_epsilon", 1e-4]
    plain = train(name, *flags, out="plain")
    with caplog.at_level(logging.INFO):
        compiled = train(name, *flags, "--compile", out="compiled")
    assert "gradients agree" in caplog.text
    assert "--compile denoiser" in caplog.text
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert weights(compiled).keys() == weights(plain).keys()


def test_blocks_are_transformers_and_convolutions():
    from diffusers import UNet2DModel

    unet, *_ = unet_and_inputs()
    kinds = {type(block).__name__ for block in repeated_blocks(unet)}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
    up = {"up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    pixels = UNet2DModel(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, **up)
    assert {type(block).__name__ for block in repeated_blocks(pixels)} == {"ResnetBlock2D"}
    assert compiled_part("denoiser", unet, 1) == "denoiser"
    assert compiled_part("denoiser", unet, 2) == "blocks"
    assert compiled_part("denoiser", nn.Linear(1, 1), 2) == "denoiser"
    assert compiled_part(None, unet, 2) is None


def test_a_budget_of_activations_keeps_less_of_the_same_gradients(monkeypatch):
    from diffusers.models.resnet import ResnetBlock2D
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    kept: list[int] = []

    def count(graph, _):
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        values = [each.meta["val"] for each in outputs if each is not None]
        kept[-1] += sum(each.numel() for each in values if isinstance(each, Tensor))
        return graph

    plain = torch.compile
    backend = aot_autograd(
        fw_compiler=count, bw_compiler=lambda graph, _: graph, partition_fn=min_cut_rematerialization_partition
    )
    monkeypatch.setattr(torch, "compile", lambda *what, mode, **how: plain(*what, backend=backend, **how))
    found = []
    for budget in (None, 0.3):
        torch._dynamo.reset()
        kept.append(0)
        torch.manual_seed(0)
        block = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4).train()
        compile_denoiser(nn.Sequential(block), Compilation("blocks", activation_memory=budget))
        loss = block(torch.randn(2, 16, 8, 8), torch.randn(2, 8)).square().sum()
        found.append(torch.autograd.grad(loss, list(block.parameters())))
    assert 0 < kept[1] < 0.8 * kept[0]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch._functorch.config.activation_memory_budget = 1.0


@pytest.mark.slow
def test_blocks_are_compiled_once_for_all_buckets(train, caplog, without_inductor):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    flags = ["--max_train_steps", 4, "--compile", "blocks", "--use_aspect_ratio_buckets", "--bucket_step", 8]
    with caplog.at_level(logging.INFO):
        train("sd", *flags, "--min_bucket_size", 16, "--max_bucket_size", 48, out="compiled")
    assert "--compile blocks" in caplog.text
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_blocks_with_adapters_share_their_graphs(without_inductor, monkeypatch):
    """Twelve blocks: a graph for each would go beyond Dynamo's limit of eight. Convolutions have no adapters here."""
    monkeypatch.setattr("utils.training.speed.CONVOLUTIONS", "")
    from peft import LoraConfig
    from torch._dynamo.utils import counters

    from utils.models.fused_lora import num_shortened, shorten

    unet, arguments, named = unet_and_inputs(depth=3)
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="default")
    trained = [each for each in unet.parameters() if each.requires_grad]

    def gradients() -> list[Tensor]:
        return torch.autograd.grad(unet(*arguments, **named).sample.square().sum(), trained)

    expected = gradients()
    shorten(unet, "default")
    assert num_shortened(unet) == 96
    torch._dynamo.reset()
    counters.clear()
    compile_denoiser(unet, Compilation("blocks"))
    found = gradients()
    assert counters["stats"]["unique_graphs"] <= 5  # by widths, sizes, strides and what needs a gradient
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_graph_serves_all_buckets(train, name, tmp_path, without_inductor):
    from tests.tiny import make_images

    sizes = [(40, 20), (20, 40), (32, 32), (48, 16)]
    images = make_images(tmp_path / "images", count=8)
    for number, file in enumerate(sorted(images.glob("*.png"))):
        Image.open(file).resize(sizes[number % 4]).save(file)
    torch._dynamo.reset()
    flags = ["--max_train_steps", 8, "--compile", "--use_aspect_ratio_buckets", "--bucket_step", 8]
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = train(name, *flags, "--train_batch_size", 2, data=images)
    assert len(losses(out)) == 8


def test_a_wrong_gradient_is_refused(train, monkeypatch, capsys):
    """As Inductor's were: the loss is right, a gradient is not."""
    from diffusers.models.resnet import ResnetBlock2D

    def wrong(function, **_):
        def call(*arguments, **named):
            block = next(each for each in function.__self__.modules() if isinstance(each, ResnetBlock2D))
            block.conv1.weight.register_hook(lambda gradient: 0.8 * gradient)
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(torch, "compile", wrong)
    train("sd", "--max_train_steps", 1, "--compile", expect=2)
    line = capsys.readouterr().err
    assert "error: --compile: the compiled gradient of" in line
    assert "20.00% off" in line


def test_what_can_not_be_compiled_is_refused(refused):
    refused(["--torch_compile", "--compile", "blocks"], "--torch_compile means --compile denoiser")
    refused(["--compile", "everything"], "--compile", "everything")
    with pytest.raises(UserError, match="--compile must be denoiser for a Linear, got blocks; it has no repeated"):
        compile_denoiser(nn.Linear(1, 1), Compilation("blocks"))


def test_the_error_of_a_gradient():
    expected = Reference({"a": torch.ones(100), "b": torch.full((4,), 1e-9)})
    small = torch.full((4,), 1e-9)
    assert expected.errors({"a": torch.ones(100), "b": -small})["b"] < 1e-5  # rounding
    assert expected.errors({"a": torch.full((100,), 1.1), "b": small})["a"] == pytest.approx(0.1)
    assert expected.errors({"a": torch.full((100,), torch.nan), "b": small})["a"] == float("inf")
    assert expected.errors({"a": torch.ones(100)})["b"] == 1.0


@pytest.mark.parametrize(
    ("error", "rounding", "holds"),
    [
        *((0.009, 0.0, True), (0.02, 0.0, False), (0.05, 0.03, True), (0.08, 0.03, False)),
        *((0.29, 0.2, True), (0.31, 0.2, False), (0.35, 0.35, True), (0.5, 0.35, False), (float("inf"), 0.2, False)),
    ],
)
def test_a_compiled_gradient_may_be_twice_as_far_off_as_the_plain_one(error, rounding, holds):
    errors = {"a": 0.0, "b": error}
    if holds:
        check_errors(errors, {"b": rounding})
        return
    with pytest.raises(UserError, match="the compiled gradient of b is"):
        check_errors(errors, {"b": rounding})


def test_a_tensor_that_plain_rounding_hardly_moves_is_held_to_what_is_usual():
    rounding = {"a": 0.001} | {f"b{number}": 0.03 for number in range(20)}
    check_errors({"a": 0.06}, rounding)
    with pytest.raises(UserError, match="the compiled gradient of a is"):
        check_errors({"a": 0.08}, rounding)


@pytest.mark.parametrize("fault", ["rounding", "a wrong gradient", "a wrong gradient in float32 alone"])
def test_half_precision_is_held_against_float32(train, monkeypatch, capsys, caplog, fault):
    """What rounds elsewhere is let through: noise under bfloat16's last bit moves gradients by more than 4.5 %."""
    from diffusers.models.resnet import ResnetBlock2D

    def compiled(function, **_):
        def call(sample, *arguments, **named):
            block = next(each for each in function.__self__.modules() if isinstance(each, ResnetBlock2D))
            is_float32 = not torch.is_autocast_enabled("cpu")
            if (fault == "a wrong gradient" and not is_float32) or (fault.endswith("alone") and is_float32):
                handle = block.conv1.weight.register_hook(lambda gradient: 0.5 * gradient)
                handles.append(handle)
            if fault == "rounding" and not is_float32:
                sample = sample * (1 + 1e-3 * torch.randn_like(sample))
            return function(sample, *arguments, **named)

        return call

    handles: list = []
    drop = Gradients.drop

    def without_hooks(self):
        drop(self)
        while handles:
            handles.pop().remove()

    monkeypatch.setattr(Gradients, "drop", without_hooks)
    monkeypatch.setattr(torch, "compile", compiled)
    is_fine = fault == "rounding"
    with caplog.at_level(logging.INFO):
        flags = ["--max_train_steps", 1, "--mixed_precision", "bf16", "--compile", "--no_final_checkpoint"]
        train("sd", *flags, expect=0 if is_fine else 2)
    if is_fine:
        assert "gradients agree with float32" in caplog.text
    else:
        assert re.search(r"conv1\.weight is (49|50)\.", capsys.readouterr().err)


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision", "bf16", "--bf16_weights"],
        ["--mixed_precision", "bf16", "--adaptation", "lora"],
        ["--mixed_precision", "bf16", "--pure_bf16"],
    ],
    ids=str,
)
def test_passes_in_float32_leave_all_as_it_was(train, monkeypatch, flags):
    """Weights, their dtypes and the run: what is compared is dropped again."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flags = ["--max_train_steps", 2, "--train_batch_size", 2, "--compile", *flags]
    checked = train("sd", *flags, out="checked")
    monkeypatch.setattr("utils.training.speed_up.compile_checked", lambda *how: compile_denoiser(*how[:2]))
    assert losses(train("sd", *flags, out="unchecked")) == losses(checked)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "what"), [("sd", "blocks"), ("pixels", "denoiser")])
def test_inductors_gradients_are_the_plain_ones(train, name, what, caplog):
    with caplog.at_level(logging.INFO):
        train(name, "--max_train_steps", 2, "--train_batch_size", 2, "--compile", what)
    assert "gradients agree" in caplog.text


def test_a_cuda_graph_is_compared_when_it_is_replayed(monkeypatch):
    """Its first pass runs the kernels, the second records them."""
    unet = unet_and_inputs()[0]
    asked, passes = [], []
    monkeypatch.setattr(torch, "compile", lambda call, **named: asked.append(named) or call)

    @contextmanager
    def gradients(in_float32: bool = False) -> Iterator[dict[str, Tensor]]:
        passes.append(None)
        wrong = 1.5 if len(passes) == 4 else 1.0
        yield {"a": torch.full((3,), wrong)}

    with pytest.raises(UserError, match=r"the compiled gradient of a is 50\.00% off"):
        compile_checked(unet, Compilation("denoiser", cuda_graphs=True), gradients, is_exact=True)
    assert [named["mode"] for named in asked] == ["reduce-overhead"]
    assert len(passes) == 4
