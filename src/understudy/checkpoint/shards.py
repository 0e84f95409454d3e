"""Tensors in safetensors files, one file for each rank that owns any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from understudy.checkpoint.durable import write_durably
from understudy.checkpoint.form import Form
from understudy.checkpoint.manifest import FileEntry
from understudy.checkpoint.ownership import assign_owners
from understudy.checkpoint.safetensors_writer import SafetensorsWriter, spec_bytes
from understudy.contracts import TensorSpec

__all__ = ["Shards"]


@dataclass(frozen=True)
class Shards:
    """Where each tensor of `layout` goes, a pure function of what every rank knows."""

    form: Form
    layout: Mapping[str, TensorSpec]
    """The tensors to write, in order, in the dtype in which they are stored."""
    owners: Mapping[str, int]
    """The rank that writes each; may name more tensors."""

    @staticmethod
    def of(form: Form, layout: Mapping[str, TensorSpec], ranks: int) -> Shards:
        """Of what `form` keeps of `layout`, written by so many ranks."""
        kept = {name: spec for name, spec in layout.items() if form.keeps(name)}
        return Shards(form, kept, assign_owners(kept, ranks if form.spread else 1))

    def owner(self, name: str) -> int | None:
        """The rank that writes a tensor; None for one that is not kept."""
        return self.owners.get(name)

    @property
    def files(self) -> dict[int, str]:
        """The file of each rank that owns any tensor."""
        ranks = sorted({self.owners[name] for name in self.layout})
        if len(ranks) == 1:
            return {ranks[0]: f"{self.form.stem}.safetensors"}
        count = len(ranks)
        return {rank: f"{self.form.stem}-{i:05}-of-{count:05}.safetensors" for i, rank in enumerate(ranks, start=1)}

    @property
    def num_bytes(self) -> int:
        return sum(spec_bytes(spec) for name in self.layout for spec in self._specs(name).values())

    def _specs(self, name: str) -> Mapping[str, TensorSpec]:
        return self.form.specs(name, self.layout[name])

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
        mine: dict[str, TensorSpec] = {}
        for name in self.layout:
            if self.owners[name] == rank:
                mine.update(self._specs(name))
        mine.update({name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in extra.items()})
        # transformers refuses files that do not say which framework wrote them.
        with SafetensorsWriter(directory / file, mine, {"format": "pt"}) as writer:
            for name, tensor in tensors:
                for key, part in self.form.parts(name, tensor):
                    writer.write(key, part.to("cpu", self.layout[name].dtype))
            for name, tensor in extra.items():
                writer.write(name, tensor)
        return {file: writer.entry}

    def write_index(self, directory: Path, extra: Iterable[str]) -> None:
        """Writes and syncs the index that readers of several files need; `extra` names are in the first of them."""
        files = self.files
        if len(files) == 1:
            return
        places = {key: files[self.owners[name]] for name in self.layout for key in self._specs(name)}
        places.update(dict.fromkeys(extra, files[min(files)]))
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(places.items()))}
        write_durably(
            directory / f"{self.form.stem}.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode()
        )
