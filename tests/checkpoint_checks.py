"""What a checkpoint promises about crashes and about ranks, checked: each function says what is wrong, a line each.

Ordinary tests demand that nothing is; tests of planted bugs demand that something is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from tests.crash_states import CrashState, tracing
from understudy.checkpoint import saving
from understudy.checkpoint.form import OPTIMIZER_STATE, WHOLE_MODEL, Form
from understudy.checkpoint.loading import open_optimizer_state
from understudy.checkpoint.manifest import MARKER, DamagedCheckpointError
from understudy.checkpoint.progress import Progress
from understudy.checkpoint.saver import CheckpointSaver, SaveSettings
from understudy.checkpoint.saving import CheckpointPlan
from understudy.checkpoint.shards import Shards
from understudy.checkpoint.store import CheckpointStore, is_checkpoint_name, verify_checkpoint
from understudy.contracts import LazyTensor, LossScale, TensorSpec
from understudy.errors import UserError
from understudy.models.weights import WeightReader

__all__ = ["completeness_problems", "crash_problems", "failed_writer_problems"]

STEPS = (10, 20, 30)
LATE_SECONDS = 0.2


def crash_problems(scratch: Path, *, background: bool = False, keep: int = 1) -> list[str]:
    """Saves three checkpoints and crashes at every change of the disk. A process group of one must exist.

    Whatever a crash leaves: once a save is done its checkpoint is there and verifies; everything that has a
    checkpoint's name, or a marker, verifies.
    """
    run = scratch / "run"
    run.mkdir()
    store = CheckpointStore(run / "checkpoints")
    strategy = _StateOnly()
    saver = CheckpointSaver(strategy, _settings(store, background=background, keep=keep), 0, 1)  # type: ignore[arg-type]
    problems = []
    with tracing(run, vouching=MARKER) as tracer:
        for count, step in enumerate(STEPS, start=1):
            strategy.step = step
            saver.save(_progress(step))
            saver.wait()
            tracer.stage = step
            kept = [path.name for path in store.committed()]
            if kept != [store.path(step).name for step in STEPS[max(0, count - keep) : count][::-1]]:
                problems.append(f"after the save of step {step}, with keep={keep}, there are {kept}")
    for number, state in enumerate(tracer.states):
        at = scratch / f"state-{number}"
        state.write(at)
        problems += [f"{state}: {problem}" for problem in _problems_after_crash(at, state)]
        shutil.rmtree(at)
    return problems


def _problems_after_crash(run: Path, state: CrashState) -> Iterator[str]:
    store = CheckpointStore(run / "checkpoints")
    for path in sorted(store.directory.iterdir()) if store.directory.exists() else []:
        named = is_checkpoint_name(path.name)
        vouched = (path / MARKER).exists() and (path / MARKER).stat().st_size > 0
        try:
            if named or vouched:
                verify_checkpoint(path)
        except DamagedCheckpointError as error:
            yield f"{path.name} has {'its name' if named else 'a marker'} and does not verify: {error}"
    with suppress(DamagedCheckpointError):
        newest = store.newest(lambda line: None)
        if state.stage is not None and (newest is None or newest[1].step < state.stage):
            yield f"step {state.stage} was committed, and {'nothing' if newest is None else newest[0].name} is there"


def completeness_problems(scratch: Path) -> list[str]:
    """Two ranks write their parts, the second long after the first, which commits. What is committed must be all of
    it: every tensor of either rank, to the bit, in files that the manifest lists."""
    store = CheckpointStore(scratch / "checkpoints")
    weights, state = _weights(3), _optimizer_state(3)
    buffers = {"model.buffer": torch.arange(5.0)}
    plan = CheckpointPlan(_shards(WHOLE_MODEL, weights, 2), _shards(OPTIMIZER_STATE, state, 2))
    partial = store.partial(3, "token")
    store.begin(partial)
    committed: list[Path] = []
    failed: list[Exception] = []

    def write(rank: int) -> None:
        mine = [
            [(name, tensor) for name, tensor in tensors.items() if shards.owners[name] == rank]
            for shards, tensors in ((plan.model, weights), (plan.optimizer, state))
        ]
        saving.write_part(plan, partial, rank, mine[0], mine[1], buffers)

    def commit() -> None:
        try:
            committed.append(
                saving.commit_checkpoint(
                    plan, store, partial, 2, _progress(3), buffers, _write_companions, still_ours=lambda: True
                )
            )
        except Exception as error:  # noqa: BLE001  # told below
            failed.append(error)

    write(0)
    committing = Thread(target=commit)
    committing.start()
    committing.join(LATE_SECONDS)
    if committed or failed:
        return [f"rank 0 did not wait for the part of rank 1: {committed or failed}"]
    write(1)
    committing.join()
    return [str(failed[0])] if failed else list(_differences(committed[0], weights | buffers, state))


def _differences(checkpoint: Path, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    try:
        verify_checkpoint(checkpoint)
        reader = WeightReader(checkpoint / "model")
        moments = open_optimizer_state(checkpoint)
    except UserError as error:
        yield str(error)
        return
    stored: dict[str, LazyTensor] = {name: reader(name) for name in reader.names()}
    stored |= {f"{name}.{key}": tensor for name, kept in moments.items() for key, tensor in kept.items()}
    expected = {**weights, **state}
    yield from (f"{name} is missing" for name in sorted(expected.keys() - stored.keys()))
    yield from (f"{name} was never saved" for name in sorted(stored.keys() - expected.keys()))
    for name in sorted(expected.keys() & stored.keys()):
        tensor = stored[name][()]
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name]):
            yield f"{name} is not what was saved"


def failed_writer_problems(scratch: Path) -> list[str]:
    """A background writer that fails is told of by the next look at it, and what it left is no checkpoint. A process
    group of one must exist."""
    store = CheckpointStore(scratch / "checkpoints")
    strategy, reached = _StateOnly(), Event()

    def fail(directory: Path) -> None:
        reached.set()
        raise OSError("the disk is gone")

    settings = _settings(store, background=True, keep=1, write_companions=fail)
    saver = CheckpointSaver(strategy, settings, 0, 1)  # type: ignore[arg-type]
    saver.save(_progress(10))
    reached.wait(10)
    problems = []
    for name, look in (("wait", saver.wait), ("check", saver.check)):
        try:
            look()
        except OSError as error:
            if "the disk is gone" not in str(error):
                problems.append(f"{name} raised {error}")
        else:
            problems.append(f"{name} did not tell that the writer had failed")
    return problems + [f"{path.name} is taken for a checkpoint" for path in store.committed()]


def unmarked_tensors(scratch: Path, *, background: bool) -> int:
    """How many more tensors a save writes than it marks. A process group of one must exist."""
    marks = 0

    def mark() -> None:
        nonlocal marks
        marks += 1

    store = CheckpointStore(scratch / "run" / "checkpoints")
    store.directory.parent.mkdir()
    strategy = _StateOnly()
    settings = _settings(store, background=background, keep=1, mark=mark)
    saver = CheckpointSaver(strategy, settings, 0, 1)  # type: ignore[arg-type]
    strategy.step = 1
    saver.save(_progress(1))
    saver.wait()
    return len(strategy.layout()) + len(strategy.optimizer_layout()) - marks


def unshared_disk_problems(scratch: Path) -> list[str]:
    """A rank that does not see what rank 0 made ends in a sentence. A process group of one must exist."""
    store = CheckpointStore(scratch / "checkpoints")
    settings = _settings(store, background=False, keep=1)
    saver = CheckpointSaver(_StateOnly(), settings, rank=1, world_size=2)  # type: ignore[arg-type]
    try:
        saver.save(_progress(10))
    except UserError as error:
        return [] if "choose an output_dir that all of them share" in str(error) else [str(error)]
    return ["a rank on another disk went on"]


class _StateOnly:
    """As much of a strategy as saving asks for; its tensors are a function of `step`."""

    step = 0
    loss_scale: LossScale | None = None

    def layout(self) -> Mapping[str, TensorSpec]:
        return _layout(_weights(self.step))

    def optimizer_layout(self) -> Mapping[str, TensorSpec]:
        return _layout(_optimizer_state(self.step))

    def state(self, owner: Callable[[str], int | None]) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in _weights(self.step).items() if owner(name) is not None)

    def optimizer_state(self, owner: Callable[[str], int]) -> Iterator[tuple[str, Tensor]]:
        return iter(_optimizer_state(self.step).items())


def _weights(step: int) -> dict[str, Tensor]:
    shapes = {"model.embed.weight": (6, 4), "model.norm.weight": (4,), "model.layer.weight": (4, 4)}
    return {name: torch.randn(shape, generator=_generator(step, name)) for name, shape in shapes.items()}


def _optimizer_state(step: int) -> dict[str, Tensor]:
    state = {}
    for name, tensor in _weights(step).items():
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{name}.{key}"] = torch.rand(tensor.shape, generator=_generator(step, name + key))
        state[f"{name}.step"] = torch.tensor(float(step))
    return state


def _generator(step: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(step * 1000 + sum(name.encode()))


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def _shards(form: Form, tensors: Mapping[str, Tensor], ranks: int) -> Shards:
    return Shards.of(form, _layout(tensors), ranks)


def _progress(step: int) -> Progress:
    return Progress(step, step / 10, 100 * step, {}, "", "", None, None, {})


def _write_companions(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))


def _settings(
    store: CheckpointStore, *, write_companions: Callable[[Path], None] = _write_companions, **named: Any
) -> SaveSettings:
    return SaveSettings(
        store=store,
        keep_best=False,
        form=WHOLE_MODEL,
        buffers={},
        write_companions=write_companions,
        token="token",
        still_ours=lambda: True,
        **named,
    )
