"""Loads pretrained weights, and refuses or reports any that are missing, unused or of another shape.

`from_pretrained` of a module is called only here, so that no weight silently stays random.
"""

import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.config.library_errors import CONFIG_ERRORS, LOADING_ERRORS, reason_of, short
from utils.config.options import UserError
from utils.config.tensor_files import require_regular_files
from utils.config.terminal import one_line
from utils.config.user_files import FileError
from utils.models.options import PICKLES, LoadingOptions
from utils.models.weight_files import Stored, check_finite, check_stored, stored_in, weight_files
from utils.runtime.hub_files import INDEX, read_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

MAX_TOKENS = 10_000  # tokenizers without a maximum length report an enormous number
FEWEST_TOKENS = 3  # of a text encoder: start, end, and one between them
SHOWN = 3  # names of weights shown in a message
LONGEST_NAME = 120
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
COUNTERS = ("num_batches_tracked",)  # buffers that are only used in training


_allowed: ContextVar[tuple[str, ...]] = ContextVar("allow_missing_weights", default=())


@contextmanager
def allowing_missing(options: LoadingOptions) -> Iterator[None]:
    """Context manager: weights that match --allow_missing_weights may be missing."""
    token = _allowed.set(tuple(options.allow_missing_weights or ()))
    try:
        yield
    finally:
        _allowed.reset(token)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Context manager: turns library errors about damaged weights and configs into a `UserError`.

    Args:
        what: the flag, its value and the part, for messages.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except FileError as error:
        raise UserError(f"{what}: {error}") from error
    except UserError:
        raise
    except (*LOADING_ERRORS, *CONFIG_ERRORS, EOFError, ImportError, StrictDataclassError) as error:
        raise UserError(f"{what} can't be loaded: {reason_of(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library, written in Rust, raises bare Exceptions
            raise
        raise UserError(f"{what} can't be loaded: {reason_of(error)}") from error


@dataclass(frozen=True)
class WeightReport:
    """Differences between the weights in a file and those of a module.

    Attributes:
        own: names of all weights of the module.
        missing: those that the file lacks.
        left_over: names in the file that the module does not have.
        mismatched: tuples (name, shape in the file, shape in the module).
    """

    own: Collection[str]
    missing: Sequence[str]
    left_over: Sequence[str]
    mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]] = ()

    def check(self, what: str, part: str) -> list[str]:
        """Refuses weights of another model, and logs what is missing or unused.

        Args:
            what: the flag, its value and the part, for messages.
            part: name of the part, which names in --allow_missing_weights may have as a prefix.

        Returns:
            The names of missing weights that are allowed to be.

        Raises:
            UserError: for weights that are missing, of another shape, or of additional layers.
        """
        # Shapes.
        if self.mismatched:
            name, found, wanted = sorted(self.mismatched)[0]
            others = f" and {len(self.mismatched) - 1} others differ too" if len(self.mismatched) > 1 else ""
            raise UserError(
                f"{what}: {name} has the shape {list(found)}, its config wants {list(wanted)}{others}; "
                "weights and config are from different models"
            )

        # Missing weights.
        allowed = [name for name in self.missing if _is_allowed(name, part)]
        if missing := sorted(set(self.missing) - set(allowed)):
            raise UserError(
                f"{what} lacks {len(missing)} of its {len(self.own)} weights: {names_of(missing)}"
                f"{self._where_they_may_be(missing)}; give a model that has them, or "
                f"--allow_missing_weights {_common(missing)} to initialize them randomly"
            )

        # Weights of additional layers.
        patterns = {_pattern(name) for name in self.own}
        layers = [name for name in self.left_over if _pattern(name) in patterns and not _is_allowed(name, part)]
        if layers:
            raise UserError(
                f"{what} has {len(layers)} weights of layers that its config lacks: {names_of(sorted(layers))}; "
                "weights and config are from different models"
            )

        # Accepted differences.
        if allowed:
            logger.warning(
                "%s: %d missing weights are initialized randomly: %s", what, len(allowed), names_of(sorted(allowed))
            )
        if self.left_over:
            left_over = sorted(self.left_over)
            logger.info("%s: %d weights of its file are not used: %s", what, len(left_over), names_of(left_over))
        return allowed

    def _where_they_may_be(self, missing: Sequence[str]) -> str:
        ends = {_end(name) for name in missing}
        alike = sorted(name for name in self.left_over if _end(name) in ends)
        if alike:
            return f"; {len(alike)} similar ones have other names in the file, such as {names_of(alike[:1])}"
        return f"; the file has others, such as {names_of([min(self.left_over)])}" if self.left_over else ""


def names_of(names: Sequence[str]) -> str:
    """Formats the first few names and the number of the others."""
    rest = len(names) - SHOWN
    shown = [name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…" for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _is_allowed(name: str, part: str) -> bool:
    return any(each.startswith(prefix) for prefix in _allowed.get() for each in (name, f"{part}.{name}"))


def _common(names: Sequence[str]) -> str:
    """Returns the common prefix of names, up to a dot; without one, the first part of the first name."""
    first, last = min(names).split("."), max(names).split(".")
    same = [a for a, b in zip(first, last, strict=False) if a == b]
    return ".".join(same) if same and first[: len(same)] == same == last[: len(same)] else first[0]


def _end(name: str) -> str:
    """Returns the last two parts of a name, ignoring numbers."""
    words = [word for word in name.split(".") if not word.isdigit()]
    return ".".join(words[-2:])


def _pattern(name: str) -> str:
    """Returns a name with numbers masked, without the prefix that CLIP text encoders used to have."""
    return NUMBER.sub("*", f".{name}").removeprefix(".").removeprefix("text_model.")


def load_module(
    kind: type,
    name: str,
    what: str,
    part: str,
    dtype: torch.dtype,
    reads: Callable[[nn.Module], Tensor] | None = None,
    must_be_finite: bool = True,
    **arguments: Any,
) -> Any:
    """Loads a pretrained module of diffusers or transformers in evaluation mode.

    Args:
        kind: its class, or one of transformers' Auto classes.
        name: folder or Hub name.
        what: the flag, its value and the part, for messages.
        part: name of the part, such as unet.
        dtype: dtype of the weights.
        reads: runs the module and returns the output that is used, if not all is: weights that do not affect it may be
            missing.
        must_be_finite: whether to refuse NaN and infinite weights; otherwise a warning is logged.
        arguments: further arguments of `from_pretrained`.

    Raises:
        UserError: if it can't be loaded, or its weights do not fit.
    """

    # Check local files before the library reads them.
    arguments = {name: value for name, value in arguments.items() if value is not None}
    require_regular_files(Path(name, arguments.get("subfolder", "")))
    folder = Path(name, arguments.get("subfolder", ""))
    if folder.is_dir():
        _check_files(folder, what, part, arguments)

    # Load; an error is traced to the config value that causes it, if possible.
    try:
        with loading(what):
            module, found = kind.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
            )
    except UserError as error:
        reason = reason_of(error.__cause__ or error)
        value = _blamed(kind, folder / "config.json", what, reason)
        if value:
            raise UserError(
                f"{what}: config.json: {value} is invalid for {kind.__name__} ({reason}); give these weights' config"
            ) from error
        raise

    # Check the weights that were loaded.
    if not folder.is_dir() and (folder := _downloaded(name, arguments)) is not None:
        _check_files(folder, what, part, arguments)
    missing = [each for each in found["missing_keys"] if not each.endswith(COUNTERS)]
    if missing and reads is not None:
        read = _names_read(module, reads, what)
        missing = [each for each in missing if each in read]
    own = module.state_dict().keys()
    report = WeightReport(own, missing, list(found["unexpected_keys"]), list(found["mismatched_keys"]))
    make_up(module, report.check(what, part))
    absent = set(found["missing_keys"])  # of a weight that is never read, the library may leave memory as it is
    read = ((each, parameter) for each, parameter in module.named_parameters() if each not in absent)
    check_finite(read, what, must_be_finite)
    return module.eval()


def _check_files(folder: Path, what: str, part: str, arguments: Mapping[str, Any]) -> None:
    """Refuses a config with values of wrong types, and weights that a library would misread."""
    config = folder / "config.json"
    is_quantized = config.is_file() and read_config(config, what).get("quantization_config") is not None
    if is_quantized:  # the library applies the scales
        return
    with_pickles = not arguments.get("use_safetensors")
    with loading(what):
        files = weight_files(folder, arguments.get("variant"), with_pickles)
    for file in files:
        with loading(what):
            stored = stored_in(file)
        check_read(f"{what}: {file.name}", part, stored)


def _blamed(kind: type, file: Path, what: str, reason: str) -> str:
    """Returns the value in a model's config that causes an error, as `key value`, or "".

    It is one that the error message names, or without which the model can be created; preferably both.
    """
    config = read_config(file, what) if file.is_file() else {}
    if not config or _is_made(kind, config):
        return ""

    # Candidates: values whose text is in the message.
    words = set(re.findall(r"\w+", reason))
    keys = [key for key in config if not key.startswith("_") and config[key] is not None]
    named = [key for key in keys if type(config[key]) in (int, str) and str(config[key]) in words]
    listed = [key for key in keys if isinstance(config[key], list) and any(str(each) in words for each in config[key])]
    # The first without which the config is valid.
    without = (key for key in (*named, *keys) if _is_made(kind, {name: config[name] for name in config if name != key}))
    found = next(without, "") if len(named) != 1 else named[0]
    found = found or next(iter(listed), "")
    return f"{found} {short(config[found])}" if found else ""


def _is_made(kind: type, config: Mapping[str, Any]) -> bool:
    """Whether a class can create a model from a config, on the meta device; True for other libraries' classes."""
    config_class = getattr(kind, "config_class", None)
    if config_class is None and not hasattr(kind, "load_config"):
        return True
    try:
        with loading(""), torch.device("meta"):
            if config_class is None:
                kind.from_config(dict(config))
            else:
                kind(config_class.from_dict(dict(config)))
    except UserError:
        return False
    return True


def check_read(what: str, part: str, stored: Mapping[str, Stored]) -> None:
    """Runs `check_stored` on a part's weights, except those that --allow_missing_weights names."""
    check_stored(what, {name: each for name, each in stored.items() if not _is_allowed(name, part)})


def _downloaded(name: str, arguments: Mapping[str, Any]) -> Path | None:
    """Returns the folder in the Hub cache from which a model was loaded; None if it is not there."""
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(name, revision=arguments.get("revision"), local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(root, arguments.get("subfolder", ""))


def _names_read(module: nn.Module, reads: Callable[[nn.Module], Tensor], what: str) -> set[str]:
    """Returns names of weights that an output depends on, by its gradient, and of the buffers next to them."""
    was = {name: each.requires_grad for name, each in module.named_parameters()}
    module.eval().requires_grad_(True)
    with loading(what), torch.enable_grad():
        reads(module).float().sum().backward()
    read = {name for name, each in module.named_parameters() if each.grad is not None}
    for name, each in module.named_parameters():
        each.grad = None
        each.requires_grad_(was[name])
    homes = {name.rpartition(".")[0] for name in read}
    with_parameters = {name.rpartition(".")[0] for name in was}
    buffers = {name for name, _ in module.named_buffers()}
    return read | {
        name for name in buffers if (home := name.rpartition(".")[0]) in homes or home not in with_parameters
    }


@torch.no_grad()
def make_up(module: nn.Module, names: Sequence[str]) -> None:
    """Initializes weights that a file lacks, if the library left them on the meta device."""
    state = module.state_dict()
    if not any(state[name].is_meta for name in names):
        return
    make = getattr(type(module), "from_config", type(module))  # diffusers has from_config, transformers does not
    fresh = make(module.config).state_dict()
    for name in names:
        home, _, last = name.rpartition(".")
        like = state[name]
        setattr(module.get_submodule(home), last, nn.Parameter(fresh[name].to(like.dtype), like.requires_grad))


def frozen(module: nn.Module) -> nn.Module:
    """Freezes a module and puts it in evaluation mode, as for a network that only measures; returns it."""
    return module.eval().requires_grad_(False)


def class_of(library: object, name: object) -> type | None:
    """Returns the class of a pipeline's component, as its index names it; None if it is unknown."""
    import diffusers
    import transformers

    homes = {"diffusers": diffusers, "transformers": transformers}
    home = (homes.get(library) or getattr(diffusers.pipelines, library, None)) if isinstance(library, str) else None
    found = getattr(home, name, None) if isinstance(name, str) else None
    return found if inspect.isclass(found) else None


def variant_of(folder: Path, variant: str | None, what: str) -> str | None:
    """Returns the variant in which to load a part's weights: the requested one, if the part has it.

    Raises:
        UserError: if all its weights are of a variant that was not requested.
    """
    files = [file for file in folder.glob("*") if file.suffix in (".safetensors", *PICKLES)]
    names = [file.name for file in files if file.suffix == ".safetensors"] or [file.name for file in files]
    if variant is not None and any(f".{variant}." in name or f".{variant}-" in name for name in names):
        return variant
    variants = [match[1] for name in names if (match := re.fullmatch(r"[^.]+\.(\w+)(-\d+-of-\d+)?\.\w+", name))]
    if names and len(variants) == len(names):
        cure = f"{_variant_flag(what)} {variants[0]}"
        raise UserError(f"{what} only has weights of the variant {variants[0]}; add {cure}")
    return None


def _variant_flag(what: str) -> str:
    """Returns the flag that names the variant of a pipeline, given the pipeline's own flag and value."""
    return "--baseline_variant" if what.startswith("--baseline ") else "--variant"


def load_parts(
    folder: Path,
    index: Mapping[str, Any],
    names: Collection[str],
    flag: str,
    dtypes: Mapping[str, torch.dtype],
    variant: str | None,
    use_safetensors: bool | None,
) -> dict[str, nn.Module]:
    """Loads the modules of a pipeline folder.

    Args:
        folder: folder of the pipeline.
        index: content of its `model_index.json`.
        names: names of the parts; those that are not modules are skipped.
        flag: the flag and its value that name the pipeline, for messages.
        dtypes: dtypes by part name, "default" for all others.
        variant: variant of the weights, such as fp16, or None.
        use_safetensors: whether to read only safetensors; None for what is there.

    Returns:
        The modules by name.
    """
    parts, variants = {}, set()
    for name in names:
        kind = class_of(*[*index[name], None][:2])
        root = folder / name if (folder / name).is_dir() else folder
        # Configs are checked for every part; only modules are loaded here.
        for file in ("scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json"):
            if (root / file).is_file():
                read_config(root / file, flag)
        if kind is None or not issubclass(kind, nn.Module):
            continue
        what = f"{flag}: {name}"
        variants.add(found := variant_of(root, variant, what))
        parts[name] = load_module(
            kind,
            str(root),
            what,
            name,
            dtypes.get(name, dtypes["default"]),
            variant=found,
            use_safetensors=use_safetensors,
        )
    if parts and variant is not None and variant not in variants:
        raise UserError(f"{flag}: no part has weights of the variant {variant}; leave out {_variant_flag(flag)}")
    return parts


def named_parts(index: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the parts named in a `model_index.json`, with their library and class."""
    return {name: entry for name, entry in index.items() if isinstance(entry, list) and name[:1] != "_" and entry[0]}


def limit_tokens(tokenizer: Any, encoder_config: Any, what: str) -> None:
    """Limits a tokenizer without a maximum length to that of its text encoder.

    Raises:
        UserError: if neither has one, or the tokenizer has no vocabulary.
    """
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_tokens)):
        raise UserError(f"{what} is missing or has no vocabulary")
    length, longest = tokenizer.model_max_length, getattr(encoder_config, "max_position_embeddings", None)
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= FEWEST_TOKENS:
        must = f"be a number of at least {FEWEST_TOKENS}"
        raise UserError(f"{what}: model_max_length must {must}, got {one_line(length, 60)}")
    if length > MAX_TOKENS:
        if longest is None:
            raise UserError(f"{what} has no model_max_length")
        length = longest
    if longest is not None and length > longest:
        raise UserError(
            f"{what} produces {length:g} tokens, but its text encoder accepts {longest}; set model_max_length"
        )
    tokenizer.model_max_length = int(length)


class Download(NamedTuple):
    """Which files of a pipeline to load.

    Attributes:
        revision: revision of a Hub repository.
        variant: variant of the weights, such as fp16.
        use_safetensors: whether to read only safetensors; None for what is there.
    """

    revision: str | None = None
    variant: str | None = None
    use_safetensors: bool | None = None


def load_pipeline_folder(
    kind: "type[DiffusionPipeline]",
    name: str,
    flag: str,
    dtypes: Mapping[str, torch.dtype],
    wanted: Download,
    given: Mapping[str, Any],
) -> "DiffusionPipeline":
    """Loads a pipeline on the CPU, from a folder or the Hub, and checks that no weights are missing.

    Args:
        kind: its class.
        name: folder or Hub name.
        flag: the flag and its value that name the pipeline, for messages.
        dtypes: dtypes by part name, "default" for all others.
        wanted: which files to load.
        given: parts that come from elsewhere; None for those to leave out.
    """
    # Files.
    folder = Path(name)
    if not folder.is_dir():
        with loading(flag):
            folder = Path(kind.download(name, **wanted._asdict(), **given))
    require_regular_files(folder)

    # Modules, which are checked one by one.
    index = read_config(folder / INDEX, flag)
    known = inspect.signature(kind.__init__).parameters
    wanted_parts = [each for each in named_parts(index) if each in known and each not in given]
    parts = load_parts(folder, index, wanted_parts, flag, dtypes, wanted.variant, wanted.use_safetensors)

    # Pipeline.
    with loading(flag):
        pipeline = kind.from_pretrained(str(folder), **given, **parts)
    pipeline.register_to_config(_name_or_path=name)
    for part, tokenizer in pipeline.components.items():
        encoder = getattr(pipeline, part.replace("tokenizer", "text_encoder"), None)
        if part.startswith("tokenizer") and isinstance(encoder, nn.Module) and hasattr(tokenizer, "model_max_length"):
            limit_tokens(tokenizer, encoder.config, f"{flag}: its {part}")
    ours = {id(each) for each in (*given.values(), *parts.values())}
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module) and id(module) not in ours:
            logger.warning("%s: can't check whether the weights of its %s are complete", flag, part)
    return pipeline
