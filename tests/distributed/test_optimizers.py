"""Every optimizer over FSDP2's sharded parameters ends where it ends on one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.processes import run_processes

pytestmark = pytest.mark.distributed

CASES = {
    "adamw": ("adamw", "float32", False),
    "adamw, fused": ("adamw", "float32", True),
    "adamw_bf16": ("adamw_bf16", "bfloat16", False),
    "adamw_8bit": ("adamw_8bit", "float32", False),
    "adafactor": ("adafactor", "float32", False),
    "lion": ("lion", "float32", False),
    "muon": ("muon", "float32", False),
    "muon, fused": ("muon", "float32", True),
    "sgd": ("sgd", "float32", False),
}
BY_BLOCK = "model.layers.0.ragged.weight"
"""Its shards do not begin at a block of 256 elements, so 8-bit moments are quantised in other blocks there."""


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """By case and parameter: how far sharded and plain weights lie apart, as a share of the way they went."""
    script = Path(__file__).parent / "optimizer_worker.py"
    ranks = run_processes(script, 2, tmp_path_factory.mktemp("optimizers"), {"cases": CASES})
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.mark.parametrize("case", ["adamw", "adamw_bf16", "lion", "muon", "muon, fused", "sgd"])
def test_sharded_parameters_take_the_same_steps_to_the_last_bit(
    differences: dict[str, dict[str, float]], case: str
) -> None:
    assert set(differences[case].values()) == {0.0}


# Adafactor sums over shards in another order; the fused kernel rounds the last elements of a tensor in another way.
@pytest.mark.parametrize("case", ["adafactor", "adamw, fused"])
def test_sharded_parameters_take_the_same_steps_to_fp32_rounding(
    differences: dict[str, dict[str, float]], case: str
) -> None:
    assert max(differences[case].values()) < 1e-5


def test_8bit_moments_on_shards_are_equal_where_blocks_are_and_else_to_the_quantisation(
    differences: dict[str, dict[str, float]],
) -> None:
    found = dict(differences["adamw_8bit"])
    assert found.pop(BY_BLOCK) < 0.03
    assert set(found.values()) == {0.0}
