"""What makes training faster trains the same, and waits for the device only when numbers are read."""

import logging
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import dedent

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import mostly_slow
from tests.test_equivalences import assert_same_bits, lora, losses, weights
from utils.config.options import UserError
from utils.models.attention import attention_by
from utils.runtime.memory import align
from utils.training.backward import Gradients
from utils.training.bf16_weights import HalfCopy
from utils.training.speed import (
    Compilation,
    Reference,
    check_errors,
    compile_checked,
    compile_denoiser,
    compiled_part,
    repeated_blocks,
)

NAMES = ["sd", "pixels"]


class Casts(TorchDispatchMode):
    """Counts tensors of a shape that are converted to another dtype."""

    def __init__(self, shapes: set[torch.Size]):
        super().__init__()
        self.count = 0
        self._shapes = shapes

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        changes = function is torch.ops.aten._to_copy.default and (named or {}).get("dtype") is not None
        self.count += bool(changes and arguments[0].shape in self._shapes)
        return function(*arguments, **(named or {}))


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile by Dynamo and AOTAutograd, which take seconds, with eager kernels."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **named: compile_(*given, backend="aot_eager", **named))


def unet_and_inputs(checkpointing: bool = False, depth: int = 1) -> tuple[nn.Module, tuple, dict]:
    """A small conditional UNet of 4 x `depth` transformer blocks, and what it is called with."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(24, 40),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=28,
        attention_head_dim=4,
        norm_num_groups=8,
        transformer_layers_per_block=depth,
    ).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return (
        unet,
        (torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 700, 999])),
        {"encoder_hidden_states": torch.randn(4, 9, 28)},
    )


def gradients(unet: nn.Module, arguments: tuple, named: dict, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        prediction = unet(*arguments, **named).sample
    (prediction.float() - arguments[0]).square().mean().backward()
    found = {name: each.grad.clone() for name, each in trained.items()}
    for each in trained.values():
        each.grad = None
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_bfloat16_copy_has_the_gradients_of_autocast_without_its_casts(checkpointing):
    unet, arguments, named = unet_and_inputs(checkpointing)
    trained, optimizer = dict(unet.named_parameters()), torch.optim.SGD(unet.parameters(), lr=0.1)
    shapes = {each.shape for each in unet.parameters() if each.ndim > 1}
    with Casts(shapes) as casts:
        expected = gradients(unet, arguments, named, trained)
    before = casts.count
    half = HalfCopy(unet, optimizer)
    with Casts(shapes) as casts, half.in_place():
        assert unet.dtype == torch.bfloat16
        found = gradients(unet, arguments, named, trained)
    assert unet.dtype == torch.float32
    matrices = sum(each.ndim > 1 for each in unet.parameters())
    assert casts.count == 0  # gradients go to float32 by a call for a group of them
    assert before >= 2 * matrices  # there and back
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], gradient)  # on a CPU, whose norms stay in float32
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with half.in_place():
        for copy, weight in zip(half._copies, half._weights, strict=True):
            assert torch.equal(copy, weight.detach().bfloat16())


def test_the_frequencies_of_a_score_model_stay_as_they_are():
    """In bfloat16 their phases would be off by radians."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        time_embedding_type="fourier",
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    arguments = torch.randn(4, 3, 8, 8), torch.tensor([0.01, 1.3, 40.0, 1300.0])
    half = HalfCopy(unet, torch.optim.SGD(unet.parameters()))
    with torch.no_grad():
        expected = unet(*arguments).sample
        with half.in_place():
            found = unet(*arguments).sample.float()
    assert torch.cosine_similarity(found.flatten(1), expected.flatten(1)).min() > 0.999


@pytest.mark.parametrize("name", mostly_slow([*NAMES, "labelled latents", "sdxl"], "pixels"))
def test_training_with_a_bfloat16_copy(train, name):
    flags = ["--mixed_precision", "bf16", "--train_batch_size", 2, "--learning_rate", 1e-3, "--adam_epsilon", 1e-4]
    flags += ["--lr_scheduler", "constant"]
    plain = train(name, *flags, "--max_train_steps", 6, out="plain")
    copied = train(name, *flags, "--max_train_steps", 6, "--bf16_weights", out="copied")
    rounding = 0.02 if name == "labelled latents" else 0  # whose class embeddings autocast leaves in float32
    assert losses(copied) == pytest.approx(losses(plain), rel=rounding, abs=0)
    part = "transformer" if name == "labelled latents" else "unet"
    assert {tensor.dtype for tensor in weights(copied, part).values()} == {torch.float32}
    train(name, *flags, "--max_train_steps", 3, "--bf16_weights", out="parts")
    resumed = ["--max_train_steps", 6, "--bf16_weights", "--resume_from_checkpoint", "latest"]
    assert_same_bits(weights(train(name, *flags, *resumed, out="parts"), part), weights(copied, part))


@pytest.mark.slow
def test_a_lora_with_a_bfloat16_copy(train):
    flags = ["--adaptation", "lora", "--mixed_precision", "bf16", "--max_train_steps", 4, "--learning_rate", 1e-3]
    plain, copied = train("sd", *flags, out="plain"), train("sd", *flags, "--bf16_weights", out="copied")
    assert losses(copied) == pytest.approx(losses(plain), rel=0.02)
    accumulated = train("sd", *flags, "--bf16_weights", "--gradient_accumulation_steps", 2, out="accumulated")
    assert len(losses(accumulated)) == 4


def test_what_does_not_go_with_a_bfloat16_copy(refused):
    refused(["--bf16_weights"], "--bf16_weights", "--mixed_precision bf16", "got no")
    refused(["--bf16_weights", "--mixed_precision", "bf16", "--pure_bf16"], "--bf16_weights", "--pure_bf16")


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_step_is_clipping_and_adamw(train, name):
    flags = ["--max_train_steps", 5, "--train_batch_size", 2, "--learning_rate", 1e-3, "--adam_epsilon", 1e-4]
    flags += ["--max_grad_norm", 0.05]
    fused = train(name, *flags, out="fused")
    plain = train(name, *flags, "--fused_adamw", "false", out="plain")
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-5)
    other = weights(plain)
    for key, tensor in weights(fused).items():
        torch.testing.assert_close(tensor, other[key], rtol=1e-4, atol=1e-6)
    loose = train(name, *flags[:-1], 0, out="loose")
    assert losses(loose)[1:] != pytest.approx(losses(fused)[1:], rel=1e-5)  # the norm is over 0.05


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 2e-3)])
@pytest.mark.parametrize("name", mostly_slow(["sd", "sdxl"], "sd"))
def test_fused_lora_layers_are_pefts(train, name, precision, tolerance):
    flags = ["--adaptation", "lora", "--mixed_precision", precision, "--max_train_steps", 4, "--learning_rate", 1e-3]
    flags += ["--lora_alpha", 8, "--train_text_encoder", "--adam_epsilon", 1e-4]
    fused, plain = train(name, *flags, out="fused"), train(name, *flags, "--no_fused_lora", out="plain")
    assert losses(fused) == pytest.approx(losses(plain), rel=tolerance)
    assert lora(fused).keys() == lora(plain).keys()
    difference = torch.cat([(lora(fused)[key] - each).flatten() for key, each in lora(plain).items()])
    whole = torch.cat([each.flatten() for each in lora(plain).values()])
    assert float(difference.norm() / whole.norm()) < tolerance


def test_fused_lora_layers_have_pefts_outputs_and_gradients():
    from peft import LoraConfig, inject_adapter_in_model

    from utils.models.fused_lora import num_shortened, shorten

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 3, bias=False), nn.Conv1d(5, 2, 1))
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2", "3"], init_lora_weights=False)
    network = inject_adapter_in_model(config, network).double()
    inputs = torch.randn(4, 5, 6, dtype=torch.double)
    expected = network(inputs)
    trained = [each for each in network.parameters() if each.requires_grad]
    wanted = torch.autograd.grad(expected.square().sum(), trained)
    shorten(network, "default")
    assert num_shortened(network) == 2  # the convolution stays peft's
    found = network(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for one, other in zip(torch.autograd.grad(found.square().sum(), trained), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    network[0].enable_adapters(False)
    assert not torch.equal(network(inputs), expected)
    dropping = LoraConfig(target_modules=["0"], lora_dropout=0.1)
    network = inject_adapter_in_model(dropping, nn.Sequential(nn.Linear(2, 2)))
    shorten(network, "default")
    assert not num_shortened(network)


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")


class Reads:
    """Counts what waits for the device: calls that bring a tensor's values to Python."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count = 0
        for name in READS:
            monkeypatch.setattr(Tensor, name, self._counting(getattr(Tensor, name)))

    def _counting(self, method):
        def call(*arguments, **named):
            self.count += 1
            return method(*arguments, **named)

        return call


@pytest.mark.parametrize("name", [*NAMES, "sdxl"])
def test_a_step_reads_nothing_from_the_device(train, monkeypatch, name):
    """Between two readings of the log there is no other, whatever the number of steps."""
    counts = {}
    for steps in (4, 12):
        with monkeypatch.context() as patch:
            reads = Reads(patch)
            flags = ["--max_train_steps", steps, "--logging_steps", 4, "--dataloader_num_workers", 1, "--use_ema"]
            flags += [] if name == "pixels" else ["--validation_epochs", 100]  # a measurement would read
            out = train(name, *flags, "--no_final_checkpoint", "--train_batch_size", 2, out=f"{steps}")
            counts[steps] = reads.count
        assert len(losses(out)) == steps
    assert counts[12] - counts[4] == 2  # of the eight steps more


def test_logging_together_logs_the_same(train):
    flags = ["--max_train_steps", 7, "--train_batch_size", 2]
    each, together = train("sd", *flags, out="each"), train("sd", *flags, "--logging_steps", 3, out="together")
    assert losses(each) == losses(together)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_a_compiled_run_is_the_plain_one(train, name, caplog, without_inductor):
    """By Dynamo and AOTAutograd; Inductor's own kernels are the slow test's."""
    flags = ["--max_train_steps", 3, "--train_batch_size", 2, "--adam_epsilon", 1e-4]
    plain = train(name, *flags, out="plain")
    with caplog.at_level(logging.INFO):
        compiled = train(name, *flags, "--compile", out="compiled")
    assert "all gradients agree" in caplog.text
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


@pytest.mark.parametrize(
    ("flags", "is_on", "said"),
    [
        (["--cudnn_benchmark"], True, ""),
        (["--cudnn_benchmark", "--deterministic"], False, "does not go with --deterministic"),
        ([], False, ""),
    ],
    ids=str,
)
def test_convolutions_are_timed_where_that_is_asked_for(train, caplog, flags, is_on, said):
    from torch.backends import cudnn

    try:
        train("sd", "--max_train_steps", 1, *flags)
        assert cudnn.benchmark == is_on
        assert said in caplog.text
    finally:
        cudnn.benchmark = False


def test_channels_last_lays_out_a_vae_that_encodes_in_each_step(train):
    plain = train("sd", "--max_train_steps", 2, out="plain")
    changed = train("sd", "--max_train_steps", 2, "--channels_last", out="changed")
    assert losses(changed) == pytest.approx(losses(plain), rel=1e-4)


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
    assert "error: --compile: compiled, the gradient of" in line
    assert "20.00% off" in line


def test_what_can_not_be_compiled_is_refused(refused):
    refused(["--torch_compile", "--compile", "blocks"], "--torch_compile is --compile denoiser")
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
    with pytest.raises(UserError, match="the gradient of b is"):
        check_errors(errors, {"b": rounding})


def test_a_tensor_that_plain_rounding_hardly_moves_is_held_to_what_is_usual():
    rounding = {"a": 0.001} | {f"b{number}": 0.03 for number in range(20)}
    check_errors({"a": 0.06}, rounding)
    with pytest.raises(UserError, match="the gradient of a is"):
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
        assert "all gradients agree with float32's" in caplog.text
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "what"), [("sd", "blocks"), ("pixels", "denoiser")])
def test_inductors_gradients_are_the_plain_ones(train, name, what, caplog):
    with caplog.at_level(logging.INFO):
        train(name, "--max_train_steps", 2, "--train_batch_size", 2, "--compile", what)
    assert "all gradients agree" in caplog.text


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.36"), reason="for glibc, which once kept 32 MB at the most")
def test_freed_memory_is_kept():
    """Some 48 MB, taken again and again: by pages that the kernel gives anew, or gave once."""
    lines = """
        import ctypes, resource, sys
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages
        from utils.runtime.memory import keep_freed_memory
        assert sys.argv[1] == "as it is" or keep_freed_memory()
        def take(): return b"x" * (48 * 2**20)
        take()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10): take()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", dedent(lines), how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("as it is", "kept")
    }
    assert faults["kept"] < 100 < 5000 < faults["as it is"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("flags", "is_kept"), [((), True), (("--keep_freed_memory", "false"), False)])
def test_keeping_freed_memory_is_said(train, name, flags, is_kept, caplog):
    with caplog.at_level(logging.INFO):
        train(name, "--max_train_steps", 1, *flags)
    line = next(each for each in caplog.messages if each.startswith("active for speed: "))
    assert ("--keep_freed_memory" in line) == is_kept


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_images_lie_as_a_cpu_likes_them(train, name, monkeypatch):
    """Weights at whole cache lines, wherever the file had them; images one channel after the other."""
    import diffusers

    network = diffusers.UNet2DConditionModel if name == "sd" else diffusers.UNet2DModel
    forward, seen = network.forward, []

    def watched(unet, sample, *more, **named):
        seen.append(sample.is_contiguous() and all(each.data_ptr() % 64 == 0 for each in unet.parameters()))
        return forward(unet, sample, *more, **named)

    monkeypatch.setattr(network, "forward", watched)
    train(name, "--max_train_steps", 2, "--train_batch_size", 2)
    assert len(seen) >= 2
    assert all(seen[:2])


def test_aligned_weights_are_the_same(pipelines):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(pipelines["sd"] / "unet")
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    assert any(each.data_ptr() % 64 for each in unet.parameters())  # a bias of 4 channels has moved what follows
    align(unet)
    assert not any(each.data_ptr() % 64 for each in unet.parameters())
    assert_same_bits(before, unet.state_dict())


@pytest.mark.parametrize(
    ("backend", "expected"), [(None, "Flash"), ("flash", "Flash"), ("cudnn", "Flash"), ("math", "")]
)
def test_attention_is_by_the_kernel_that_was_asked_for(backend, expected):
    """And by another where that can't: there is no cuDNN on a CPU."""
    query = torch.randn(2, 2, 16, 8, requires_grad=True)
    with attention_by(backend):
        found = functional.scaled_dot_product_attention(query, query, query)
    assert ("Flash" in type(found.grad_fn).__name__) == bool(expected)
    with attention_by("math"):
        pass
    after = functional.scaled_dot_product_attention(query, query, query)
    assert "Flash" in type(after.grad_fn).__name__
    torch.testing.assert_close(found, after)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_training_by_another_attention(train, name, caplog):
    flags = ["--max_train_steps", 3, "--train_batch_size", 2, "--adam_epsilon", 1e-4]
    plain = train(name, *flags, out="plain")
    with caplog.at_level(logging.INFO):
        other = train(name, *flags, "--attention_backend", "math", out="other")
    assert "--attention_backend math" in caplog.text
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(other) != losses(plain)


def test_what_speeds_up_nothing_here(refused):
    refused(["--cuda_graphs"], "--cuda_graphs", "CUDA device", "found cpu")
    refused(["--compile", "--cuda_graphs"], "--cuda_graphs", "CUDA device", "found cpu")
    refused(["--attention_backend", "cudnn"], "--attention_backend cudnn", "flash or math")
    refused(["--attention_backend", "math", "--attention_slicing"], "--attention_backend math", "--attention_slicing")
    refused(["--compile", "--optimizer_in_backward", "--max_grad_norm", "0"], "--optimizer_in_backward", "--compile")


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

    with pytest.raises(UserError, match=r"the gradient of a is 50\.00% off"):
        compile_checked(unet, Compilation("denoiser", cuda_graphs=True), gradients, is_exact=True)
    assert [named["mode"] for named in asked] == ["reduce-overhead"]
    assert len(passes) == 4


def test_what_is_active_is_said(train, caplog):
    flags = ["--cache_latents", "--cache_text_embeddings", "--use_ema", "--logging_steps", 5, "--channels_last"]
    with caplog.at_level(logging.INFO):
        train("sd", "--max_train_steps", 1, "--dataloader_num_workers", 1, *flags)
    line = next(each for each in caplog.messages if each.startswith("active for speed: "))
    assert line == (
        "active for speed: --cache_latents, --cache_text_embeddings, --dataloader_num_workers 1, --channels_last, "
        "--keep_freed_memory, --fused_adamw, --foreach_ema, --logging_steps 5"
    )
