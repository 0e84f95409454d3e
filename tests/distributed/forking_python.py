"""A Python for each of `hosts` that forks what it is to run from a process that has imported all it needs.

In front of the real one on every host: whoever starts `sys.executable -m MODULE …` there, over ssh or as a launcher of
processes, gets a small program that has the host's server fork MODULE, with its descriptors, directory and environment;
passes signals on; ends as it ends; and when it is killed, so is what was forked. Any other module, the keeper of a
connection for one, is started as it always is.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import runpy
import selectors
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.distributed.forked import become, start_forked, status_of

FORKED = (
    *("understudy", "torch.distributed.run", "accelerate.commands.launch"),
    *("deepspeed.launcher.runner", "deepspeed.launcher.launch"),
)
SITE = "import sys\n\nsys.executable = {program!r}\n"
PROGRAM = """\
#!{python} -S
import json, os, signal, socket, sys

arguments = [word for word in sys.argv[1:] if word != "-u"]
server = os.path.join({directory!r}, os.uname().nodename)
if arguments[:1] != ["-m"] or arguments[1] not in {forked!r} or arguments[1:3] == ["understudy", "launch"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
line = socket.socket(socket.AF_UNIX)
line.connect(server)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: line.send(bytes([number])))
told = json.dumps([arguments[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(line, [len(told).to_bytes(4, "big")], [0, 1, 2])
line.sendall(told)
status = int.from_bytes(line.recv(2), "big", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextmanager
def forking_python(directory: Path, sshd: Mapping[str, int]) -> Iterator[tuple[Path, Path, tuple[int, ...]]]:
    """Its program, the directory that makes it everybody's who has that in PYTHONPATH, and the processes of the hosts'
    servers. `sshd` are the hosts' names, each with a process there."""
    program, site = directory / "python", directory / "site"
    site.mkdir(parents=True)
    values = {"python": sys.executable, "directory": str(directory), "forked": FORKED}
    program.write_text(PROGRAM.format(**values))
    program.chmod(0o755)
    (site / "sitecustomize.py").write_text(SITE.format(program=str(program)))
    with ExitStack() as stack:
        servers: list[int] = []
        for name, process in sshd.items():
            listening = socket.socket(socket.AF_UNIX)
            stack.enter_context(listening)
            listening.bind(str(directory / name))
            listening.listen(64)
            server = start_forked(_serve, process, listening, str(program))
            stack.callback(server.join)
            stack.callback(server.kill)
            assert server.pid is not None
            servers.append(server.pid)
        yield program, site, tuple(servers)


def _serve(host: int, listening: socket.socket, program: str) -> None:
    """Forks, on the host of the process `host`, whatever comes in, until it is killed."""
    enter(host)
    sys.executable = program
    fork = multiprocessing.get_context("fork")
    started: dict[int, tuple[BaseProcess, socket.socket]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listening:
                    line, _ = listening.accept()
                    *what, descriptors = _received(line)
                    process = fork.Process(target=_run, args=(*what, descriptors))
                    process.start()
                    for descriptor in descriptors:
                        os.close(descriptor)
                    started[process.sentinel] = started[line.fileno()] = (process, line)
                    selector.register(process.sentinel, selectors.EVENT_READ)
                    selector.register(line, selectors.EVENT_READ)
                    continue
                process, line = started[key.fd]
                if key.fd == process.sentinel:
                    process.join()
                    with suppress(OSError):  # who asked was killed
                        line.send((process.exitcode or 0).to_bytes(2, "big", signed=True))
                    for end in (process.sentinel, line.fileno()):
                        selector.unregister(end)
                        del started[end]
                    line.close()
                    process.close()
                elif process.pid is not None:
                    number = line.recv(1)
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, number[0] if number else 9)
                    if not number:
                        process.join()


def _received(line: socket.socket) -> tuple[Any, ...]:
    size, descriptors, _, _ = socket.recv_fds(line, 4, 3)
    told = b""
    while len(told) < int.from_bytes(size, "big"):
        told += line.recv(2**16)
    return (*json.loads(told), descriptors)


def _run(arguments: Sequence[str], directory: str, variables: dict[str, str], descriptors: Sequence[int]) -> None:
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(directory)
    become(variables)
    module, *others = arguments
    if module == "understudy":
        sys.exit(status_of(others))
    sys.argv = [module, *others]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def enter(process: int) -> None:
    """Joins the network, the name and the files of another process's host."""
    system = ctypes.CDLL(None, use_errno=True)
    descriptors = [os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "mnt")]
    for descriptor in descriptors:
        if system.setns(descriptor, 0) != 0:
            raise OSError(ctypes.get_errno(), "setns failed")
        os.close(descriptor)
