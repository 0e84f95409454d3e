"""What one would write without Understudy: a transformers model, its own loss, AdamW, a loop.

`python -m benchmarks.bare_loop JSON` trains on the batches of a file and prints step times and the peak of memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.process import fresh_peak, peak_bytes

Example = tuple[list[int], list[int]]
"""Token ids, and a label for each: the id itself, or −100 where it is not supervised."""


def train(model_directory: Path, steps: list[list[Example]], learning_rate: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    seconds, losses = [], []
    fresh_peak()
    for examples in steps:
        began = time.perf_counter()
        loss = model(**padded(examples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return {"step_seconds": seconds, "losses": losses, "memory_peak_bytes": peak_bytes()}


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A rectangle as wide as the longest example; no mask where there is nothing to hide."""
    longest = max(len(tokens) for tokens, _ in examples)
    tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in examples])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in examples])
    if all(len(tokens) == longest for tokens, _ in examples):
        return {"input_ids": tokens, "labels": labels}
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens, _ in examples])
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def main() -> None:
    settings = json.loads(sys.argv[1])
    steps = json.loads(Path(settings["batches"]).read_text())
    print(json.dumps(train(Path(settings["model"]), steps, settings["learning_rate"])))


if __name__ == "__main__":
    main()
