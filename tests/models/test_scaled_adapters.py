"""Adapters and their scales as a command line names them."""

import pytest

from utils.config.options import UserError
from utils.models.scaled_adapters import ScaledAdapter, number_text, parse_adapter, parse_adapters


@pytest.mark.parametrize(
    ("word", "source", "scale"),
    [
        ("a", "a", 1.0),
        ("a=0.8", "a", 0.8),
        ("/x/a=b", "/x/a=b", 1.0),
        ("/x/a=b=0.5", "/x/a=b", 0.5),
        ("/x/a=1/b", "/x/a=1/b", 1.0),
        ("/x/v=2.safetensors", "/x/v=2.safetensors", 1.0),
        (r"C:\x=0.5", r"C:\x", 0.5),
        ("user/name=1e-1", "user/name", 0.1),
        ("a=-.5", "a", -0.5),
        ("a=+2.", "a", 2.0),
        ("a=0", "a", 0.0),
        ("a=1_0", "a=1_0", 1.0),
        ("a=0x1", "a=0x1", 1.0),
        ("a= 1", "a= 1", 1.0),
    ],
)
def test_what_follows_the_last_sign_is_a_scale_only_if_it_is_a_number(word, source, scale):
    assert parse_adapter("lora", word) == ScaledAdapter(source, scale)


def test_a_word_that_exists_as_it_stands_is_a_path(tmp_path):
    whole = tmp_path / "run=2"
    whole.mkdir()
    assert parse_adapter("lora", str(whole)) == ScaledAdapter(str(whole), 1.0)
    assert parse_adapter("lora", f"{whole}=0.5") == ScaledAdapter(str(whole), 0.5)
    (tmp_path / "run").mkdir()
    assert parse_adapter("lora", str(whole)) == ScaledAdapter(str(tmp_path / "run"), 2.0)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("a=nan", "--lora a=nan: the scale must be a finite number"),
        ("a=-INF", "must be a finite number"),
        ("a=1e999", "must be a finite number"),
        ("=0.5", "names no LoRA; write --lora NAME=0.5"),
        ("a=0,8", "write a=0.8"),
        ("a=", "what follows = is not a number; write a=0.8, or a alone"),
    ],
)
def test_what_is_no_scale_or_no_adapter_is_refused(word, said):
    with pytest.raises(UserError) as raised:
        parse_adapter("lora", word)
    assert said in str(raised.value)


def test_an_adapter_that_is_named_twice_is_refused(tmp_path):
    """By its folder and by the file in it, and through a link."""
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "pytorch_lora_weights.safetensors"
    file.write_bytes(b"")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for words in (
        [f"{tmp_path}/a=0.5", f"{file}=0.3"],
        [f"{tmp_path}/a=0.5", f"{tmp_path}/b=0.3"],
        ["u/n=.5", "u/n=.3"],
    ):
        with pytest.raises(UserError, match=r"twice.*=0\.8 for the sum"):
            parse_adapters("lora", words)
    assert len(parse_adapters("lora", [f"{tmp_path}/a", "u/n"])) == 2
    assert parse_adapters("lora", None) == ()


def test_numbers_are_short_and_exact():
    assert [number_text(value) for value in (0.0, -0.0, 1.0, 0.5, -2.0, 1e-7)] == ["0", "0", "1", "0.5", "-2", "1e-07"]
    assert all(float(number_text(value)) == value for value in (0.1 + 0.2, 1e22, 123456.789))


def test_the_names_of_adapters_are_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ScaledAdapter(".", 0.5).label == f"{tmp_path.name}=0.5"
    assert ScaledAdapter("user/name").label == "user/name=1"
