"""Cores, and the threads that are to run on them."""

from __future__ import annotations

from understudy.diagnosis.check import Finding, Host, broken, check, ok, warning
from understudy.errors import UserError
from understudy.recipe.environment import chosen_threads

UNSET = "Unset OMP_NUM_THREADS, so that the cores are shared out among the processes; to choose, set it to a number."


@check("threads", seconds=60, if_lost="See whether the vendor's tool, nvidia-smi or npu-smi, answers.")
def threads(host: Host) -> Finding:
    """Runs in a process of its own, because counting devices may ask a driver."""
    machine = host.machine
    cores = f"{machine.cores} core{'s' if machine.cores > 1 else ''}"
    try:
        chosen = chosen_threads()
    except UserError as error:
        return broken(str(error), UNSET)
    details = {"cores": machine.cores, "omp_num_threads": chosen}
    if chosen is None:
        return ok(f"{cores}, shared out among the processes of a run", **details)
    if chosen < 1:
        return broken(f"OMP_NUM_THREADS is {chosen}", UNSET, **details)
    processes = machine.devices or host.processes or 1
    wanted = chosen * processes
    each = f"OMP_NUM_THREADS gives each process {chosen}"
    if wanted > machine.cores:
        times = f" × {processes} processes" if processes > 1 else ""
        return warning(f"{cores}, and {each}{times}; threads will wait for each other", UNSET, **details)
    return ok(f"{cores}; {each}", **details)
