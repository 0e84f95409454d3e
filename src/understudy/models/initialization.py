"""Random weights as a model directory, made once, so that every strategy starts from the same files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers import __version__ as transformers_version

from understudy.models.architecture import UNBUILDABLE, invalid_config, make_config
from understudy.models.made_once import made_once
from understudy.models.source import stored_config
from understudy.recipe import schema

__all__ = ["materialize_random"]


def materialize_random(model: schema.Model, seed: int, cache: Path) -> Path:
    """A model directory with random fp32 weights for `model` with `init: random`, drawn under `seed`.

    The architecture is `model.config`, over the config.json of `model.path` where one is given. The directory lies in
    `cache` under a digest of all that decides its contents; one process builds it, others wait, and it appears whole.
    Raises `UserError` for a configuration that describes no model. Needs the model's size in host memory.
    """
    config = make_config(stored_config(model), model.config)
    described = [config.to_dict(), seed, torch.__version__, transformers_version]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    directory = cache / "models" / digest[:32]
    return made_once(directory, lambda building: _build(config, model.config, seed, building))


def _build(config: PreTrainedConfig, overrides: Mapping[str, Any], seed: int, directory: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except UNBUILDABLE as error:
            raise invalid_config(config.model_type, overrides, error) from error
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    shared = {name for name, _ in network.named_parameters(remove_duplicate=False)} - dict(
        network.named_parameters()
    ).keys()
    save_file(
        {name: tensors[name] for name in tensors.keys() - shared}, directory / "model.safetensors", {"format": "pt"}
    )
    network.config.save_pretrained(directory)
    if network.can_generate():
        network.generation_config.save_pretrained(directory)
