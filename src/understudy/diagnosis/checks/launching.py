"""Environment variables that change how a run starts or how fast it is, and were not meant to."""

from __future__ import annotations

from understudy.devices.detect import hidden_devices
from understudy.diagnosis.check import Finding, Host, broken, check, ok, warning
from understudy.errors import UserError
from understudy.recipe.environment import debugging_variables, launcher_variables, process_environment


@check("launcher-variables")
def launcher_variables_agree(host: Host) -> Finding:
    """Whether a run that is started here takes itself for one process of many, and should."""
    variables, launched = launcher_variables()
    listed = ", ".join(f"{name}={value}" for name, value in variables.items())
    unset = f"Unset them: `unset {' '.join(variables)}`."
    try:
        place = process_environment()
    except UserError as error:
        fix = "Have the launcher, or the script that calls it, set what is named." if launched else unset
        return broken(str(error), fix, **variables)
    if place is None:
        lone = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in variables]
        if lone:
            return warning(f"{', '.join(lone)} set, but not what a launcher sets beside", unset, **variables)
        return ok("none that matters is set; `understudy train` starts its processes itself", **variables)
    of = f"process {place.rank} of {place.world_size}"
    if place.local_rank >= place.local_world_size or place.local_world_size > place.world_size:
        return broken(
            f"they contradict each other: local rank {place.local_rank}, {place.local_world_size} processes on this "
            f"host, {place.world_size} in all",
            unset,
            **variables,
        )
    if launched:
        return ok(f"a launcher started this as {of}", **variables)
    fix = f"{unset} If a launcher of yours did set them, all is well."
    return warning(f"{listed}: `understudy train` will take itself for {of} and start no others", fix, **variables)


@check("hidden-devices")
def devices_hidden(host: Host) -> Finding:
    hidden = hidden_devices(host.root)
    if not hidden:
        return ok("no accelerator is hidden")
    listed = " and ".join(f"{name} hides {count} accelerators" for name, count in hidden.items())
    return warning(listed, f"If that is not meant, unset {' and '.join(hidden)}.", **hidden)


@check("debugging-variables")
def debugging(host: Host) -> Finding:
    found = debugging_variables()
    if not found:
        return ok("none is set that slows runs down")
    listed = "; ".join(f"{setting} {effect}" for setting, effect in found.items())
    names = " ".join(setting.partition("=")[0] for setting in found)
    return warning(listed, f"When you are done debugging, `unset {names}`.", variables=list(found))
