"""An SD 1.x with two UNet levels of one layer: every kind of block, and a tenth of the tiny model's operators.

The pre-flight's tests go through its whole run on tensors without values, whose cost is the number of operators alone. Most
tests of training use it with weights; its tokenizer has a tenth of CLIP's vocabulary, whose reading and saving were half of
a short run.
"""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "denoiser": {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "sample_size": 8,
    },
    "vae": {
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    "text_encoders": [
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "projection_dim": 32,
            "vocab_size": 49408,
        }
    ],
}


def small_architecture() -> Any:
    """Its configs, for `estimate_memory(architecture=...)`."""
    from everydream_kit.preflight.skeleton import shipped_architecture

    return shipped_architecture("sd1", **SMALL)


NUM_MERGES = 4600
"""Of CLIP's vocabulary, the most frequent ones: common words are one token as ever."""


def small_model() -> Any:
    """It with seeded random weights, a text encoder of three layers, and a vocabulary of about 5,000 tokens."""
    from everydream_kit.models.random_models import build_model
    from everydream_kit.models.tokenizer import END, START, Vocabulary, build_tokenizer, clip_merges, clip_vocabulary

    merges = clip_merges()[:NUM_MERGES]
    tokens = [*list(clip_vocabulary())[: 512 + NUM_MERGES], START, END]
    text_encoder = {**SMALL["text_encoders"][0], "num_hidden_layers": 3, "vocab_size": len(tokens)}
    text_encoder |= {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    model = build_model("sd1", **{**SMALL, "text_encoders": [text_encoder]})
    numbered = {token: index for index, token in enumerate(tokens)}
    model.tokenizers[:] = [build_tokenizer(vocabulary=Vocabulary(numbered, [" ".join(pair) for pair in merges]))]
    return model
