"""A teacher with another tokenizer: it reads each document as its own tokenizer and chat template have it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from understudy.contracts import IGNORED, Batch
from understudy.objectives.targets import AlignedTargets
from understudy.objectives.teachers.aligned_documents import AlignedDocuments
from understudy.objectives.teachers.model_teacher import ModelTeacher
from understudy.objectives.teachers.teacher import documents_of

__all__ = ["AlignedTeacher"]


class AlignedTeacher:
    """Asks `teacher`, once for every batch, about its own reading of the batch's documents, where the two are aligned.
    `read` gives the tokens of one of its examples. Raises `UserError` for a document that is not among `documents`."""

    def __init__(
        self,
        teacher: ModelTeacher,
        documents: AlignedDocuments,
        read: Callable[[int], npt.NDArray[np.int32]],
        device: torch.device,
    ) -> None:
        self._teacher = teacher
        self._documents = documents
        self._read = read
        self._vocabulary = documents.vocabulary.to(device)

    def targets(self, batch: Batch) -> AlignedTargets:
        rows, same = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.bool)]
        asked: list[tuple[Tensor, Tensor]] = []
        count = 0
        for tokens, supervised in documents_of(batch):
            if not (own := int(supervised.sum())):
                continue
            found = self._documents.find(tokens, supervised)
            if len(found.rows):
                rows.append(torch.from_numpy(found.rows) + count)
                same.append(torch.from_numpy(found.same))
                asked.append(_marked(self._read(found.example), found.positions))
            count += own
        told = self._teacher.targets(Batch.of(asked).to(batch.tokens.device))
        return AlignedTargets(torch.cat(rows), torch.cat(same), told, self._vocabulary, count)


def _marked(tokens: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]) -> tuple[Tensor, Tensor]:
    """A document [L] with labels [L] at `positions`, whatever they are: a teacher speaks where there are any."""
    document = torch.from_numpy(tokens.astype(np.int64))
    labels = torch.full_like(document, IGNORED)
    labels[torch.from_numpy(positions)] = 0
    return document, labels
