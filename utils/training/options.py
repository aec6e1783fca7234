"""The options that both training scripts have, by group, in the order of `--help`."""

from dataclasses import dataclass
from pathlib import Path

from utils.config.training_length import LengthOptions
from utils.data.buckets import BucketOptions
from utils.data.cache import CacheOptions
from utils.data.captions import CaptionOptions
from utils.data.class_labels import LabelOptions
from utils.data.images import ImageOptions
from utils.data.loader import LoaderOptions
from utils.data.plan import HeldOutOptions, SelectionOptions
from utils.data.sources import DataOptions, SourceOptions
from utils.diffusion.losses import LossOptions
from utils.diffusion.noise import NoiseOptions
from utils.evaluation.metrics.features import FeatureOptions
from utils.evaluation.while_training import EvaluationOptions
from utils.models.loading import LoadingOptions
from utils.models.loss_terms import TermOptions
from utils.models.perceptual_loss import PerceptualOptions
from utils.models.pipeline_source import PartOptions
from utils.runtime.processes import RuntimeOptions
from utils.sampling.controls import SamplingControlOptions
from utils.sampling.grid_samples import SamplingOptions
from utils.sampling.prompt_samples import ValidationOptions
from utils.training.adaptation import TrainedOptions
from utils.training.checkpoint import CheckpointOptions
from utils.training.ema import EmaOptions
from utils.training.log import TrackingOptions
from utils.training.model_card import HubOptions
from utils.training.optimizers import OptimizerOptions, ScheduleOptions
from utils.training.speed import SpeedOptions
from utils.training.validation_loss import EarlyStoppingOptions


@dataclass(frozen=True)
class TrainingOptions:
    """All option groups of a training script. Each script subclasses it and narrows the groups that are its own."""

    model: PartOptions
    loading: LoadingOptions
    adaptation: TrainedOptions
    data: DataOptions
    source: SourceOptions
    captions: CaptionOptions | LabelOptions
    selection: SelectionOptions
    image: ImageOptions
    buckets: BucketOptions
    cache: CacheOptions
    loader: LoaderOptions
    length: LengthOptions
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    loss: LossOptions
    perceptual: PerceptualOptions
    term: TermOptions
    noise: NoiseOptions
    ema: EmaOptions
    held_out: HeldOutOptions
    samples: ValidationOptions | SamplingOptions
    stopping: EarlyStoppingOptions
    checkpoint: CheckpointOptions
    runtime: RuntimeOptions
    speed: SpeedOptions
    tracking: TrackingOptions
    hub: HubOptions
    evaluation: EvaluationOptions
    features: FeatureOptions
    controls: SamplingControlOptions

    @property
    def caption_options(self) -> CaptionOptions:
        """How the data's captions are used, or the labels in their place.

        Raises:
            UserError: if labels are asked for in a way that the source does not have.
        """
        return self.captions.for_source(self.source)

    @property
    def structure(self) -> dict[str, object]:
        """The settings that must equal the checkpoint's for a run to resume from it, by flag."""
        term = None if self.term.loss_module is None else Path(self.term.loss_module).name
        shared = {"seed": self.runtime.seed, "optimizer": self.optimizer.name, "loss_module": term}
        return shared | self.adaptation.structure

    @property
    def data_name(self) -> str:
        """The dataset's name, or that of its folder or file."""
        source = self.source
        return source.dataset_name or Path(source.train_data_dir or self.data.dataset_file).name
