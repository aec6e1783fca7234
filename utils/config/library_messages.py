"""Log messages of other libraries, and the few of them that are useless to users of this toolkit.

Each pattern matches one message. New library warnings are shown; add a line here for one that is of no use.
"""

import logging
import re
import warnings

from utils.config.terminal import set_up_logging

LIBRARIES = ("transformers", "diffusers", "accelerate", "datasets", "huggingface_hub", "peft")
DROPPED_WARNINGS = (
    r"`gradient_checkpointing_enable` is deprecated",  # transformers; diffusers and accelerate call it
    r"`broadcast_buffers` is deprecated",  # torch's DDP; accelerate has no other name for it yet
    r"This DataLoader will create \d+ worker processes",  # the number of workers is chosen here or by the user
    r"Already found a `peft_config` attribute",  # peft, for the second of several LoRAs
    r"The following alpha_pattern keys did not match",  # peft; the alphas of LoRA files are set here
)
DROPPED_LOGS = re.compile(
    r"No LoRA keys associated to \w+ found with"  # diffusers, for each part that a LoRA file does not train
    r"|requires torchvision \(not installed\); falling back to"  # transformers; nothing here needs torchvision
    r"|The config attributes \{'decay': .*'power': [\d.]+\} were passed"  # diffusers, for the config of EMA weights
    r"|Token indices sequence length is longer than"  # transformers, when prompts are measured before truncation
    r"|only the non-EMA weights are extracted"  # diffusers, for single files; it names a flag that does not exist here
    r"|modules in \w+ that should be kept in float32: \[\]"  # diffusers, for an empty list
    r"|Some weights of the model checkpoint were not used"  # both; utils.models.loading reports this itself
    r"|using a DoRA checkpoint that is not compatible in Diffusers"  # diffusers, for files of UIs; see our own note
    r"|Changing scheduler \{self\.config\} to have"  # diffusers, about the final steps of DPM-Solver
)
CUT_PROMPT = re.compile(r"(The following part of your input was truncated because .*?: )(.*)", re.DOTALL)
PADDING = re.compile(r"(<\|endoftext\|>|!)+")


class KnownMessages(logging.Filter):
    """Drops the messages listed above, and removes padding tokens from warnings about truncated prompts."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        if record.name.partition(".")[0] not in LIBRARIES:
            return True
        text = record.getMessage()
        if DROPPED_LOGS.search(text):
            return False
        cut = CUT_PROMPT.search(text)
        if cut is not None:
            parts = [PADDING.sub("", part).strip(" '\"") for part in cut[2].strip(" []").split("', '")]
            parts = [part for part in parts if part]
            record.msg, record.args = cut[1] + "%s", ("; ".join(parts),)
            return bool(parts)
        return True


def hear_libraries() -> None:
    """Sends library logs to this toolkit's log, without progress bars and the messages listed above."""
    from datasets.utils.logging import disable_progress_bar
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    set_up_logging()
    disable_progress_bar()
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.disable_default_handler()
        library.enable_propagation()
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, KnownMessages) for each in handler.filters):
            handler.addFilter(KnownMessages())
    for message in DROPPED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import warns about kernels missing on CPUs
