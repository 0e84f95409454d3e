"""A tiny random base and adapters around it, as peft itself saves them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.small_run import write_tokenizer
from tests.small_models import SIZES
from understudy.models.adapters.directory import BaseReference, write_base
from understudy.models.identity import model_digest

VOCABULARY = 16
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=LINEAR),
    "rslora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"]),
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, use_dora=True, target_modules=LINEAR),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": peft.VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "up_proj"], save_projection=False),
    "vera-stored": peft.VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj"], save_projection=True),
    "whole": peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "llama_adapter": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
    "prompt_tuning": peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=SIZES["hidden_size"], num_transformer_submodules=1
    ),
}


def write_model(directory: Path, model_type: str = "llama", **config: Any) -> Path:
    """A random model, with a tokenizer."""
    torch.manual_seed(1)
    sizes = {**SIZES, "vocab_size": VOCABULARY, **config}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # which begin as zeros
            torch.nn.init.normal_(parameter)
    network.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_adapter(
    directory: Path, base: Path, config: peft.PeftConfig, *, seed: int = 2, tokens: int | None = None
) -> Path:
    """An adapter with large random values, that has grown the vocabulary to `tokens`; peft's own files only."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tokens is not None:
            network.resize_token_embeddings(tokens, mean_resizing=False)
        adapted = peft.get_peft_model(network, type(config)(**config.to_dict()))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                # A magnitude or a factor stays near what it was, so that nothing explodes.
                torch.nn.init.normal_(parameter, std=0.2, mean=1.0 if "ia3" in name else 0.0)
                if "magnitude" in name:
                    parameter.data.abs_().add_(0.5)
        adapted.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


def write_trained(directory: Path, base: Path, cache: Path, **reference: Any) -> Path:
    """Makes of peft's adapter in `directory` one that training here left."""
    values = {"revision": None, "quantization": None, "path": str(base), "digest": model_digest(base, cache)}
    write_base(directory, BaseReference(**{**values, **reference}))
    write_tokenizer(directory)
    return directory


def peft_network(base: Path, adapter: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Base and adapter as peft alone loads them."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(network, str(adapter)).to(dtype).eval()
