"""What all tests share."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

BUILD = Path(__file__).resolve().parents[1] / "build"


def pytest_configure() -> None:
    """One thread a process: two tests run at once, and threads of both on the same cores would wait for each other.

    Tests have caches of their own, and would each compile DeepSpeed's operators again, a minute each.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        release = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(BUILD / "extensions" / f"deepspeed-{release}-{python}"))
