"""Tokenises chunks of rows in parallel processes and hands the results back in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker

from understudy.data.cutting import Tokenised
from understudy.data.row_chunks import RowChunk
from understudy.data.tokenisation import RowReader, Tokeniser, TokeniserSettings
from understudy.errors import UnderstudyError

__all__ = ["tokenise_chunks"]

_FEW_CHUNKS = 16
"""So many are done in this process: starting others would take longer."""

_tokeniser: Tokeniser
"""Of a worker process, set once by `_start_worker`."""


def tokenise_chunks(chunks: Iterable[RowChunk], settings: TokeniserSettings, workers: int) -> Iterator[Tokenised]:
    """Each chunk tokenised, in order. Raises `UserError` for the first bad row found."""
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, _FEW_CHUNKS))
    if workers == 1 or len(first) < _FEW_CHUNKS:
        tokeniser = Tokeniser(settings)
        yield from (_tokenise(tokeniser, chunk) for chunk in itertools.chain(first, chunks))
        return
    # Spawned, not forked: the parent may run threads of the tokenizer library or of torch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (settings,)) as pool:
        try:
            yield from _in_order(pool, itertools.chain(first, chunks), ahead=2 * workers)
        except BrokenProcessPool as error:
            raise UnderstudyError(
                "a process that tokenises was killed, most likely for lack of memory; set data.num_workers lower."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterable[RowChunk], ahead: int) -> Iterator[Tokenised]:
    """Keeps at most `ahead` chunks in flight, so that reading does not run away from tokenising."""
    waiting: deque[Future[Tokenised]] = deque()
    for chunk in chunks:
        with _interrupts_held_back():  # it starts processes
            waiting.append(pool.submit(_tokenise_in_worker, chunk))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started inside never see a Ctrl-C, which reaches the whole terminal, and would each print a traceback;
    this process gets it on leaving, and ends them."""
    resource_tracker.ensure_running()  # started inside, it would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(settings: TokeniserSettings) -> None:
    global _tokeniser
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker keeps to its own core
    _tokeniser = Tokeniser(settings)


def _tokenise_in_worker(chunk: RowChunk) -> Tokenised:
    return _tokenise(_tokeniser, chunk)


def _tokenise(tokeniser: Tokeniser, chunk: RowChunk) -> Tokenised:
    return tokeniser.tokenise(chunk.rows, RowReader(chunk.format_name, chunk.columns), source=chunk.source)
