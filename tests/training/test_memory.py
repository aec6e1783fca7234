"""What saves memory computes the same, or the same but for what it says."""

import pytest
import torch
from torch import nn

from tests.comparing import assert_same_bits, lora, losses, weights
from tests.conftest import mostly_slow
from utils.models.quantization import quantize_linears


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("int8", 0.012)])
def test_quantised_layers_against_their_own_rounding(kind, tolerance):
    """nf4 by Dettmers et al. (2023): the nearest of 16 levels, scaled by the largest of each 64 weights."""
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False))
    inputs, expected = torch.randn(5, 64), nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False))
    expected.load_state_dict(network.state_dict())
    quantize_linears(network, kind, torch.device("cpu"))
    assert network[0].weight.dtype in (torch.uint8, torch.int8)
    if kind == "nf4":
        levels = dequantize_4bit(network[0].weight.data, network[0].weight.quant_state)
        blocks = (expected[0].weight.view(-1, 64), levels.view(-1, 64))
        scales = blocks[0].abs().amax(1, keepdim=True)
        assert ((blocks[0] - blocks[1]).abs() / scales).max() < 0.16  # half the widest gap between two levels
        for layer in (0, 2):
            weight = network[layer].weight
            expected[layer].weight.data = dequantize_4bit(weight.data, weight.quant_state)
    error = float((network(inputs) - expected(inputs)).norm() / expected(inputs).norm())
    assert error < tolerance
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("kind", mostly_slow(["nf4", "int8"], "nf4"))
@pytest.mark.parametrize("name", mostly_slow(["sd", "sdxl"], "sd"))
def test_a_lora_on_a_quantised_base(train, pipelines, name, kind):
    from diffusers import DiffusionPipeline

    flags = ["--adaptation", "lora", "--max_train_steps", 6, "--train_batch_size", 2, "--learning_rate", 1e-2]
    plain = train(name, *flags, out="plain")
    quantised = train(name, *flags, "--quantize_base", kind, out="quantised")
    assert losses(quantised) == pytest.approx(losses(plain), rel=0.05)
    assert losses(quantised) != losses(plain)
    assert lora(quantised).keys() == lora(plain).keys()
    pipeline = DiffusionPipeline.from_pretrained(pipelines[name])
    pipeline.load_lora_weights(quantised)
    parts = train(name, *flags[:2], *flags[4:], "--max_train_steps", 3, "--quantize_base", kind, out="parts")
    train(name, *flags, "--quantize_base", kind, "--resume_from_checkpoint", "latest", out="parts")
    assert losses(parts) == losses(quantised)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_trains_in_bf16_on_a_cpu(train, kind):
    flags = ["--adaptation", "lora", "--max_train_steps", 2, "--train_batch_size", 2, "--mixed_precision", "bf16"]
    plain = train("sd", *flags, out="plain")
    quantised = train("sd", *flags, "--quantize_base", kind, "--validation_prompt", "a", out="quantised")
    assert losses(quantised) == pytest.approx(losses(plain), rel=0.05)


def test_slices_and_tiles(train, capsys):
    flags = ["--max_train_steps", 3, "--train_batch_size", 3, "--learning_rate", 1e-3, "--adam_epsilon", 1e-5]
    plain = train("sd", *flags, out="plain")
    sliced = train("sd", *flags, "--vae_slicing", "--attention_slicing", out="sliced")
    assert losses(sliced) == pytest.approx(losses(plain), rel=1e-5)
    tiled = train("sd", *flags, "--vae_tiling", out="tiled")
    assert_same_bits(weights(tiled), weights(plain))  # smaller than a tile
    train("sd", "--quantize_base", "nf4", out="full", expect=2)
    assert "--quantize_base nf4 goes with --adaptation lora" in capsys.readouterr().err


def test_stochastic_rounding_has_the_value_for_its_mean():
    from utils.training.per_parameter import round_stochastically

    values = torch.tensor([1.0, 1.001, -3.14159, 1e-20, 0.0, 65504.0, float("inf")])
    random = torch.Generator().manual_seed(0)
    rounded = torch.stack([round_stochastically(values, random).float() for _ in range(20000)])
    torch.testing.assert_close(rounded.mean(0)[:-1], values[:-1], rtol=2e-4, atol=0)
    assert torch.isinf(rounded[:, -1]).all()
    assert set(rounded[:, 0].tolist()) == {1.0}  # what bfloat16 holds stays
    assert len(set(rounded[:, 1].tolist())) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "muon", "schedule_free_adamw"])
def test_steps_in_the_backward_pass_are_the_steps_after_it(train, optimizer):
    flags = ["--optimizer", optimizer, "--max_train_steps", 5, "--train_batch_size", 2, "--learning_rate", 1e-3]
    plain = train("sd", *flags, "--max_grad_norm", 0, out="plain")
    backward = train("sd", *flags, "--optimizer_in_backward", out="backward")
    assert losses(backward) == pytest.approx(losses(plain), rel=1e-4 if optimizer != "muon" else 2e-2)
    import json

    norms = [
        [json.loads(line)["grad_norm"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (plain, backward)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--optimizer_in_backward",), ("--optimizer", "adamw8bit", "--use_ema")])
def test_bfloat16_weights_learn_and_resume_bit_by_bit(train, more):
    from safetensors.torch import load_file

    flags = ["--pure_bf16", "--mixed_precision", "bf16", "--train_batch_size", 2, "--learning_rate", 1e-3, *more]
    whole = train("sd", *flags, "--max_train_steps", 8, out="whole")
    train("sd", *flags, "--max_train_steps", 4, out="parts")
    parts = train("sd", *flags, "--max_train_steps", 8, "--resume_from_checkpoint", "latest", out="parts")
    assert losses(whole) == losses(parts)
    for file in sorted((whole / "checkpoint-8").rglob("*.safetensors")):
        assert_same_bits(load_file(file), load_file(parts / file.relative_to(whole)))
    assert {tensor.dtype for tensor in weights(whole / "checkpoint-8").values()} == {torch.bfloat16}
    exact = train("sd", *flags[1:], "--max_train_steps", 8, out="exact")
    assert losses(whole) == pytest.approx(losses(exact), rel=0.03)
    moved = weights(whole)["conv_in.weight"].float() - weights(exact)["conv_in.weight"].float()
    assert float(moved.abs().mean()) < 2e-3


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["--optimizer_in_backward", "--gradient_accumulation_steps", 2],
            "--gradient_accumulation_steps must be 1, is 2",
        ),
        (["--optimizer_in_backward", "--max_grad_norm", 1], "--max_grad_norm"),
        (["--optimizer_in_backward", "--layer_norm_steps", 1], "--layer_norm_steps"),
        (["--pure_bf16"], "--pure_bf16 needs --mixed_precision bf16, got no"),
        (["--pure_bf16", "--adaptation", "lora"], "--pure_bf16 needs --adaptation full"),
    ],
)
def test_what_does_not_go(refused, flags, named):
    refused(flags, named)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("cached", [(), ("--cache_latents", "--cache_text_embeddings")])
def test_samples_with_one_part_on_the_device_at_a_time(train, monkeypatch, name, cached):
    """The same pixels and the same training, while each part is moved as it is needed (here from CPU to CPU)."""
    import numpy as np
    from PIL import Image

    from utils.models.text_to_image import TextFamily

    flags = ["--max_train_steps", 3, "--train_batch_size", 2, "--validation_steps", 2, *cached]
    flags += ["--validation_prompts", "a red square", "blue", "--validation_num_inference_steps", 2]
    plain = train(name, *flags, out="plain")
    moves = []

    def record(self: TextFamily, names: list[str], device: torch.device) -> None:
        moves.extend((part, self.pipeline.components[part] is not None) for part in names)

    monkeypatch.setattr(TextFamily, "_move", record)
    saved = train(name, *flags, "--sampling_cpu_offload", out="saved")
    assert_same_bits(weights(plain), weights(saved))
    for file in sorted((plain / "samples").rglob("*.png")):
        other = Image.open(saved / "samples" / file.relative_to(plain / "samples"))
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(other))
    encoders = [part for part, _ in moves if part.startswith("text_encoder")]
    assert {part for part, _ in moves} == {"unet", "vae", *encoders}
    assert all(is_there for _, is_there in moves)
