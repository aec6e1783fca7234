"""How files of adapters name the layers of a pipeline: the UIs' names (kohya's, LyCORIS'), diffusers' and PEFT's.

The facts are from kohya-ss/sd-scripts (networks/lora.py), LyCORIS (lycoris/kohya), ComfyUI (comfy/lora.py) and
diffusers (loaders/lora_conversion_utils.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WRAPPED = "base_model.model."  # prefix of tensor names in PEFT's own files
TEXT_PREFIX = "text_model."  # of CLIP's names in files; transformers 5 has dropped it from the modules
ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Layers of a text encoder as older releases of diffusers name them in LoRA files."""
OTHER_KINDS = {
    **{"oft_": "OFT", "boft_": "BOFT", "lora_mid": "LoCon", "lora_t1": "LoCon", "lora_t2": "LoCon"},
    **{"lokr_t1": "LoKr with two cores", "on_input": "IA3", "ia3": "IA3", "bundle_emb": "LoRA and embedding"},
    **{"w_norm": "LoRA and norm", "b_norm": "LoRA and norm", "diff_b": "whole-difference", "diff": "whole-difference"},
    **{"a1.weight": "GLoRA", "b1.weight": "GLoRA", "reshape_weight": "reshaping LoRA"},
    **{"lora_embedding_A": "LoRA of embeddings", "lora_embedding_B": "LoRA of embeddings"},
}
"""Kinds of files that are not read, by marks in their tensors' names."""
OF_PIPELINES = ("model.diffusion_model.", "first_stage_model.")
"""How names of tensors begin in a single file of a whole pipeline."""
LORA_ROLES = {
    **{"lora_down": "down", "lora_up": "up", "lora_A": "down", "lora_B": "up"},
    **{"lora.down": "down", "lora.up": "up", "lora_linear_layer.down": "down", "lora_linear_layer.up": "up"},
}
"""The matrices of a LoRA update, by the names that tools give them."""
MAGNITUDES = {
    **{"dora_scale": "dora_scale"},  # of LyCORIS, of outputs or of inputs, as its shape says
    **dict.fromkeys(("lora_magnitude_vector.weight", "lora_magnitude_vector"), "magnitude"),  # of PEFT, of outputs
}
FACTORS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_w1", "lokr_w2", "lokr_t2"),
)
"""The tensors of LoHa and LoKr updates, which all tools name alike."""
ENDINGS = (
    *((f".{name}{end}", role) for name, role in LORA_ROLES.items() for end in (".weight", ".default.weight")),
    *((f"_{name}.weight", role) for name, role in LORA_ROLES.items() if name in ("lora.down", "lora.up")),
    *((f".{name}", role) for name, role in MAGNITUDES.items()),
    *((f".{name}", name) for name in FACTORS),
    (".alpha", "alpha"),
)
"""Ends of tensors' names, and the role of such a tensor in its layer's update."""


@dataclass(frozen=True)
class Component:
    """A component of a pipeline that adapters change.

    Attributes:
        name: its name in the pipeline.
        shapes: the shape of the weight of each of its layers, by the layers' names in the component's own file.
        prefixes: how the UIs' names of its layers begin; the first is written, all are read.
        original: the names of layers in the original layout, of a component whose UI names follow that layout too.
        writes_original: whether the UIs' names that are written follow the original layout.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    prefixes: tuple[str, ...] = ()
    original: Mapping[str, str] = field(default_factory=dict)
    writes_original: bool = False

    def ui_name(self, layer: str) -> str:
        """Returns a layer's name in files for UIs, such as lora_unet_down_blocks_0_attentions_0_proj_in.

        Raises:
            ValueError: if the component, or in the original layout the layer, has no such name.
        """
        spelled = self.original.get(layer) if self.writes_original else layer
        if not self.prefixes or spelled is None:
            raise ValueError(f"UIs have no name for the layer {layer} of the {self.name}")
        return self.prefixes[0] + spelled.replace(".", "_")

    def spellings(self) -> Iterator[tuple[str, str]]:
        """Yields (name in files for UIs, layer), of all spellings that are read."""
        for layer in self.shapes:
            spelled = (layer, self.original[layer]) if layer in self.original else (layer,)
            yield from ((prefix + each.replace(".", "_"), layer) for prefix in self.prefixes for each in spelled)

    def find(self, dotted: str) -> str | None:
        """Returns the layer that a dotted name of diffusers or PEFT stands for; None if there is none."""
        plain = dotted.removeprefix(WRAPPED).replace(".processor.", ".")
        head, _, last = plain.rpartition(".")
        spelled = (plain, f"{plain}.0", f"{head}.{ATTENTION.get(last, last)}")
        return next(
            (each for name in spelled for each in (name, TEXT_PREFIX + name) if each in self.shapes),
            None,
        )


class LayerNames:
    """Finds the layers that the tensors of a file are for."""

    def __init__(self, components: Sequence[Component]):
        self._components = {component.name: component for component in components}
        self._by_ui = {
            ui_name: (component.name, layer) for component in components for ui_name, layer in component.spellings()
        }

    def find(self, owner: str, component: str | None) -> tuple[str, str] | None:
        """Returns (component, layer) of a name without its ending; None if it stands for no layer.

        Args:
            owner: the name, such as `lora_te_text_model_...` or `unet.down_blocks.0...`.
            component: the component that all names are of, if the file does not say it.
        """
        if owner in self._by_ui:
            return self._by_ui[owner]
        if component is None:
            component, _, owner = owner.removeprefix(WRAPPED).partition(".")
        known = self._components.get(component)
        layer = None if known is None else known.find(owner)
        return None if layer is None else (component, layer)


def split_name(name: str) -> tuple[str, str] | None:
    """Splits a tensor's name into the layer's name and the tensor's role there; None if no tool names tensors so."""
    return next(((name.removesuffix(end), role) for end, role in ENDINGS if name.endswith(end)), None)


def kind_not_read(name: str) -> str | None:
    """Returns the kind of file that a tensor's name is of, if this kind is not read."""
    parts = name.split(".")
    tails = (".".join(parts[start:]) for start in range(len(parts)))
    return next(
        (
            kind
            for tail in tails
            for mark, kind in OTHER_KINDS.items()
            if tail == mark or (mark != "diff" and tail.startswith(mark))  # diffusion_model is no diff
        ),
        None,
    )


def component_of_names(owners: Sequence[str], components: Sequence[Component]) -> str | None:
    """Returns the component that has layers of all these names, which do not say it themselves; None if none has."""
    plain = [owner.removeprefix(WRAPPED) for owner in owners]
    return next((each.name for each in components if plain and all(each.find(name) for name in plain)), None)


def loadable_text_name(name: str) -> str:
    """Returns the name in a LoRA file of a text encoder's tensor, which all releases of transformers load.

    The names have the prefix that transformers 5 has dropped from its modules. transformers 5 loads the magnitudes of
    DoRA only if their names end in `.weight`; releases before it load both.
    """
    prefixed = name if name.startswith(TEXT_PREFIX) else TEXT_PREFIX + name
    return f"{prefixed}.weight" if prefixed.endswith(".lora_magnitude_vector") else prefixed


def loadable_name(name: str) -> str:
    """Returns the name that this release gives to a tensor of a LoRA file of any release."""
    component, _, rest = name.partition(".")
    return f"{component}.{loadable_text_name(rest)}" if rest.startswith(TEXT_PREFIX) else name


def is_loaded_by_transformers(name: str) -> bool:
    """Whether all releases of transformers load a tensor of a LoRA file."""
    return loadable_name(name) == name
