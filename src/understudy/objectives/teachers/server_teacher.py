"""A teacher behind a server: asked about a step's documents before the step, as answers may take long or not come."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from understudy.contracts import Batch
from understudy.objectives.targets import TopKTargets
from understudy.objectives.teachers.prompt_logprobs import PATH, question, read_answer
from understudy.objectives.teachers.server_client import ServerClient
from understudy.objectives.teachers.teacher import documents_of

__all__ = ["REQUESTS_AT_ONCE", "ServerTeacher"]

REQUESTS_AT_ONCE = 8
"""By one process, to each endpoint. A server batches what all processes send it."""


class ServerTeacher:
    """The `k` likeliest tokens, of `classes`, as the model served under the name `model` says."""

    def __init__(self, client: ServerClient, model: str, *, k: int, classes: int, requests_at_once: int) -> None:
        self._client = client
        self._model = model
        self._k = k
        self._classes = classes
        self._pool = ThreadPoolExecutor(requests_at_once, thread_name_prefix="teacher")

    def close(self) -> None:
        self._pool.shutdown()
        self._client.close()

    def ask(self, batches: Sequence[Batch]) -> list[TopKTargets]:
        """What it says about each of `batches`, on the CPU, for `Batch.targets`. No collective; any thread may call it.
        Raises `ServerError`."""
        documents = [documents_of(batch) for batch in batches]
        asked = [[self._pool.submit(self.document, *document) for document in members] for members in documents]
        futures = [future for members in asked for future in members]
        ended, others = wait(futures, return_when=FIRST_EXCEPTION)
        for future in others:  # there was a failure
            future.cancel()
        for future in ended:
            future.result()
        return [_joined([future.result() for future in members]) for members in asked]

    def document(self, tokens: Tensor, supervised: Tensor) -> TopKTargets:
        """About one document [L]: after each of its `supervised` tokens. Raises `ServerError`."""
        positions = supervised.nonzero().squeeze(1).tolist()
        if not positions:
            return _nothing(self._k)
        prompt = tokens[: positions[-1] + 2].tolist()  # what comes behind is asked about nowhere

        def read(answer: object) -> TopKTargets:
            return read_answer(answer, len(prompt), positions, self._k, self._classes)

        return self._client.post(PATH, question(self._model, prompt, self._k), read)

    def targets(self, batch: Batch) -> TopKTargets:
        # An empty batch, of a strategy's own making, was asked about nowhere.
        told: TopKTargets = _nothing(self._k) if batch.targets is None else batch.targets
        device = batch.tokens.device
        return TopKTargets(told.ids.to(device), told.log_probs.to(device), told.tail.to(device))


def _nothing(k: int) -> TopKTargets:
    return TopKTargets(torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k), torch.zeros(0))


def _joined(parts: Sequence[TopKTargets]) -> TopKTargets:
    return TopKTargets(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.tail for part in parts]),
    )
