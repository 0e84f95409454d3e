"""What stands beside the weights of a model that is exported: configuration, tokenizer, licence …"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["copy_files", "other_files", "set_dtype"]

DTYPE_KEYS = ("dtype", "torch_dtype")
"""Under which config.json tells the dtype of the weights; the second until transformers 4.56."""
WEIGHTS = (".safetensors", ".safetensors.index.json")
NEVER_COPIED = (
    *(".bin", ".ckpt", ".dill", ".joblib", ".mar", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"),  # pickles
    *(".gguf", ".h5", ".index.json", ".msgpack", ".onnx", ".onnx_data", ".safetensors"),  # other weights
)


def other_files(directory: Path, stem: str, report: Callable[[str], None]) -> Iterator[Path]:
    """What to copy from `directory`, whose weights are in files with names that begin with `stem`. Hidden files are
    passed over; `report` is told of pickles and other weights, which are left out."""
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or "__pycache__" in name.parts:
            continue
        if not path.name.endswith(NEVER_COPIED):
            yield path
        elif not (path.parent == directory and path.name.startswith(stem) and path.name.endswith(WEIGHTS)):
            report(f"left out: {path}")


def copy_files(directory: Path, files: Iterable[Path], out: Path) -> None:
    """Copies `files`, which are inside `directory`, to the same places inside `out`."""
    for file in files:
        target = out / file.relative_to(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Wherever `config` tells it, also of a model's parts (`text_config`)."""
    for key, value in config.items():
        if key in DTYPE_KEYS:
            config[key] = dtype
        elif key.endswith("_config") and isinstance(value, dict):
            set_dtype(value, dtype)
