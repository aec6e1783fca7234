"""Trains the demo's base from scratch: tokenizer, VAE and text encoder here, the UNet with `train_text_to_image.py`.

    python demo/make_base.py --output_dir demo/build/base

No training image shows the digits 8 and 9; the text encoder sees their names in captions, but without images.
"""

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from digits import (
    DIGIT_WORDS,
    HELD_OUT_PAIRS,
    HELD_OUT_WORDINGS,
    PALETTE,
    PRETRAINED_DIGITS,
    RESOLUTION,
    caption,
    enlarge,
    one_colour_wordings,
    split_digits,
    training_pairs,
    training_wordings,
    write_pretraining_folder,
)

DEMO = Path(__file__).resolve().parent
UNET_CONFIG = DEMO / "unet.json"
MAX_TOKENS = 32
TEXT_WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"

NUM_FIELDS = 6000
VAE_STEPS, VAE_BATCH, VAE_RATE, KL_WEIGHT = 3000, 16, 2e-3, 1e-3
PRETRAINING_STEPS = 4000
PRETRAINING_ARGUMENTS = [
    "--resolution", "64",
    "--mixed_precision", "no",
    "--train_batch_size", "64",
    "--learning_rate", "1e-3",
    "--lr_scheduler", "cosine",
    "--lr_warmup_steps", "50",
    "--caption_dropout", "0.1",
    "--use_ema",
    "--ema_decay", "0.999",
    "--checkpointing_steps", "500",
    "--checkpoints_total_limit", "2",
    "--dataloader_num_workers", "1",
    "--report_to", "none",
    "--seed", "0",
]  # fmt: skip
READING_STEPS, READING_BATCH, READING_RATE = 1000, 64, 2e-3


# --- tokenizer --------------------------------------------------------------------------------------------------------


def make_tokenizer() -> CLIPTokenizer:
    """Returns a byte-pair CLIP tokenizer for any text, in which each word of the demo's captions is one token."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=5000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([_all_words()], trainer)
    merges = [tuple(pair) for pair in _merges_of(tokenizer)]
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    """The merges of a byte-pair tokenizer, in order."""
    return json.loads(tokenizer.to_str())["model"]["merges"]


def _all_words() -> str:
    """All words that captions of the demo can contain."""
    wordings = " ".join([*training_wordings(), *HELD_OUT_WORDINGS])
    for name in ("{digit}", "{ink}", "{ground}"):
        wordings = wordings.replace(name, " ")
    return " ".join([wordings, *DIGIT_WORDS, *PALETTE])


# --- text encoder -----------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A text encoder with three heads that predict digit, ink and background of a caption.

    They predict at every position from the end token on.
    """

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.heads = nn.ModuleList(
            nn.Linear(TEXT_WIDTH, size) for size in (len(DIGIT_WORDS), len(PALETTE) + 1, len(PALETTE) + 1)
        )

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Maps tokens [n, length] to logits of digit, ink and background, each [n, length, number of choices]."""
        states = self.text_encoder(tokens).last_hidden_state
        return [head(states) for head in self.heads]

    def loss(self, tokens: Tensor, answers: Tensor) -> Tensor:
        """Returns the mean cross-entropy of the answers [n, 3] at the end token and the padding after it."""
        after_end = tokens == self.text_encoder.config.eos_token_id
        losses = [
            functional.cross_entropy(logits[after_end], answer[:, None].expand_as(tokens)[after_end])
            for logits, answer in zip(self(tokens), answers.T, strict=True)
        ]
        return torch.stack(losses).mean()


def make_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """Returns a two-layer CLIP text encoder trained on captions to predict digit, ink and background."""
    torch.manual_seed(seed)
    reader = Reader(CLIPTextModel(_text_config(tokenizer)))
    tokens, answers = _captions(tokenizer, [*training_wordings(), *one_colour_wordings()], training_pairs())
    optimizer = torch.optim.AdamW(reader.parameters(), lr=READING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, READING_RATE, READING_STEPS)
    for _ in range(READING_STEPS):
        batch = torch.randint(len(tokens), (READING_BATCH,))
        _descend(reader.loss(tokens[batch], answers[batch]), optimizer, schedule)
    print(f"text encoder: accuracy on held-out wordings and colour pairs {_reading_accuracy(reader, tokenizer):.1%}")
    return reader.text_encoder.eval()


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, projection_dim=TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _captions(
    tokenizer: CLIPTokenizer, wordings: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """Captions of all wordings, digits and pairs: tokens [n, 32], and numbers of digit, ink and background [n, 3].

    The number of a colour is its index in the palette, or the length of the palette if the wording does not name it.
    """
    colours = list(PALETTE)
    settings = list(itertools.product(wordings, range(len(DIGIT_WORDS)), pairs))
    texts = [caption(wording, digit, *pair) for wording, digit, pair in settings]
    answers = [
        (
            digit,
            colours.index(ink) if "{ink}" in wording else len(colours),
            colours.index(ground) if "{ground}" in wording else len(colours),
        )
        for wording, digit, (ink, ground) in settings
    ]
    tokens = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return tokens.input_ids, torch.tensor(answers)


@torch.no_grad()
def _reading_accuracy(reader: Reader, tokenizer: CLIPTokenizer) -> float:
    """The share of held-out captions whose digit and colours are all predicted correctly at the last position."""
    tokens, answers = _captions(tokenizer, HELD_OUT_WORDINGS, HELD_OUT_PAIRS)
    read = torch.stack([logits[:, -1].argmax(dim=-1) for logits in reader(tokens)], dim=1)
    return (read == answers).all(dim=1).float().mean().item()


# --- VAE --------------------------------------------------------------------------------------------------------------


def make_vae(seed: int = 0) -> AutoencoderKL:
    """Returns a small VAE (64 x 64 pixels, latents 4 x 8 x 8), trained on digits 0 to 7 and random coloured strokes."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=RESOLUTION,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    fields = torch.from_numpy(np.stack(list(_ink_fields(np.random.default_rng(seed)))))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VAE_RATE, VAE_STEPS, pct_start=0.1)
    for step in range(VAE_STEPS):
        pictures = _random_pictures(fields, VAE_BATCH).to(memory_format=torch.channels_last)
        loss = _vae_loss(vae, pictures)
        _descend(loss, optimizer, schedule, vae.parameters())
        if step % 100 == 0:
            print(f"vae: step {step} loss {loss.item():.4f}", flush=True)
    vae.register_to_config(scaling_factor=_scaling_factor(vae, _random_pictures(fields, 512)))
    return vae.to(memory_format=torch.contiguous_format).eval()


def _ink_fields(generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields ink [64, 64] in [0, 1]: two thirds are digits 0 to 7, one third random strokes."""
    drawing = split_digits()[0].only(PRETRAINED_DIGITS)
    for number in range(NUM_FIELDS):
        strokes = number % 3 == 2
        yield enlarge(_strokes(generator) if strokes else drawing.ink[number % len(drawing.ink)], generator)


def _strokes(generator: np.random.Generator) -> np.ndarray:
    """One to three random arcs with soft edges: float32 [8, 8] in [0, 1]."""
    rows, columns = np.mgrid[0:8, 0:8].astype(np.float32)
    ink = np.zeros((8, 8), np.float32)
    for _ in range(generator.integers(1, 4)):
        for row, column in _arc(generator):
            ink = np.maximum(ink, 1.25 - 0.75 * np.hypot(rows - row, columns - column))
    return np.clip(ink, 0.0, 1.0).astype(np.float32)


def _arc(generator: np.random.Generator, num_points: int = 24) -> np.ndarray:
    """Points [24, 2] (row, column), in an 8 x 8 grid, of an arc with random radii, start and extent."""
    start, extent = generator.uniform(0, 2 * np.pi), generator.uniform(0.5, 5.5)
    angles = start + extent * np.linspace(0, 1, num_points)
    centre, radii = generator.uniform(1.5, 5.5, 2), generator.uniform(0.5, 3.5, 2)
    return np.clip(centre + radii * np.stack([np.sin(angles), np.cos(angles)], axis=1), 0.0, 7.0)


def _random_pictures(fields: Tensor, num_pictures: int) -> Tensor:
    """Images [num_pictures, 3, 64, 64] in [-1, 1] of random ink from `fields`, in two random or palette colours."""
    ink = fields[torch.randint(len(fields), (num_pictures,))][:, None]
    palette = torch.tensor(list(PALETTE.values())) / 127.5 - 1
    colours = palette[torch.rand(num_pictures, len(palette)).argsort(dim=1)[:, :2]]
    any_colours = 2 * torch.rand(num_pictures, 2, 3) - 1
    colours = torch.where(torch.rand(num_pictures, 1, 1) < 0.3, any_colours, colours)[..., None, None]
    return colours[:, 1] + ink * (colours[:, 0] - colours[:, 1])


def _vae_loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Absolute and squared reconstruction error, plus a small KL divergence from the unit normal."""
    posterior = vae.encode(pictures).latent_dist
    difference = vae.decode(posterior.sample()).sample - pictures
    return difference.abs().mean() + 2 * difference.square().mean() + KL_WEIGHT * posterior.kl().mean() / 256


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, pictures: Tensor) -> float:
    """1 / standard deviation of the latents."""
    return 1.0 / vae.encode(pictures).latent_dist.sample().std().item()


def _descend(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    clipped: Iterable[nn.Parameter] | None = None,
) -> None:
    """One step of the optimizer and its schedule; clips the gradients of `clipped` to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    if clipped is not None:
        nn.utils.clip_grad_norm_(clipped, 1.0)
    optimizer.step()
    schedule.step()


# --- the pipeline -----------------------------------------------------------------------------------------------------


def make_scheduler() -> DDIMScheduler:
    """Returns Stable Diffusion's noise schedule with v-prediction and zero terminal SNR.

    With zero terminal SNR (https://arxiv.org/abs/2305.08891) images can be entirely black or white.
    """
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip


def make_skeleton(folder: Path) -> None:
    """Saves a pipeline with trained VAE, tokenizer and text encoder, and a UNet with random weights."""
    tokenizer = make_tokenizer()
    text_encoder, vae = make_text_encoder(tokenizer), make_vae()
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=make_scheduler(),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(UNET_CONFIG)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)


def pretrain(skeleton: Path, pictures: Path, output_dir: Path, num_steps: int, resume: bool) -> None:
    """Trains a new UNet on digits 0 to 7 with this toolkit's training script; `output_dir` is then the base."""
    sys.path.insert(0, str(DEMO.parent))
    from train_text_to_image import main as train

    where = ["--pretrained_model", str(skeleton), "--train_data_dir", str(pictures), "--output_dir", str(output_dir)]
    length = ["--max_train_steps", str(num_steps), *(["--resume_from_checkpoint", "latest"] if resume else [])]
    status = train([*where, "--unet_config", str(UNET_CONFIG), *length, *PRETRAINING_ARGUMENTS])
    if status:
        sys.exit(status)


def keep_parts(run_folder: Path, base: Path) -> None:
    """Copies only the pipeline of a run's output folder to `base`, and replaces the one there."""
    index = json.loads((run_folder / "model_index.json").read_text(encoding="utf-8"))
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    shutil.copy(run_folder / "model_index.json", base)
    for name in index:
        if (run_folder / name).is_dir():
            shutil.copytree(run_folder / name, base / name)


def options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="output folder of the UNet's training run")
    parser.add_argument("--base", type=Path, default=DEMO / "base", help="folder for the result (default: demo/base)")
    parser.add_argument(
        "--work_dir", type=Path, help="folder for the untrained pipeline and the images (default: OUTPUT_DIR-work)"
    )
    parser.add_argument("--skeleton", type=Path, help="existing pipeline with an untrained UNet; trains only the UNet")
    parser.add_argument("--only_skeleton", action="store_true", help="stop before training the UNet")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted training run of the UNet")
    parser.add_argument(
        "--max_train_steps", type=int, default=PRETRAINING_STEPS, help="optimizer steps of the UNet (default: 4000)"
    )
    return parser.parse_args()


def main() -> None:
    chosen = options()
    work = chosen.work_dir or chosen.output_dir.with_name(f"{chosen.output_dir.name}-work")
    skeleton = chosen.skeleton or work / "skeleton"
    if chosen.skeleton is None:
        make_skeleton(skeleton)
    if not chosen.only_skeleton:
        if not (work / "pictures" / "metadata.jsonl").exists():
            write_pretraining_folder(work / "pictures")
        pretrain(skeleton, work / "pictures", chosen.output_dir, chosen.max_train_steps, chosen.resume)
        keep_parts(chosen.output_dir, chosen.base)


if __name__ == "__main__":
    main()
