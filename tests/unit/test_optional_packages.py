"""The package works without what only some runs need."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

OPTIONAL = ("deepspeed", "bitsandbytes", "flash_attn", "torch_npu", "accelerate", "peft")
IMPORT_EVERYTHING = f"""
import importlib, pkgutil, sys
for name in {OPTIONAL}:
    sys.modules[name] = None
import understudy
for module in pkgutil.walk_packages(understudy.__path__, "understudy."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_every_module_imports_without_optional_packages() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
