"""Whether every host that is listed can take part in a run. Imports no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from understudy.errors import LostProcessError, UnderstudyError, UserError
from understudy.launch.hostfile import ListedHost
from understudy.launch.ssh import SshLauncher

__all__ = ["UnfitHostsError", "check_hosts"]

CHECK_SECONDS = 60.0
CONNECTIONS = 32
SSH_FAILED = 255
SAME = ("understudy", "Python", "torch", "transformers", "deepspeed", "recipe")


class UnfitHostsError(UnderstudyError):
    """Hosts cannot take part: a line for each reason, with the status of the first."""

    def __init__(self, errors: Sequence[UnderstudyError]) -> None:
        super().__init__("\n".join(dict.fromkeys(str(error) for error in errors)))
        self.exit_status = errors[0].exit_status


def check_hosts(
    launcher: SshLauncher, hosts: Sequence[ListedHost], recipe: str, ours: Mapping[str, str | None]
) -> None:
    """Asks all of them at once. Raises `UnfitHostsError` where one cannot be reached or differs from `ours`."""
    if shutil.which("ssh") is None:
        raise UserError("there is no ssh here; install OpenSSH's client, or start `understudy train` on each host.")
    ask = partial(_facts, launcher, recipe, hosts[0])
    with ThreadPoolExecutor(min(len(hosts), CONNECTIONS)) as pool:
        told = dict(zip(hosts, pool.map(ask, hosts)))
    found: list[UnderstudyError] = []
    machines: dict[str, ListedHost] = {}
    for host, theirs in told.items():
        if isinstance(theirs, UnderstudyError):
            found.append(theirs)
        elif (machine := theirs["machine"]) is not None and (other := machines.setdefault(machine, host)) != host:
            found.append(
                UserError(f"{other.name} and {host.name} are one host; give it one line, with all of its slots.")
            )
        elif (problem := _difference(host, hosts[0], launcher, recipe, ours, theirs)) is not None:
            found.append(problem)
    if found:
        raise UnfitHostsError(found)


def _facts(
    launcher: SshLauncher, recipe: str, first: ListedHost, host: ListedHost
) -> Mapping[str, str | None] | UnderstudyError:
    command = launcher.check(host, recipe, first)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHECK_SECONDS,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return LostProcessError(f"{host.name} does not answer within {CHECK_SECONDS:.0f} s, though ssh reached it.")
    if done.returncode == SSH_FAILED:
        return _unreached(host, done.stderr)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return UserError(
            f"{host.name}: {launcher.python} cannot run understudy there ({last}); every host needs the same Python "
            "environment at the same path."
        )
    # What a shell's start-up files print comes before.
    facts: dict[str, str | None] = json.loads(done.stdout[done.stdout.rindex("{") :])
    return facts


def _unreached(host: ListedHost, said: str) -> UnderstudyError:
    last = (said.strip().splitlines() or ["ssh failed"])[-1]
    if "Host key verification failed" in said:
        changed = "REMOTE HOST IDENTIFICATION HAS CHANGED" in said or "has changed" in said
        why = "is not the one that is known" if changed else "is not known"
        return UserError(
            f"{host.name}: its host key {why}; make sure of the host, then correct known_hosts (`ssh {host.target}` "
            "shows how)."
        )
    if "Could not resolve hostname" in said:
        return UserError(f"{host.name}: there is no host of this name; correct the hostfile.")
    if "Permission denied" in said:
        return UserError(f"{host.name}: it lets nobody in without a password ({last}); install a key with ssh-copy-id.")
    if "command-line" in said or "Bad configuration option" in said:
        return UserError(f"ssh does not take its options ({last}); correct --ssh-option.")
    return LostProcessError(
        f"{host.name} cannot be reached ({last}); see that it is up and that sshd answers there, or take it out of the "
        "hostfile."
    )


def _difference(
    host: ListedHost,
    first: ListedHost,
    launcher: SshLauncher,
    recipe: str,
    ours: Mapping[str, str | None],
    theirs: Mapping[str, str | None],
) -> UserError | None:
    if theirs["directory"] is None:
        return UserError(f"{host.name} has no directory {launcher.directory}; every host must see it.")
    for name in SAME:
        here, there = ours[name], theirs[name]
        if here == there:
            continue
        if name == "recipe":
            what = "is not there" if there is None else f"differs there (SHA-256 {there:.12}, here {here:.12})"
            return UserError(f"{recipe} {what}: {host.name} must see the same file.")
        return UserError(
            f"{host.name} has {name} {there or 'not installed'}, and this host {here or 'none'}; every host needs the "
            "same versions."
        )
    if host == first:
        if (why := theirs["why the port is not free"]) is None:
            return None
        return UserError(
            f"{host.name} cannot open port {launcher.port}, where the hosts are to meet ({why}); choose another one "
            "with --port, or end what uses it."
        )
    address = theirs["first host"]
    if address is None:
        return UserError(f"{host.name} does not know the name {first.name}; list the first host by its address.")
    if address.startswith("127."):
        return UserError(
            f"{first.name} is {host.name} itself there; list the first host by a name or address that leads to it from "
            "every host."
        )
    return None
