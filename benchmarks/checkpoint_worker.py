"""One rank of the checkpoint benchmark: saves and loads the same sharded tensors in one of several ways."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from benchmarks.process import fresh_peak, peak_bytes
from understudy.checkpoint.form import WHOLE_MODEL
from understudy.checkpoint.loading import open_optimizer_state
from understudy.checkpoint.progress import Progress
from understudy.checkpoint.saver import CheckpointSaver, SaveSettings
from understudy.checkpoint.store import CheckpointStore, verify_checkpoint
from understudy.contracts import Batch
from understudy.devices.device import find_device
from understudy.models.build import make_language_model
from understudy.models.weights import WeightReader
from understudy.objectives.registry import make_objective
from understudy.optim.optimizers.registry import make_optimizer
from understudy.parallel.world import World, process_group
from understudy.recipe.environment import process_environment
from understudy.recipe.schema import Recipe
from understudy.strategies.registry import make_strategy


class Subject:
    """A model under FSDP2 with AdamW's moments, and ways to save and load all of it."""

    def __init__(self, model: Path, world: World, scratch: Path) -> None:
        self.model, self.world, self.scratch = model, world, scratch
        self.recipe = Recipe.model_validate(
            {
                "name": "bench",
                "output_dir": "unused",
                "model": {"path": str(model)},
                "data": {"train": [{"path": "unused"}]},
                "strategy": "fsdp",
                "training": {"precision": "fp32", "activation_checkpointing": "none"},
            }
        )
        device = find_device()
        self.strategy: Any = make_strategy(self.recipe, device.torch_device(world.local_rank), world)
        self.strategy.build(
            lambda: make_language_model(model, self.recipe.model, device),
            lambda named: make_optimizer(self.recipe.optimizer, named, fused=True),
        )
        self.strategy.load_state(WeightReader(model))
        tokens = torch.arange(16)
        self.strategy.forward_backward([Batch.of([(tokens, tokens)])], make_objective(self.recipe.objective), 32)
        self.strategy.optimizer_step(1e-5, 1.0)
        layouts = (self.strategy.layout(), self.strategy.optimizer_layout())
        self.num_bytes = sum(
            torch.Size(spec.shape).numel() * spec.dtype.itemsize for layout in layouts for spec in layout.values()
        )
        self.step = 0

    def saver(self, *, background: bool) -> CheckpointSaver:
        settings = SaveSettings(
            store=CheckpointStore(self.scratch / "understudy"),
            keep=1,
            keep_best=False,
            background=background,
            form=WHOLE_MODEL,
            buffers={},
            write_companions=lambda directory: shutil.copy(self.model / "config.json", directory),
            token="bench",
            still_ours=lambda: True,
        )
        return CheckpointSaver(self.strategy, settings, self.world.rank, self.world.size)

    def progress(self) -> Progress:
        self.step += 1
        return Progress(self.step, 0.0, 0, {}, "", "", None, None, {})

    def understudy_load(self) -> None:
        checkpoint = CheckpointStore(self.scratch / "understudy").committed()[0]
        if self.world.rank == 0:  # what a run does first, on one process
            verify_checkpoint(checkpoint)
        dist.barrier()
        self.strategy.load_state(WeightReader(checkpoint / "model"))
        self.strategy.load_optimizer_state(open_optimizer_state(checkpoint))

    def sharded_state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.strategy.module, self.strategy.optimizer)
        return {"model": model, "optimizer": optimizer}

    def dcp_save(self) -> None:
        dcp.save(self.sharded_state(), checkpoint_id=self.fresh("dcp"))

    def dcp_load(self) -> None:
        state = self.sharded_state()
        dcp.load(state, checkpoint_id=self.scratch / "dcp")
        set_state_dict(
            self.strategy.module,
            self.strategy.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def torch_save(self) -> None:
        """What trainers do that save one file: everything gathered on rank 0."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.strategy.module, self.strategy.optimizer, options=options)
        if self.world.rank == 0:
            with (self.scratch / "all.pt").open("wb") as file:
                torch.save({"model": model, "optimizer": optimizer}, file)
                os.fsync(file.fileno())

    def torch_load(self) -> None:
        """Every rank reads everything and keeps its shard."""
        state = torch.load(self.scratch / "all.pt", weights_only=True, map_location="cpu", mmap=True)
        set_state_dict(
            self.strategy.module,
            self.strategy.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )

    def fresh(self, name: str) -> Path:
        if self.world.rank == 0:
            shutil.rmtree(self.scratch / name, ignore_errors=True)
        dist.barrier()
        return self.scratch / name


def measured(action: Callable[[], None], rounds: int) -> dict[str, float]:
    """Seconds until all ranks are done, and memory over what was held before, at most, on this rank."""
    seconds, extra = [], []
    for _ in range(rounds):
        dist.barrier()
        fresh_peak()
        before, began = peak_bytes(), time.perf_counter()
        action()
        dist.barrier()
        seconds.append(time.perf_counter() - began)
        extra.append(peak_bytes() - before)
    return {"seconds": statistics.median(seconds), "extra_bytes": max(extra)}


def background(subject: Subject, rounds: int) -> dict[str, float]:
    """Seconds that the loop stands still, and until the checkpoint is committed."""
    saver, stalls, totals, extra = subject.saver(background=True), [], [], []
    for _ in range(rounds):
        dist.barrier()
        fresh_peak()
        before, began = peak_bytes(), time.perf_counter()
        saver.save(subject.progress())
        stalls.append(time.perf_counter() - began)
        saver.wait()
        totals.append(time.perf_counter() - began)
        extra.append(peak_bytes() - before)
    return {"stall": statistics.median(stalls), "seconds": statistics.median(totals), "extra_bytes": max(extra)}


def main() -> None:
    settings = json.loads(sys.argv[1])
    environment = process_environment()
    assert environment is not None
    device = find_device()
    with process_group(environment, device.torch_device(environment.local_rank), device.backend) as world:
        answer = measured_side(settings, world)
        answers: list[Any] = [None] * world.size
        dist.all_gather_object(answers, answer)
    if environment.rank == 0:
        Path(settings["out"]).write_text(json.dumps(answers))


def measured_side(settings: dict[str, Any], world: World) -> dict[str, Any]:
    subject = Subject(Path(settings["model"]), world, Path(settings["scratch"]))
    rounds = settings["rounds"]
    answer: dict[str, Any] = {"num_bytes": subject.num_bytes}
    if settings["side"] == "understudy":
        saver = subject.saver(background=False)
        answer["save"] = measured(lambda: saver.save(subject.progress()), rounds)
        answer["background"] = background(subject, rounds)
        answer["load"] = measured(subject.understudy_load, rounds)
    elif settings["side"] == "dcp":
        answer["save"] = measured(subject.dcp_save, rounds)
        answer["load"] = measured(subject.dcp_load, rounds)
    else:
        answer["save"] = measured(subject.torch_save, rounds)
        answer["load"] = measured(subject.torch_load, rounds)
    return answer


if __name__ == "__main__":
    main()
