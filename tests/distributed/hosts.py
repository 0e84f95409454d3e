"""Several hosts on this machine: network namespaces with addresses and names of their own, and a real `sshd` in each.

The disk and the process ids are one machine's. The hosts hang on a switch, a bridge in a namespace of its own, so that
nothing is changed outside and tests that run at once do not meet. As in many distributions a host's own name leads to
127.0.1.1 there, which is no address that its peers could use.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.forking_python import forking_python
from tests.distributed.small_run import environment

PREFIX = "understudy-"
NETWORK = "10.77.0"
NEEDED = {"ip": "iproute2", "unshare": "util-linux", "ssh": "openssh-client", "sshd": "openssh-server"}
SYSTEM = "/usr/sbin:/sbin:/usr/bin:/bin"
SECONDS = 30.0
SSHD = """\
Port 22
HostKey {keys}/{name}
AuthorizedKeysFile {keys}/user.pub
PidFile none
StrictModes no
PasswordAuthentication no
PermitRootLogin yes
UsePAM yes
PrintMotd no
AcceptEnv HF_TOKEN UNDERSTUDY_*
"""


@dataclass(frozen=True)
class Host:
    """One host, while `hosts` is inside."""

    name: str
    address: str
    namespace: str
    switch: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs `arguments` there, in the environment that it is given."""
        renamed = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *arguments]
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *renamed]

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Starts `arguments` there, leading a session of their own. What they print goes to `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(arguments),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> dict[int, str]:
        """What runs there, apart from `sshd` itself: command lines by process id."""
        found = {}
        for pid in map(int, _ip("netns", "pids", self.namespace).split()):
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line and not line.startswith("sshd: "):
                    found[pid] = line
        return found

    def pull_cable(self) -> None:
        """From now on nothing reaches it, and nothing that it sends arrives."""
        _ip("-n", self.switch, "link", "set", self.name, "down")

    def plug_in_cable(self) -> None:
        """As it was at first."""
        _ip("-n", self.switch, "link", "set", self.name, "up")


@dataclass(frozen=True)
class Hosts:
    """Hosts that reach each other, by names and over ssh."""

    hosts: tuple[Host, ...]
    keys: Path
    servers: tuple[int, ...]
    """The process of each one's `sshd`."""
    python: Path
    """Starts what tests start often in a fraction of the time (`forking_python`);"""
    site: Path
    """in PYTHONPATH it does so for whoever starts Python there."""
    forking: tuple[int, ...]
    """What does that."""

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    @property
    def ssh_options(self) -> dict[str, str]:
        """What ssh is to be told to get in without a question, whoever runs it."""
        return {
            "IdentityFile": str(self.keys / "user"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.keys / "known_hosts"),
            "GlobalKnownHostsFile": "none",
            "StrictHostKeyChecking": "yes",
        }

    def environment(self, scratch: Path) -> dict[str, str]:
        """For what starts Python on the hosts."""
        inherited = environment(scratch)
        return {**inherited, "PYTHONPATH": f"{self.site}{os.pathsep}{inherited.get('PYTHONPATH', '')}".rstrip(":")}

    def launch(self, recipe: Path, lines: Sequence[str], more: Sequence[str] = ()) -> list[str]:
        """The command line that has any of them launch a run on the hosts of these lines of a hostfile."""
        hostfile = recipe.with_name("hostfile")
        hostfile.write_text("".join(f"{line}\n" for line in lines))
        options = [word for name, value in self.ssh_options.items() for word in ("--ssh-option", f"{name}={value}")]
        ours = [sys.executable, "-m", "understudy", "launch", str(recipe), "--hostfile", str(hostfile)]
        return [*ours, *more, *options]

    @contextmanager
    def shown(self, host: Host, file: Path, instead: Path) -> Iterator[None]:
        """Inside, whoever comes over ssh sees `instead` where `file` is on this host."""
        there = ["nsenter", "--target", str(self.servers[self.hosts.index(host)]), "--mount"]
        subprocess.run([*there, "mount", "--bind", str(instead), str(file)], check=True, timeout=SECONDS)
        try:
            yield
        finally:
            subprocess.run([*there, "umount", str(file)], check=True, timeout=SECONDS)

    def left(self) -> dict[str, str]:
        """What still runs on them, apart from `sshd` itself and what forks processes there."""
        return {
            f"{host.name} {pid}": line
            for host in self.hosts
            for pid, line in host.processes().items()
            if pid not in self.forking
        }

    def restore(self) -> None:
        """Has them as they were made."""
        for host in self.hosts:
            host.plug_in_cable()
        for process in self.left():
            with suppress(ProcessLookupError):
                os.kill(int(process.split()[1]), signal.SIGKILL)

    def wait_until_empty(self, seconds: float) -> None:
        """Fails when something still runs on a host after `seconds`."""
        deadline = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.05)


@contextmanager
def hosts(count: int, scratch: Path) -> Iterator[Hosts]:
    """`count` hosts, hostA, hostB …, with 10.77.0.1 and so on as addresses, gone with all that runs on them when it is
    left. Skips the test where that cannot be had, but in CI, which has all it needs, fails it."""
    if (why := _missing()) is not None:
        assert not os.environ.get("CI"), why
        pytest.skip(why)
    _remove_abandoned()
    keys = scratch / "keys"
    keys.mkdir(parents=True)
    own = f"{PREFIX}{os.getpid()}"
    switch = f"{own}-switch"
    made = tuple(
        Host(f"host{chr(ord('A') + i)}", f"{NETWORK}.{i + 1}", f"{own}-{chr(ord('a') + i)}", switch)
        for i in range(count)
    )
    with ExitStack() as stack:
        stack.callback(_remove, [*(host.namespace for host in made), switch])
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in made:
            _plug_in(host, made)
        _make_keys(keys, made)
        Path("/run/sshd").mkdir(exist_ok=True)
        servers = tuple(stack.enter_context(_sshd(host, keys)) for host in made)
        names = (host.name for host in made)
        forking = stack.enter_context(forking_python(scratch / "python", dict(zip(names, servers))))
        yield Hosts(made, keys, servers, *forking)


def _missing() -> str | None:
    lacking = [package for program, package in NEEDED.items() if shutil.which(program, path=SYSTEM) is None]
    if lacking:
        return f"this machine lacks {', '.join(lacking)} (make system-packages)"
    if os.geteuid() != 0:
        return "network namespaces are root's to make"
    made = subprocess.run(["unshare", "--net", "--uts", "ip", "link", "add", "type", "veth"], capture_output=True)
    return None if made.returncode == 0 else f"there are no network namespaces here: {made.stderr.decode().strip()}"


def _plug_in(host: Host, peers: Sequence[Host]) -> None:
    _ip("netns", "add", host.namespace)
    _ip("-n", host.switch, "link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("-n", host.switch, "link", "set", host.name, "master", "bridge", "up")
    _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", host.namespace, "link", "set", device, "up")
    # `ip netns exec` shows a process this directory's files in /etc.
    own = Path("/etc/netns", host.namespace)
    own.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}"]
    lines += [f"{peer.address} {peer.name}" for peer in peers if peer != host]
    (own / "hosts").write_text("".join(f"{line}\n" for line in lines))


def _make_keys(keys: Path, made: Sequence[Host]) -> None:
    known = []
    for name in ("user", *(host.name for host in made)):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
        subprocess.run(command, check=True, timeout=SECONDS)
    for host in made:
        kind, key, _ = (keys / f"{host.name}.pub").read_text().split(maxsplit=2)
        known.append(f"{host.name},{host.address} {kind} {key}\n")
    (keys / "known_hosts").write_text("".join(known))


@contextmanager
def _sshd(host: Host, keys: Path) -> Iterator[int]:
    configuration = keys / f"{host.name}.sshd"
    configuration.write_text(SSHD.format(keys=keys, name=host.name))
    log = keys / f"{host.name}.log"
    program = shutil.which("sshd", path=SYSTEM)
    assert program is not None
    environment = {"PATH": os.environ["PATH"]}
    server = host.start([program, "-D", "-e", "-f", str(configuration)], environment, log)
    try:
        deadline = time.monotonic() + SECONDS
        while "Server listening" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield server.pid
    finally:
        server.kill()
        server.wait()


def _remove_abandoned() -> None:
    """What a test left that was killed."""
    for name in _ip("netns", "list").split():
        own, _, pid = name.partition(PREFIX)
        pid = pid.partition("-")[0]
        if own == "" and pid.isdigit() and not Path("/proc", pid).exists():
            _remove([name])


def _remove(namespaces: Sequence[str]) -> None:
    there = {line.split()[0] for line in _ip("netns", "list").splitlines()}
    for name in namespaces:
        if name in there:
            for pid in _ip("netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", name)
        shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
