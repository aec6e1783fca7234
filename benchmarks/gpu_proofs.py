"""The sections of benchmarks/gpu.py that check correctness: gradients, resuming, waits, out of memory, CUDA graphs."""

import hashlib
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import attention as race
from benchmarks.gpu_runs import FAILED, HOLDS, Bench, Finding, Run, relative_distance, tensors_of
from utils.models.options import ATTENTION, CPU_ATTENTION
from utils.training.backward import Gradients
from utils.training.encoding import EncodedBatch
from utils.training.exchange import Exchange
from utils.training.log import SentNumbers
from utils.training.speed import Reference, allowed_error
from utils.training.step_graph import Outcome, StepGraph

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "triton")
PARITY = 1e-4  # relative error of the worst tensor between float32 on two devices
COSINE = 0.99  # cosine between the gradients in half precision and float32
FP16_SCALE = 1024.0  # loss scale at which the first step's gradients neither overflow nor vanish
SAME = 1e-5  # of weights that trained by smaller pieces, and of losses that a graph replays


def verdict(failures: Sequence[str], says: str, facts: Mapping[str, Any]) -> Finding:
    """Returns HOLDS if nothing failed, else FAILED with the failures first."""
    if failures:
        return Finding(FAILED, f"{'; '.join(failures)[:300]} ({says})", dict(facts) | {"failures": list(failures)})
    return Finding(HOLDS, says, dict(facts))


# The machine


def timed(bench: Bench, function: Callable[[], object], repeats: int) -> float:
    """Returns the median seconds of a call, after a warm-up call."""
    taken = []
    for _ in range(repeats + 1):
        wait(bench)
        began = time.perf_counter()
        function()
        wait(bench)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def wait(bench: Bench) -> None:
    """Synchronises the device."""
    if bench.is_cuda:
        torch.cuda.synchronize()


def machine(bench: Bench) -> Finding:
    """Measures a matrix product and a copy; records versions and the default attention kernel."""
    facts: dict[str, Any] = {"versions": {}}
    for package in PACKAGES:
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:
            facts["versions"][package] = None
    edge, size = (512, 2**22) if bench.is_tiny else (8192, 2**33)
    one, other = torch.randn(2, edge, edge, device=bench.device, dtype=torch.bfloat16).unbind()
    seconds = timed(bench, lambda: one @ other, 10)
    bench.product_tflops = facts["product_tflops"] = 2 * edge**3 / seconds / 1e12
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    facts["copy_tbs"] = 2 * size / timed(bench, lambda: target.copy_(source), 5) / 1e12
    query = torch.randn(2, 8, 256, 64, device=bench.device, dtype=torch.bfloat16)
    names = {int(value): name for name, value in torch.nn.attention.SDPBackend.__members__.items()}
    facts["attention"] = names.get(torch._fused_sdp_choice(query, query, query))
    facts["cudnn"] = torch.backends.cudnn.version()
    facts["device"] = torch.cuda.get_device_name() if bench.is_cuda else "CPU"
    if bench.is_cuda:
        facts["driver"], facts["memory_gb"] = driver_version(), torch.cuda.mem_get_info()[1] / 1e9
    says = f"{facts['device']}, torch {torch.__version__}, cuDNN {facts['cudnn']}, {facts['attention']} by default; "
    return Finding(HOLDS, f"{says}{facts['product_tflops']:.3g} TF/s bf16, {facts['copy_tbs']:.3g} TB/s", facts)


def driver_version() -> str:
    """Returns the version of the kernel module."""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text(encoding="utf-8").splitlines()[0] if file.exists() else "unknown"


# Gradients of one batch

FAMILIES = ("sd", "sdxl", "pixels", "labelled latents")
BF16 = ("--mixed_precision", "bf16")
PLAIN = ("--mixed_precision", "no", "--allow_tf32", "false", "--no_fused_lora")
LORA = ("--adaptation", "lora", "--rank", 4)
HALVES: dict[str, tuple[object, ...]] = {
    "bf16": BF16,
    "bf16_weights": (*BF16, "--bf16_weights"),
    "channels_last": (*BF16, "--channels_last"),
    "fp16": ("--mixed_precision", "fp16"),
}
"""Flags of half precision by name. The first, plain, is compared with the CPU, the others with the first."""


@contextmanager
def keeping_gradients(kept: dict[str, Tensor]) -> Iterator[None]:
    """Context manager: copies the gradients of the first step; first replaces zero weights, which could hide some."""
    add_up = Gradients.add_up

    def keep(self: Gradients, step: int, batches: Any) -> Any:
        if step == 0:
            stir(self.model)
            if self.accelerator.scaler is not None:
                scaler = self.accelerator.scaler
                scaler.load_state_dict(scaler.state_dict() | {"scale": FP16_SCALE})
        sums = add_up(self, step, batches)
        if not kept:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            named = ((name, each.grad) for name, each in self.model.named_parameters() if each.grad is not None)
            kept.update((name, each.detach().float().cpu() / scale) for name, each in named)
        return sums

    with patch.object(Gradients, "add_up", keep):
        yield


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Replaces trained tensors that are all zero by values that are the same on each device."""
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.02)


def gradients_of(bench: Bench, family: str, flags: Sequence[object], on_cpu: bool = False) -> dict[str, Tensor]:
    """Returns the gradients of the first batch of a run, by parameter name.

    Raises:
        RuntimeError: if the run failed.
    """
    kept: dict[str, Tensor] = {}
    place = patch.object(torch.cuda, "is_available", lambda: False) if on_cpu else nullcontext()
    with keeping_gradients(kept), place:
        run = bench.train(family, [*flags, "--max_train_steps", 1, "--no_final_checkpoint"], fresh_name("parity"))
    if run.status or not kept:
        raise RuntimeError(run.error)
    return kept


_COUNTS: Counter[str] = Counter()


def fresh_name(kind: str) -> str:
    """Returns a unique name for the folder of a run."""
    _COUNTS[kind] += 1
    return f"{kind}-{_COUNTS[kind]}"


def cosine(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Returns the cosine between two sets of tensors, each as one vector."""
    dot = sum(float((found[name].double() * expected[name].double()).sum()) for name in expected)
    squares = [sum(float(each.double().square().sum()) for each in tensors.values()) for tensors in (found, expected)]
    return dot / max(1e-30, (squares[0] * squares[1]) ** 0.5)


def parity(bench: Bench) -> Finding:
    """Compares float32 with the CPU, and half precision with float32 relative to the error of plain half precision."""
    failures: list[str] = []
    facts: dict[str, Any] = {}
    worst: dict[str, float] = {}
    cases = [(family, ()) for family in FAMILIES] + [(family, LORA) for family in FAMILIES[:2]]
    for family, adapted in cases:
        name = f"{family} {'lora' if adapted else ''}".strip()
        plain = [word for word in PLAIN if adapted or word != "--no_fused_lora"]
        exact = gradients_of(bench, family, [*plain, *adapted], on_cpu=True)
        reference = Reference(exact)
        own = reference.errors(gradients_of(bench, family, [*BF16, *adapted], on_cpu=True))
        variants = {"fp32": tuple(plain)} | HALVES
        if adapted:
            variants = {"fp32": tuple(plain), "fp32, fused": tuple(plain[:-1]), "bf16": BF16, "fp16": HALVES["fp16"]}
        for variant, flags in variants.items():
            if not bench.is_cuda and variant in ("fp32", "fp16"):
                continue  # there float32 is the reference itself, and fp16 is not supported
            try:
                found = gradients_of(bench, family, [*flags, *adapted])
            except RuntimeError as error:
                failures.append(f"{name} {variant}: {error}")
                continue
            errors = reference.errors(found)
            largest, together = max(errors.values()), cosine(found, exact)
            facts[f"{name}, {variant}"] = {"worst": largest, "cosine": together}
            worst[variant] = max(worst.get(variant, 0.0), largest)
            if variant.startswith("fp32"):
                wrong = {each: error for each, error in errors.items() if not error <= PARITY}
            elif variant == "bf16":  # single tensors round differently on two devices
                wrong = {} if largest <= allowed_error(max(own.values())) else {"the worst": largest}
                own = errors
            else:
                wrong = {each: error for each, error in errors.items() if not error <= allowed_error(own[each])}
            if wrong:
                each = max(wrong, key=lambda tensor: wrong[tensor])
                failures.append(f"{name} {variant}: {len(wrong)} tensors, {each} is {wrong[each]:.2g} off")
            if not together >= COSINE:
                failures.append(f"{name} {variant}: cosine {together:.4f}")
        bench.note(f"parity of {name}: {'; '.join(failures[-2:]) or 'holds'}")
    says = f"{len(facts)} comparisons; worst " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    return verdict(failures, says, facts)


# Resumed runs

RESUMED: dict[str, tuple[object, ...]] = {
    "plain": (),
    "bf16, EMA": (*BF16, "--use_ema"),
    "bf16_weights, channels_last": (*BF16, "--bf16_weights", "--channels_last"),
    "8-bit": ("--optimizer", "adamw8bit"),
    "paged": ("--optimizer", "paged_adamw8bit"),
    "nf4 LoRA": (*BF16, *LORA, "--quantize_base", "nf4"),
    "async checkpoint": ("--async_checkpointing",),
    "fp16": ("--mixed_precision", "fp16"),
}

OF_BITSANDBYTES = ("8-bit", "paged", "nf4 LoRA")


def digests(checkpoint: Path) -> dict[str, str]:
    """Returns the SHA-256 of the tensors in each file of a checkpoint; the order of safetensors metadata varies."""
    found = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found[str(file.relative_to(checkpoint))] = digest.hexdigest()
    return found


def resumes(bench: Bench) -> Finding:
    """Compares four steps with two steps, resumed for two: weights, EMA and optimizer state, bit for bit."""
    failures, facts = [], {}
    for name, flags in RESUMED.items():
        if name == "fp16" and not bench.is_cuda:
            facts[name] = "skipped: not supported on a CPU"
            continue
        if name in OF_BITSANDBYTES and find_spec("bitsandbytes") is None:
            facts[name] = "skipped: bitsandbytes is not installed"
            continue
        if name == "nf4 LoRA" and not bench.is_cuda:
            flags = flags[len(BF16) :]  # norms on a CPU do not mix float32 with bfloat16 weights
        words = [*flags, "--deterministic", "--learning_rate", 1e-3, "--checkpointing_steps", 2]
        key = fresh_name("resumes")
        runs = [bench.train("sd", [*words, "--max_train_steps", 4], f"{key}-whole")]
        runs.append(bench.train("sd", [*words, "--max_train_steps", 2], f"{key}-parts"))
        again = ["--max_train_steps", 4, "--resume_from_checkpoint", "latest"]
        runs.append(bench.train("sd", [*words, *again], f"{key}-parts"))
        broken = next((run for run in runs if run.status), None)
        if broken is not None:
            facts[name] = broken.error
            failures.append(f"{name}: {broken.error}")
            continue
        whole, parts = (digests(run.folder / "checkpoint-4") for run in (runs[0], runs[2]))
        other = sorted(file for file in whole.keys() | parts.keys() if whole.get(file) != parts.get(file))
        facts[name] = other or "equal"
        if other or not whole:
            failures.append(f"{name}: {', '.join(other) or 'no files'}")
    equal = sum(found == "equal" for found in facts.values())
    return verdict(failures, f"{equal} of {len(RESUMED)} equal bit for bit", facts)


# Waits for the device


class Waits:
    """Counts calls that wait for a GPU, from the start of a step until it is recorded, except for reads by the log.

    It uses the warnings of torch's debug mode, which show all such calls; its errors would end the run at the first.
    """

    def __init__(self, first: int):
        """Args:
        first: the step from which calls count; one-time setup happens before it.
        """
        self.found: Counter[str] = Counter()
        self._first = first

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Context manager: counts the waits of a run."""
        add_up, exchange, read = Gradients.add_up, Exchange.step, SentNumbers.read

        def begin(gradients: Gradients, step: int, batches: Any) -> Any:
            if step >= self._first:
                torch.cuda.set_sync_debug_mode("warn")
            return add_up(gradients, step, batches)

        def end(*arguments: Any) -> None:
            try:
                exchange(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        def unheard(sent: Sequence[SentNumbers]) -> Any:
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("default")
            try:
                return read(sent)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        places = (Gradients, "add_up", begin), (Exchange, "step", end), (SentNumbers, "read", staticmethod(unheard))
        with warnings.catch_warnings():
            warnings.showwarning = self._hear
            warnings.filterwarnings("always", message=".*synchronizing.*")
            with patch.object(*places[0]), patch.object(*places[1]), patch.object(*places[2]):
                yield

    def _hear(self, message: Warning | str, *rest: Any) -> None:
        if "synchronizing" not in str(message):
            return
        frames = [each for each in traceback.extract_stack() if "warnings.py" not in each.filename][:-1]
        near = [each for each in frames if "site-packages" not in each.filename][-1:] + frames[-1:]
        self.found[" > ".join(f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in near)] += 1


def waits(bench: Bench) -> Finding:
    """Checks that the host never waits within a step, and that steps are queued before the previous one has ended."""
    from benchmarks.gpu_speed import queued_ahead

    failures, facts = [], {}
    cases: dict[str, tuple[object, ...]] = {
        "fp32, EMA": ("--use_ema",),
        "bf16_weights, channels_last": RESUMED["bf16_weights, channels_last"],
        "LoRA": (*BF16, *LORA),
        "cached": ("--cache_latents", "--cache_text_embeddings"),
    }
    for name, flags in cases.items():
        heard = Waits(first=3)
        with heard.counting():
            words = ["--max_train_steps", 20, "--logging_steps", 10, "--no_final_checkpoint", *flags]
            run = bench.train("sd", words, fresh_name("waits"))
        facts[name] = dict(heard.found)
        if run.status:
            failures.append(f"{name}: {run.error}")
        elif heard.found:
            place, count = heard.found.most_common(1)[0]
            failures.append(f"{name}: {heard.found.total()} waits, {count} of them in {place}")
    facts["queued ahead"] = ahead = queued_ahead(bench)
    if ahead < 0.5:
        failures.append(f"{ahead:.0%} of the steps were queued before the previous one had ended")
    return verdict(failures, f"{len(cases)} runs without waits, {ahead:.0%} of steps queued ahead", facts)


# Out of memory


@contextmanager
def failing_convolution(samples: int) -> Iterator[None]:
    """Context manager: a UNet's first convolution fails on more than `samples` samples, with cuDNN's error message."""
    from diffusers import UNet2DConditionModel

    forward = UNet2DConditionModel.forward

    def fail(self: nn.Module, sample: Tensor, *rest: Any, **named: Any) -> Any:
        if len(sample) > samples:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return forward(self, sample, *rest, **named)

    with patch.object(UNet2DConditionModel, "forward", fail):
        yield


@contextmanager
def limited(gigabytes: float, from_step: int = 0) -> Iterator[None]:
    """Context manager: limits the device memory of this process, from a step on."""
    add_up, total = Gradients.add_up, torch.cuda.mem_get_info()[1]

    def limit() -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))

    def begin(self: Gradients, step: int, batches: Any) -> Any:
        if step == from_step:
            limit()
        return add_up(self, step, batches)

    try:
        if from_step == 0:
            limit()
        with patch.object(Gradients, "add_up", begin) if from_step else nullcontext():
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


SHARES = (0.8, 0.6, 0.45)  # memory limits, relative to the memory that a run needs


def memory(bench: Bench) -> Finding:
    """Checks that a run out of memory halves its micro-batches, ends with the same weights, and can be resumed."""
    from benchmarks.assets import make_images

    edge, batch = (32, 4) if not bench.is_cuda else (256, 16)
    data = make_images(bench.folder / f"images-{edge}", batch, edge)
    words = ["--resolution", edge, "--train_batch_size", batch, "--learning_rate", 1e-3, "--adam_epsilon", 1e-5]
    words += ["--max_train_steps", 3, "--checkpointing_steps", 2]
    failures, facts = [], {}

    def train(*more: object) -> Run:
        return bench.train("sd", [*words, *more], fresh_name("memory"), data=data)

    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    whole = train()
    if whole.status:
        return Finding(FAILED, whole.error)
    expected = tensors_of(whole.folder / "unet")
    ways: dict[str, Any] = {"a convolution": partial(failing_convolution, batch // 2)}
    if bench.is_cuda:
        facts["peak_gb"] = peak = torch.cuda.max_memory_allocated() / 1e9
        ways |= {f"{share:.0%} of {peak:.2f} GB": partial(limited, share * peak) for share in SHARES}
        ways["from step 2 on"] = partial(limited, SHARES[1] * peak, 1)
    else:
        facts["limits of the device"] = "skipped: needs CUDA"
    for name, way in ways.items():
        with way():
            run = train()
        halved = run.said.count("out of memory in")
        distance = None if run.status else relative_distance(tensors_of(run.folder / "unet"), expected)
        facts[name] = {"halved": halved, "distance": distance, "error": run.error if run.status else None}
        if run.status or not distance <= SAME or not halved:
            why = run.error if run.status else f"halved {halved} times, weights {distance:.1e} off"
            failures.append(f"{name}: {why}")
        bench.note(f"out of memory by {name}: {facts[name]}")
    with next(iter(ways.values()))():
        first = train("--max_train_steps", 2)
    out = first.folder.name
    again = ["--resume_from_checkpoint", "latest"]
    resumed = bench.train("sd", [*words, *again], out, data=data)
    distance = 1.0 if resumed.status else relative_distance(tensors_of(resumed.folder / "unet"), expected)
    facts["resumed"] = distance
    if not distance <= SAME:
        failures.append(f"resumed: {resumed.error if resumed.status else f'weights {distance:.1e} off'}")
    return verdict(failures, f"{len(ways)} runs out of memory and a resumed run end with the same weights", facts)


# Compiled graphs

NORMS = ("--model_size", "tiny", "--channel_mult", 1, "--layers_per_block", 1, "--attention_resolutions", 0)
DRAWING = ("--eval_batch_size", 2, "--num_inference_steps", 2)
DENOISER, BLOCKS = ("--compile", "denoiser"), ("--compile", "blocks")


@contextmanager
def rehearsed_compiler(is_tiny: bool) -> Iterator[None]:
    """Context manager: for tiny models, torch.compile captures graphs but does not generate kernels."""
    compile_ = torch.compile

    def without_inductor(*given: Any, mode: str | None = None, **named: Any) -> Any:
        return compile_(*given, backend="aot_eager", **named)

    with patch.object(torch, "compile", without_inductor) if is_tiny else nullcontext():
        yield


def gates(bench: Bench) -> Finding:
    """Runs the script's own gate on compiled models, and checks that CUDA graphs replay the compiled losses."""
    failures, facts = [], {}
    edge, channels = (16, 16) if bench.is_tiny else (64, 128)
    norms = (*NORMS, "--model_channels", channels, *DRAWING)
    cases: dict[str, tuple[str, tuple[object, ...], tuple[object, ...]]] = {
        "LoRA of 11 blocks, fp32": ("deep", (*LORA, "--allow_tf32", "false", *BLOCKS), ()),
        "norms of 4 channels a group, bf16": (
            *("pixels", (*BF16, "--channels_last", *DENOISER, "--resolution", edge)),
            norms,
        ),
        "DiT": ("labelled latents", (*BF16, *DENOISER), ()),
        "SD, fp32": ("sd", ("--allow_tf32", "false", *DENOISER), ()),
        "SD, bf16": ("sd", (*BF16, *DENOISER), ()),
        "SDXL, bf16_weights, blocks": ("sdxl", (*BF16, "--bf16_weights", *BLOCKS), ()),
    }
    if bench.is_cuda:
        cases["LoRA of 11 blocks, bf16"] = "deep", (*LORA, *BF16, *BLOCKS), ()
        cases["SD, --fast"] = "sd", (*BF16, "--fast"), ()
        cases["SDXL, blocks, activation memory 0.5"] = "sdxl", (*BF16, *BLOCKS, "--activation_memory", 0.5), ()
    short = ("--max_train_steps", 2, "--no_final_checkpoint")
    with rehearsed_compiler(bench.is_tiny and not bench.is_cuda):
        for name, (family, flags, shape) in cases.items():
            run = bench.train(family, [*flags, *short], fresh_name("gates"), shape)
            lines = [line for line in run.said.splitlines() if line.startswith("compiled in")]
            facts[name] = run.error if run.status else next(iter(lines), "nothing was compiled")
            if run.status or not lines:
                failures.append(f"{name}: {facts[name]}")
            bench.note(f"gate of {name}: {facts[name]}")
        if bench.is_cuda:
            for name, flags in GRAPHS.items():
                failures += graph_failures(bench, name, flags, facts)
            failures += failed_recording(bench, facts)
        else:
            facts["CUDA graphs"] = "skipped: needs CUDA"
    graphs = f"{len(GRAPHS)} graphs replay" if bench.is_cuda else "CUDA graphs need CUDA"
    return verdict(failures, f"{len(cases)} gates; {graphs}", facts)


GRAPHS: dict[str, tuple[object, ...]] = {
    "one graph a step": BF16,
    "one graph a step, bf16_weights and an average": (*BF16, "--bf16_weights", "--use_ema"),
    "one graph a step, compiled": (*BF16, *DENOISER),
    "one graph a step, LoRA": (*BF16, *LORA),
    "a graph a pass, accumulation": (*BF16, *DENOISER, "--train_batch_size", 2, "--gradient_accumulation_steps", 2),
}


def graph_failures(bench: Bench, name: str, flags: Sequence[object], facts: dict[str, Any]) -> list[str]:
    """Returns why the losses with CUDA graphs differ from those without; an empty list if they agree."""
    words = [*flags, "--max_train_steps", 6, "--no_final_checkpoint", "--learning_rate", 1e-4]
    plain = bench.train("sd", words, fresh_name("graphs"))
    graphs = bench.train("sd", [*words, "--cuda_graphs"], fresh_name("graphs"))
    if name.startswith("one graph a step") and "--cuda_graphs: recorded a step" not in graphs.said:
        lines = [line for line in graphs.said.splitlines() if "--cuda_graphs: " in line]
        facts[name] = " ".join(lines) or "no step was recorded"
        return [f"{name}: {facts[name]}"]
    broken = next((run for run in (plain, graphs) if run.status), None)
    if broken is not None:
        facts[name] = broken.error
        return [f"{name}: {broken.error}"]
    facts[name] = worst = max(
        abs(one - other) / abs(one) for one, other in zip(plain.losses, graphs.losses, strict=True)
    )
    bench.note(f"{name}: losses {worst:.1e} off")
    return [] if worst <= SAME else [f"{name}: losses {worst:.1e} off"]


def failed_recording(bench: Bench, facts: dict[str, Any]) -> list[str]:
    """Returns why a run whose step can't be recorded goes wrong; an empty list if it trains without a graph."""

    def reads(self: StepGraph, encoded: EncodedBatch) -> Outcome:
        encoded.mean.sum().item()
        return compute(self, encoded)

    compute, words = StepGraph._compute, [*BF16, "--max_train_steps", 4, "--no_final_checkpoint"]
    plain = bench.train("sd", words, fresh_name("graphs"))
    with patch.object(StepGraph, "_compute", reads):
        run = bench.train("sd", [*words, "--cuda_graphs"], fresh_name("graphs"))
    said = "a step that cannot be recorded"
    if run.status or "computed without a graph" not in run.said:
        facts[said] = run.error or "it was recorded"
        return [f"{said}: {facts[said]}"]
    facts[said] = worst = max(abs(one - other) / abs(one) for one, other in zip(plain.losses, run.losses, strict=True))
    return [] if worst <= SAME else [f"{said}: losses {worst:.1e} off"]


# Attention


def attention(bench: Bench) -> Finding:
    """Compares each attention kernel with float64 and with PyTorch's choice on the shapes of Stable Diffusion."""
    precision, kernels = ("bf16", tuple(ATTENTION)) if bench.is_cuda else ("fp32", CPU_ATTENTION)
    repeats, failures, facts = 3, [], {}
    for layer in race.layers("small" if bench.is_tiny else "true"):
        run, expected = race.passes(layer, 2, race.DTYPES[precision], bench.device.type)
        shape = f"{layer.heads} x {layer.queries} x {layer.keys} x {layer.width}"
        cells = {}
        for name in (each for each in kernels if each != "math"):
            cells[name] = race.cell(run, expected, name, race.TOLERANCE[precision], repeats)
        facts[f"{layer.name}, {shape}"] = cells
        failures += [f"{layer.name}, {name}: {said}" for name, said in cells.items() if said.startswith("wrong")]
        if bench.is_cuda:
            bench.note(f"attention of {layer.name}: {cells}")
    won = Counter(max(cells, key=lambda name: speed_of(cells[name])) for cells in facts.values())
    says = f"{len(facts)} shapes; fastest: " + ", ".join(f"{name} {count}" for name, count in won.most_common())
    return verdict(failures, says, facts)


def speed_of(said: str) -> float:
    """Returns the ratio at the start of a cell; 0 if it has none."""
    try:
        return float(said.split()[0])
    except ValueError:
        return 0.0
