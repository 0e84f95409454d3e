"""A real Slurm of two hosts on this machine: munged, slurmctld and two slurmd with ports of their own, as this user."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

NEEDED = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}
SYSTEM = "/usr/sbin:/sbin:/usr/bin:/bin"
SECONDS = 30.0
CONFIGURATION = """\
ClusterName=understudy
FirstJobId={control}
SlurmctldHost=localhost
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={scratch}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={scratch}/state
SlurmdSpoolDir={scratch}/spool-%n
SlurmctldPidFile={scratch}/slurmctld.pid
SlurmdPidFile={scratch}/slurmd-%n.pid
SlurmctldLogFile={scratch}/slurmctld.log
SlurmctldDebug=debug
SlurmdLogFile={scratch}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=5
OverTimeLimit=0
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobRequeue=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=4 Boards=1 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=4 Boards=1 RealMemory=1000
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=60 OverSubscribe=EXCLUSIVE MaxTime=INFINITE
PartitionName=high Nodes=n[1-2] PriorityTier=2 OverSubscribe=EXCLUSIVE PreemptMode=OFF
"""


@dataclass
class Slurm:
    """The cluster, while `slurm` is inside."""

    scratch: Path
    daemons: dict[str, subprocess.Popen[bytes]]

    @property
    def environment(self) -> dict[str, str]:
        """By which its commands find it."""
        return {**os.environ, "SLURM_CONF": str(self.scratch / "slurm.conf")}

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, identifier: str) -> dict[str, str]:
        told = self.run("scontrol", "--oneliner", "show", "job", identifier)
        return dict(field.split("=", 1) for field in told.split() if "=" in field)

    def wait_for(self, identifier: str, *states: str, seconds: float = 120.0) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while (fields := self.job(identifier))["JobState"] not in states:
            assert time.monotonic() < deadline, fields
            time.sleep(0.2)
        return fields

    def is_told(self, words: str, identifier: str) -> bool:
        """Whether the controller has logged `words` and the job since it last gave hosts to the job."""
        log = (self.scratch / "slurmctld.log").read_text(errors="replace")
        begun = log[max(log.rfind(f"{how} JobId={identifier} ") for how in ("Allocate", "Started")) :]
        return any(words in line and f"JobId={identifier}" in line.split() for line in begun.splitlines())

    def kill_host(self, name: str) -> None:
        """Ends a host's slurmd and all it started, as a crash of the host does: none tells of another's end."""
        found = list(self._processes())
        tasks = {pid: parent for pid, parent, of_host in found if of_host == name}
        managers = {pid for pid, _, _ in found if pid in tasks.values() and _command(pid).startswith("slurmstepd")}
        _kill({self.daemons[name].pid, *tasks, *managers})
        self.daemons[name].wait()

    def kill_rest(self) -> None:
        """Ends what is left of jobs."""
        _kill({pid for pid, _, _ in self._processes() if _command(pid).startswith("slurmstepd")})

    def _processes(self) -> Iterator[tuple[int, int, str]]:
        """Those of this cluster, each with its parent and, where it belongs to one, its host."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if f"SLURM_CONF={self.scratch / 'slurm.conf'}" in variables:
                named = [text.partition("=")[2] for text in variables if text.startswith("SLURMD_NODENAME=")]
                yield int(entry.name), parent, named[0] if named else ""

    def start_host(self, name: str) -> None:
        self.daemons[name] = _start(["slurmd", "-D", "-N", name], self.environment, self.scratch / f"{name}.out")


@contextmanager
def slurm(scratch: Path) -> Iterator[Slurm]:
    """Gone with all that runs on it when it is left. Skips the test where it cannot be had; in CI fails it."""
    lacking = sorted({package for program, package in NEEDED.items() if shutil.which(program, path=SYSTEM) is None})
    if lacking:
        why = f"this machine lacks {', '.join(lacking)} (make system-packages)"
        assert not os.environ.get("CI"), why
        pytest.skip(why)
    scratch.mkdir(parents=True, exist_ok=True)
    scratch.chmod(0o755)
    (scratch / "state").mkdir()
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    control, first, second = _free_ports(3)
    text = CONFIGURATION.format(scratch=scratch, user=user, control=control, first=first, second=second)
    (scratch / "slurm.conf").write_text(text)
    made = Slurm(scratch, {})
    key = scratch / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    with ExitStack() as stack:
        stack.callback(_stop, made)
        own = [
            f"--{name}={scratch}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file", "seed-file")
        ]
        made.daemons["munged"] = _start(
            ["munged", "-F", "--force", f"--key-file={key}", *own], made.environment, scratch / "munged.out"
        )
        _wait(lambda: (scratch / "munge.socket").exists(), scratch)
        made.daemons["slurmctld"] = _start(["slurmctld", "-D", "-i"], made.environment, scratch / "slurmctld.out")
        for name in ("n1", "n2"):
            (scratch / f"spool-{name}").mkdir()
            made.start_host(name)
        _wait(lambda: _idle(made) == ["idle", "idle"], scratch)
        yield made


def _idle(made: Slurm) -> list[str]:
    command = ["sinfo", "-h", "-N", "-p", "low", "-o", "%T"]
    return subprocess.run(command, env=made.environment, capture_output=True, text=True).stdout.split()


def _wait(ready: object, scratch: Path) -> None:
    assert callable(ready)
    deadline = time.monotonic() + SECONDS
    while not ready():
        logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in scratch.glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.1)


def _start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    program = shutil.which(command[0], path=SYSTEM)
    assert program is not None
    with log.open("ab") as file:
        return subprocess.Popen(
            [program, *command[1:]], env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


def _stop(made: Slurm) -> None:
    subprocess.run(["scancel", "--state=RUNNING"], env=made.environment, capture_output=True, timeout=SECONDS)
    for name in ("n1", "n2"):
        if name in made.daemons and made.daemons[name].poll() is None:
            made.kill_host(name)
    made.kill_rest()
    for daemon in made.daemons.values():
        daemon.kill()
        daemon.wait()


def _kill(pids: Iterable[int]) -> None:
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
