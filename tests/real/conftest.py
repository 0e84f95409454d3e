"""SmolLM2-135M-Instruct and Alpaca data, where they can be had; what needs them is skipped elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "smollm2-alpaca.yaml"
MODEL = ROOT / "build" / "smollm2"
TOOL = ROOT.parent / "shared" / "tools" / "get_smollm2.py"
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model's directory, fetched once for all sessions."""
    if not (MODEL / "model.safetensors").is_file() or not (MODEL / "tokenizer.json").is_file():
        if not TOOL.is_file():
            pytest.skip(f"neither {MODEL} nor {TOOL}, which fetches it, is here")
        subprocess.run([sys.executable, TOOL, MODEL], check=True)
    return MODEL


@pytest.fixture(scope="session")
def small_run(smollm2: Path) -> list[str]:
    """Overrides that make the shipped recipe a run of seconds on a processor: short examples, few of them, few steps.

    The same 8 examples or so are evaluated each time.
    """
    if not ALPACA.is_file():
        pytest.skip(f"{ALPACA} is not here")
    return [
        f"model.path={smollm2}",
        f"data.train.0.path={ALPACA}",
        "data.train.0.max_samples=80",
        "data.eval_fraction=0.1",
        "data.max_length=64",
        "data.num_workers=1",
        "optimizer.learning_rate=1.5e-4",
        "training.max_steps=3",
        "training.global_batch_size=8",
        "evaluation.samples=0",
        "cluster.processes=2",
    ]


@pytest.fixture(scope="session")
def token_caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where prepared data is kept."""
    return tmp_path_factory.mktemp("caches")
