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
    """Hosts cannot take part: a line for each, with the status of the first."""

    def __init__(self, errors: Sequence[UnderstudyError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.exit_status = errors[0].exit_status


def check_hosts(
    launcher: SshLauncher, hosts: Sequence[ListedHost], recipe: str, ours: Mapping[str, str | None]
) -> None:
    """Asks all of them at once. Raises `UnfitHostsError` where one cannot be reached or differs from `ours`."""
    if shutil.which("ssh") is None:
        raise UserError("there is no ssh here; install OpenSSH's client, or start `understudy train` on each host.")
    check = partial(_problem, launcher, recipe, hosts[0], ours)
    with ThreadPoolExecutor(min(len(hosts), CONNECTIONS)) as pool:
        problems = list(pool.map(check, hosts))
    if found := [problem for problem in problems if problem is not None]:
        raise UnfitHostsError(found)


def _problem(
    launcher: SshLauncher, recipe: str, first: ListedHost, ours: Mapping[str, str | None], host: ListedHost
) -> UnderstudyError | None:
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
    return _difference(host, first, launcher, recipe, ours, json.loads(done.stdout[done.stdout.rindex("{") :]))


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
    return LostProcessError(f"{host.name} cannot be reached ({last}).")


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
    if theirs["first host"] is None:
        return UserError(f"{host.name} does not know the name {first.name}; list the first host by its address.")
    return None
