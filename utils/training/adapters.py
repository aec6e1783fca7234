"""Table of adaptations, readable without loading torch. To add one, write a class and add a row here."""

from dataclasses import dataclass

from utils.config.late import Late

EVERY_ADAPTER = ("rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_weights")
LORA_ALONE = ("use_dora", "use_rslora", "export_fused", "quantize_base")
FORMATS = ("diffusers", "kohya", "both")


@dataclass(frozen=True)
class AdaptationSpec:
    """A row of the table of adaptations.

    Attributes:
        kind: the subclass of `Adaptation`, loaded when needed.
        flags: adapter flags that this adaptation accepts.
        trains_base: whether the denoiser's own weights train.
    """

    kind: Late
    flags: tuple[str, ...] = EVERY_ADAPTER
    trains_base: bool = False


ADAPTATIONS: dict[str, AdaptationSpec] = {
    "full": AdaptationSpec(Late("utils.training.adaptation", "FullFineTuning"), flags=(), trains_base=True),
    "lora": AdaptationSpec(Late("utils.training.adaptation", "LowRankAdaptation"), flags=EVERY_ADAPTER + LORA_ALONE),
    "loha": AdaptationSpec(Late("utils.training.adaptation", "HadamardAdaptation")),
    "lokr": AdaptationSpec(Late("utils.training.adaptation", "KroneckerAdaptation")),
}
