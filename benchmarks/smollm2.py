"""The model that is measured: SmolLM2-135M-Instruct as a Hugging Face directory."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.process import ROOT, run

__all__ = ["require_model"]

TOOL = Path("../shared/tools/get_smollm2.py")


def require_model(directory: Path) -> None:
    """Makes sure that the model is in `directory`. Ends the program, saying how to get it, where it cannot."""
    if (directory / "model.safetensors").is_file():
        return
    if not (ROOT / TOOL).is_file():
        sys.exit(
            f"{directory} holds no model. Put HuggingFaceTB/SmolLM2-135M-Instruct there "
            f"(hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir {directory}), or name it with --model."
        )
    print(f"getting SmolLM2-135M-Instruct: python {TOOL} {directory}", flush=True)
    run([sys.executable, str(TOOL), str(directory)])
