"""What stands beside the weights of a saved model: configuration, generation defaults, tokenizer, chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

__all__ = ["generation_config", "write_companions"]


def generation_config(model_directory: Path, config: PreTrainedConfig) -> GenerationConfig:
    """The model's generation defaults: its own file's, else what its configuration implies."""
    if (model_directory / "generation_config.json").is_file():
        defaults: GenerationConfig = GenerationConfig.from_pretrained(model_directory)
        return defaults
    return GenerationConfig.from_model_config(config)


def write_companions(
    directory: Path,
    *,
    model_directory: Path,
    config: PreTrainedConfig,
    architecture: str,
    dtype: torch.dtype,
    tokenizer: Any,
) -> None:
    """Writes all of it into `directory`. `architecture` is the transformers class that loads the weights, `tokenizer`
    the one that training used, with its chat template."""
    config.architectures = [architecture]
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(directory)
    generation_config(model_directory, config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if getattr(config, "auto_map", None):  # a model that ships its own code does not load without it
        for source in model_directory.glob("*.py"):
            shutil.copy(source, directory / source.name)
