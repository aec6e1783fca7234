"""Reads checkpoints of a training run as pipelines or as adapters."""

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path

from utils.config.config_file import recorded_options
from utils.config.options import UserError
from utils.config.user_files import read_json
from utils.diffusion.options import NoiseOptions
from utils.formats.adapter_files import LORA_FILE, PEFT_FILE
from utils.models.streamed_pipeline import COMPONENT_CONFIG, StreamedPipeline, read_component, read_streamed

logger = logging.getLogger(__name__)
STATE = "training_state.json"
AVERAGE = "_ema"
UNET_AVERAGE = "unet_ema"  # the folder of a LoRA's average


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run.

    Attributes:
        path: its folder.
        options: the options of its run, as recorded; empty if they are not known.
    """

    path: Path
    options: dict[str, object]

    @classmethod
    def at(cls, path: str) -> "Checkpoint | None":
        """Returns the checkpoint at a path; None if there is none."""
        folder = Path(path)
        if not (folder / STATE).is_file():
            return None
        return cls(folder, recorded_options(folder.resolve().parent))

    @property
    def has_average(self) -> bool:
        """Whether it holds average weights beside the trained ones."""
        return any(each.is_dir() for each in self.path.glob(f"*{AVERAGE}"))

    @property
    def has_adapter(self) -> bool:
        """Whether it holds an adapter rather than models."""
        return (self.path / LORA_FILE).is_file() or any(self.path.glob(f"*/{PEFT_FILE}"))

    def adapter_place(self, ema: bool) -> Path:
        """Returns the file or folder of its adapter; average weights of LoHa and LoKr are in folders that end in _ema.

        Raises:
            UserError: if it has no average.
        """
        if not ema:
            self._offer_average()
            return self.path
        if (self.path / UNET_AVERAGE / LORA_FILE).is_file():
            return self.path / UNET_AVERAGE / LORA_FILE
        if not any(self.path.glob(f"*{AVERAGE}/{PEFT_FILE}")):
            raise UserError(f"--source {self.path} has no average weights; leave --ema out")
        return self.path

    def pipeline(self, given: str | None, variant: str | None, ema: bool) -> StreamedPipeline:
        """Returns the pipeline with the checkpoint's weights.

        Args:
            given: value of --pipeline: the pipeline that the run started from; None for the recorded one.
            variant: variant of that pipeline's files.
            ema: whether to take the average weights.

        Raises:
            UserError: if the base is not known, or the checkpoint has no models of it.
        """
        what = f"--source {self.path}"
        base = given or self.options.get("pretrained_model_name_or_path")
        if not isinstance(base, str) or not Path(base).exists():
            why = (
                f"{base}, which is not on this machine" if isinstance(base, str) else "a pipeline that it does not name"
            )
            raise UserError(f"{what} was trained from {why}; give its folder or file with --pipeline")
        variant = variant or self._recorded("variant")
        pipeline = read_streamed(base, "--pipeline", variant)
        pipeline = replace(pipeline, what=f"{what}, trained from {base}")
        pipeline = self._with_vae(pipeline, given)

        # The trained components.
        folders = {name: self.path / (name + AVERAGE * ema) for name in pipeline.parts}
        parts = {
            name: read_component(folder, self._class_name(folder), f"{what}: {folder.name}")
            for name, folder in folders.items()
            if (folder / COMPONENT_CONFIG).is_file()
        }
        if not parts:
            cure = "leave --ema out" if ema else "give another checkpoint"
            raise UserError(f"{what} has no {'average weights' if ema else 'models'} of its pipeline; {cure}")
        if not ema:
            self._offer_average()
        schedule = {**pipeline.configs["scheduler"], **self._noise().scheduler_changes}
        configs = {**pipeline.configs, "scheduler": schedule}
        return replace(pipeline.with_parts(parts), configs=configs)

    def _offer_average(self) -> None:
        if self.has_average:
            logger.info("%s also has average weights, which --ema takes", self.path)

    def _noise(self) -> NoiseOptions:
        """Returns the run's options of noise, which decide the schedule of the result."""
        names = {field.name for field in fields(NoiseOptions)}
        return NoiseOptions(**{name: value for name, value in self.options.items() if name in names})

    def _with_vae(self, pipeline: StreamedPipeline, given: str | None) -> StreamedPipeline:
        """Returns the pipeline with the VAE that the run was given, unless --pipeline decides."""
        vae = self._recorded("pretrained_vae_model_name_or_path")
        if vae is None or given is not None:
            return pipeline
        folder = next((each for each in (Path(vae, "vae"), Path(vae)) if (each / COMPONENT_CONFIG).is_file()), None)
        if folder is None:
            raise UserError(
                f"--source {self.path} was trained with the VAE {vae}, which is no folder on this machine; give a "
                "pipeline that has it with --pipeline"
            )
        found = read_component(folder, "AutoencoderKL", f"the VAE {vae}")
        configs = {**pipeline.configs, "vae": read_json(folder / COMPONENT_CONFIG)}
        return replace(pipeline.with_parts({"vae": found}), configs=configs)

    def _recorded(self, name: str) -> str | None:
        value = self.options.get(name)
        return value if isinstance(value, str) else None

    def _class_name(self, folder: Path) -> str:
        config = read_json(folder / COMPONENT_CONFIG)
        return str(config.get("_class_name") or (config.get("architectures") or [""])[0])
