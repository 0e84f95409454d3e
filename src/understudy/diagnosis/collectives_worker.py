"""One process of the collectives that `understudy doctor` tries: `python -m … DIRECTORY`, started by our launcher.

Rates are what a link carries: an all-reduce of n bytes between N processes moves 2 n (N − 1) / N over each, an
all-gather to n bytes or a reduce-scatter from n bytes half of that (as nccl-tests count, in doc/PERFORMANCE.md).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from understudy.devices.device import Device, find_device
from understudy.diagnosis.pairs import pair_rounds
from understudy.diagnosis.progress import Progress
from understudy.launch.cause import write_cause
from understudy.launch.parent import die_with_parent
from understudy.launch.run_directory import RunDirectory
from understudy.parallel.world import process_group
from understudy.recipe.environment import launcher_process, process_environment
from understudy.training.failure import StepNote, ending_on_failure

__all__ = ["main"]

SENT_NUMBERS = 8 * 2**20
"""fp32: 32 MiB."""
REPETITIONS = 3


def main(path: Path) -> None:
    if (launcher := launcher_process()) is not None:
        die_with_parent(launcher)
    directory, environment = RunDirectory(path), process_environment()
    assert environment is not None, "a launcher sets RANK and WORLD_SIZE"
    progress = Progress(directory.path, environment.rank)
    report = partial(write_cause, directory.cause(environment.rank))
    with ending_on_failure(environment.rank, StepNote(), report):
        device = find_device()
        where = device.torch_device(environment.local_rank)
        everyone = tuple(range(environment.world_size))
        with ExitStack() as stack:
            with progress.step("meeting", everyone):
                world = stack.enter_context(process_group(environment, where, device.backend))
            with ending_on_failure(environment.rank, StepNote(), report):
                collectives = Collectives(device, where, world.rank, progress)
                collectives.try_pairs(world.size)
                collectives.try_together(everyone)
            with progress.step("leaving", everyone):
                stack.close()


class Collectives:
    """Tries collectives from one process; every process must make the same calls."""

    def __init__(self, device: Device, where: torch.device, rank: int, progress: Progress) -> None:
        self._device = device
        self._where = where
        self._rank = rank
        self._progress = progress

    def try_pairs(self, size: int) -> None:
        """An all-reduce between each two processes; first, so that the pair shows that would hold all of them up."""
        if size <= 2:
            return  # all together are the pair
        rounds = pair_rounds(size)
        with self._progress.step("forming pairs", tuple(range(size))):  # every process makes every group
            groups = {pair: dist.new_group(list(pair)) for pairs in rounds for pair in pairs}
        for pair, group in groups.items():
            if self._rank in pair:
                self._all_reduce(f"pair {pair[0]}–{pair[1]}", pair, self._where, group)

    def try_together(self, everyone: tuple[int, ...]) -> None:
        self._all_reduce("all-reduce", everyone, self._where)
        self._all_gather(everyone)
        self._reduce_scatter(everyone)
        if self._where.type != "cpu":  # offloaded state, and what processes tell each other, is in host memory
            self._all_reduce("all-reduce in host memory", everyone, torch.device("cpu"))

    def _all_reduce(
        self, name: str, members: tuple[int, ...], where: torch.device, group: dist.ProcessGroup | None = None
    ) -> None:
        tensor = torch.full((SENT_NUMBERS,), self._rank + 1.0, device=where)
        expected = float(sum(rank + 1 for rank in members))
        moved = tensor.nbytes * 2 * (len(members) - 1) / len(members)
        self._try(name, members, lambda: dist.all_reduce(tensor, group=group), lambda: tensor == expected, moved)

    def _all_gather(self, everyone: tuple[int, ...]) -> None:
        size = len(everyone)
        own = torch.full((SENT_NUMBERS // size,), self._rank + 1.0, device=self._where)
        whole = torch.empty(own.numel() * size, device=self._where)
        expected = torch.arange(1.0, size + 1, device=self._where).repeat_interleave(own.numel())
        moved = whole.nbytes * (size - 1) / size
        self._try(
            "all-gather", everyone, lambda: dist.all_gather_into_tensor(whole, own), lambda: whole == expected, moved
        )

    def _reduce_scatter(self, everyone: tuple[int, ...]) -> None:
        size = len(everyone)
        own = torch.empty(SENT_NUMBERS // size, device=self._where)
        whole = torch.arange(1.0, size + 1, device=self._where).repeat_interleave(own.numel()) * (self._rank + 1)
        expected = (self._rank + 1.0) * size * (size + 1) / 2
        moved = whole.nbytes * (size - 1) / size
        self._try(
            "reduce-scatter", everyone, lambda: dist.reduce_scatter_tensor(own, whole), lambda: own == expected, moved
        )

    def _try(
        self,
        name: str,
        members: tuple[int, ...],
        run: Callable[[], object],
        right: Callable[[], Tensor],
        moved_bytes: float,
    ) -> None:
        """`right` compares after the first of several runs; the fastest of the others is told."""
        with self._progress.step(name, members) as outcome:
            run()
            outcome.right = bool(right().all())
            seconds = []
            for _ in range(REPETITIONS):
                self._device.synchronize()
                began = time.monotonic()
                run()
                self._device.synchronize()
                seconds.append(time.monotonic() - began)
            outcome.bytes_per_second = moved_bytes / min(seconds) or None  # one process sends nothing


if __name__ == "__main__":
    main(Path(sys.argv[1]))
