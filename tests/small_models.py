"""Small random models of many architectures, and documents to try them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from understudy.contracts import IGNORED, Batch
from understudy.devices.cpu import CPU
from understudy.models.build import make_language_model, open_weights
from understudy.models.decoding import Decoding
from understudy.models.language_model import LanguageModel
from understudy.recipe.schema import Model

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large weights, so that what attention does shows in the logits.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
WITHOUT_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "llama-tied": SIZES | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": SIZES,
    "qwen2-windowed": SIZES
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": SIZES | {"head_dim": 8},
    "mistral": SIZES | {"sliding_window": 6},
    "phi3": SIZES | {"sliding_window": 6},
    "gemma2": SIZES | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 20},
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 5.0},
    "gpt2": GPT2_SIZES,
    "olmo": SIZES,
    "olmo2": SIZES,
    "smollm3": SIZES,
    "gpt_neox": {name: value for name, value in SIZES.items() if name != "num_key_value_heads"},
    "cohere": SIZES | {"logit_scale": 0.25},
    "granite": SIZES | {"logits_scaling": 3.0, "attention_multiplier": 0.2},
    "starcoder2": SIZES | WITHOUT_DROPOUT | {"sliding_window": 6},
    "gpt_oss": SIZES | {"head_dim": 8, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
    "apertus": SIZES,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "init_std": 0.2,
    },
}
LENGTHS = (9, 1, 17, 4)
"""Longer and shorter than the windows above, and one document too short to supervise anything."""


def recipe(name: str, config: dict[str, Any]) -> Model:
    return Model(init="random", config={"model_type": name, **config})


def load(directory: Path, model: Model) -> LanguageModel:
    """A `LanguageModel` with its weights, without a strategy."""
    built = make_language_model(directory, model, CPU())
    read = open_weights(directory, built)
    values = {
        id(parameter): nn.Parameter(read(name)[:].clone()) for name, parameter in built.network.named_parameters()
    }
    for module in built.network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = values[id(parameter)]
    return built


def documents() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    result = []
    for length in LENGTHS:
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        labels = torch.cat([tokens[1:], torch.tensor([IGNORED])])
        labels[: length // 3] = IGNORED
        result.append((tokens, labels))
    return result


def assert_decodes_as_it_reads(model: LanguageModel) -> None:
    """Fed one token after another, `model` says of each next one what it says of it in whole texts."""
    lengths, new = (9, 1, 4), 5
    model.eval()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, len(model.head.weight), (length + new,), generator=generator) for length in lengths]
    decoding = Decoding([text[:-new] for text in texts])
    with torch.no_grad():
        whole = Batch.of([(text, torch.full_like(text, IGNORED)) for text in texts])
        read = model(whole, logits_at=torch.arange(len(whole.tokens))).split([len(text) for text in texts])
        for step in range(new):
            expected = torch.stack([rows[length - 1 + step] for rows, length in zip(read, lengths)])
            torch.testing.assert_close(model(None, texts=decoding), expected, rtol=1e-4, atol=1e-4)
            tokens = torch.stack([text[length + step] for text, length in zip(texts, lengths)])
            decoding.feed(tokens, torch.ones(len(texts), dtype=torch.bool))
