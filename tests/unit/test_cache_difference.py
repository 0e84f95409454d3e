"""What a build says of the likeliest tokens is what the student's first steps will see of the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.scenario import VOCABULARY, write_model
from tests.small_models import load
from understudy.contracts import IGNORED, Batch
from understudy.objectives.teachers.cache_contents import TopK
from understudy.recipe.objectives import Distillation
from understudy.recipe.schema import Model
from understudy.training.cache_difference import measure_difference

pytestmark = pytest.mark.unit

K, TEMPERATURE = 5, 1.5


def log_probs(directory: Path, tokens: torch.Tensor, at: list[int]) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(directory).double()
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=tokens[None]).logits[0, at] / TEMPERATURE, dim=1)


def test_it_is_the_divergence_of_both_and_its_largest_difference(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("teacher", "student")]
    for seed, place in enumerate(places):
        write_model(place, tied=False, seed=seed)
    generator = torch.Generator().manual_seed(0)
    batches, exact, cached, gaps, count = [], 0.0, 0.0, [], 0
    for length in (7, 12, 5):
        tokens = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = torch.cat([tokens[1:], torch.tensor([IGNORED])])
        labels[:2] = IGNORED
        batches.append(Batch.of([(tokens, labels)]))
        at = list(range(2, length - 1))
        p, q = (log_probs(place, tokens, at) for place in places)
        whole = (p.exp() * (p - q)).sum()
        kept, ids = p.topk(K, dim=1)
        pairs = zip((kept, q.gather(1, ids)), (p, q))
        few = [torch.cat([top, x.scatter(1, ids, -torch.inf).logsumexp(1, True)], dim=1) for top, x in pairs]
        less = (few[0].exp() * (few[0] - few[1])).sum()
        exact, cached, count = exact + float(whole), cached + float(less), count + len(at)
        gaps.append(float(whole - less) / len(at))
    objective = Distillation.model_validate({"teacher": {"kind": "cache", "path": "t"}, "temperature": TEMPERATURE})
    teacher, student = (load(place, Model(path=str(place))).eval() for place in places)
    found = measure_difference(objective, student, teacher, TopK(K, TEMPERATURE, VOCABULARY), batches)
    assert found.examples == 3
    assert found.exact == pytest.approx(exact / count, rel=1e-4)
    assert found.cached == pytest.approx(cached / count, rel=1e-4)
    assert found.largest == pytest.approx(max(gaps), rel=1e-3)
    assert found.largest > 0.01
