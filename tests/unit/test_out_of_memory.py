"""How it is known that memory ran out, what is tried next, and what a process may have."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.test_rules import recipe_with
from understudy.devices.cpu import CPU
from understudy.errors import OutOfMemoryError, UserError, is_out_of_memory
from understudy.launch.cause import Cause, Exit, Shortage, ShortOfMemoryError, first_failure
from understudy.launch.control_groups import oom_kills
from understudy.launch.local import launch_local
from understudy.launch.run_directory import RunDirectory
from understudy.plan.machine import Machine
from understudy.recipe.source_map import SourceMap
from understudy.training import out_of_memory
from understudy.training.failure import cause_of
from understudy.training.job import Job
from understudy.training.out_of_memory import as_learned, learned_from, readable, smaller

pytestmark = pytest.mark.unit

CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "223281152 bytes. Error code 12 (Cannot allocate memory)"
)


def raised_from(cause: BaseException) -> BaseException:
    try:
        try:
            raise cause
        except type(cause) as error:
            raise UserError("the disk is gone.") from error
    except UserError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 2 GiB"),
        RuntimeError(CPU_ALLOCATOR),
        MemoryError(),
        MemoryError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; 64.00 GiB total capacity)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/buffer.cc:30] std::bad_alloc"),
        RuntimeError("could not create a memory object"),
        OutOfMemoryError("the device ran out of memory over a single answer."),
        raised_from(MemoryError()),
    ],
)
def test_every_way_to_say_that_there_is_no_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    cause = cause_of(error, rank=1, step=3, micro_batch_tokens=100)
    assert (cause.exit_status, cause.peer_failed, cause.micro_batch_tokens) == (4, False, 100)
    assert cause.shortage is not None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        OSError(errno.ENOSPC, "No space left on device"),
        UserError("lower it, or you run out of memory."),
    ],
)
def test_other_failures_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert cause_of(error, rank=1, step=3).shortage is None


def test_what_was_asked_for_is_told_in_mebibytes() -> None:
    assert cause_of(RuntimeError(CPU_ALLOCATOR), 0, 1).shortage == "ran out of memory, asking for 213 MiB,"
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of …")
    assert cause_of(cuda, 0, 1).shortage == "ran out of memory, asking for 1.50 GiB,"
    assert cause_of(MemoryError("std::bad_alloc"), 0, 1).shortage == "ran out of memory (std::bad_alloc)"


def cause(rank: int, *, tokens: int, peer_failed: bool = False) -> Cause:
    shortage = None if peer_failed else "ran out of memory"
    return Cause(rank, "a", 10.0 + rank, 1 if peer_failed else 4, "m", 7, "", peer_failed, tokens, shortage)


def test_a_rank_out_of_memory_outranks_peers_and_the_largest_micro_batch_of_all_is_known() -> None:
    logs = {rank: Path(f"rank-{rank}.log") for rank in range(3)}
    causes = {0: cause(0, tokens=300, peer_failed=True), 1: cause(1, tokens=200), 2: cause(2, tokens=250)}
    error = first_failure([Exit(0, "a", 1, 10.1), Exit(1, "a", 4, 11.1)], causes, logs)
    assert isinstance(error, ShortOfMemoryError)
    assert error.shortage == Shortage(1, "a", 7, True, 300, "ran out of memory", logs[1])

    del causes[1], causes[2]
    error = first_failure([Exit(1, "a", -signal.SIGKILL, 11.1)], causes, logs, {1: "was killed"})
    assert isinstance(error, ShortOfMemoryError)
    assert error.shortage == Shortage(1, "a", 7, True, 300, "was killed", logs[1])


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("terminate called after throwing an instance of 'std::bad_alloc'", "os.abort()"),
        ("memory allocation of 1048576 bytes failed", "os.abort()"),
        ("libgomp: Out of memory allocating 64 bytes", "sys.exit(1)"),
    ],
)
def test_a_process_that_ends_for_want_of_memory_is_known_by_its_last_words(
    tmp_path: Path, words: str, status: str
) -> None:
    body = f"import os, sys\nprint({words!r}, flush=True)\n{status}"
    with pytest.raises(ShortOfMemoryError, match=r"rank 0 on \S+ ended for want of memory; its output is in") as caught:
        launch_local((sys.executable, "-c", body), 1, RunDirectory(tmp_path), 4, accelerated=False)
    assert caught.value.exit_status == 4
    assert caught.value.shortage.may_have_trained, "nobody knows that it had not"


def test_what_a_log_says_of_an_earlier_start_counts_no_more(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.logs.mkdir()
    directory.log(0).write_text("std::bad_alloc\n")
    with pytest.raises(Exception, match=r"rank 0 on \S+ was killed by SIGABRT"):
        launch_local((sys.executable, "-c", "import os; os.abort()"), 1, directory, 4, accelerated=False)


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.events": "oom 3\noom_kill 2\n"}, 2),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
                "proc/vmstat": "oom_kill 9\n",
            },
            1,
        ),
        ({"proc/vmstat": "nr_free_pages 1\noom_kill 9\n"}, 9),
        ({}, None),
    ],
)
def test_processes_killed_by_the_system_are_counted(tmp_path: Path, files: dict[str, str], kills: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == kills


LIMITED = """
import errno, mmap, sys
from understudy.devices import host_memory
before = host_memory.held_data_bytes()
reserved = mmap.mmap(-1, 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
host_memory.limit_data(before + 2**28)
held = bytearray(2**27)
try:
    bytearray(2**27)
    sys.exit("it got more than the limit")
except MemoryError:
    pass
shared = mmap.mmap(-1, 2**29)
host_memory.lift_data_limit()
bytearray(2**28)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process maps")
def test_a_limit_holds_for_what_is_private_and_reserved_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds")
def test_a_limit_below_what_a_process_holds_is_refused() -> None:
    with pytest.raises(UserError, match=r"a limit of 16 MiB is less than the [\d,]+ MiB that a process takes before"):
        CPU().limit_memory(2**24)


class Lengths:
    """A token cache of which nothing but lengths is asked."""

    lengths = np.array([40, 50, 60, 100, 30, 20])


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(out_of_memory.TokenCache, "open", lambda place: Lengths)
    recipe = recipe_with(
        {
            "strategy": {"kind": "ddp"},
            "training.micro_batch_tokens": 4096,
            "training.activation_checkpointing": "none",
            "training.global_batch_size": 4,
            "cluster.processes": 2,
        }
    )
    place = Path("x")
    return Job(recipe, SourceMap("r.yaml", {}), place, place, None, place, (), train=place, evaluation=None)


def short(tokens: int | None, *, trained: bool = True) -> Shortage:
    return Shortage(0, "a", 3 if trained else None, trained, tokens, "ran out of memory", Path("log"))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (1000, 500),  # half of what there really was, not of the budget
        (8000, 2048),
        (150, 100),  # an example is not cut
        (None, 100),  # two of the longest examples, a process's share of a step
    ],
)
def test_the_next_micro_batch_is_half_of_the_largest_that_there_was(
    job: Job, tokens: int | None, expected: int
) -> None:
    tried = smaller(job, short(tokens), may_checkpoint=True)
    assert tried is not None
    assert tried.training.micro_batch_tokens == expected
    assert tried.training.activation_checkpointing == "none"
    assert tried.training.global_batch_size == 4


def test_when_micro_batches_are_as_small_as_an_example_activations_are_recomputed(job: Job) -> None:
    tried = smaller(job, short(100), may_checkpoint=True)
    assert tried is not None
    assert tried.training.activation_checkpointing == "full"
    assert smaller(job, short(100), may_checkpoint=False) is None, "the recipe says none"
    assert smaller(job, short(None, trained=False), may_checkpoint=True) is None, "micro-batches are not to blame"


def test_what_was_learned_counts_for_the_same_settings_only(job: Job) -> None:
    machine = Machine(0, 2**34, 4)
    asked = job.recipe
    learned = smaller(job, short(4096), may_checkpoint=False)
    assert learned is not None
    lesson = learned_from(asked, machine, asked, learned)
    assert as_learned(asked, machine, lesson).training.micro_batch_tokens == 2048
    assert as_learned(asked, machine, None) == asked
    assert as_learned(asked, Machine(0, 2**35, 4), lesson) == asked
    for change in ({"micro_batch_tokens": 3000}, {"memory_limit": "20GiB"}, {"activation_checkpointing": "full"}):
        other = asked.model_copy(update={"training": asked.training.model_copy(update=change)})
        assert as_learned(other, machine, lesson) == other


def test_a_recipe_that_is_written_down_has_room_for_its_longest_example(job: Job) -> None:
    tried = smaller(job, short(150), may_checkpoint=False)
    assert tried is not None
    assert tried.data.max_length == 2048
    assert readable(tried).data.max_length == 100
    assert readable(job.recipe) == job.recipe
