"""Streaming safetensors: what is written is what the library reads, and half a file never has the name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from understudy.checkpoint.ownership import assign_owners
from understudy.checkpoint.safetensors_writer import SafetensorsWriter, spec_bytes
from understudy.contracts import TensorSpec

pytestmark = pytest.mark.unit


def tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.randn(5, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "bf16.weight": torch.randn(7).to(torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "flags": torch.tensor([True, False, True]),
        "ü": torch.randn(2).half(),
    }


def layout(named: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in named.items()}


def test_the_library_reads_back_every_value_shape_and_dtype(tmp_path: Path) -> None:
    named = tensors()
    with SafetensorsWriter(tmp_path / "a.safetensors", layout(named), {"format": "pt"}) as writer:
        for name, tensor in named.items():
            writer.write(name, tensor)
    read = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(named)
    for name, tensor in named.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_failure_halfway_leaves_nothing(tmp_path: Path) -> None:
    named = tensors()

    def fail_halfway() -> None:
        with SafetensorsWriter(tmp_path / "a.safetensors", layout(named)) as writer:
            writer.write("matrix", named["matrix"])
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_tensor_is_an_error_and_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"old")
    with (
        pytest.raises(ValueError, match="matrix was never written"),
        SafetensorsWriter(tmp_path / "a.safetensors", layout({"matrix": torch.zeros(1)})),
    ):
        pass
    assert (tmp_path / "a.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(1, dtype=torch.float16)])
def test_another_shape_or_dtype_than_announced_is_refused(tmp_path: Path, wrong: torch.Tensor) -> None:
    specs = layout({"matrix": torch.zeros(1)})
    with (
        pytest.raises(ValueError, match="expected"),
        SafetensorsWriter(tmp_path / "a.safetensors", specs) as writer,
    ):
        writer.write("matrix", wrong)


def test_owners_are_balanced_in_bytes_and_known_without_asking() -> None:
    specs = {f"layer.{i}": TensorSpec((i % 7 + 1, 64), torch.float32) for i in range(40)}
    specs["embedding"] = TensorSpec((30, 64), torch.float32)
    owners = assign_owners(specs, 3)
    loads = [sum(spec_bytes(specs[name]) for name in specs if owners[name] == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= 2 * 64 * 4
    assert owners == assign_owners(dict(reversed(list(specs.items()))), 3)
