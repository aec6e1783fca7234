"""Reads the UIs' names of layers without the base model: dots in the place of the right underscores."""

import re

WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "conv_in", "conv_out", "conv_shortcut"),
    *("time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2", "proj_in", "proj_out"),
    *("to_q", "to_k", "to_v", "to_out", "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("text_projection", "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers"),
    *("skip_connection", "time_embed", "label_emb"),
)
"""The parts of layers' names in UNets and CLIP text encoders, of both layouts, that have underscores themselves."""
_WORD = re.compile("|".join(sorted(WORDS, key=len, reverse=True)) + r"|[A-Za-z0-9]+")


def dotted(flat: str) -> str | None:
    """Returns a layer's name for one with underscores only; None if it does not consist of known words."""
    found, place = [], 0
    while place < len(flat):
        match = _WORD.match(flat, place)
        if match is None or (match.end() < len(flat) and flat[match.end()] != "_"):
            return None
        found.append(match.group())
        place = match.end() + 1
    return ".".join(found) or None
