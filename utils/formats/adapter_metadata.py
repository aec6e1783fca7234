"""What a file of an adapter says about its training, in the keys that sd-scripts writes and UIs show.

The keys: kohya-ss/sd-scripts, train_network.py and library/train_util.py (`SS_METADATA_...`, `ss_...`).
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.config.terminal import json_text
from utils.config.user_files import open_regular
from utils.formats.adapter_files import AdapterLayer
from utils.formats.adapter_writer import LEGACY_BEGIN, LEGACY_DIGITS, LEGACY_SIZE, usual
from utils.formats.modelspec import ModelFacts, modelspec

BASE_VERSIONS = {"stable-diffusion-v1": "sd_v1", "stable-diffusion-v2": "sd_v2"}
BASE_VERSIONS |= {"stable-diffusion-xl-v1-base": "sdxl_base_v1-0"}
"""What sd-scripts calls a base model, by the beginning of its architecture in ModelSpec."""
DORA_NOTE = (
    "ComfyUI and Forge divide DoRA weights by the norm of the base weights instead of the sum, AUTOMATIC1111 takes the "
    "norm over inputs instead of outputs, and diffusers loads the file as a plain LoRA, so their images differ from "
    "the run's"
)
"""Which tools do not compute DoRA as LyCORIS, sd-scripts and peft do; for the log and the model card."""


@dataclass(frozen=True)
class AdapterFacts:
    """What a file says about its training; None for what is unknown, which is left out.

    Attributes:
        model: architecture, title, resolution, prediction type and licence.
        base: name of the base model.
        base_file: the base's file, if it is a single file, whose hash is stored.
        zero_snr: whether the noise schedule has zero terminal SNR.
        trigger_words: the words that call what was learnt.
        tags: how often each tag occurs, by folder.
        training: sd-scripts' names of further settings, without `ss_`, and their values.
    """

    model: ModelFacts
    base: str | None = None
    base_file: Path | None = None
    zero_snr: bool = False
    trigger_words: Sequence[str] = ()
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)


def adapter_metadata(layers: Sequence[AdapterLayer], facts: AdapterFacts) -> dict[str, str]:
    """Returns the metadata of a file for UIs; its hashes are added when it is written."""
    architecture = facts.model.architecture
    version = next((each for begin, each in BASE_VERSIONS.items() if architecture.startswith(begin)), None)
    size = facts.model.resolution
    found: dict[str, object] = {
        "base_model_version": version,
        "v2": version == BASE_VERSIONS["stable-diffusion-v2"],
        "v_parameterization": facts.model.prediction_type == "v_prediction",
        "zero_terminal_snr": facts.zero_snr,
        "sd_model_name": facts.base,
        "resolution": None if size is None else f"({size[0]}, {size[1]})",
        "output_name": facts.model.title,
        "tag_frequency": json_text(facts.tags) if facts.tags else None,
        **_network(layers),
        **({} if facts.base_file is None else _hashes(facts.base_file)),
        **facts.training,
    }
    spec = modelspec(facts.model, "lora")  # ModelSpec's word for all adapters of this kind, as sd-scripts uses it
    if facts.trigger_words:
        spec["modelspec.trigger_phrase"] = ", ".join(facts.trigger_words)
    return {f"ss_{name}": str(value) for name, value in found.items() if value is not None} | spec


def _network(layers: Sequence[AdapterLayer]) -> dict[str, object]:
    """Returns which module of sd-scripts or LyCORIS reads the layers, and with which arguments."""
    kind = layers[0].kind
    is_dora = any("magnitude" in layer.tensors for layer in layers)
    linear = [layer for layer in layers if len(layer.shape) == 2] or list(layers)
    kernels = [layer for layer in layers if any(edge > 1 for edge in layer.shape[2:])]
    arguments: dict[str, str] = {} if kind == "lora" and not is_dora else {"algo": kind}
    if is_dora:
        arguments["dora_wd"] = "True"
    if kernels:
        arguments["conv_dim"] = str(usual(layer.rank for layer in kernels))
        arguments["conv_alpha"] = f"{usual(layer.alpha for layer in kernels):g}"
    if kind == "lokr":
        arguments["factor"] = "-1"
    return {
        "network_module": "lycoris.kohya" if "algo" in arguments else "networks.lora",
        "network_dim": usual(layer.rank for layer in linear),
        "network_alpha": f"{usual(layer.alpha for layer in linear):g}",
        "network_args": json_text(arguments) if arguments else None,
    }


def _hashes(file: Path) -> dict[str, str]:
    """Returns the hashes of a model's file: of all of it, and AUTOMATIC1111's first one, of some bytes."""
    with open_regular(file) as opened:
        opened.seek(LEGACY_BEGIN)
        legacy = hashlib.sha256(opened.read(LEGACY_SIZE)).hexdigest()[:LEGACY_DIGITS]
        opened.seek(0)
        whole = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"sd_model_hash": legacy, "new_sd_model_hash": whole}


def count_tags(captions: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts the tags of captions, which commas separate.

    Args:
        captions: pairs of folder and caption.
    """
    found: dict[str, Counter[str]] = {}
    for folder, caption in captions:
        tags = (tag.strip().lower() for tag in caption.split(","))
        found.setdefault(folder, Counter()).update(tag for tag in tags if tag)
    return {folder: dict(tags.most_common()) for folder, tags in found.items()}
