"""Sets up the processes of a run and the folder that it writes to."""

import logging
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import torch
from filelock import FileLock, Timeout

from utils.config.library_messages import hear_libraries
from utils.config.options import UserError, end_at_once_on_errors, first_line, require
from utils.config.output_folder import refuse_used
from utils.config.terminal import json_text
from utils.config.user_files import FileError, read_json
from utils.runtime.atomic_files import MARKER, mark_as_own, or_without, usual_modes, write_text
from utils.runtime.engines import DTYPES, asked_engine, check_engine
from utils.runtime.heartbeat import watching
from utils.runtime.options import RuntimeOptions
from utils.runtime.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".tif", ".tiff", ".bmp", ".gif")
OWN_FILES = ("run.json", "results.json", "dry_run_report.json")  # a run's own folder contains one of these
LOCK = ".lock"  # in an output folder
EXPANDABLE = "expandable_segments:True"
PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "datasets", "peft", "safetensors", "numpy", "pillow")
Result = TypeVar("Result")


def start_processes(
    options: RuntimeOptions, accumulation_steps: int, trackers: list[str], output_dir: Path, logging_dir: str
) -> "Accelerator":
    """Starts accelerate and joins the processes of this run, on GPUs if there are any.

    Args:
        options: options of the processes.
        accumulation_steps: micro-batches per optimizer step.
        trackers: names of trackers, such as tensorboard.
        output_dir: folder of the run.
        logging_dir: folder of the trackers' logs, relative to `output_dir`.

    Raises:
        UserError: if the requested settings are invalid, or accelerate would silently do something else.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

    # Settings that must precede the first use of the GPU.
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first use of the GPU
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost a pass over each new tensor
        torch.backends.cudnn.benchmark = False
    _expand_segments()

    # Engine: DDP, FSDP2 or DeepSpeed, as the launcher requests.
    on_cpu = not (torch.cuda.is_available() or _other_accelerator())
    check_engine(on_cpu, options.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION"))
    handler = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    if asked_engine() == "DEEPSPEED" and on_cpu:
        on_cpu = False  # with cpu=True accelerate silently ignores DeepSpeed
        handler.backend = "gloo"
    # Gradients as views of the buckets save a copy. Buffers are equal on all processes; broadcasting them before each
    # forward pass would hang if one process restarts it while the others already share gradients.
    sharing = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=accumulation_steps,
            step_scheduler_with_optimizer=False,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / logging_dir)),
            kwargs_handlers=[handler, sharing],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"accelerate can't start with these settings: {first_line(error)}") from error

    # Check what accelerate made of the settings.
    if accelerator.num_processes > 1:
        end_at_once_on_errors()
    asked_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if asked_processes != accelerator.num_processes:
        raise UserError(
            f"{asked_processes} processes were started but accelerate joined {accelerator.num_processes}: they would "
            "train separately; check the GPUs, or launch with --multi_gpu or torchrun on a CPU"
        )
    _check_precision(accelerator.mixed_precision, accelerator.device.type)
    if options.local_rank != -1 and accelerator.is_main_process:
        logger.warning("--local_rank is ignored: the launcher sets it in the environment")
    if accelerator.device.type == "cpu" and (accelerator.mixed_precision != "no" or _wants_gpus()):
        _warn_of_cpu()
    allow_tf32(accelerator.mixed_precision != "no" if options.allow_tf32 is None else options.allow_tf32)
    hear_libraries()
    return accelerator


def _expand_segments() -> None:
    """Makes CUDA's allocator use growable segments, unless the user chose: fixed ones fragment with varying sizes."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if sys.platform != "linux" or any(name in os.environ for name in names):
        return
    os.environ[names[0]] = EXPANDABLE
    if torch.__version__ < (2, 12):  # it reads only the older name
        os.environ[names[1]] = EXPANDABLE


def _wants_gpus() -> bool:
    """Whether `accelerate launch` was configured to use GPUs."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "false") == "false"


def _warn_of_cpu() -> None:
    """Warns that a run configured for a GPU runs on the CPU, and why."""
    if torch.version.cuda is None and torch.version.hip is None:
        cure = f"torch {torch.__version__} is built without CUDA; install a CUDA build if the machine has a GPU"
    else:
        cure = f"torch {torch.__version__} finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    logger.warning("running on the CPU: %s (https://pytorch.org/get-started/locally)", cure)


def allow_tf32(is_allowed: bool) -> None:
    """Sets whether float32 matrix products and convolutions use TF32; torch's default is the latter only."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed


def is_tf32_allowed() -> bool:
    """Whether any float32 arithmetic uses TF32."""
    return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context manager: computes float32 arithmetic in full float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _check_precision(precision: str, device: str) -> None:
    """Refuses a mixed precision that the device does not support, whether the script or the launcher set it."""
    require(precision in DTYPES, "mixed_precision", precision, f"be one of {', '.join(DTYPES)}")
    if device == "cpu":
        cure = "fp16 is not supported on a CPU"
        require(precision != "fp16", "mixed_precision", precision, "be no or bf16 without a GPU", cure)
    if device == "cuda" and precision == "bf16":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        require(has_bfloat16, "mixed_precision", precision, "be no or fp16 on this GPU", "it does not support bfloat16")


def _other_accelerator() -> bool:
    from accelerate.utils import is_mps_available, is_npu_available, is_xpu_available

    return is_mps_available() or is_npu_available() or is_xpu_available()


def weight_dtype(accelerator: "Accelerator") -> torch.dtype:
    """Returns the dtype of frozen weights: that of the mixed precision, whether set by the script or the launcher."""
    return DTYPES[accelerator.mixed_precision]


def autocast(accelerator: "Accelerator") -> AbstractContextManager:
    """Context manager: autocast to the mixed precision under any engine (accelerate's own skips DeepSpeed)."""
    precision = accelerator.mixed_precision
    if precision == "no":
        return nullcontext()
    return torch.autocast(accelerator.device.type, DTYPES[precision])


class OutputFolder:
    """The folder of a run: locked during the run, and refused if it contains another run.

    `run.json` in it records the run's options and, once it has ended, its outcome.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self._lock = FileLock(self.path / LOCK, timeout=0)  # the kernel releases it when the process ends

    def claim(self, resuming: bool, overwrite: bool) -> None:
        """Creates and locks the folder.

        Args:
            resuming: whether the folder's run is being resumed.
            overwrite: whether the folder may contain another run.

        Raises:
            UserError: if it can't be written, is in use, or contains another run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise UserError(f"--output_dir {self.path} is in use by another run; choose another folder") from error
        except OSError as error:
            raise UserError(f"--output_dir {self.path} can't be written: {error.strerror or error}") from error
        if not resuming and not overwrite:
            refuse_used(self.path)
        self._refuse_pictures()
        with suppress(OSError):
            os.utime(self.path / LOCK)  # see `is_of_run`
        try:
            mark_as_own(self.path)
        except OSError as error:
            raise UserError(f"--output_dir {self.path} can't be written: {error.strerror or error}") from error

    def _refuse_pictures(self) -> None:
        """Refuses a folder of images that no run wrote: once marked as a run's folder, it could not be trained on."""
        if any((self.path / name).exists() for name in (MARKER, *OWN_FILES)):
            return
        found = next((path.name for path in self.path.iterdir() if path.suffix.lower() in PICTURES), None)
        if found is not None:
            raise UserError(
                f"--output_dir {self.path} contains images that no run wrote, such as {found}; choose another folder"
            )

    def replace(self, name: str, write: Callable[[Path], None]) -> None:
        """Replaces folder `name` by one that `write` fills at a temporary path."""
        aside, old = self.path / f".tmp-{name}", self.path / f".tmp-{name}-replaced"
        for path in (aside, old):
            shutil.rmtree(path, ignore_errors=True)
        try:
            aside.mkdir()
            write(aside)
            usual_modes(aside)
            if (self.path / name).exists():
                os.replace(self.path / name, old)
            os.replace(aside, self.path / name)
        except OSError as error:
            raise UserError(f"{self.path / name} can't be written: {error}") from error
        shutil.rmtree(old, ignore_errors=True)

    def record(self, options: dict, versions: dict[str, str], command: list[str], **more: object) -> None:
        """Writes the run's options, versions and command to `run.json`, and what else there is to record."""
        try:
            known = {"options": options, "versions": versions, "command": command}
            write_json(self.path / "run.json", known | more)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--output_dir {self.path}: run.json can't be written: {reason}") from error

    def add_to_record(self, **values: object) -> None:
        """Adds values to `run.json`."""
        path = self.path / "run.json"
        try:
            known = read_json(path)
        except (OSError, FileError):
            known = {}
        with or_without(path):
            write_json(path, (known if isinstance(known, dict) else {}) | values)

    def release(self) -> None:
        """Unlocks the folder."""
        self._lock.release()


def is_of_run(file: Path, folder: Path) -> bool:
    """Whether a file was written since the run that holds an output folder began; True if none holds it.

    The times are those of the folder's file system.
    """
    try:
        began = (folder / LOCK).stat().st_mtime_ns
    except OSError:
        began = 0
    return file.stat().st_mtime_ns >= began


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically: at any moment the file is either the old or the new one."""
    write_text(path, json_text(value, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect a run's results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def use_hub_cache_if_offline() -> None:
    """If the Hub can't be reached, switches to its cache at once instead of after half a minute of retries."""
    import huggingface_hub.constants
    from huggingface_hub.constants import ENDPOINT

    has_proxy = any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ)
    if has_proxy or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    address = urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        import datasets.config

        logger.warning("%s can't be reached; using previously downloaded files only", ENDPOINT)
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def on_main_process(accelerator: "Accelerator", action: Callable[[], Result]) -> Result:
    """Runs `action` on the main process only, and returns its result on all processes.

    A user error there is raised on all processes, so that none waits for the result.
    """
    from accelerate.utils import broadcast_object_list

    error = result = None
    if accelerator.is_main_process:
        try:
            result = action()
        except UserError as raised:
            error = raised
    message, result = broadcast_object_list([None if error is None else str(error), result])
    if message is not None:
        raise UserError(message) from error
    return result


@contextmanager
def ending(accelerator: "Accelerator", folder: OutputFolder, peer_timeout: float) -> Iterator[None]:
    """Context manager: closes trackers and unlocks the folder at the end; meanwhile processes watch each other.

    The process group is not destroyed here but at the process's exit (`options.leave`): destroying it holds the
    interpreter's lock while it waits for gloo's threads, which need that lock to free a tensor (seen with 3 processes).
    """
    try:
        with watching(accelerator.process_index, accelerator.num_processes, peer_timeout):
            yield
    finally:
        try:
            Trackers(accelerator).finish()
        finally:
            folder.release()
