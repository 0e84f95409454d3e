"""TensorBoard event files under tensorboard/."""

from __future__ import annotations

from understudy.training.sinks.registry import Row, RunFacts, Sink

__all__ = ["make"]


class TensorBoardSink(Sink):
    """One scalar a column, `train/…` or `eval/…`, over steps."""

    def __init__(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(facts.directory.tensorboard))

    def row(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                self._writer.add_scalar(tag, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


def make(facts: RunFacts) -> Sink:
    return TensorBoardSink(facts)
