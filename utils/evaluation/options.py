"""Options of evaluation: reference, feature networks, metrics, and metrics during training."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from utils.config.flag_rules import Lists, Partner, Resume
from utils.config.options import UserError, flags_as, option, require, require_not_negative, require_positive
from utils.config.progress import Progress
from utils.config.user_files import check_encoding
from utils.evaluation.metrics.table import DEFAULT_METRICS, METRICS
from utils.runtime.hub_files import is_path

LPIPS_NETWORKS = ("alex", "vgg")
FID_MODES = {
    "clean": "PIL bicubic on floats, antialiased, to 299; (x - 128) / 128",
    "pytorch-fid": "bilinear without antialiasing to 299; 2 x - 1",
    "tf": "TensorFlow 1's bilinear, its corners unaligned, to 299; (x - 128) / 128",
}
REFERENCE_FLAGS = {"reference": "eval_reference"}  # flag of evaluate_pipeline.py: its name in the training scripts

REFERENCE = ("reference", "training_images")
COMPARING = tuple(name for name, metric in METRICS.items() if metric.compares)


def computed(*names: str) -> tuple[Partner, ...]:
    """Returns the flags of evaluate_pipeline.py and the training scripts by which one of the metrics is computed."""
    return Lists("metrics", (*names, "all"), DEFAULT_METRICS), Lists("eval_metrics", names)


def metrics_by(network: str) -> tuple[str, ...]:
    """Returns the metrics that need a network."""
    return tuple(name for name, metric in METRICS.items() if metric.network == network)


@dataclass(frozen=True)
class ScoreOptions:
    kid_subsets: int = option(
        100,
        "number of subsets of the conventional KID, reported besides the KID of all images",
        acts_with=computed("kid"),
    )
    kid_subset_size: int = option(1000, "images per KID subset", acts_with=computed("kid"))
    fid_groups: int = option(
        5, "number of disjoint groups of images to estimate the spread of FID", acts_with=computed("fid", "fd_dinov2")
    )
    num_duplicate_pairs: int = option(
        12,
        "number of pairs (image, nearest training image) that memorisation reports",
        acts_with=computed("memorisation"),
    )

    def __post_init__(self) -> None:
        require_positive(self, "kid_subsets", "kid_subset_size", "num_duplicate_pairs")
        for name in ("kid_subset_size", "fid_groups"):
            if getattr(self, name) < 2:
                raise UserError(f"--{name} must be 2 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class FeatureOptions:
    fid_mode: str = option(
        "clean",
        "how to resize images to 299 pixels for the Inception network; the modes give different FIDs",
        choices=FID_MODES,
        resume=Resume.REPORTING,
        acts_with=(*computed(*metrics_by("main")), "save_reference"),
    )
    inception_weights: str | None = option(
        None,
        "weight file of pytorch-fid, .pth or .safetensors; by default downloaded once",
        resume=Resume.REPORTING,
        acts_with=(*computed(*metrics_by("main")), "save_reference"),
    )
    feature_module: str | None = option(
        None,
        "Python file with a feature network to use instead of Inception for KID, FID and related metrics",
        resume=Resume.REPORTING,
        acts_with=(*computed(*metrics_by("main")), "save_reference"),
    )
    clip_model: str = option(
        "openai/clip-vit-large-patch14",
        "CLIP model for the CLIP score and similarity: folder or Hub name",
        resume=Resume.REPORTING,
        acts_with=computed(*metrics_by("clip")),
    )
    cmmd_model: str = option(
        "openai/clip-vit-large-patch14-336",
        "CLIP model for CMMD: folder or Hub name",
        resume=Resume.REPORTING,
        acts_with=computed(*metrics_by("cmmd")),
    )
    dino_model: str = option(
        "facebook/dinov2-large",
        "DINOv2 model for FD-DINOv2 and the DINO similarity: folder or Hub name",
        resume=Resume.REPORTING,
        acts_with=computed(*metrics_by("dino")),
    )
    lpips_network: str = option(
        "alex",
        "backbone of LPIPS",
        choices=LPIPS_NETWORKS,
        resume=Resume.REPORTING,
        acts_with=computed(*metrics_by("lpips")),
    )
    lpips_weights: str | None = option(
        None,
        "torchvision weight file of the LPIPS backbone, .pth or .safetensors; by default downloaded once",
        resume=Resume.REPORTING,
        acts_with=computed(*metrics_by("lpips")),
    )
    lpips_size: int | None = option(
        None,
        "resize images to a square of this edge in pixels for LPIPS; by default they keep their size",
        resume=Resume.REPORTING,
        acts_with=computed(*metrics_by("lpips")),
    )
    pickscore_model: str | None = option(
        None,
        "CLIP model of PickScore, such as yuvalkirstain/PickScore_v1: folder or Hub name",
        resume=Resume.REPORTING,
        acts_with=computed(*metrics_by("pickscore")),
    )
    hpsv2_model: str | None = option(
        None,
        "CLIP model of HPSv2 in transformers format: folder or Hub name",
        resume=Resume.REPORTING,
        acts_with=computed(*metrics_by("hpsv2")),
    )
    no_download: bool = option(
        False,
        "do not download feature networks; metrics whose network is missing are not computed",
        resume=Resume.REPORTING,
        acts_with=(*computed(*METRICS), "save_reference"),
    )
    feature_batch_size: int = option(
        32, "batch size of feature networks", resume=Resume.COST, acts_with=(*computed(*METRICS), "save_reference")
    )

    def __post_init__(self) -> None:
        require_positive(self, "lpips_size", "feature_batch_size")
        require(self.lpips_size is None or self.lpips_size >= 64, "lpips_size", self.lpips_size, "be 64 or more")
        for name in ("inception_weights", "lpips_weights"):
            file = getattr(self, name)
            is_file = file is None or (Path(file).is_file() and Path(file).suffix in (".pth", ".pt", ".safetensors"))
            require(is_file, name, file, "be a .pth or .safetensors file that exists")
        for name in ("clip_model", "cmmd_model", "dino_model", "pickscore_model", "hpsv2_model"):
            value = getattr(self, name)
            fits = value is None or not is_path(value) or Path(value).is_dir()
            require(fits, name, value, "be a folder that exists, or a Hub name")
        file = self.feature_module
        is_module = file is None or (Path(file).is_file() and file.endswith(".py"))
        require(is_module, "feature_module", file, "be a Python file that exists")


@dataclass(frozen=True)
class ReferenceOptions:
    reference: str | None = option(
        None,
        "real images to compare with: a folder, a dataset, or an .npz file of statistics",
        acts_with=(*computed(*COMPARING), "save_reference"),
    )
    reference_split: str = option("train", "split of a reference dataset", is_text=True, acts_with=REFERENCE)
    reference_image_column: str = option(
        "image", "column of images in a reference dataset", is_text=True, acts_with=REFERENCE
    )
    reference_caption_column: str = option(
        "text",
        "column of captions in the reference's metadata",
        is_text=True,
        acts_with=REFERENCE,
    )
    reference_resolution: int | None = option(
        None,
        "resize and centre-crop the reference to squares of this edge in pixels; by default images stay whole",
        acts_with=REFERENCE,
    )
    max_reference_images: int | None = option(
        None, "use at most N reference images, chosen at random by --seed", acts_with=REFERENCE
    )
    training_images: str | None = option(
        None, "training images, for memorisation: a folder or a dataset", acts_with=computed("memorisation")
    )
    save_reference: str | None = option(
        None, "save the statistics of the reference in this .npz file", acts_with=("reference",)
    )
    allow_stats_mismatch: bool = option(
        False, "accept reference statistics of another network or image preparation", acts_with=("reference",)
    )

    def __post_init__(self) -> None:
        require_positive(self, "reference_resolution", "max_reference_images")
        for name in ("reference", "training_images"):
            value = getattr(self, name)
            is_local = value is not None and (is_path(value) or value.endswith(".npz"))
            require(not is_local or Path(value).exists(), name, value, "be a folder, dataset or file that exists")
        file = self.save_reference
        require(file is None or file.endswith(".npz"), "save_reference", file, "end with .npz")
        if file is not None and (self.reference is None or self.is_statistics):
            raise UserError("--save_reference needs reference images; give --reference a folder or a dataset")

    @property
    def is_statistics(self) -> bool:
        """Whether the reference is a file of statistics."""
        return self.reference is not None and self.reference.endswith(".npz")


@dataclass(frozen=True)
class EvaluationOptions:
    needs_reference: ClassVar[bool] = True  # False in scripts that can compare with the training images

    eval_metrics: list[str] | None = option(
        None, "metrics to compute during training", choices=METRICS, resume=Resume.REPORTING
    )
    eval_steps: int | None = option(
        None,
        "compute metrics every N optimizer steps; by default only after the last step",
        resume=Resume.REPORTING,
    )
    eval_prompts_file: str | None = option(
        None,
        "file of prompts for --eval_metrics: .txt, .jsonl or .csv; by default the validation prompts",
        resume=Resume.REPORTING,
    )
    eval_prompts_encoding: str | None = option(
        None,
        "encoding of --eval_prompts_file, such as gb18030; by default UTF-8, else a guess, which is logged",
        resume=Resume.REPORTING,
    )
    eval_num_images: int = option(
        64,
        "number of images to draw for --eval_metrics, spread evenly over prompts or classes",
        resume=Resume.REPORTING,
        acts_with=("eval_metrics",),
    )
    eval_reference: str | None = option(
        None,
        "real images to compare with: a folder, a dataset, or an .npz file of statistics",
        resume=Resume.REPORTING,
    )
    eval_num_inference_steps: int | None = option(
        None,
        "denoising steps per image for --eval_metrics; by default the pipeline's",
        resume=Resume.REPORTING,
        acts_with=("eval_metrics",),
    )
    eval_guidance_scale: float | None = option(
        None,
        "classifier-free guidance scale for --eval_metrics; by default the pipeline's",
        resume=Resume.REPORTING,
        acts_with=("eval_metrics",),
    )
    eval_sampling_batch_size: int | None = option(
        None,
        "images per batch and process for --eval_metrics; by default it doubles until memory is full",
        resume=Resume.REPORTING,
        acts_with=("eval_metrics",),
    )

    def __post_init__(self) -> None:
        require_positive(self, "eval_steps", "eval_num_images", "eval_num_inference_steps", "eval_sampling_batch_size")
        require_not_negative(self, "eval_guidance_scale")
        file = self.eval_prompts_file
        require(file is None or Path(file).is_file(), "eval_prompts_file", file, "be a file that exists")
        if self.eval_prompts_encoding is not None:
            check_encoding(self.eval_prompts_encoding, "eval_prompts_encoding")
            if file is None:
                raise UserError("--eval_prompts_encoding needs --eval_prompts_file; give both or neither")
        for name in ("eval_steps", "eval_prompts_file", "eval_reference"):
            if getattr(self, name) is not None and not self.eval_metrics:
                raise UserError(f"--{name} needs --eval_metrics; give both or neither")
        for name in self.eval_metrics or ():
            if METRICS[name].compares and self.eval_reference is None and self.needs_reference:
                raise UserError(f"--eval_metrics {name} compares with real images; give --eval_reference")
            if name == "memorisation":
                raise UserError("--eval_metrics memorisation works only in evaluate_pipeline.py; remove it")
        with flags_as(REFERENCE_FLAGS):
            ReferenceOptions(reference=self.eval_reference)

    def is_due(self, progress: Progress) -> bool:
        """Whether metrics are due after a step."""
        return bool(self.eval_metrics) and (progress.is_last or progress.is_multiple_of(self.eval_steps))
