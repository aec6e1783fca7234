"""Captions of more tokens than a text encoder takes, in chunks, compared with what is known of one."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.comparing import losses, weights
from utils.config.batch import Conditioning
from utils.config.options import UserError
from utils.models.options import ModelOptions
from utils.models.pipeline_source import ComponentDtypes, PipelineSource
from utils.models.registry import pick_family
from utils.models.text_to_image import TextFamily, Tokenize

LETTERS = "abcdefghijklmnopqrstuvwxyz"  # each is a token of the tiny tokenizer
SHORT = "a red cat"
LONG = " ".join(LETTERS[index * index % 26] for index in range(100))
PIECES = [" ".join(LONG.split()[:75]), " ".join(LONG.split()[75:])]
ALTERED = " ".join("?" if index == 90 else letter for index, letter in enumerate(LONG.split()))


def family(pipelines, name: str, **options) -> TextFamily:
    source = PipelineSource(ModelOptions(pretrained_model_name_or_path=str(pipelines[name]), **options))
    made = pick_family(source)(source, ComponentDtypes(*[torch.float32] * 3), {})
    made.freeze()
    return made


def encode(made: TextFamily, *captions: str):
    """The states of captions, of which empty ones count as dropped."""
    return made.encode_text(made.tokenizer()(list(captions)), torch.tensor([caption == "" for caption in captions]))


@torch.no_grad()
def by_encoders(pipeline, piece: str, clip_skip: int):
    """The hidden states of at most 75 tokens and, of SDXL, the pooled one, by the text encoders themselves."""
    ids = pipeline.tokenizer(piece, padding="max_length", return_tensors="pt").input_ids
    one = pipeline.text_encoder(ids, output_hidden_states=True)
    if not hasattr(pipeline, "text_encoder_2"):
        return pipeline.text_encoder.final_layer_norm(one.hidden_states[-1 - clip_skip]), None
    two = pipeline.text_encoder_2(ids, output_hidden_states=True)
    return torch.cat([output.hidden_states[-2 - clip_skip] for output in (one, two)], dim=-1), two.text_embeds


@torch.no_grad()
def predict(made: TextFamily, *captions: str) -> torch.Tensor:
    """The UNet's predictions, of the same noise for all captions."""
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).expand(len(captions), -1, -1, -1)
    return made.predict(
        made.denoiser,
        noisy,
        torch.full((len(captions),), 500),
        Conditioning(encode(made, *captions), torch.full((len(captions), 6), 32.0)),
    )


class TestTokenize:
    def tokenizers(self, tmp_path):
        """Two that pad differently, as SDXL's do."""
        one, two = tiny.tokenizer(tmp_path / "one"), tiny.tokenizer(tmp_path / "two")
        two.pad_token = "!"
        return [one, two]

    def test_concepts_of_several_vectors_are_read_as_the_pipelines_read_them(self, tmp_path):
        tokenizers, captions = self.tokenizers(tmp_path), ["a <cat> sat", "<dog>,<cat>", SHORT]
        plain = Tokenize(tokenizers)(captions[2:])
        for each in tokenizers:
            each.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
        written_out = ["a <cat> <cat>_1 <cat>_2 sat", "<dog>,<cat> <cat>_1 <cat>_2", SHORT]
        tokenize = pickle.loads(pickle.dumps(Tokenize(tokenizers)))
        for number, each in enumerate(tokenizers):
            expected = each(written_out, padding="max_length", truncation=True, return_tensors="pt").input_ids
            assert torch.equal(tokenize(captions)[:, number], expected)
        assert torch.equal(tokenize(captions)[2:], plain)
        assert tokenize.num_tokens(captions).tolist() == [
            len(ids) for ids in tokenizers[0](written_out, add_special_tokens=False).input_ids
        ]

    def test_one_chunk_is_what_the_tokenizer_gives(self, tmp_path):
        tokenizers, captions = self.tokenizers(tmp_path), ["", SHORT, "b" * 75, "b" * 76, LONG]
        ids = Tokenize(tokenizers)(captions)
        assert ids.dtype == torch.int64
        for index, tokenizer in enumerate(tokenizers):
            alone = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            assert torch.equal(ids[:, index], alone.input_ids)

    @pytest.mark.parametrize("length", [0, 1, 75, 76, 150, 225, 226, 400])
    def test_chunks_against_pieces_cut_by_hand(self, tmp_path, length):
        tokenizers, caption = self.tokenizers(tmp_path), " ".join((LETTERS * 20)[:length])
        ids = pickle.loads(pickle.dumps(Tokenize(tokenizers, 3)))([SHORT, caption])
        assert ids.shape == (2, 2, 3 * 77)
        for index, pad in enumerate((513, tokenizers[1].convert_tokens_to_ids("!"))):
            tokens = tokenizers[index].convert_tokens_to_ids([f"{letter}</w>" for letter in caption.split()])
            pieces = [tokens[start : start + 75] for start in (0, 75, 150)]
            expected = [[512, *piece, 513] + [pad] * (75 - len(piece)) for piece in pieces]
            assert ids[1, index].view(3, 77).tolist() == expected

    def test_tokens_are_counted_uncut_and_quietly(self, tmp_path, caplog):
        tokenize = Tokenize(self.tokenizers(tmp_path), 2)
        assert tokenize.num_tokens(["", "a b", LONG, "a" * 300]).tolist() == [0, 2, 100, 300]
        assert tokenize.num_tokens([]).tolist() == []
        assert tokenize.max_tokens == 150
        assert not caplog.records

    def test_many_captions_are_counted_piece_by_piece(self, tmp_path, monkeypatch):
        monkeypatch.setattr("utils.models.text_to_image.CAPTIONS_AT_ONCE", 3)
        captions = [LETTERS[:length] for length in range(11)]
        assert np.array_equal(Tokenize(self.tokenizers(tmp_path)).num_tokens(captions), np.arange(11))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
class TestStates:
    def test_a_short_caption_is_seen_as_in_one_chunk(self, pipelines, name):
        one, three = family(pipelines, name), family(pipelines, name, max_token_length=225)
        expected = predict(one, SHORT, "", LONG)
        alone, among = predict(three, SHORT, "", SHORT), predict(three, SHORT, "", LONG)
        torch.testing.assert_close(alone[:2], expected[:2], rtol=0, atol=1e-5)
        torch.testing.assert_close(among[:2], expected[:2], rtol=0, atol=1e-5)
        assert (among[2] - expected[2]).abs().max() > 1e-4

    def test_the_mask_is_of_what_a_caption_fills(self, pipelines, name):
        states = encode(family(pipelines, name, max_token_length=225), SHORT, "", "b" * 75, LONG, "c" * 500)
        lengths = torch.tensor([1, 1, 1, 2, 3]) * 77
        assert torch.equal(states["encoder_attention_mask"], torch.arange(231) < lengths[:, None])
        assert "encoder_attention_mask" not in encode(family(pipelines, name), LONG)

    def test_what_stands_late_in_a_caption_matters(self, pipelines, name):
        one, two = family(pipelines, name), family(pipelines, name, max_token_length=150)
        assert torch.equal(predict(one, LONG), predict(one, ALTERED))
        assert (predict(two, LONG) - predict(two, ALTERED)).abs().max() > 1e-5

    @pytest.mark.parametrize("clip_skip", [None, 1])
    def test_states_are_those_of_the_pieces_side_by_side(self, pipelines, name, clip_skip):
        states = encode(family(pipelines, name, max_token_length=150, clip_skip=clip_skip), LONG)
        by_hand = [by_encoders(family(pipelines, name).pipeline, piece, clip_skip or 0) for piece in PIECES]
        hidden = torch.cat([hidden for hidden, _ in by_hand], dim=1)
        torch.testing.assert_close(states["encoder_hidden_states"], hidden, rtol=0, atol=1e-5)
        if name == "sdxl":
            torch.testing.assert_close(states["text_embeds"], by_hand[0][1], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("clip_skip", [None, 1])
    def test_a_dropped_caption_is_that_of_one_chunk(self, pipelines, name, clip_skip):
        one = encode(family(pipelines, name, clip_skip=clip_skip), "")
        two = encode(family(pipelines, name, max_token_length=150, clip_skip=clip_skip), LONG, "")
        torch.testing.assert_close(two["encoder_hidden_states"][1:, :77], one["encoder_hidden_states"])
        assert two["encoder_attention_mask"].sum(dim=1).tolist() == [154, 77]
        if name == "sdxl":
            assert not any(two[key][1].any() for key in ("encoder_hidden_states", "text_embeds"))

    @pytest.mark.parametrize("clip_skip", [None, 1])
    def test_gradients_reach_every_text_weight_from_every_chunk(self, pipelines, name, clip_skip):
        made = family(pipelines, name, max_token_length=225, clip_skip=clip_skip)
        for index, encoder in enumerate(made.text_encoders):
            for key, parameter in encoder.named_parameters():
                parameter.requires_grad_(made.reads_text_parameter(index, key))
        states = encode(made, SHORT, "", ALTERED)
        noisy, times = torch.randn(3, 4, 16, 16), torch.tensor([500] * 3)
        conditioning = Conditioning(states, torch.full((3, 6), 32.0))
        made.predict(made.denoiser, noisy, times, conditioning).square().sum().backward()
        late = made.tokenizers[0].convert_tokens_to_ids("?</w>")
        for encoder in made.text_encoders:
            unused = [key for key, weight in encoder.named_parameters() if weight.requires_grad and weight.grad is None]
            assert not unused
            assert encoder.get_input_embeddings().weight.grad[late].any()

    def test_prompts_have_the_chunks_that_they_need(self, pipelines, name):
        one, three = family(pipelines, name), family(pipelines, name, max_token_length=225)
        for negative in (None, "", "blue"):
            short, same = one.prompt_arguments(SHORT, negative), three.prompt_arguments(SHORT, negative)
            assert short.keys() == same.keys()
            assert all(torch.equal(short[key], same[key]) for key in short)
        for prompt, negative in ((LONG, None), (LONG, SHORT), (SHORT, LONG)):
            arguments = three.prompt_arguments(prompt, negative)
            embeds, others = arguments["prompt_embeds"], arguments["negative_prompt_embeds"]
            assert embeds.shape == others.shape == (1, 154, 48 if name == "sdxl" else 32)
            torch.testing.assert_close(embeds, encode(three, prompt)["encoder_hidden_states"][:, :154])
            torch.testing.assert_close(others, encode(three, negative or "")["encoder_hidden_states"][:, :154])


class TestOption:
    @pytest.mark.parametrize(
        ("value", "cure"),
        [(100, "try 75 or 150"), (77, "try 75 or 150"), (74, "try 75"), (0, "try 75"), (-75, "try 75")],
    )
    def test_other_numbers_are_refused(self, value, cure):
        with pytest.raises(UserError, match=f"--max_token_length must be a .* of 75, got {value}; {cure}$"):
            ModelOptions(pretrained_model_name_or_path="a", max_token_length=value)

    def test_xformers_is_refused(self):
        options = {"max_token_length": 150, "enable_xformers_memory_efficient_attention": True}
        with pytest.raises(UserError, match=r"--enable_xformers.* --max_token_length 150"):
            ModelOptions(pretrained_model_name_or_path="a", **options)


@pytest.fixture
def described(tmp_path):
    """An imagefolder of four images, two of which are described at length."""
    folder = tiny.make_images(tmp_path / "described", 4)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines[:2]:
        line["text"] += f" {LONG}"
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_training(train, described, name, adaptation):
    flags = ["--adaptation", adaptation, "--train_text_encoder", "--max_train_steps", 2, "--train_batch_size", 2]
    flags += ["--learning_rate", 1e-3, "--validation_prompt", LONG, "--num_validation_images", 1, "--seed", 1]
    flags += ["--validation_num_inference_steps", 2, "--caption_dropout", 0.2]
    short = train(name, *flags, data=described, out="short")
    long = train(name, *flags, "--max_token_length", 150, data=described, out="long")
    assert len(losses(long)) == 2
    assert losses(long)[0] != losses(short)[0]
    drawn = [np.asarray(Image.open(next((out / "samples" / "final").glob("*.png")))) for out in (short, long)]
    assert not np.array_equal(*drawn)


def test_training_of_the_unet_alone(train, described):
    flags = ["--max_train_steps", 2, "--train_batch_size", 4, "--max_token_length", 150]
    out = train("sd", *flags, "--gradient_checkpointing", data=described, out="checkpointing")
    other = train("sd", *flags, data=described, out="plain")
    for key, value in weights(out).items():
        torch.testing.assert_close(value, weights(other)[key], rtol=1e-4, atol=1e-6)
