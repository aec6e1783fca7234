"""What other libraries say, and the few messages of theirs that say nothing to a user of this toolkit.

Each filter names one message. A new warning of a library is shown; whoever finds it useless adds a line here.
"""

import logging
import re
import warnings

from utils.config.terminal import set_up_logging

LIBRARIES = ("transformers", "diffusers", "accelerate", "datasets", "huggingface_hub", "peft")
DROPPED_WARNINGS = (
    r"`gradient_checkpointing_enable` is deprecated",  # transformers; diffusers and accelerate call it
    r"`broadcast_buffers` is deprecated",  # torch's DDP; accelerate has no other name for it yet
    r"This DataLoader will create \d+ worker processes",  # the number of workers is chosen, or asked for
    r"The following alpha_pattern keys did not match",  # peft; layers of LoRA files get their alphas here
)
DROPPED_LOGS = re.compile(
    r"No LoRA keys associated to \w+ found with"  # diffusers, for each part that a LoRA file does not train
    r"|requires torchvision \(not installed\); falling back to"  # transformers; nothing here needs torchvision
    r"|The config attributes \{'decay': .*'power': [\d.]+\} were passed"  # diffusers, of an average's own config
    r"|Token indices sequence length is longer than"  # transformers, where prompts are measured before they are cut
    r"|only the non-EMA weights are extracted"  # diffusers, of single files; the flag that it names is another tool's
    r"|modules in \w+ that should be kept in float32: \[\]"  # diffusers, of none
    r"|Some weights of the model checkpoint were not used"  # both, of what utils.models.loading says itself
    r"|Changing scheduler \{self\.config\} to have"  # diffusers, of DPM-Solver's last steps
)
CUT_PROMPT = re.compile(r"(The following part of your input was truncated because .*?: )(.*)", re.DOTALL)
PADDING = re.compile(r"(<\|endoftext\|>|!)+")


class KnownMessages(logging.Filter):
    """Drops the messages listed above, and takes padding out of what a text encoder says of cut prompts."""

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
    """Sends what libraries log to this toolkit's log, without their progress bars and the messages listed above."""
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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it warns of kernels that CPUs lack
