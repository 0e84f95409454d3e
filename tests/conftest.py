"""What all tests share."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build"


def pytest_configure() -> None:
    """Tests have caches of their own, and would each compile DeepSpeed's operators again, a minute each."""
    try:
        release = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(BUILD / "extensions" / f"deepspeed-{release}-{python}"))
