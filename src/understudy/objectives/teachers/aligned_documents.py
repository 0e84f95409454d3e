"""What a teacher with another tokenizer reads in place of each of a student's documents, on the disk.

One safetensors file, made once before any process starts, which all of them map. Shape letters: E different documents
of the student, A aligned positions, M matched tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from understudy.errors import UserError
from understudy.objectives.divergences.uld import SharedVocabulary
from understudy.objectives.teachers.cache_format import KEY_BYTES, Positions, example_key, place_of_key, sortable

__all__ = ["FORMAT_VERSION", "AlignedDocument", "AlignedDocuments", "AlignmentCounts", "write_aligned_documents"]

FORMAT_VERSION = 1
"""Part of every file's name: raise it whenever the same input would be stored otherwise."""
FILE = "documents.safetensors"


class AlignedDocument(NamedTuple):
    """The counterpart of one document, and A positions that both read alike, in order."""

    example: int
    """Which of the teacher's examples it is; meaningless without a position."""
    rows: npt.NDArray[np.int32]
    """[A] which of the document's supervised positions they are."""
    positions: npt.NDArray[np.int32]
    """[A] where they are in the teacher's example."""
    same: npt.NDArray[np.bool_]
    """[A] whether both go on with the same token."""


class AlignmentCounts(NamedTuple):
    """Of all examples, equal ones counted as often as they come."""

    supervised: int
    """Tokens that the student is trained on."""
    aligned: int
    """Those of them that begin where one of the teacher's does."""
    same: int
    """Those of them that end where it ends, too."""
    matched: int
    """Tokens in both vocabularies."""
    student_classes: int
    teacher_classes: int


def write_aligned_documents(
    directory: Path,
    documents: Mapping[bytes, AlignedDocument],
    matched: npt.NDArray[np.int64],
    counts: AlignmentCounts,
) -> None:
    """`documents` by their `example_key`; `matched` [M, 2] pairs a student's and a teacher's tokens."""
    keys = sorted(documents)
    ordered = [documents[key] for key in keys]
    tensors = {
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
        "examples": np.array([document.example for document in ordered], np.int64),
        "offsets": np.cumsum([0, *(len(document.rows) for document in ordered)], dtype=np.int64),
        "rows": np.concatenate([document.rows for document in ordered]),
        "positions": np.concatenate([document.positions for document in ordered]),
        "same": np.concatenate([document.same for document in ordered]),
        "matched": matched,
    }
    save_file(tensors, directory / FILE, {name: str(value) for name, value in counts._asdict().items()})


class AlignedDocuments:
    """Finds a document's counterpart by what the document holds. Maps the file in `directory`; no collective."""

    def __init__(self, directory: Path) -> None:
        # Tensors of torch, unlike arrays, are views of the mapped file.
        with safe_open(directory / FILE, framework="pt", device="cpu") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.counts = AlignmentCounts(**{name: int(value) for name, value in file.metadata().items()})
        self.vocabulary = SharedVocabulary.of(
            stored["matched"], self.counts.student_classes, self.counts.teacher_classes
        )
        self._keys = sortable(stored["keys"].numpy())
        self._examples, self._offsets, self._rows, self._positions, self._same = (
            stored[name].numpy() for name in ("examples", "offsets", "rows", "positions", "same")
        )

    def find(self, tokens: Positions, supervised: Positions) -> AlignedDocument:
        """Of a document as for `example_key`. Raises `UserError` for one that was not among those aligned."""
        place = place_of_key(self._keys, example_key(tokens, supervised))
        if place is None:
            raise UserError(
                "a teacher with another tokenizer can be asked about examples of the recipe's data alone, as they were "
                "when the run began; begin it again."
            )
        rows = slice(*self._offsets[place : place + 2].tolist())
        return AlignedDocument(int(self._examples[place]), self._rows[rows], self._positions[rows], self._same[rows])
