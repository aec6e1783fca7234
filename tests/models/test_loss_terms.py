"""Further terms of the loss: perceptual, and a user's own."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from tests.comparing import assert_same_bits, losses, weights
from tests.launching import succeed
from tests.noise import SD_SCHEDULE
from tests.repository import ROOT
from utils.config.batch import Noised, Predicted
from utils.config.options import UserError
from utils.diffusion.noise import ForwardProcess
from utils.models.loss_terms import LossTerm, TermFacts, added_losses, load_term
from utils.models.options import PerceptualOptions, TermOptions
from utils.models.perceptual_loss import Features, PerceptualLoss, _resized


@pytest.mark.parametrize(("size", "other"), [((40, 24), 16), ((16, 9), 32), ((20, 20), 20)])
def test_deterministic_resizing_is_the_interpolation(size, other):
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = functional.interpolate(images, (other, other), mode="bicubic", antialias=True)
    weights = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), images)
    torch.use_deterministic_algorithms(True)
    try:
        found = _resized(images, other)
        (gradient,) = torch.autograd.grad((found * weights).sum(), images)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


BACKWARDS = ("--perceptual_min_timestep", 5, "--perceptual_max_timestep", 5)
EXAMPLE = ROOT / "examples" / "adversarial_loss.py"
FACTS = TermFacts(
    latent_channels=4,
    num_timesteps=1000,
    decode=lambda latents: nn.functional.interpolate(latents[:, :3], scale_factor=8.0),
)


def make_network(kind: str, folder: Path) -> Path:
    """A small image model of transformers with random weights."""
    import transformers

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        model = transformers.ResNetModel(config)
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, patch_size=14, **layers))
    else:
        text = {**layers, "vocab_size": 32}
        vision = {**layers, "image_size": 32, "patch_size": 8}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}')
    return folder


def predicted(estimate: Tensor, latents: Tensor, timesteps: list[int], masks: Tensor | None = None) -> Predicted:
    ones = torch.ones(len(timesteps))
    noised = Noised(latents, latents, torch.tensor(timesteps), ones, 1000)
    return Predicted(estimate, latents, estimate, noised, {}, ones[:, None].expand(-1, 6), masks)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_estimate_of_the_true_target_is_the_clean_latents(prediction_type):
    process = ForwardProcess(SD_SCHEDULE, {"prediction_type": prediction_type})
    latents, noise = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    noised = process.apply(latents, noise, torch.tensor([0, 300, 700, 999]), None)
    torch.testing.assert_close(process.estimate(noised, noised.target), latents, rtol=0, atol=1e-4)


class TestPerceptual:
    @pytest.mark.parametrize("kind", ["resnet", "dinov2", "clip"])
    def test_against_the_formula(self, tmp_path, kind):
        """LPIPS, equation 1, place by place, on hidden states taken by hooks from the network itself."""
        import transformers

        network = make_network(kind, tmp_path)
        options = PerceptualOptions(2.0, str(network), 100, 600)
        estimate = torch.randn(4, 4, 8, 8, requires_grad=True)
        latents = torch.randn(4, 4, 8, 8)
        found = PerceptualLoss(FACTS, options)(predicted(estimate, latents, [99, 100, 599, 600]))
        model = transformers.AutoModel.from_pretrained(network).eval()
        model = model.vision_model if kind == "clip" else model
        size = {"resnet": 64, "dinov2": 28, "clip": 32}[kind]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))

        def states(of: Tensor) -> list[Tensor]:
            image = FACTS.decode(of[None])
            resized = nn.functional.interpolate(image, (size, size), mode="bicubic", antialias=True)
            pixels = ((image if size == 64 else resized)[0] / 2 + 0.5 - mean) / std
            hidden = model(pixels[None], output_hidden_states=True).hidden_states
            return [each[0].flatten(1).T if each.ndim == 4 else each[0] for each in hidden]

        for sample in (1, 2):
            layers = []
            for one, other in zip(states(estimate[sample]), states(latents[sample]), strict=True):
                places = [(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(one, other, strict=True)]
                layers.append(sum(places) / len(places))
            assert float(found[sample]) == pytest.approx(2 * float(sum(layers) / len(layers)), rel=1e-3)
        assert found[0] == found[3] == 0
        found.sum().backward()
        assert (estimate.grad.flatten(1).abs().sum(1) > 0).tolist() == [False, True, True, False]

    def test_what_a_mask_leaves_out_does_not_count(self, tmp_path):
        term = PerceptualLoss(FACTS, PerceptualOptions(1.0, str(make_network("resnet", tmp_path))))
        latents, masks = torch.randn(1, 4, 8, 8), torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
        estimate = latents.clone()
        estimate[..., 4:] += 1
        assert term(predicted(estimate, latents, [5], masks)) > 0
        masks[..., 4:] = 0
        assert float(term(predicted(estimate, latents, [5], masks))) == pytest.approx(0, abs=1e-6)

    def test_a_run_with_it(self, train, tmp_path):
        network = make_network("resnet", tmp_path / "network")
        flags = ["--train_batch_size", 2, "--max_train_steps", 2, "--learning_rate", 1e-3, "--cache_latents"]
        flags += ["--gradient_checkpointing"]
        plain = train("sd2", *flags, out="plain")
        term = ["--perceptual_weight", 3, "--perceptual_network", network]
        added = train("sd2", *flags, *term, out="added")
        never = train("sd2", *flags, *term, "--perceptual_min_timestep", 999, out="never")
        assert losses(added)[0] > losses(plain)[0]
        assert losses(never) == losses(plain)
        assert any(not torch.equal(one, weights(plain)[name]) for name, one in weights(added).items())

    @pytest.mark.parametrize(
        ("flags", "named"),
        [
            (["--perceptual_weight", 1], "--perceptual_network need each other"),
            (["--perceptual_weight", 1, "--perceptual_network", "/nowhere"], "--perceptual_network /nowhere can't be"),
            (["--perceptual_weight", 1, "--perceptual_network", "text"], "returns no hidden states for images"),
            (["--perceptual_max_timestep", 5], "need --perceptual_weight"),
            (
                ["--perceptual_weight", 1, "--perceptual_network", "x", *BACKWARDS],
                "--perceptual_max_timestep must be above",
            ),
        ],
    )
    def test_what_does_not_go(self, refused, pipelines, flags, named):
        flags = [pipelines["sd"] / "text_encoder" if word == "text" else word for word in flags]
        refused(flags, named)


class Counting(LossTerm):
    """A term of one parameter, for its gradients."""

    def __init__(self, facts: TermFacts):
        super().__init__(facts)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, predicted: Predicted) -> Tensor:
        return self.scale * predicted.estimate.square().mean((1, 2, 3))

    def own_losses(self, predicted: Predicted) -> Tensor:
        return (self.scale - 1).square() * predicted.estimate.mean((1, 2, 3)).abs()


OWN_TERM = """
import torch
from utils.models.loss_terms import LossTerm

class Constant(LossTerm):
    def __init__(self, facts, value=1.0):
        super().__init__(facts)
        self.value = value

    def forward(self, predicted):
        return torch.full((len(predicted.latents),), self.value)
"""
RUNNING_TERM = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from utils.models.loss_terms import LossTerm

@dataclass
class Share:
    value: float = 0.5

class Running(LossTerm):
    def __init__(self, facts):
        super().__init__(facts)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, predicted):
        self.mean.lerp_(predicted.estimate.detach().mean().float(), Share().value)
        return self.mean.clone().expand(len(predicted.latents))

    def own_losses(self, predicted):
        return self.scale.square().expand(len(predicted.latents))
"""


class TestOwnTerm:
    def test_its_parameters_learn_from_its_own_losses_alone_and_the_model_from_the_other(self):
        term = Counting(FACTS)
        estimate = torch.randn(2, 4, 3, 3, requires_grad=True)
        value = added_losses(term, predicted(estimate, torch.zeros(2, 4, 3, 3), [1, 2]))
        torch.testing.assert_close(value, 3 * estimate.square().mean((1, 2, 3)))
        value.sum().backward()
        torch.testing.assert_close(estimate.grad, 6 * estimate.detach() / 36)
        own = 2 * (3 - 1) * estimate.detach().mean((1, 2, 3)).abs().sum()
        torch.testing.assert_close(term.scale.grad, own)

    def test_losses_of_another_shape_are_refused(self):
        class Wrong(Counting):
            def forward(self, predicted: Predicted) -> Tensor:
                return super().forward(predicted)[:, None]

        of = predicted(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3), [1, 2])
        with pytest.raises(UserError, match=r"Wrong must return one loss per sample, \[2\], it returned \[2, 1\]"):
            added_losses(Wrong(FACTS), of)

    def test_a_discriminator_that_steps_inside_the_backward_pass(self, train):
        flags = ["--loss_module", EXAMPLE, "--loss_module_args", "channels=8", "--train_batch_size", 2]
        plain = train("sd", *flags, "--max_train_steps", 3, "--max_grad_norm", 0, out="plain")
        inside = train("sd", *flags, "--max_train_steps", 3, "--optimizer_in_backward", out="inside")
        assert losses(inside) == pytest.approx(losses(plain), rel=1e-4)

    def test_buffers_of_a_term_are_resumed_too(self, train, tmp_path):
        (tmp_path / "own.py").write_text(RUNNING_TERM)
        flags = ["--loss_module", tmp_path / "own.py", "--train_batch_size", 2, "--checkpointing_steps", 2]
        whole = train("sd", *flags, "--max_train_steps", 4, out="whole")
        train("sd", *flags, "--max_train_steps", 2, out="parts")
        parts = train("sd", *flags, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", out="parts")
        assert losses(whole) == losses(parts)

    def test_its_value_is_added(self, train, tmp_path):
        (tmp_path / "own.py").write_text(OWN_TERM)
        flags = ["--train_batch_size", 2, "--max_train_steps", 1]
        plain = train("sd", *flags, out="plain")
        term = ["--loss_module", tmp_path / "own.py", "--loss_module_args", "value=0.25"]
        added = train("sd", *flags, *term, out="added")
        assert losses(added)[0] == pytest.approx(losses(plain)[0] + 0.25)
        assert_same_bits(weights(plain), weights(added))

    def test_the_adversarial_example_against_its_formula(self):
        torch.manual_seed(0)
        term = load_term(TermOptions(str(EXAMPLE), ["weight=0.5", "channels=8"]), FACTS)
        estimate, latents = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 4, 8, 8)
        of = predicted(estimate, latents, [10, 400, 600])
        drawn, real = term.judge(estimate, of.noised.timesteps), term.judge(latents, of.noised.timesteps)
        expected = -0.5 * drawn.mean((1, 2, 3)) * torch.tensor([1, 1, 0])
        torch.testing.assert_close(added_losses(term, of), expected)
        hinge = (1 - real).clamp(min=0).mean((1, 2, 3)) + (1 + drawn).clamp(min=0).mean((1, 2, 3))
        torch.testing.assert_close(term.own_losses(of), hinge * torch.tensor([1, 1, 0]))
        optimizer = torch.optim.AdamW(term.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            added_losses(term, of.detached()).sum().backward()
            optimizer.step()
        assert float(term.own_losses(of).sum()) < 0.5 * float(hinge[:2].sum())

    @pytest.mark.parametrize("flags", [["--use_ema"], ["--adaptation", "lora", "--optimizer", "muon"]])
    def test_a_resumed_run_with_a_discriminator(self, train, flags):
        term = ["--loss_module", EXAMPLE, "--loss_module_args", "channels=8", "--loss_module_lr", 1e-3]
        common = [*flags, *term, "--train_batch_size", 2, "--checkpointing_steps", 2, "--learning_rate", 1e-3]
        whole = train("sd", *common, "--max_train_steps", 4, out="whole")
        train("sd", *common, "--max_train_steps", 2, out="parts")
        parts = train("sd", *common, "--max_train_steps", 4, "--resume_from_checkpoint", "latest", out="parts")
        for file in ("optimizer.safetensors", "loss_module.safetensors"):
            found = [load_file(out / "checkpoint-4" / file) for out in (whole, parts)]
            assert_same_bits(*found)
        assert losses(whole) == losses(parts)
        early, late = (load_file(whole / f"checkpoint-{step}" / "loss_module.safetensors") for step in (2, 4))
        assert all(not torch.equal(early[name], late[name]) for name in early)

    @pytest.mark.nightly
    def test_two_processes_train_it_as_one_does(self, pipelines, images, tmp_path):
        flags = ["--pretrained_model", pipelines["sd"], "--train_data_dir", images, "--resolution", 32]
        flags += ["--report_to", "none", "--max_train_steps", 2, "--lr_warmup_steps", 0, "--adam_epsilon", 1e-5]
        flags += ["--loss_module", EXAMPLE, "--loss_module_args", "channels=8"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29631]
        script = ROOT / "train_text_to_image.py"
        for name, start, batch in (("one", [sys.executable], 2), ("two", launch, 1)):
            command = [*start, script, *flags, "--train_batch_size", batch, "--output_dir", tmp_path / name]
            succeed(command)
        one, two = (load_file(tmp_path / name / "checkpoint-2" / "loss_module.safetensors") for name in ("one", "two"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize(
        ("text", "flags", "named"),
        [
            (None, [], "--loss_module must be a Python file that exists"),
            ("def (", [], "can't be run: SyntaxError"),
            ("x = 1", [], "must define one subclass of utils.models.loss_terms.LossTerm, it defines none"),
            (
                "from utils.models.loss_terms import LossTerm\nclass Own(LossTerm): pass",
                [],
                "its Own must define forward",
            ),
            (OWN_TERM, ["--loss_module_args", "valu=1"], "unexpected keyword argument 'valu'"),
            (OWN_TERM, ["--loss_module_args", "value"], "--loss_module_args must be NAME=VALUE"),
            (OWN_TERM, ["--loss_module_lr", 0], "--loss_module_lr must be"),
        ],
    )
    def test_what_does_not_go(self, refused, tmp_path, text, flags, named):
        file = tmp_path / "own.py"
        if text is not None:
            file.write_text(text)
        refused(["--loss_module", file, *flags], named)

    def test_features_are_of_unit_length(self, tmp_path):
        layers = Features(str(make_network("dinov2", tmp_path)))(torch.rand(2, 3, 40, 56))
        for layer in layers:
            torch.testing.assert_close(layer.norm(dim=1), torch.ones(2, layer.shape[2]))


FROZEN_PARTS = """
import torch
from torch import nn

from utils.models.loss_terms import LossTerm


class Own(LossTerm):
    def __init__(self, facts):
        super().__init__(facts)
        self.frozen = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).requires_grad_(False)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.learnt = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.learnt.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)).requires_grad_(False)

    def forward(self, predicted):
        return predicted.estimate.mean((1, 2, 3))
"""


def test_frozen_parts_of_a_term_evaluate_and_its_own_parts_train(tmp_path):
    (tmp_path / "own.py").write_text(FROZEN_PARTS)
    facts = TermFacts(4, 1000, lambda latents: latents)
    term = load_term(TermOptions(loss_module=str(tmp_path / "own.py")), facts)
    for _ in range(2):
        assert not any(each.training for part in (term.frozen, term.norm) for each in part.modules())
        assert not any(each.training for each in term.learnt.inner.modules())
        assert all(term.learnt[number].training for number in range(3))
        term.eval()
        assert not any(each.training for each in term.modules())
        term.train()
