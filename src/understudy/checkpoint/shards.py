"""Tensors in safetensors files, one file for each rank that owns any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from understudy.checkpoint.durable import write_durably
from understudy.checkpoint.manifest import FileEntry
from understudy.checkpoint.safetensors_writer import SafetensorsWriter, spec_bytes
from understudy.contracts import TensorSpec

__all__ = ["Shards"]


@dataclass(frozen=True)
class Shards:
    """Where each tensor of `layout` goes, a pure function of what every rank knows."""

    stem: str
    """File names begin with it: `model` or `optimizer`."""
    layout: Mapping[str, TensorSpec]
    """How tensors are stored, in the order in which they are written."""
    owners: Mapping[str, int]
    """The rank that writes each; may name more tensors."""

    @property
    def files(self) -> dict[int, str]:
        """The file of each rank that owns any tensor."""
        ranks = sorted({self.owners[name] for name in self.layout})
        if len(ranks) == 1:
            return {ranks[0]: f"{self.stem}.safetensors"}
        count = len(ranks)
        return {rank: f"{self.stem}-{i:05}-of-{count:05}.safetensors" for i, rank in enumerate(ranks, start=1)}

    @property
    def num_bytes(self) -> int:
        return sum(map(spec_bytes, self.layout.values()))

    def write(
        self, directory: Path, rank: int, tensors: Iterable[tuple[str, Tensor]], extra: Mapping[str, Tensor]
    ) -> dict[str, FileEntry]:
        """Writes the tensors that `rank` owns, one in memory at a time, and `extra` ones, in its file, and returns the
        file written. `tensors` are those, in order; it is read to its end also where it must be empty, because to
        produce it may be a collective."""
        file = self.files.get(rank)
        if file is None:
            for name, _ in tensors:
                raise AssertionError(f"rank {rank} owns nothing but was given {name}")
            return {}
        mine = {name: spec for name, spec in self.layout.items() if self.owners[name] == rank}
        mine.update({name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in extra.items()})
        # transformers refuses files that do not say which framework wrote them.
        with SafetensorsWriter(directory / file, mine, {"format": "pt"}) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor.to("cpu", self.layout[name].dtype))
            for name, tensor in extra.items():
                writer.write(name, tensor)
        return {file: writer.entry}

    def write_index(self, directory: Path, extra: Iterable[str]) -> None:
        """Writes and syncs the index that readers of several files need; `extra` names are in the first of them."""
        files = self.files
        if len(files) == 1:
            return
        places = {name: files[self.owners[name]] for name in self.layout}
        places.update(dict.fromkeys(extra, files[min(files)]))
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(places.items()))}
        write_durably(directory / f"{self.stem}.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())
