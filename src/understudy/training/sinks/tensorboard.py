"""TensorBoard event files under tensorboard/."""

from __future__ import annotations

from understudy.training.sinks.registry import Row, RunFacts, Sink

__all__ = ["make"]


class TensorBoardSink(Sink):
    """One scalar a column, `train/…` or `eval/…`, over steps."""

    def __init__(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged past the checkpoint that the run goes on from is of a course that was lost.
        purge_step = facts.first_step + 1 if facts.first_step else None
        self._writer = SummaryWriter(str(facts.directory.tensorboard), purge_step=purge_step)

    def row(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self._writer.add_scalar(tag, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


def make(facts: RunFacts) -> Sink:
    return TensorBoardSink(facts)
