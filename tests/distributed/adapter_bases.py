"""A small base, the same in 4 bits, adapters of both, and how peft trains them in fp64 in one process."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.distributed import scenario
from understudy.models.adapters.directory import WEIGHTS
from understudy.models.quantization.linear import QuantizedLinear
from understudy.models.quantization.materialize import materialize_quantized
from understudy.recipe.schema import Quantization, Recipe
from understudy.training.adapting import adapted_model, find_adapter

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8, "train": ["embeddings"]},
    "dora": {"kind": "dora", "rank": 4, "alpha": 8, "rank_stabilized": True, "targets": ["q_proj", "down_proj"]},
    "pissa": {"kind": "lora", "rank": 4, "alpha": 4, "init": "pissa"},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 8},
    "llama_adapter": {"kind": "llama_adapter", "tokens": 3, "adapted_layers": 1},
    "prompt_tuning": {"kind": "prompt_tuning", "tokens": 3},
}
FREEZE = {"kind": "freeze", "last_layers": 1, "parameters": ["^model.norm"]}
TRAINED_BY_FREEZE = re.compile(r"^model\.(layers\.1|norm)\.")
NF4 = Quantization()


class Bases:
    """A tied model, the same in 4 bits, what that dequantizes to, and adapters of both that are not at their zeros."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.whole = root / "whole"
        scenario.write_model(self.whole, tied=True)
        self.quantized = materialize_quantized(
            self.whole, NF4, identity="test", cache=root / "cache", report=lambda line: None
        )
        self.dequantized = root / "dequantized"
        self._write_dequantized()

    def directory(self, *, quantized: bool) -> Path:
        return self.quantized if quantized else self.whole

    @cache  # noqa: B019  # one a module
    def adapter(self, kind: str, *, quantized: bool) -> Path:
        recipe = self._recipe(ADAPTERS[kind])
        directory = find_adapter(recipe, self.directory(quantized=quantized), self.whole)
        assert directory is not None
        values = load_file(directory / WEIGHTS)
        generator = torch.Generator().manual_seed(3)
        # At its first values an adapter adds nothing, and half of its gradients are zero.
        moved = {
            key: value if kind == "pissa" else value + 0.1 * torch.randn(value.shape, generator=generator)
            for key, value in sorted(values.items())
        }
        embeddings = [key for key in moved if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
        moved |= {key: values[key] for key in embeddings}  # tied: both are one
        made = self.root / f"{kind}-{quantized}"
        made.mkdir()
        for file in directory.iterdir():
            (made / file.name).write_bytes(file.read_bytes())
        save_file(moved, made / WEIGHTS, {"format": "pt"})
        return made

    @cache  # noqa: B019
    def solution(self, kind: str, *, quantized: bool) -> scenario.Solution:
        plain = self.dequantized if quantized else self.whole
        settings: dict[str, Any] = {
            "steps": 4,
            "learning_rate": 1e-2,
            "max_norm": 0.5,
            "optimizer": "adamw",
            "decay": 0.1,
        }
        if kind == "freeze":
            return scenario.solve(plain, trained=TRAINED_BY_FREEZE, **settings)
        if kind == "pissa":
            return self._residual_solution(settings)
        return scenario.solve(plain, adapter=self.adapter(kind, quantized=quantized), **settings)

    def _residual_solution(self, settings: dict[str, Any]) -> scenario.Solution:
        """peft on a base that really lacks what the adapter began with."""
        adapter = self.adapter("pissa", quantized=False)
        rank, values = 4, load_file(adapter / WEIGHTS)
        base, plain = self.root / "residual", self.root / "pissa-trained"
        model = AutoModelForCausalLM.from_pretrained(self.whole)
        trained = {}
        for key, value in values.items():
            trained[key] = (value[:rank] if "lora_A" in key else value[:, :rank]).contiguous()
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").replace("lora_A.", "")
                first, up = value[rank:], values[key.replace("lora_A", "lora_B")][:, rank:]
                model.get_parameter(name).data += up @ first  # alpha / rank is 1, and the sign is in the file
        model.save_pretrained(base)
        plain.mkdir()
        for file in adapter.iterdir():
            (plain / file.name).write_text(file.read_text()) if file.suffix == ".json" else None
        configuration = plain / "adapter_config.json"
        halved = configuration.read_text().replace('"r": 8', '"r": 4').replace('"lora_alpha": 8', '"lora_alpha": 4')
        configuration.write_text(halved)
        save_file(trained, plain / WEIGHTS, {"format": "pt"})
        return scenario.solve(base, adapter=plain, **settings)

    def _recipe(self, adapter: dict[str, Any] | None) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "adapters",
                "output_dir": "unused",
                "model": {"path": str(self.whole)},
                "data": {"train": [{"path": "unused"}]},
                "training": {"precision": "fp32"},
                "adapter": adapter,
            }
        )

    def _write_dequantized(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.whole)
        opened = adapted_model(self._recipe(None), self.quantized, None)
        for name, module in opened.model.network.named_modules():
            if isinstance(module, QuantizedLinear):
                values = opened.read(f"{name}.weight")[:]
                model.get_parameter(f"{name}.weight").data.copy_(module.codec.dequantize(values))
        model.save_pretrained(self.dequantized)
