"""What a model card says of a run, and the names of the files that it speaks of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from utils.config.terminal import json_text


@dataclass(frozen=True)
class CardFacts:
    """The content of a model card.

    Attributes:
        base_model: folder, Hub name or single file of the pipeline that training started from; None from scratch.
        data: name of the dataset or its folder.
        adaptation: full, or the kind of adapter.
        is_dora: whether the adapter is a DoRA.
        pipeline_class: the class of the pipeline; needed only with a base model that is a single file.
        base_arguments: arguments with which the base model is loaded, beside its name.
        scheduler_class: the class of the pipeline's scheduler.
        scheduler_changes: changes to the config of the base model's scheduler, without which an adapter draws noise.
        load_arguments: arguments with which the result is loaded, such as 'torch_dtype=torch.float16, variant="fp16"'.
        call: Python expression that draws an image.
        tag: the Hub's tag for the task of the model.
        trigger_words: words that call up what an adapter has learnt.
        negative_prompt: the negative prompt of the samples.
        is_misread: whether diffusers reads the adapter's file for UIs in another way than UIs do.
        ui_notes: what UIs must be told to draw as the pipeline does, in Markdown.
        settings: (name, value) rows of the table of settings.
        verdict: why the run has diverged; empty if it has not.
        judgement: the verdict on the run, in one line; empty if it was not judged.
        failures: what a check of the exported files found wrong; empty if all are right or were not checked.
    """

    base_model: str | None
    data: str
    adaptation: str = "full"
    is_dora: bool = False
    pipeline_class: str = "DiffusionPipeline"
    base_arguments: Mapping[str, object] = field(default_factory=dict)
    scheduler_class: str = "DDIMScheduler"
    scheduler_changes: Mapping[str, object] = field(default_factory=dict)
    load_arguments: str = ""
    call: str = 'pipeline("a prompt")'
    tag: str = "text-to-image"
    trigger_words: Sequence[str] = ()
    negative_prompt: str = ""
    is_misread: bool = False
    ui_notes: Sequence[str] = ()
    settings: Sequence[tuple[str, object]] = ()
    verdict: str = ""
    judgement: str = ""
    failures: Sequence[str] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether the result is an adapter, which needs its base model."""
        return self.adaptation != "full"


def quoted(text: str) -> str:
    """Returns a text as a Python string literal that can't end a Markdown code block."""
    return json_text(text).replace("`", "\\u0060")
