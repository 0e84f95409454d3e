"""Going on with texts token by token gives the logits that the whole texts would."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_models import CONFIGS, assert_decodes_as_it_reads, load, recipe
from understudy.models.initialization import materialize_random

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_decodes_as_it_reads(name: str, tmp_path: Path) -> None:
    model = recipe(name.partition("-")[0], CONFIGS[name])
    assert_decodes_as_it_reads(load(materialize_random(model, 3, tmp_path), model))
