"""Going on with texts token by token gives the logits that the whole texts would."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.small_models import CONFIGS, VOCABULARY, assert_decodes_as_it_reads, load, recipe
from understudy.models.initialization import materialize_random
from understudy.training.generation import generate

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_decodes_as_it_reads(name: str, tmp_path: Path) -> None:
    model = recipe(name.partition("-")[0], CONFIGS[name])
    assert_decodes_as_it_reads(load(materialize_random(model, 3, tmp_path), model))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_text_that_has_ended_takes_up_no_more_positions_while_others_go_on(name: str, tmp_path: Path) -> None:
    """Each text fills the positions that there are, which are learned one by one."""
    longest = CONFIGS[name].get("n_positions") or CONFIGS[name]["max_position_embeddings"]
    described = recipe(name, CONFIGS[name])
    model = load(materialize_random(described, 3, tmp_path), described).eval()

    @torch.no_grad()
    def decode(texts: Any) -> torch.Tensor:
        logits: torch.Tensor = model(None, texts=texts)
        return logits

    prompts = [torch.arange(length) % VOCABULARY for length in (2, longest - 3)]
    strategy: Any = SimpleNamespace(decode=decode)

    def answers(members: list[torch.Tensor], micro_batch_tokens: int) -> list[list[int]]:
        room = [longest - len(prompt) for prompt in members]
        return generate(
            strategy,
            members,
            room,
            stops=frozenset(),
            micro_batch_tokens=micro_batch_tokens,
            rank=0,
            world_size=1,
        )

    together = answers(prompts, 10 * longest)
    assert [len(answer) for answer in together] == [longest - 2, 3]
    assert together == answers(prompts, 1), "each in a batch of its own"
