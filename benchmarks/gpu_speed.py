"""The sections of benchmarks/gpu.py that measure speed: our training step on true architectures, and peers' scripts.

Our step uses the scripts' own parts, without data and files: models with random weights on the device, one batch in
pinned memory, and the same calls as the scripts' loops: Gradients.add_up, TrainingState.clip and update, EMA, RunLog.
Steps are timed by events in the device's stream; the host's time to queue a step is reported too. Images and captions
are already encoded, as with --cache_latents and --cache_text_embeddings.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.assets import UNCONDITIONAL_UNET, make_images, make_pipeline
from benchmarks.gpu_runs import FAILED, HOLDS, SKIPPED, Bench, Finding, process_of_its_own
from benchmarks.made import MODELS, TOKENS, Architecture, MadeSource
from benchmarks.train import tuned_flags
from utils.config.batch import Batch
from utils.config.options import parse
from utils.diffusion.noise import ForwardProcess
from utils.diffusion.process import process_of
from utils.models.attention import Attention
from utils.models.sd import StableDiffusion
from utils.models.sdxl import StableDiffusionXL
from utils.models.unconditional import Pixels, Wanted
from utils.runtime.processes import OutputFolder, weight_dtype
from utils.runtime.step_lines import SampleCount
from utils.training.adaptation import FullFineTuning
from utils.training.backward import Gradients
from utils.training.checkpoint import RunFacts
from utils.training.learning_rates import LearningRates
from utils.training.log import RunLog, StepMetrics
from utils.training.objective import Objective
from utils.training.optimizers import set_learning_rate
from utils.training.session import start_engine
from utils.training.speed import Compilation, compile_denoiser
from utils.training.speed_up import speed_up
from utils.training.state import TrainingState
from utils.training.step_graph import CudaRecorder, StepGraph
from utils.training.task import Task

WARM_UP = 3
BF16 = "--mixed_precision bf16"
FAST = f"{BF16} --bf16_weights --channels_last"


class Variant(NamedTuple):
    """How a case is trained.

    Attributes:
        what: its name in the table.
        batch: samples per step.
        flags: flags of the script.
        is_gated: whether the compiled model must pass the script's own gate, which takes time.
        benchmark: whether cuDNN benchmarks its kernels.
        counted_gb: memory counted by benchmarks/memory.py, if known.
        is_live: whether the encoders run in each step.
    """

    what: str
    batch: int
    flags: str
    is_gated: bool = False
    benchmark: bool = False
    counted_gb: float | None = None
    is_live: bool = False

    @property
    def is_compiled(self) -> bool:
        """Whether it is compiled."""
        return "--compile" in self.flags


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        name: its name in the table.
        architecture: the architecture of a text-to-image pipeline; None for pixels.
        edge: edge of the images in pixels.
        averages: whether it keeps an EMA.
        flags: flags of all variants.
    """

    name: str
    architecture: Architecture | None
    edge: int
    averages: bool = True
    flags: str = ""

    @property
    def words(self) -> list[str]:
        """Returns the flags of all variants."""
        return [*self.flags.split(), *(["--use_ema"] if self.averages else [])]


TINY_VAE = {"block_out_channels": (16, 32), "latent_channels": 4, "norm_num_groups": 8}
TINY_VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
TINY_UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
TINY_CLIP = {"vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
TINY_CLIP |= {"num_attention_heads": 4}
TINY_SDXL_UNET = TINY_UNET | {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "cross_attention_dim": 64,
}
TINY_MODELS = {
    "sd": Architecture(StableDiffusion, TINY_UNET, TINY_VAE, [("CLIPTextModel", TINY_CLIP)]),
    "sdxl": Architecture(
        StableDiffusionXL,
        TINY_SDXL_UNET,
        TINY_VAE,
        [("CLIPTextModel", TINY_CLIP), ("CLIPTextModelWithProjection", TINY_CLIP | {"projection_dim": 24})],
    ),
}


# Our step


class Training:
    """A run of ours up to its loop, with models created on the device."""

    def __init__(self, bench: Bench, case: Case, variant: Variant):
        self.bench, self.batch_size, self.edge = bench, variant.batch, case.edge
        torch.manual_seed(0)  # the same initial weights in each variant
        folder = OutputFolder(str(bench.folder / "speed"))
        folder.path.mkdir(parents=True, exist_ok=True)
        self.folder = folder.path
        words = ["--output_dir", str(folder.path), "--report_to", "none", "--logging_steps", "10"]
        words += ["--train_data_dir", str(bench.images)]  # required, but never read
        words += ["--train_batch_size", str(variant.batch), "--resolution", str(case.edge)]
        words += [*case.words, *variant.flags.split()]
        make = self._make_pixels if case.architecture is None else self._make_text
        make(case, words, variant.is_live, folder)
        engine, family = self.engine, self.family
        if variant.is_live or case.architecture is None:
            family.to(bench.device)
        else:
            family.rest(engine.accelerator.device, vae=True, text_encoders=True)
        self._make_steps(folder, variant.batch)
        self.adaptation.train_mode()
        if bench.is_cuda:
            self.batch = self.batch.pin_memory()
        self._compile(variant)

    def _make_steps(self, folder: OutputFolder, batch_size: int) -> None:
        """Creates the state and the gradients of a run, with stand-ins for session and data."""
        options, engine, family = self.options, self.engine, self.family
        session = SimpleNamespace(engine=engine, accelerator=engine.accelerator, seed=0, folder=folder)
        session.attention, session.checkpoint = Attention(None), None
        session.resumption = SimpleNamespace(samples_at_once=None, with_structure=lambda facts, structure: facts)
        batches = SimpleNamespace(size=batch_size, epochs_before=lambda step: 0)
        objective = Objective(family, self.adaptation.modules, self.process, options.noise, options.loss)
        self.task = Task(family, self.adaptation, self.process, objective, [], False, "made", "made")
        rates = LearningRates(options.optimizer, 1.0, options.schedule, 1, lambda step: 1.0)
        data, facts = SimpleNamespace(batches=batches, resolution=self.edge), RunFacts({}, {}, 1)
        self.state = TrainingState.create(options, session, data, self.task, rates, facts)
        dataset = SimpleNamespace(sizes=[None], with_draws=lambda batch: batch)
        self.feed = SimpleNamespace(dataset=dataset, at_once=batch_size, group_size=batch_size, num_workers=0)
        self.feed.pieces = SimpleNamespace(slots=[range(batch_size)])
        self.feed.largest = lambda timestep: self.batch
        self.gradients = Gradients.of_run(options, session, self.task, self.state, self.feed)

    def _make_text(self, case: Case, words: list[str], is_live: bool, folder: OutputFolder) -> None:
        from train_text_to_image import Options

        words = ["--pretrained_model", "made", *words]
        options = self.options = parse(Options, words, "")
        engine = self.engine = start_engine(options, folder)
        adaptation_class = options.adaptation.spec.kind.value
        dtypes = adaptation_class.dtypes(options.adaptation, weight_dtype(engine.accelerator))
        with self.bench.device:
            family = case.architecture.family(MadeSource(options.model, case.architecture), dtypes, {})
            self.adaptation = adaptation_class(family, options.adaptation, None)
        self._lay_out(family)
        self.family, self.process = family, ForwardProcess(family.pipeline.scheduler.config, {})
        self.batch = text_batch(case, family, self.batch_size, is_live)

    def _make_pixels(self, case: Case, words: list[str], is_live: bool, folder: OutputFolder) -> None:
        from train_unconditional import Options

        config = self.bench.folder / "unconditional.json"
        config.write_text(json.dumps(unconditional_config(self.bench.is_tiny, case.edge)), encoding="utf-8")
        options = self.options = parse(Options, [*words, "--model_config_name_or_path", str(config)], "")
        engine = self.engine = start_engine(options, folder)
        dtypes = FullFineTuning.dtypes(options.adaptation, weight_dtype(engine.accelerator))
        wanted = Wanted(case.edge, options.image.channels)
        family = self.family = Pixels(options.model, options.noise, wanted, dtypes.denoiser, dtypes.frozen, None)
        self.adaptation = FullFineTuning(family, options.adaptation, None)
        self._lay_out(family)
        scheduler = family.pipeline.scheduler
        self.process = process_of(options.noise, type(scheduler).__name__, scheduler.config)
        self.batch = pixel_batch(case.edge, self.batch_size)

    def _lay_out(self, family: Any) -> None:
        if self.options.speed.channels_last:
            family.use_channels_last(vae=False)
        if self.options.model.gradient_checkpointing:
            family.use_gradient_checkpointing(False, vae=False)

    def _compile(self, variant: Variant) -> None:
        speed = self.options.speed
        if variant.is_gated:
            speed_up(self.options, self.task, self.state, self.gradients, self.feed, fast_parts=())
            return
        if speed.compiled is not None:
            how = Compilation(speed.compiled, activation_memory=speed.activation_memory)
            compile_denoiser(self.family.denoiser, how)
        if speed.cuda_graphs:
            recorded = CudaRecorder(), self.gradients, self.state, self.options.optimizer.clip_norm
            self.gradients.whole_step = StepGraph(*recorded)

    def steps(self, count: int, counts_flops: bool) -> dict[str, Any]:
        """Trains some steps and returns the measurements.

        Returns:
            "ms" per step, "host_ms" to queue a step, "queued_ahead", the share of steps queued before the previous one
            had ended, "memory_gb", the peak after the first step, "size", samples per micro-batch, "loss", "flops".
        """
        is_cuda, state, rates = self.bench.is_cuda, self.state, self.options.optimizer
        marks, host, ahead, found = [], [], [], {}
        with RunLog(
            self.engine.accelerator, self.folder, range(count), SampleCount(self.batch_size), 10, state.skips
        ) as log:
            for step in range(count):
                began = time.perf_counter()
                set_learning_rate(state.optimizer, 1.0)
                if counts_flops and step == 0:
                    with FlopCounterMode(display=False) as counter:
                        sums = self.gradients.add_up(step, [self.batch])
                    found["flops"] = counter.get_total_flops()
                else:
                    sums = self.gradients.add_up(step, [self.batch])
                norm = state.clip(rates.clip_norm)
                state.update(norm)
                log.step(StepMetrics(step + 1, 0.0, sums.loss / self.batch_size, norm, rates.learning_rate))
                host.append(time.perf_counter() - began)
                if is_cuda:
                    event = torch.cuda.Event(enable_timing=True)
                    event.record()
                    ahead += [not marks[-1].query()] if marks else []
                    marks.append(event)
                else:
                    marks.append(time.perf_counter())
                if step == 0 and is_cuda:
                    torch.cuda.reset_peak_memory_stats()
            loss = float(sums.loss) / self.batch_size
        pairs = list(itertools.pairwise(marks))[WARM_UP - 1 :]
        taken = [one.elapsed_time(other) if is_cuda else 1e3 * (other - one) for one, other in pairs]
        found |= {"ms": statistics.median(taken), "host_ms": 1e3 * statistics.median(host[WARM_UP:])}
        found |= {"size": self.gradients.size, "loss": loss, "first_s": host[0]}
        if is_cuda:
            found |= {"memory_gb": torch.cuda.max_memory_allocated() / 1e9}
            found |= {"queued_ahead": statistics.mean(ahead[WARM_UP - 1 :])}
        return found


def unconditional_config(is_tiny: bool, edge: int) -> dict[str, Any]:
    """Returns the config of the denoiser for pixels: the default of diffusers' script."""
    config = UNCONDITIONAL_UNET | {"sample_size": edge}
    if is_tiny:
        config |= {"block_out_channels": (16, 16), "norm_num_groups": 8, "layers_per_block": 1}
        config |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        config |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return config


def text_batch(case: Case, family: Any, size: int, is_live: bool) -> Batch:
    """Returns a batch like those of the loader, encoded or not."""
    random = torch.Generator().manual_seed(0)
    shape = (size, *family.latent_space.shape((case.edge, case.edge)))
    config, crops = family.denoiser.config, torch.tensor([[case.edge, case.edge, 0, 0, case.edge, case.edge]]).float()
    if is_live:
        pixels = torch.randint(0, 256, (size, 3, case.edge, case.edge), generator=random, dtype=torch.uint8)
        given = {"pixels": pixels, "moments": None, "states": None}
        given["input_ids"] = torch.zeros(size, len(family.text_encoder_names), TOKENS, dtype=torch.int64)
    else:
        moments = torch.randn(shape[0], 2, *shape[1:], generator=random)
        moments[:, 1] = 0.1
        widths = {"encoder_hidden_states": (TOKENS, config.cross_attention_dim)}
        if "text_embeds" in family.prompt_argument_names:
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            widths["text_embeds"] = (width,)
        states = {name: torch.randn(size, *width, generator=random).bfloat16() for name, width in widths.items()}
        given = {"pixels": None, "moments": moments, "states": states, "input_ids": None}
    return drawn(shape, random, crops, posterior=True, **given)


def pixel_batch(edge: int, size: int) -> Batch:
    """Returns a batch of pixels."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (size, 3, edge, edge), generator=random, dtype=torch.uint8)
    ids = torch.zeros(size, 1, 1, dtype=torch.int64)
    given = {"pixels": pixels, "moments": None, "states": None, "input_ids": ids}
    return drawn((size, 3, edge, edge), random, torch.zeros(1, 6), posterior=False, **given)


def drawn(shape: tuple[int, ...], random: torch.Generator, crops: Tensor, posterior: bool, **given: Any) -> Batch:
    """Returns a batch with random values and noise."""
    size = shape[0]
    return Batch(
        step=0,
        slots=tuple(range(size)),
        keys=tuple(map(str, range(size))),
        caption_dropped=torch.zeros(size, dtype=torch.bool),
        crops=crops.repeat(size, 1),
        loss_weights=torch.ones(size),
        posterior_noise=torch.randn(shape, generator=random) if posterior else None,
        noise=torch.randn(shape, generator=random),
        input_perturbation=None,
        timesteps=torch.randint(0, 1000, (size,), generator=random),
        **given,
    )


def queued_ahead(bench: Bench) -> float:
    """Returns the share of Stable Diffusion's steps that are queued before the previous one has ended."""
    case = Case("sd", (TINY_MODELS if bench.is_tiny else MODELS)["sd"], 32 if bench.is_tiny else 512)
    with process_of_its_own():
        return Training(bench, case, Variant("", 2 if bench.is_tiny else 8, FAST)).steps(8, False)["queued_ahead"]


def measure(bench: Bench, case: Case, variant: Variant, flops: float | None) -> dict[str, Any]:
    """Measures a variant; returns a row of the table.

    Args:
        flops: FLOPs per image, if known; else they are counted, unless the model is compiled.
    """
    row: dict[str, Any] = {"case": case.name, "batch": variant.batch, "what": variant.what}
    with process_of_its_own():
        torch.backends.cudnn.benchmark = variant.benchmark
        began = time.perf_counter()
        training = Training(bench, case, variant)
        row |= training.steps(
            WARM_UP + (3 if bench.is_tiny else 8), counts_flops=flops is None and not variant.is_compiled
        )
        row["seconds"] = time.perf_counter() - began
        del training
    row["images_per_second"] = 1e3 * variant.batch / row["ms"]
    each = row.pop("flops", 0) / variant.batch or flops
    if each:
        row["flops_per_image"] = each
        if bench.product_tflops:
            row["mfu"] = each * row["images_per_second"] / bench.product_tflops / 1e12
    if variant.counted_gb is not None:
        row["counted_gb"] = variant.counted_gb
    return row


def contest(bench: Bench, case: Case, variants: Sequence[Variant]) -> Finding:
    """Measures all variants of a case while time is left; reports those that fail and continues."""
    from benchmarks.gpu import free

    rows, failures, flops = [], [], None
    for variant in variants:
        usual = 60 if variant.is_compiled and "denoiser" in variant.flags else 15
        if not bench.is_tiny and bench.left() < usual:
            failures.append(f"{variant.what}, b{variant.batch}: no time left")
            continue
        try:
            row = measure(bench, case, variant, None if variant.is_live else flops)
        except Exception as error:  # noqa: BLE001 - the next variant may succeed
            first = (str(error).strip().splitlines() or [""])[0]
            failures.append(f"{variant.what}, b{variant.batch}: {type(error).__name__}: {first[:160]}")
            bench.note(failures[-1])
            continue
        finally:
            free()
        flops = flops if variant.is_live else flops or row.get("flops_per_image")
        rows.append(row)
        bench.note(f"{case.name}: {' | '.join(cells(row, ()))}")
    if not rows:
        return Finding(FAILED, "; ".join(failures)[:300], {"failures": failures})
    best = max(rows, key=lambda row: row["images_per_second"])
    broken = [each for each in failures if not each.endswith("no time left")]
    says = f"best {best['images_per_second']:.4g} images/s ({best['what']}, b{best['batch']})"
    says += f"; {'; '.join(failures)}"[:300] if failures else ""
    return Finding(FAILED if broken else HOLDS, says, {"speeds": rows, "failures": failures})


def cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the cells of a row, with its speed relative to the peer's, and the peer's batch size if it differs."""
    peers = [each for each in rows if each["case"] == row["case"] and each.get("is_peer")]
    peer = min(peers, key=lambda each: abs(each["batch"] - row["batch"]), default=None)
    ratio = ""
    if peer is not None and not row.get("is_peer"):
        ratio = f"{row['images_per_second'] / peer['images_per_second']:.2f}"
        ratio += f" (b{peer['batch']})" if peer["batch"] != row["batch"] else ""
    size = row.get("size", row["batch"])
    what = row["what"] + (f", halved to {size} at once" if size < row["batch"] else "")
    memory = f"{row['memory_gb']:.1f}" if "memory_gb" in row else ""
    memory += f" (counted {row['counted_gb']:.1f})" if "counted_gb" in row else ""
    share = f"{row['mfu']:.1%}" if "mfu" in row else ""
    numbers = [
        f"{row['images_per_second']:.4g}",
        f"{row['ms']:.4g}",
        f"{row['host_ms']:.3g}" if "host_ms" in row else "",
    ]
    return [row["case"], str(row["batch"]), what, *numbers, memory, share, ratio]


# The cases


def tiny_variants(*variants: Variant) -> list[Variant]:
    """Returns the variants of a rehearsal: one of each kind, two samples, no CUDA graphs and no activation budget."""
    kept: dict[tuple[bool, ...], Variant] = {}
    for each in variants:
        key = each.is_compiled, each.is_live, each.is_gated, "--bf16_weights" in each.flags
        if not any(flag in each.flags for flag in ("--cuda_graphs", "--activation_memory")):
            kept.setdefault(key, each._replace(batch=2, counted_gb=None))
    return list(kept.values())


def run_case(bench: Bench, case: Case, variants: Sequence[Variant]) -> Finding:
    """Runs a case, or its tiny version in a rehearsal."""
    from benchmarks.gpu_proofs import rehearsed_compiler

    if bench.is_tiny:
        kind = "sdxl" if "sdxl" in case.name else "sd"
        case = replace(case, edge=32, architecture=None if case.architecture is None else TINY_MODELS[kind])
        variants = tiny_variants(*variants)
    with rehearsed_compiler(bench.is_tiny):
        return contest(bench, case, variants)


def sd(bench: Bench) -> Finding:
    """Stable Diffusion 1.5 at 512 px."""
    variants = [
        Variant("eager", 64, BF16),
        Variant("eager, bf16_weights", 64, f"{BF16} --bf16_weights"),
        Variant("eager, bf16_weights, channels_last", 64, FAST),
        Variant("compiled blocks", 64, f"{FAST} --compile blocks"),
        Variant("compiled denoiser", 64, f"{FAST} --compile denoiser"),
        Variant("eager, as counted", 1, BF16, counted_gb=14.48, is_live=True),
        Variant("eager, cuDNN's benchmark", 64, FAST, benchmark=True),
        Variant("compiled blocks, by the gate", 4, f"{FAST} --compile blocks", is_gated=True),
    ]
    return run_case(bench, Case("sd 512", MODELS["sd"], 512), variants)


def sdxl(bench: Bench) -> Finding:
    """SDXL at 1024 px, full fine-tuning."""
    variants = [
        Variant("eager", 4, FAST),
        Variant("eager", 8, FAST),
        Variant("compiled blocks", 8, f"{FAST} --compile blocks"),
        Variant("eager, checkpointing", 16, f"{FAST} --gradient_checkpointing"),
        Variant("compiled blocks", 16, f"{FAST} --compile blocks"),
        Variant("compiled blocks, memory 0.7", 16, f"{FAST} --compile blocks --activation_memory 0.7"),
        Variant("compiled denoiser", 8, f"{FAST} --compile denoiser"),
    ]
    return run_case(bench, Case("sdxl 1024", MODELS["sdxl"], 1024), variants)


def sdxl_lora(bench: Bench) -> Finding:
    """SDXL at 1024 px, LoRA of rank 16."""
    lora = "--adaptation lora --rank 16"
    light = f"{BF16} --channels_last"
    variants = [
        Variant("eager", 1, light),
        Variant("compiled blocks", 1, f"{light} --compile blocks"),
        Variant("eager, one graph a step", 1, f"{light} --cuda_graphs"),
        Variant("compiled blocks, one graph a step", 1, f"{light} --compile blocks --cuda_graphs"),
        Variant("eager", 4, light),
        Variant("compiled blocks", 4, f"{light} --compile blocks"),
        Variant("eager, bf16_weights", 1, FAST),
        Variant("compiled blocks, bf16_weights", 1, f"{FAST} --compile blocks"),
        Variant("eager, as counted", 1, BF16, counted_gb=14.56, is_live=True),
    ]
    return run_case(bench, Case("sdxl lora 1024", MODELS["sdxl"], 1024, averages=False, flags=lora), variants)


def pixels(bench: Bench) -> Finding:
    """A pixel denoiser of 114 million weights at 64 px."""
    variants = [
        Variant("eager", 16, BF16),
        Variant("eager, bf16_weights, channels_last", 16, FAST),
        Variant("compiled denoiser", 16, f"{FAST} --compile denoiser"),
        Variant("eager, one graph a step", 16, f"{FAST} --cuda_graphs"),
        Variant("compiled denoiser, one graph a step", 16, f"{FAST} --compile denoiser --cuda_graphs"),
        Variant("eager, bf16_weights, channels_last", 128, FAST),
        Variant("compiled denoiser", 128, f"{FAST} --compile denoiser"),
    ]
    return run_case(bench, Case("pixels 64", None, 64), variants)


# The peers


class Peer(NamedTuple):
    """An example script of diffusers.

    Attributes:
        case: our case that it is compared with.
        kind: kind of pipeline.
        seconds: the time that must be left to start it.
        flags: flags that make it faster, and others that it needs.
    """

    case: str
    script: str
    kind: str
    edge: int
    batch: int
    seconds: float
    flags: str


PEERS = (
    Peer("sdxl 1024", "train_text_to_image_sdxl.py", "sdxl", 1024, 16, 60, "--gradient_checkpointing --use_ema"),
    Peer("sd 512", "train_text_to_image.py", "sd", 512, 64, 40, "--use_ema"),
    Peer("sdxl lora 1024", "train_text_to_image_lora_sdxl.py", "sdxl", 1024, 1, 40, "--rank 16"),
    Peer("pixels 64", "train_unconditional.py", "unconditional", 64, 16, 25, "--use_ema"),
)
PEER_STEPS = 10


def peers(bench: Bench) -> Finding:
    """Runs diffusers' own scripts with tuned flags, each in a process that ends after some steps."""
    if bench.peer is None:
        return Finding(SKIPPED, "no --peer: give a folder with diffusers' example scripts")
    rows, failures = [], []
    for peer in PEERS:
        script = bench.peer / peer.script
        if not script.exists():
            failures.append(f"{peer.script} is not in {bench.peer}")
            continue
        if not bench.is_tiny and bench.left() < peer.seconds:
            failures.append(f"{peer.script}: no time left")
            continue
        try:
            row = run_peer(bench, peer, script)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            failures.append(f"{peer.script}: {error}")
            bench.note(failures[-1])
            continue
        rows.append(row)
        bench.note(f"{peer.case}: {' | '.join(cells(row, ()))}")
    says = "; ".join([f"{row['case']} {row['images_per_second']:.4g} images/s" for row in rows] + failures)[:400]
    facts = {"speeds": rows, "failures": failures}
    return Finding(HOLDS if rows else SKIPPED if not failures else FAILED, says, facts)


def peer_pipeline(bench: Bench, kind: str) -> Path:
    """Writes a pipeline with random weights in bfloat16, created on the device; returns its folder."""
    folder = bench.folder / f"peer-{kind}"
    if bench.is_tiny or kind == "unconditional":
        return make_pipeline(kind, "tiny" if bench.is_tiny else "true", folder)
    return MODELS[kind].save_pipeline(folder, device=bench.device)


def run_peer(bench: Bench, peer: Peer, script: Path) -> dict[str, Any]:
    """Runs a peer's script; returns a row of the table.

    Raises:
        RuntimeError: if the script failed.
    """
    edge, batch = (32, 2) if bench.is_tiny else (peer.edge, peer.batch)
    steps = 4 if bench.is_tiny else PEER_STEPS
    pipeline, place = peer_pipeline(bench, peer.kind), bench.folder / f"peer-{peer.script}"
    place.mkdir(exist_ok=True)
    images = make_images(bench.folder / f"peer-images-{edge}", 64 if not bench.is_tiny else 4, edge)
    words: list[object] = [sys.executable, Path(__file__).with_name("launch.py"), "--record", place]
    words += ["--stop_after", steps, script, "--train_data_dir", images, "--resolution", edge, "--center_crop"]
    words += ["--train_batch_size", batch, "--mixed_precision", "bf16" if bench.is_cuda else "no"]
    words += ["--lr_scheduler", "constant", "--lr_warmup_steps", 0, "--checkpointing_steps", 10**6]
    words += ["--output_dir", place / "out", *peer.flags.split()]
    words += tuned_flags(script.read_text(encoding="utf-8"), os.cpu_count() or 1)
    if peer.kind == "unconditional":
        words += ["--model_config_name_or_path", pipeline / "unet", "--num_epochs", 1000, "--save_images_epochs", 10**6]
    else:
        words += ["--pretrained_model_name_or_path", pipeline, "--seed", 0, "--max_train_steps", 10**4]
    environment = os.environ | {"HF_HOME": str(place / "home"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    with (bench.out / f"peer-{script.stem}.log").open("w", encoding="utf-8") as log:
        told = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment, "check": False}
        status = subprocess.run([str(word) for word in words], timeout=max(1.0, bench.left()), **told).returncode
    if status:
        said = Path(log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(f"exit status {status}: {said[-1] if said else ''}"[:200])
    record = json.loads((place / "record.json").read_text(encoding="utf-8"))
    taken = record["device_seconds"] or [step["seconds"] for step in record["steps"][1:]]
    row = {"case": peer.case, "batch": batch, "what": f"diffusers' {peer.script}, {peer.flags}", "is_peer": True}
    row["ms"] = 1e3 * statistics.median(taken[WARM_UP - 1 :])
    row["images_per_second"] = 1e3 * batch / row["ms"]
    if bench.is_cuda:
        row["memory_gb"] = record["memory"]["steps"] / 1e9
    return row
