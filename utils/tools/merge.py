"""Merges adapters into a pipeline's weights, or into one LoRA.

python -m utils.tools.merge --pipeline BASE --lora A=0.8 B=0.5 --out OUT
"""

from utils.config.first_checks import read_first, run_read
from utils.tools.merge_options import Options, read_options

if __name__ == "__main__":
    # Answer --help and report invalid flags before torch is loaded.
    read_first(read_options)

import logging
from collections.abc import Sequence
from pathlib import Path

from utils.config.options import leave
from utils.config.terminal import one_line
from utils.models.adapter_layers import refuse_same
from utils.models.streamed_components import base_of_streamed
from utils.models.streamed_pipeline import read_streamed
from utils.tools.adapters import Adapter, form_of, read_for, widest_dtype, write_adapter
from utils.tools.merging import merged_lora, merged_pipeline, updates_of
from utils.tools.results import dtype_of, source_name, write_pipeline

logger = logging.getLogger("utils.tools.merge")


def merge(options: Options) -> None:
    """Merges the adapters of --lora, and checks the result."""
    # The base and the adapters, which must fit it completely.
    asked, out = options.merge, Path(options.merge.out or "")
    pipeline = read_streamed(asked.pipeline or "", "--pipeline", asked.variant)
    base = base_of_streamed(pipeline)
    adapters = [read_for(Path(each.source), base, f"--lora {each.source}") for each in asked.adapters]
    refuse_same([(each.what, each.layers) for each in adapters])
    scales = [each.scale for each in asked.adapters]
    for each in asked.adapters:
        if each.scale == 0:
            logger.warning("--lora %s=0: the scale is 0, so it has no effect", one_line(each.source))
    updates = updates_of([(each.layers, scale) for each, scale in zip(adapters, scales, strict=True)])
    logger.info("%d adapters change %d layers of %s", len(adapters), len(updates), asked.pipeline)

    # The result.
    sources = [f"{each.name}={each.scale:g}" for each in asked.adapters]
    if asked.result != "lora":
        merged = merged_pipeline(pipeline, updates, dtype_of(options.output))
        write_pipeline(merged, out, options.output, asked.pipeline_config, [source_name(pipeline), *sources])
        return
    layers = merged_lora(pipeline, updates, asked.rank)
    metadata = {key: value for each in reversed(adapters) for key, value in each.metadata.items()}
    dtype = widest_dtype({each.dtype for each in adapters})
    result = Adapter(f"--out {out}", layers, base, metadata, tuple(sources), dtype)
    write_adapter(result, out, form_of(asked.lora_format, out), options.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit status."""
    return run_read(merge, read_options, argv)


if __name__ == "__main__":
    leave(main())
