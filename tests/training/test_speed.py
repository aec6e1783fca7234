"""What makes training faster trains the same, and waits for the device only when numbers are read."""

import logging

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.comparing import assert_same_bits, losses, weights
from tests.conftest import mostly_slow
from tests.unets import NAMES, gradients, unet_and_inputs
from utils.runtime.memory import align
from utils.training.bf16_weights import HalfCopy
from utils.training.state import TrainingState


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


@pytest.mark.parametrize(
    ("flags", "is_on", "said"),
    [
        (["--cudnn_benchmark"], True, ""),
        (["--cudnn_benchmark", "--deterministic"], False, "no effect with --deterministic"),
        ([], False, ""),
    ],
    ids=str,
)
def test_convolutions_are_timed_where_that_is_asked_for(train, monkeypatch, caplog, flags, is_on, said):
    from torch.backends import cudnn

    seen, clip = [], TrainingState.clip
    monkeypatch.setattr(TrainingState, "clip", lambda *given: (seen.append(cudnn.benchmark), clip(*given))[1])
    train("sd", "--max_train_steps", 1, *flags)
    assert seen == [is_on]
    assert not cudnn.benchmark
    assert said in caplog.text


def test_channels_last_lays_out_a_vae_that_encodes_in_each_step(train):
    plain = train("sd", "--max_train_steps", 2, out="plain")
    changed = train("sd", "--max_train_steps", 2, "--channels_last", out="changed")
    assert losses(changed) == pytest.approx(losses(plain), rel=1e-4)


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


def test_what_speeds_up_nothing_here(refused):
    refused(["--cuda_graphs"], "--cuda_graphs", "CUDA device", "found cpu")
    refused(["--compile", "--cuda_graphs"], "--cuda_graphs", "CUDA device", "found cpu")
    refused(["--attention_backend", "cudnn"], "--attention_backend cudnn", "flash or math")
    refused(["--attention_backend", "math", "--attention_slicing"], "--attention_backend math", "--attention_slicing")
    refused(["--compile", "--optimizer_in_backward", "--max_grad_norm", "0"], "--optimizer_in_backward", "--compile")


def test_what_is_active_is_said(train, caplog):
    flags = ["--cache_latents", "--cache_text_embeddings", "--use_ema", "--logging_steps", 5, "--channels_last"]
    with caplog.at_level(logging.INFO):
        train("sd", "--max_train_steps", 1, "--dataloader_num_workers", 1, *flags)
    line = next(each for each in caplog.messages if each.startswith("active for speed: "))
    assert line == (
        "active for speed: --cache_latents, --cache_text_embeddings, --dataloader_num_workers 1, --channels_last, "
        "--keep_freed_memory, --fused_adamw, --foreach_ema, --logging_steps 5"
    )
