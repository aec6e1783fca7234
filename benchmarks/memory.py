"""Reports how much memory each memory flag of train_text_to_image.py saves, and what it costs.

    python benchmarks/memory.py [--models sd sdxl] [--rows 1 2 14]     counted, on any machine
    python benchmarks/memory.py --measure [--folder FOLDER]            measured, on a GPU

SD 1.5 at 512 px and SDXL at 1024 px in bfloat16 mixed precision, with one image per step unless a row says otherwise.

Counted: an optimizer step with the script's own parts, on fake tensors that have a shape but no memory; it adds up
their storages while they exist. Each kind has its total; the peak is less than the sum, because gradients appear while
activations are freed. If torch is built without CUDA, fake tensors can't be on a GPU, so they are on the CPU with
CUDA's rules: norms and softmax in float32 under autocast, and flash attention. Not counted are the CUDA context, the
workspaces of cuDNN and cuBLAS, rounding by the allocator, and the columns that int8 layers compute in half precision.

Measured: a short run of the script for each row, in its own process, on a pipeline of the same architecture with random
weights; the memory is what the run logs. A run of SDXL writes 14 GB, which are deleted afterwards. This part has not
been run on a GPU yet.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bitsandbytes.nn  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

from benchmarks.made import MODELS, TOKENS, Architecture, MadeSource  # noqa: E402
from benchmarks.printing import print_table  # noqa: E402
from tests import tiny  # noqa: E402
from train_text_to_image import Options  # noqa: E402
from utils.config.batch import Conditioning  # noqa: E402
from utils.config.options import UserError, parse, run_script  # noqa: E402
from utils.models.base import TextStates  # noqa: E402
from utils.models.text_to_image import TextFamily  # noqa: E402
from utils.training.ema import MovingAverage  # noqa: E402
from utils.training.optimizers import NamedParameter  # noqa: E402
from utils.training.state import make_optimizer  # noqa: E402

PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
STEPS = 6


class Row(NamedTuple):
    """Flags, the number of the row that they extend and are compared with, and their cost."""

    base: int | None
    flags: str
    costs: str = ""


SAMPLES = (
    "--validation_prompt squares --num_validation_images 1 --validation_num_inference_steps 5 --validation_steps 3"
)
ROWS = {
    1: Row(None, "--mixed_precision bf16 --train_batch_size 1"),
    2: Row(1, "--gradient_checkpointing", "recomputes most of the forward pass"),
    3: Row(1, "--cache_latents --cache_text_embeddings", "disk space; fixed crops and flips per image"),
    4: Row(1, "--optimizer adamw8bit", "state rounded to 8 bits"),
    5: Row(1, "--optimizer adafactor", "another optimizer, without momentum"),
    6: Row(1, "--pure_bf16", "stochastic rounding; weights are updated one by one"),
    7: Row(1, "--optimizer_in_backward", "no clipping, no accumulation, one process"),
    8: Row(1, "--use_ema", "updated in each step"),
    9: Row(8, "--offload_ema", "copies all weights to the host in each step"),
    10: Row(1, "--attention_slicing", "time, and the memory that PyTorch's attention saves"),
    11: Row(2, "--optimizer_in_backward", "as 7"),
    12: Row(11, "--cache_latents --cache_text_embeddings --pure_bf16 --optimizer adamw8bit", "as 3, 4, 6"),
    13: Row(1, "--adaptation lora --rank 16", "trains only matrices of rank 16"),
    14: Row(13, "--gradient_checkpointing", "as 2"),
    15: Row(13, "--quantize_base nf4", "weights rounded to 4 bits, unpacked in each layer"),
    16: Row(13, "--quantize_base int8", "weights and inputs rounded to 8 bits; each layer's input is kept"),
    17: Row(14, "--quantize_base nf4", "as 15"),
    18: Row(17, "--cache_latents --cache_text_embeddings", "as 3"),
    19: Row(14, "--train_batch_size 4"),
    20: Row(19, "--vae_slicing", "images are encoded one after another"),
    21: Row(14, "--resolution 1536"),
    22: Row(21, "--vae_tiling", "small differences at the seams of tiles"),
}
MEASURED_ROWS = ROWS | {
    23: Row(14, SAMPLES),
    24: Row(23, "--attention_slicing", "time"),
    25: Row(23, "--vae_slicing", "nothing: samples are decoded one by one"),
    26: Row(23, "--vae_tiling", "as 22"),
    27: Row(23, "--sampling_cpu_offload", "moves models to the device and back in each validation"),
}


def flags_of(number: int) -> list[str]:
    """Returns all flags of a row, including those of the row that it extends."""
    row = MEASURED_ROWS[number]
    return [*(() if row.base is None else flags_of(row.base)), *row.flags.split()]


def title_of(number: int) -> list[str]:
    """Returns the number and the flags of a row as cells."""
    row = MEASURED_ROWS[number]
    return [str(number), f"full fine-tuning, `{row.flags}`" if row.base is None else f"{row.base} + `{row.flags}`"]


# Counting


class Live(TorchDispatchMode):
    """Counts the bytes of existing storages, and the FLOPs.

    Attributes:
        now, most: current bytes, and the peak of a step; `phase_of_most` is the phase of the peak.
        copies: bytes, by storage, of parameters in another dtype.
        flops: FLOPs of a step, 2 for each multiply-add.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = 0
        self.begin("")

    def begin(self, phase: str) -> None:
        """Begins a phase of a step."""
        self.phase = self.phase_of_most = phase
        self.most, self.flops = self.now, 0
        self.copies: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made, packet = function(*args, **(kwargs or {})), getattr(function, "_overloadpacket", None)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=made)
        elif str(packet) in ("bitsandbytes.gemm_4bit", "bitsandbytes.int8_scaled_mm"):
            self.flops += 2 * args[0].numel() * made.shape[-1]
        for storage in (each.untyped_storage() for each in tree_leaves(made) if isinstance(each, Tensor)):
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._remove, key)
                if packet is torch.ops.aten._to_copy and isinstance(args[0], nn.Parameter):
                    self.copies[key] = storage.nbytes()
        if self.now > self.most:
            self.most, self.phase_of_most = self.now, self.phase
        return made

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        self.copies.pop(key, None)


def in_float32(function: Callable) -> Callable:
    """Wraps a function so that it computes in float32 under autocast."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return call


def flash_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Attention that keeps inputs, output and one number per row for the backward pass."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def in_4_bits(data: Tensor, **options: Any) -> nn.Parameter:
    """Replaces bitsandbytes' `Params4bit`, whose class fake tensors can't have."""
    packed, state = bitsandbytes.functional.quantize_4bit(data, quant_type="nf4", compress_statistics=True)
    made = nn.Parameter(packed, requires_grad=False)
    made.quant_state, made.quant_type, made.compress_statistics = state, "nf4", True
    return made


def in_8_bits(data: Tensor, **options: Any) -> nn.Parameter:
    """Replaces bitsandbytes' `Int8Params`, likewise."""
    packed, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(data.half())
    made = nn.Parameter(packed, requires_grad=False)
    made.CB, made.SCB, made.has_fp16_weights = packed, scales, False
    return made


def apply_anew(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply` that creates new parameters, because fake ones can't be changed in place."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None and (made := function(parameter.detach())).dtype != parameter.dtype:
            module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
    return module


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Context manager: the CPU follows CUDA's rules, and fake tensors return a value when asked for one."""
    changes = [
        (F, "group_norm", in_float32(F.group_norm)),
        (F, "layer_norm", in_float32(F.layer_norm)),
        (Tensor, "softmax", in_float32(Tensor.softmax)),
        (F, "scaled_dot_product_attention", flash_attention),
        (nn.Module, "_apply", apply_anew),
        (FakeTensor, "__bool__", lambda self: True),
        (FakeTensor, "item", lambda self: 1.0),
    ]
    for place in (bitsandbytes.nn, bitsandbytes.nn.modules):
        changes += [(place, "Params4bit", in_4_bits), (place, "Int8Params", in_8_bits)]
    with ExitStack() as stack:
        for place, name, change in changes:
            stack.enter_context(patch.object(place, name, change, create=True))
        yield


def prepared(architecture: Architecture, options: Options) -> tuple[TextFamily, list[NamedParameter]]:
    """Returns the pipeline as the script prepares it, and its trained parameters."""
    adaptation_class = options.adaptation.spec.kind.value
    dtypes = adaptation_class.dtypes(options.adaptation, torch.bfloat16)
    family = architecture.family(MadeSource(options.model, architecture), dtypes, {})
    if options.adaptation.quantize_base is not None:
        family.quantize_unet(options.adaptation.quantize_base, torch.device("cpu"))
        for module in family.denoiser.modules():
            if isinstance(module, bitsandbytes.nn.Linear8bitLt):
                module.state.threshold = 0.0  # which columns are over it is not known without values
    adaptation = adaptation_class(family, options.adaptation, None)
    family.save_memory()
    if options.model.gradient_checkpointing:
        family.use_gradient_checkpointing(text_encoders=False, vae=False)
    if options.cache.cache_latents:
        family.latent_space.vae = family.pipeline.vae = None
        vars(family.pipeline).update(dict.fromkeys(family.text_encoder_names))
    adaptation.train_mode()
    return family, adaptation.named_parameters(options.optimizer)


def encoded(family: TextFamily, options: Options) -> tuple[Tensor, TextStates]:
    """Returns noisy latents and text states, from the encoders if they are not cached."""
    batch, edge = options.loader.train_batch_size, options.image.resolution or family.default_resolution
    if options.cache.cache_latents:
        shapes = {"encoder_hidden_states": (TOKENS, family.denoiser.config.cross_attention_dim), "text_embeds": (1280,)}
        states = {name: torch.empty(batch, *shapes[name]).bfloat16() for name in family.prompt_argument_names}
        return torch.empty(batch, *family.latent_space.shape((edge, edge))), states
    mean, std = family.latent_space.moments(torch.empty(batch, 3, edge, edge, dtype=torch.uint8))
    ids = torch.zeros(batch, len(family.text_encoder_names), TOKENS, dtype=torch.long)
    return mean + std, family.encode_text(ids, torch.zeros(batch, dtype=torch.bool))


class Count(NamedTuple):
    """Bytes by kind, the peak of all kinds with its phase of the step, and the FLOPs of the step."""

    kinds: dict[str, int]
    most: int
    phase: str
    flops: int


def count(architecture: Architecture, flags: Sequence[str]) -> Count:
    """Counts an optimizer step, after a first step with trivial gradients that creates the optimizer state."""
    options: Options = parse(Options, ["--pretrained_model", "made", *flags], "")
    live = Live()
    with FakeTensorMode(allow_non_fake_inputs=True), live, as_on_cuda():
        family, named = prepared(architecture, options)
        parameters = [each.parameter for each in named]
        sizes = [parameter.nbytes for parameter in parameters]
        gradients = max(sizes) if options.optimizer.optimizer_in_backward else sum(sizes)
        gc.collect()
        kinds = {"weights": sum(sizes), "gradients": gradients, "frozen": live.now - sum(sizes)}
        before = live.now
        on_device = options.ema.use_ema and not options.ema.offload_ema
        average = MovingAverage(parameters, options.ema) if on_device else None
        kinds["average"], before = live.now - before, live.now
        optimizer = make_optimizer(named, options.optimizer, options.adaptation.pure_bf16, options.runtime.seed)
        sum(parameter.sum() for parameter in parameters).backward()
        optimizer.step()
        optimizer.zero_grad()
        kinds["optimizer"] = live.now - before
        kinds |= backward_pass(live, family, options)
        if not options.optimizer.optimizer_in_backward:
            nn.utils.clip_grad_norm_(parameters, options.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update()
        return Count(kinds, live.most, live.phase_of_most, live.flops)


def backward_pass(live: Live, family: TextFamily, options: Options) -> dict[str, int]:
    """Runs encoding, forward and backward pass; returns the bytes that exist after the forward pass, by kind."""
    live.begin("encoding")
    with torch.no_grad():
        noisy, states = encoded(family, options)
    before, live.phase = live.now, "forward"
    timesteps, crops = torch.zeros(len(noisy), dtype=torch.long), torch.zeros(len(noisy), 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = family.predict(family.denoiser, noisy, timesteps, Conditioning(states, crops)).float().square().mean()
    copies = sum(live.copies.values())
    kept = {"activations": live.now - before - copies, "bf16 copies": copies}
    live.phase = "backward"
    loss.backward()
    live.phase = "step"
    return kept


KINDS = ("weights", "gradients", "optimizer", "average", "frozen", "activations", "bf16 copies")
COUNTED = ["", "flags", *KINDS, "most at once", "when", "saved", "TFLOPs", "costs"]


def counted_rows(architecture: Architecture, numbers: Sequence[int]) -> Iterator[list[str]]:
    """Yields the cells of each row, in GB."""
    counts: dict[int, Count] = {}
    for number in numbers:
        found = counts[number] = count(architecture, flags_of(number))
        base = counts.get(ROWS[number].base)
        sizes = [f"{size / 1e9:.2f}" for size in (*(found.kinds[kind] for kind in KINDS), found.most)]
        saved = "" if base is None else f"{(base.most - found.most) / 1e9:z.2f}"
        more = "" if base is None else f" ({found.flops / base.flops - 1:+.0%})"
        flops = f"{found.flops / 1e12:.2f}{more}"
        yield [*title_of(number), *sizes, found.phase, saved, flops, ROWS[number].costs]


# Measuring


def measure(pipeline: Path, images: Path, folder: Path, flags: Sequence[str]) -> tuple[float, float]:
    """Runs the script briefly; returns (peak GB of device memory, NaN without a device; seconds per step).

    Raises:
        UserError: if the run failed, with its last line.
    """
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [sys.executable, ROOT / "train_text_to_image.py", "--pretrained_model", pipeline]
        command += ["--train_data_dir", images, "--output_dir", output, "--max_train_steps", STEPS]
        command += ["--encoding_cache_dir", folder / "cache", "--cache_batch_size", 1]
        command += ["--no_final_checkpoint", "--no_report", "--no_verdict", "--report_to", "none", *flags]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
        lines = Path(output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    images_per_second = statistics.median(step["images_per_second"] for step in steps[STEPS // 2 :])
    batch_size = int(flags[len(flags) - flags[::-1].index("--train_batch_size")])
    return steps[-1].get("device_memory_gb", float("nan")), batch_size / images_per_second


MEASURED = ["", "flags", "most memory, GB", "saved, GB", "s/step", "times as long", "costs"]


def measured_rows(architecture: Architecture, folder: Path, numbers: Sequence[int]) -> Iterator[list[str]]:
    """Yields the cells of each row, or the reason if its run failed."""
    pipeline = architecture.save_pipeline(folder / architecture.family.__name__)
    images = tiny.make_images(folder / "images")
    found: dict[int, tuple[float, float]] = {}
    for number in numbers:
        row = MEASURED_ROWS[number]
        try:
            memory, seconds = found[number] = measure(pipeline, images, folder, flags_of(number))
        except UserError as error:
            yield [*title_of(number), "", "", "", "", str(error)]
            continue
        base_memory, base_seconds = found.get(row.base, (memory, seconds))
        saved, ratio = f"{base_memory - memory:.2f}", f"{seconds / base_seconds:.3g}"
        yield [*title_of(number), f"{memory:.2f}", saved, f"{seconds:.3g}", ratio, row.costs]


def run(argv: Sequence[str] | None) -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="+", type=int, choices=MEASURED_ROWS, help="numbers of rows (default: all)")
    parser.add_argument("--measure", action="store_true", help="run the script on a GPU instead of counting")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("memory-benchmark"),
        help="folder for pipelines and images (default: memory-benchmark)",
    )
    args = parser.parse_args(argv)
    if args.measure and not torch.cuda.is_available():
        raise UserError("--measure needs a GPU with CUDA, and there is none; remove it to count instead")
    torch.set_num_threads(1)
    print(", ".join(f"{package} {version(package)}" for package in PACKAGES))
    for name in args.models:
        architecture = MODELS[name]
        numbers = args.rows or list(MEASURED_ROWS if args.measure else ROWS)
        title = f"{name}, {architecture.family.default_resolution} px"
        if args.measure:
            rows = measured_rows(architecture, args.folder, numbers)
            print_table(f"{title}: measured on {torch.cuda.get_device_name()}", MEASURED, rows)
        else:
            rows = counted_rows(architecture, [number for number in numbers if number in ROWS])
            print_table(f"{title}: counted, in GB", COUNTED, rows)


if __name__ == "__main__":
    sys.exit(run_script(run))
