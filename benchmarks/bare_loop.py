"""What one would write without Understudy: a transformers model, its own loss, AdamW, a loop.

`python -m benchmarks.bare_loop JSON` trains on the batches of a file and prints step times and the peak of memory. The
settings are `model`, a directory; `batches`, the file; `learning_rate`; `precision`, fp32 or bf16; and `adapter`: null
trains the whole model, a mapping has peft put LoRA with these settings around it, on a base in NF4 where `quantized`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.process import fresh_peak, peak_bytes

__all__ = ["Example", "make_model", "train"]

Example = tuple[list[int], list[int]]
"""Token ids, and a label for each: the id itself, or −100 where it is not supervised."""


def make_model(
    directory: Path, *, precision: str, adapter: Mapping[str, Any] | None = None, quantized: bool = False
) -> nn.Module:
    """The model of `directory`, all of it trained, or an adapter in fp32 around a base that is held in `precision`."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if adapter is None:
        # Master weights are fp32, whatever computes.
        whole: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return whole
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **(_nf4(dtype) if quantized else {}))
    adapted: nn.Module = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **adapter))
    return adapted


def train(model: nn.Module, steps: Sequence[Sequence[Example]], learning_rate: float, precision: str) -> dict[str, Any]:
    """Trains what of `model` requires gradients. In bf16 autocast computes, as under `Trainer`; that is faster than to
    have peft compute its fp32 matrices in fp32."""
    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    seconds, losses = [], []
    fresh_peak()
    for examples in steps:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**padded(examples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return {"step_seconds": seconds, "losses": losses, "memory_peak_bytes": peak_bytes()}


def padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A rectangle as wide as the longest example; no mask where there is nothing to hide."""
    longest = max(len(tokens) for tokens, _ in examples)
    tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in examples])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in examples])
    if all(len(tokens) == longest for tokens, _ in examples):
        return {"input_ids": tokens, "labels": labels}
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in examples])
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def _nf4(dtype: torch.dtype) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": "cpu"}


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.manual_seed(0)
    precision = settings["precision"]
    model = make_model(
        Path(settings["model"]), precision=precision, adapter=settings["adapter"], quantized=settings["quantized"]
    )
    steps = json.loads(Path(settings["batches"]).read_text())
    print(json.dumps(train(model, steps, settings["learning_rate"], precision)))


if __name__ == "__main__":
    main()
