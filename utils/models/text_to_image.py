"""Base of the text-to-image families: CLIP text encoders, a VAE, and a UNet that reads their outputs."""

import logging
import math
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from utils.config.batch import Conditioning
from utils.config.options import UserError, first_line, require
from utils.diffusion.samplers import changed_scheduler
from utils.models.base import Family, TextStates
from utils.models.folder_form import FLOAT32, FolderForm
from utils.models.latent_space import LatentSpace
from utils.models.loading import limit_tokens
from utils.models.pipeline_files import OPTIONAL, BaseFiles, load_optional, write_pipeline
from utils.models.pipeline_source import ComponentDtypes, PipelineSource
from utils.models.weight_files import loaded_files

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
PIPELINE_EDGE = 8  # diffusers refuses images whose edges it does not divide
ZERO_SNR_NOTE = (
    "The noise schedule has zero terminal SNR: ComfyUI's node ModelSamplingDiscrete has the switch `zsnr`, A1111 and "
    "Forge have *Noise schedule for sampling: Zero Terminal SNR* in their settings."
)
CAPTIONS_AT_ONCE = 4096  # captions whose tokens are held in memory while counting


class TextFamily(Family):
    """A pipeline whose denoiser is conditioned on the outputs of CLIP text encoders.

    Attributes:
        source: source of the pipeline.
        prompt_argument_names: the pipeline's argument for each text embedding of a prompt.
        ui_prefixes: by component, how the names of its layers begin in adapters for UIs; the first is written.
        words_in_metadata: words in the metadata of adapters' files that name the family.
        published_widths: widths of the text embeddings of its published models.
        published_inputs: input widths that only these have, by component and end of the layer's name.
        published_blocks: the entries of their UNets' configs that say which blocks these have.
        ui_names_are_original: whether these name the UNet's layers as the original layout does.
        v_prediction_note: what UIs must be told to draw with a model that predicts v.
    """

    tokenizer_names: tuple[str, ...]
    prompt_argument_names: Mapping[str, str]
    ui_prefixes: ClassVar[Mapping[str, tuple[str, ...]]]
    ui_names_are_original: ClassVar[bool] = False
    words_in_metadata: ClassVar[tuple[str, ...]]
    published_widths: ClassVar[tuple[int, ...]]
    published_inputs: ClassVar[Mapping[tuple[str, str], int]] = {}
    published_blocks: ClassVar[Mapping[str, object]]
    v_prediction_note: str

    def __init__(self, source: PipelineSource, dtypes: ComponentDtypes, scheduler_changes: Mapping[str, object]):
        # Pipeline, with the noise schedule that its file or the options set.
        self.source = source
        pipeline = source.load(type(self), dtypes)
        changes = {**source.scheduler_marks(), **scheduler_changes}
        say_what_marks_do(source, pipeline.scheduler.config, scheduler_changes)
        pipeline.scheduler = changed_scheduler(pipeline.scheduler, changes)

        # Components: none missing, and all fitting together.
        for name in self.needed_names():
            if getattr(pipeline, name) is None:
                raise UserError(f"--pretrained_model {source.path} has no {name}, which is required")
        super().__init__(pipeline, LatentSpace(pipeline.vae), source.options)
        self._limit_tokens(pipeline)
        self._warn_of_unknown_tokens()
        self.check(source, {name: getattr(self.pipeline, name).config for name in self._part_names})

        # A UNet config without sample_size, with which the exported pipeline could not choose a size.
        if self.denoiser.config.get("sample_size") is None:
            edge = self.default_resolution // self.latent_space.factor
            logger.warning("the UNet's config has no sample_size; the exported one gets %d", edge)
            self.denoiser.register_to_config(sample_size=edge)
        if source.options.unet_config is not None:
            self._probe_unet()

    @classmethod
    def needed_names(cls) -> tuple[str, ...]:
        """Returns the names of the required components."""
        return (cls.denoiser_name, "vae", *cls.text_encoder_names, *cls.tokenizer_names, "scheduler")

    @classmethod
    def check(cls, source: PipelineSource, configs: Mapping[str, Mapping]) -> None:
        """Refuses components whose configs do not fit together; values that a config lacks are assumed to fit."""
        # The UNet and the VAE.
        unet, encoders = configs[cls.denoiser_name], [configs[name] for name in cls.text_encoder_names]
        in_channels, latent_channels = unet.get("in_channels", 4), configs["vae"].get("latent_channels", 4)
        if in_channels != latent_channels:
            raise UserError(
                f"the UNet takes {in_channels} channels but the VAE's latents have {latent_channels}; "
                "inpainting and depth models are not supported"
            )
        if configs["vae"].get("scaling_factor", 1.0) is None:
            raise UserError(f"--pretrained_model {source.path}: the config of its VAE has no scaling_factor")
        if unet.get("time_cond_proj_dim") is not None:
            flag = f"--unet_config {source.options.unet_config}" if source.options.unet_config else "the UNet"
            raise UserError(
                f"{flag} takes guidance as an input (time_cond_proj_dim {unet['time_cond_proj_dim']}), as latent "
                "consistency models do, which is not supported; fine-tune the model that it was distilled from"
            )

        # The UNet and the text encoders.
        expected, widths = unet.get("cross_attention_dim"), _each(encoders, "hidden_size")
        if isinstance(expected, int) and widths and expected != sum(widths):
            flag = f"--unet_config {source.options.unet_config}" if source.options.unet_config else "the UNet"
            raise UserError(f"{flag} has cross_attention_dim {expected} but the text encoders have {sum(widths)}")
        skip, layers = source.options.clip_skip, min(_each(encoders, "num_hidden_layers"), default=None)
        if skip is not None and layers is not None:
            require(skip < layers - 1, "clip_skip", skip, f"be below {layers - 1} for these text encoders")

    def _probe_unet(self) -> None:
        """Runs a fresh UNet once on the meta device, to refuse one that fails or has weights that nothing trains."""
        # Inputs for one sample.
        ids = self.tokenizer()([""])
        with torch.no_grad():
            states = self.encode_text(ids, torch.tensor([False]))
        with torch.device("meta"):
            unet = type(self.denoiser).from_config(self.denoiser.config)
        size = 2 ** len(unet.config.block_out_channels)
        noisy = torch.zeros(1, self.latent_space.channels, size, size, device="meta")
        on_meta = {name: state.to("meta", unet.dtype) for name, state in states.items()}
        flag = f"--unet_config {self.source.options.unet_config}"

        # Forward and backward pass.
        try:
            step, crops = torch.zeros(1, device="meta"), torch.zeros(1, 6, device="meta")
            prediction = self.predict(unet, noisy, step, Conditioning(on_meta, crops))
            (prediction - noisy).sum().backward()
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{flag} does not fit this pipeline: {first_line(error)}") from error
        for name, parameter in unet.named_parameters():
            if parameter.grad is None:
                raise UserError(f"{flag} has {name}, which this pipeline does not use")

    @property
    def ui_notes(self) -> list[str]:
        """What UIs must be told to draw as this pipeline does, in Markdown, one sentence or two each."""
        config = self.pipeline.scheduler.config
        notes = [self.v_prediction_note] if config.get("prediction_type") == "v_prediction" else []
        if config.get("rescale_betas_zero_snr"):
            notes.append(ZERO_SNR_NOTE)
        if self.clip_skip_of_uis is not None:
            notes.append(f"Set the clip skip to {self.clip_skip_of_uis} (ComfyUI: -{self.clip_skip_of_uis}).")
        return notes

    @property
    def clip_skip_of_uis(self) -> int | None:
        """The clip skip that UIs need, which they count from 1; None for their default."""
        return None

    @property
    def tokenizers(self) -> list[Any]:
        """The tokenizers, in the order of `tokenizer_names`."""
        return [getattr(self.pipeline, name) for name in self.tokenizer_names]

    def tokenizer(self) -> "Tokenize":
        """Returns a tokenizer for the loader's workers: B captions -> [B, text encoders, chunks * tokens] int64."""
        return Tokenize(self.tokenizers, self.source.options.num_chunks, self._num_known_tokens)

    @property
    def _num_known_tokens(self) -> list[int]:
        """Number of token embeddings in each text encoder."""
        return [encoder.get_input_embeddings().num_embeddings for encoder in self.text_encoders]

    def _warn_of_unknown_tokens(self) -> None:
        counts = self._num_known_tokens
        for name, tokenizer, count in zip(self.tokenizer_names, self.tokenizers, counts, strict=True):
            unknown = [word for word, number in tokenizer.get_vocab().items() if number >= count]
            if unknown:
                logger.warning(
                    "%s of %s has %d tokens without an embedding in its text encoder, such as %r; a caption with one "
                    "ends the run",
                    *(name, self.source.path, len(unknown), unknown[0]),
                )

    def encode_text(self, input_ids: Tensor, dropped: Tensor) -> TextStates:
        """Returns the text embeddings of [B, text encoders, chunks * tokens] input ids, each chunk encoded by itself.

        Except in chunks that the mask excludes, a sample's embeddings do not depend on the number of chunks.

        Args:
            input_ids: [B, text encoders, chunks * tokens] int64; those of "" where the caption was dropped.
            dropped: [B] bool, True where the caption was dropped: the embeddings there are those of no prompt at
                inference.
        """
        states = self._encode(input_ids, dropped)
        if self.has_zeros_without_prompt:
            states = {
                name: state.masked_fill(dropped.view(-1, *[1] * (state.ndim - 1)), 0) for name, state in states.items()
            }
        chunks = self._chunks(input_ids)
        if chunks.shape[2] > 1:
            states["encoder_attention_mask"] = self._filled(chunks).repeat_interleave(chunks.shape[3], dim=1)
        return states

    def _chunks(self, input_ids: Tensor) -> Tensor:
        """Reshapes [B, text encoders, chunks * tokens] input ids to [B, text encoders, chunks, tokens]."""
        return input_ids.unflatten(2, (-1, self.tokenizers[0].model_max_length))

    def _filled(self, chunks: Tensor) -> Tensor:
        """Returns [B, chunks] bool: which of [B, text encoders, chunks, tokens] have text; the first is always True.

        A chunk without text has its end token right after the start token.
        """
        ends = [tokenizer.eos_token_id for tokenizer in self.tokenizers]  # ints: a tensor would wait for the GPU
        filled = torch.stack([chunks[:, index, :, 1] != end for index, end in enumerate(ends)]).any(dim=0)
        filled[:, 0] = True
        return filled

    def _encode(self, input_ids: Tensor, unskipped: Tensor) -> TextStates:
        """Returns the embeddings of all chunks, concatenated; clip_skip is ignored where `unskipped`, [B] bool."""
        chunks = self._chunks(input_ids).transpose(1, 2)
        num_samples, num_chunks = chunks.shape[:2]
        states = self._encode_chunks(chunks.flatten(0, 1), unskipped.repeat_interleave(num_chunks))
        by_sample = {name: state.unflatten(0, (num_samples, num_chunks)) for name, state in states.items()}
        return {
            name: state.flatten(1, 2) if name == "encoder_hidden_states" else state[:, 0]
            for name, state in by_sample.items()
        }

    @abstractmethod
    def _encode_chunks(self, input_ids: Tensor, unskipped: Tensor) -> TextStates:
        """Returns the embeddings of [N, text encoders, tokens] chunks, without clip_skip where `unskipped`, [N]."""

    @property
    def has_zeros_without_prompt(self) -> bool:
        """Whether inference without a prompt uses zeros as embeddings."""
        return False

    def prompt_arguments(self, prompt: str, negative_prompt: str | None) -> dict[str, Tensor]:
        """Returns the pipeline's keyword arguments for an encoded prompt and negative prompt.

        Both get the number of chunks that the longer one fills: the pipelines need equal lengths and take no mask.
        Without a negative prompt, its embeddings are the pipeline's own for no prompt.
        """
        ids = self.tokenizer()([prompt, negative_prompt or ""])
        chunks = self._chunks(ids)
        ids = chunks[:, :, : int(self._filled(chunks).sum(dim=1).max())].flatten(2).to(self.text_encoders[0].device)
        none, every = torch.tensor([False], device=ids.device), torch.tensor([True], device=ids.device)
        # one by one and without clip_skip for the negative prompt, as the pipeline does
        states = self._encode(ids[:1], none)
        negative = self.encode_text(ids[1:], every) if negative_prompt is None else self._encode(ids[1:], every)
        names = self.prompt_argument_names
        return {argument: states[name] for name, argument in names.items()} | {
            f"negative_{argument}": negative[name] for name, argument in names.items()
        }

    @property
    def text_dtype(self) -> torch.dtype:
        """The dtype of the text embeddings."""
        return self.text_encoders[0].dtype

    def text_facts(self) -> list[object]:
        """Returns what text embeddings depend on besides the encoders' weights: tokenizers and settings."""
        options = self.source.options
        tokenizers = [getattr(self.pipeline, name) for name in self.tokenizer_names]
        vocabularies = [sorted(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
        specials = [(tokenizer.model_max_length, tokenizer.special_tokens_map) for tokenizer in tokenizers]
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt")
        # earlier versions encoded multi-vector tokens wrongly: their caches must not match
        vectors = [True] if any(map(has_multi_vector_tokens, tokenizers)) else []
        return [vocabularies, specials, options.clip_skip, options.max_token_length, zeros, *vectors]

    @property
    def clip_skip(self) -> int | None:
        """Number of last text encoder layers that are skipped."""
        return self.source.options.clip_skip

    def probe(self, pipeline: "DiffusionPipeline") -> np.ndarray:
        """Draws an image of the smallest size that the UNet takes, in two steps."""
        halvings = len(self.denoiser.config.block_out_channels) - 1
        edge = math.lcm(PIPELINE_EDGE, self.latent_space.factor * 2**halvings)
        return pipeline(
            "a photo",
            height=edge,
            width=edge,
            num_inference_steps=2,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]

    def float32_pipeline(self, **parts: nn.Module) -> "DiffusionPipeline":
        """Returns the source's pipeline in float32, with some components replaced, for export."""
        whole = self.source.load_whole(self.pipeline_class(), scheduler=self.pipeline.scheduler, **parts)
        self._limit_tokens(whole)
        return whole

    def _limit_tokens(self, pipeline: "DiffusionPipeline") -> None:
        for name, encoder_name in zip(self.tokenizer_names, self.text_encoder_names, strict=True):
            tokenizer, encoder = getattr(pipeline, name), getattr(pipeline, encoder_name)
            if tokenizer is not None:  # components can be left out when loading for export
                encoder = encoder or getattr(self.pipeline, encoder_name)
                limit_tokens(tokenizer, encoder.config, f"--pretrained_model {self.source.path}: its {name}")

    @cached_property
    def _base(self) -> Path | None:
        """The folder of the base pipeline; None if it is a single file."""
        return self.source.folder(self.pipeline_class())

    def prepare_saving(self) -> None:
        """Downloads components of a Hub pipeline that training does not need, such as the safety checker."""
        _ = self._base

    def save_pipeline(self, folder: Path, form: FolderForm = FLOAT32, **parts: nn.Module) -> None:
        """Writes the pipeline with these components replaced; others are copied from the base's files if possible."""
        options = self.source.options
        others = {} if options.pretrained_vae_model_name_or_path is None else {"vae": self.source.vae_folder()}
        base = BaseFiles(self._base, others, options.variant, self._float32_parts)
        write_pipeline(folder, self.pipeline, parts, base, form)

    def base_files(self, name: str) -> list[Path]:
        """See `Family.base_files`."""
        options = self.source.options
        folder = None if self._base is None else self._base / name
        if name == "vae" and options.pretrained_vae_model_name_or_path is not None:
            folder = self.source.vae_folder()
        return loaded_files(folder, options.variant, options.use_safetensors)

    def _float32_parts(self, names: Collection[str]) -> dict[str, Any]:
        """Loads components of the source's pipeline in float32, by name."""
        loaded, needed = {}, set(names)
        options = self.source.options
        for name in sorted(needed & set(OPTIONAL)) if self._base is not None else ():
            needed.remove(name)
            try:
                loaded[name] = load_optional(name, self._base / name, options.variant, options.use_safetensors)
            except UserError as error:
                logger.warning("the result has no %s: the base's can't be loaded: %s", name, first_line(error))
        if needed:
            others = [name for name in self.pipeline.components if name not in needed and name != "scheduler"]
            components = self.float32_pipeline(**dict.fromkeys(others)).components
            loaded |= {name: components[name] for name in needed}
        return loaded

    @classmethod
    def check_before_loading(cls, source: PipelineSource, sizes: Sequence[tuple[int, int]]) -> None:
        """Runs `check` and `check_sizes` on the configs, if they are available without the weights."""
        configs = {name: source.config(name) for name in (cls.denoiser_name, *cls.text_encoder_names, "vae")}
        if None not in configs.values():
            cls.check(source, configs)
            cls.check_sizes(sizes, configs["vae"])


class Tokenize:
    """Tokenizes captions for each text encoder, in chunks of its maximum length, each with start and end tokens."""

    def __init__(self, tokenizers: list, num_chunks: int = 1, num_known: Sequence[int] | None = None):
        """Args:
        tokenizers: the tokenizers of the pipeline.
        num_chunks: maximum number of chunks per caption.
        num_known: number of token embeddings in each text encoder, to check ids; None for no check.
        """
        self._tokenizers = tokenizers
        self._num_chunks = num_chunks
        self._num_known = num_known
        self._have_vectors = [has_multi_vector_tokens(tokenizer) for tokenizer in tokenizers]

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens read of a caption, without start and end tokens."""
        return self._num_chunks * min(tokenizer.model_max_length - 2 for tokenizer in self._tokenizers)

    def __call__(self, captions: list[str]) -> Tensor:
        """Returns [B, text encoders, chunks * tokens] int64; unused chunks are those of "".

        Raises:
            UserError: for a token without an embedding in a text encoder.
        """
        return torch.stack([self._ids(number, captions) for number in range(len(self._tokenizers))], dim=1)

    def _read(self, number: int, captions: list[str]) -> list[str]:
        """Expands multi-vector tokens as the pipeline does: `<cat>` becomes `<cat> <cat>_1` for two vectors."""
        if not self._have_vectors[number]:
            return captions
        from diffusers.loaders import TextualInversionLoaderMixin

        return TextualInversionLoaderMixin().maybe_convert_prompt(captions, self._tokenizers[number])

    def _ids(self, number: int, captions: list[str]) -> Tensor:
        # Chunks of each caption; those of "" come last.
        tokenizer = self._tokenizers[number]
        encoded = tokenizer(
            [*self._read(number, captions), ""],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_overflowing_tokens=True,
            return_tensors="pt",
        )

        # Tokens that the text encoder does not know.
        if self._num_known is not None and int(encoded.input_ids.max()) >= self._num_known[number]:
            unknown = encoded.input_ids[encoded.input_ids >= self._num_known[number]][:1].tolist()
            raise UserError(
                f"the token {tokenizer.convert_ids_to_tokens(unknown)[0]!r} is number {unknown[0]} of its tokenizer, "
                f"but its text encoder has {self._num_known[number]} embeddings; they are from different models"
            )

        # Pad each caption with chunks of "".
        *by_caption, empty = encoded.input_ids.split(encoded.overflow_to_sample_mapping.bincount().tolist())
        ids = empty.repeat(len(captions), self._num_chunks, 1)
        for chunks, filled in zip(ids, by_caption, strict=True):
            chunks[: len(filled)] = filled[: self._num_chunks]
        return ids.flatten(1)

    def num_tokens(self, captions: Sequence[str]) -> np.ndarray:
        """Returns [B] int64: tokens per caption before truncation, by the tokenizer with the most."""
        counts = np.zeros(len(captions), dtype=np.int64)
        for start in range(0, len(captions), CAPTIONS_AT_ONCE):
            some = list(captions[start : start + CAPTIONS_AT_ONCE])
            for number, tokenizer in enumerate(self._tokenizers):
                encoded = tokenizer(
                    self._read(number, some), add_special_tokens=False, return_attention_mask=False, verbose=False
                )
                part = counts[start : start + len(some)]
                np.maximum(part, [len(ids) for ids in encoded.input_ids], out=part)
        return counts


def has_multi_vector_tokens(tokenizer: Any) -> bool:
    """Whether a tokenizer has a textual-inversion concept of several tokens: `<cat>`, `<cat>_1`, ..."""
    added = tokenizer.added_tokens_encoder
    return any(f"{token}_1" in added for token in added)


FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
FEW_STEP_NAMES = re.compile(r"(?<![a-z])(turbo|lightning|lcm|hyper|dmd2?|schnell)(?![a-z])", re.IGNORECASE)


def say_what_marks_do(source: PipelineSource, config: Mapping[str, Any], asked: Mapping[str, object]) -> None:
    """Logs what a base model's file says about its noise schedule, and which of that the options override."""
    # Marks in a single file.
    for key, value in source.scheduler_marks().items():
        if key in asked and asked[key] != value:
            logger.warning(
                "--%s %s overrides the mark in %s, which says %s: the model was trained with that",
                *(key, asked[key], source.path, value),
            )
        elif key not in asked and config.get(key) != value:
            logger.info("%s says %s %s: using it", source.path, key, value)
    if source.is_single_file and "prediction_type" not in {**asked, **source.scheduler_marks()}:
        likely, taken = source.file.looks_like_v2(), config.get("prediction_type", "epsilon")
        if likely not in (None, taken):
            logger.warning(
                "%s does not say its prediction type and looks like one of %s, but its config says %s; give "
                "--prediction_type %s if the samples are noise",
                *(source.path, likely, taken, likely),
            )

    # Models distilled for few steps.
    name = config.get("_class_name")
    if name in FEW_STEP_SCHEDULERS or FEW_STEP_NAMES.search(Path(source.path).name):
        logger.warning(
            "%s (%s) looks like a model distilled for few sampling steps: fine-tuned with the diffusion loss it "
            "loses that; its samples then need guidance and more steps",
            *(source.path, name),
        )


def _each(configs: Sequence[Any], name: str) -> list[int]:
    """Returns a number from each config (a model's or JSON); an empty list if any lacks it."""
    values = [config.get(name) if isinstance(config, dict) else getattr(config, name) for config in configs]
    return [] if None in values else values


def is_in_read_layers(name: str, num_read_layers: int) -> bool:
    """Whether a parameter of a CLIP text encoder is in one of its first layers, or outside of the layers."""
    _, found, rest = name.partition("encoder.layers.")
    return not found or int(rest.partition(".")[0]) < num_read_layers
