"""What a run is planned for: so many devices of one kind, on so many hosts. Imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from understudy.errors import UserError
from understudy.plan.hardware.catalogue import Accelerator, Link, accelerators, links
from understudy.recipe.sizes import bytes_of, is_size

__all__ = ["Hardware", "local_hardware", "parse_hardware", "processor"]

_GIBIBYTE = 2**30
_COUNTED = re.compile(r"\s*(?:(\d+)\s*[x×*]\s*)?(.*?)\s*", re.IGNORECASE)
_MAKERS = re.compile(
    r"nvidia|amd|huawei|ascend|geforce|instinct|tesla|quadro|rtx|hbm\d?e?|sxm\d?|pcie|oam", re.IGNORECASE
)
_MEMORY = re.compile(r"(\d+)\s*gi?b", re.IGNORECASE)
_CPU_CONTEXT_BYTES = 450 * 2**20
"""Resident code and libraries of a training process: PyTorch, transformers, the data's index."""
_CPU_CORES = 8
_FLOPS_A_CORE = 1.5e11
"""fp32, of matrix products on one core with 512-bit units at 2.4 GHz. Passes of decoders of 5 to 21 million parameters
reached 87 to 100 billion of them on the machines that run the tests; cores with 256-bit units have half."""
_BANDWIDTH_A_CORE = 1.0e10
_ACCELERATED_PROCESS_BYTES = 3 * _GIBIBYTE
"""Host memory of a process that drives an accelerator: the driver's mappings, PyTorch, transformers."""


@dataclass(frozen=True)
class Hardware:
    """`nodes` hosts with `devices_per_node` devices each; one process drives one device."""

    accelerator: Accelerator
    devices_per_node: int
    nodes: int
    network: Link
    """Between hosts, for each device."""
    host_bytes: int
    """Memory of one host; 0 where it is not known."""
    process_bytes: int
    """Host memory of a process before it holds anything."""

    @property
    def devices(self) -> int:
        return self.devices_per_node * self.nodes

    @property
    def accelerated(self) -> bool:
        return self.accelerator.api != "cpu"

    @property
    def name(self) -> str:
        return self.accelerator.name

    def described(self) -> str:
        """`8 × A100-80GB`, with the number of hosts where there are several."""
        hosts = f" on {self.nodes} hosts" if self.nodes > 1 else ""
        return f"{self.devices} × {self.name}{hosts}"


def parse_hardware(text: str, *, nodes: int = 1, processes: int | None = None) -> Hardware:
    """`8xA100-80GB`, `4x910B-64GB`, `cpu:24GiB`, `8xH100@EFA`: devices of one host, of which there are `nodes`.

    Of those that are counted `processes` are used, all when None; without a count it is `processes`, else 1. `cpu:` is
    followed by the memory that one process may take, `@` by the
    link between hosts where it is not the usual one. Raises `UserError`, with the nearest name, for what is not in the
    catalogue.
    """
    machine, at, network = text.partition("@")
    counted = _COUNTED.fullmatch(machine)
    count, name = (counted[1], counted[2]) if counted else (None, machine)
    devices = int(count) if count else processes or 1
    if not 1 <= devices <= 1024 or not 1 <= nodes <= 1024:
        raise UserError(f"{text!r:.60} is {devices} devices; plan for 1 to 1024 of them on a host.")
    if count and processes is not None and processes > devices:
        raise UserError(
            f"the recipe starts {processes} processes on each host (`cluster.processes`), and {text!r:.60} has "
            f"{devices} devices there; make them agree."
        )
    devices = processes if count and processes is not None else devices
    kind, colon, size = name.partition(":")
    if kind.strip().lower() == "cpu":
        room = bytes_of(size) if colon and is_size(size) else None
        if not room:
            raise UserError(f"{text!r:.60} does not say how much memory a process may take; write cpu:24GiB.")
        found = _on_host(processor(room), devices, nodes, host_bytes=room * devices)
    else:
        accelerator = _named(name)
        if accelerator is None:
            raise UserError(f"there is no {name!r:.60} in the catalogue of accelerators; {_suggestion(name)}")
        found = _on_host(accelerator, devices, nodes, host_bytes=0)
    return replace(found, network=_network(network)) if at else found


def local_hardware(
    name: str,
    devices: int,
    device_bytes: int,
    host_bytes: int,
    cores: int,
    processes: int | None,
    *,
    free_bytes: int | None = None,
) -> Hardware:
    """This machine: `devices` accelerators that call themselves `name` and have `device_bytes` each, or its processor
    where there are none, of which `processes` are used. A processor's programs can have `free_bytes` of `host_bytes`,
    all of them when None."""
    if devices:
        used = min(processes or devices, devices)
        sized = f"{name} {round(device_bytes / _GIBIBYTE)}GB"
        found = _named(name) or _named(sized) or _generic(name, device_bytes)
        if device_bytes:
            found = replace(found, usable_bytes=min(device_bytes, found.usable_bytes))
        return _on_host(found, used, 1, host_bytes=host_bytes)
    used, free = processes or 1, host_bytes if free_bytes is None else free_bytes
    found = replace(processor(host_bytes // used, max(1, cores // used)), usable_bytes=free // used)
    return _on_host(found, used, 1, host_bytes=free)


def processor(room: int, cores: int = _CPU_CORES) -> Accelerator:
    """A processor as a device that has `room` bytes and so many cores."""
    rate, memory = _FLOPS_A_CORE * cores, links()["shared memory"]
    return Accelerator(
        name="cpu",
        api="cpu",
        capability=0.0,
        device_bytes=room,
        usable_bytes=room,
        bf16=rate / 2,  # most processors multiply bf16 in fp32 units
        fp16=rate / 4,
        fp32=rate,
        memory_bandwidth=min(_BANDWIDTH_A_CORE * cores, 1.0e11),
        link=memory,
        host_link=memory,
        context_bytes=_CPU_CONTEXT_BYTES,
        matmul=0.6,
        source="measured on the machines that run the tests",
    )


def _on_host(accelerator: Accelerator, devices: int, nodes: int, *, host_bytes: int) -> Hardware:
    network = {"cuda": "IB-400", "npu": "RoCE-200", "cpu": "Ethernet-100"}[accelerator.api]
    if accelerator.link.name.startswith("PCIe"):
        network = "Ethernet-100"  # hosts without a link between their devices seldom have one between hosts
    process = _ACCELERATED_PROCESS_BYTES if accelerator.api != "cpu" else 0
    return Hardware(accelerator, devices, nodes, links()[network], host_bytes, process)


def _network(name: str) -> Link:
    known = {key.lower(): link for key, link in links().items() if link.between_hosts}
    link = known.get(name.strip().lower())
    if link is None:
        near = difflib.get_close_matches(name.strip().lower(), known, n=1)
        meant = (
            f"did you mean {known[near[0]].name}?" if near else f"it has {', '.join(x.name for x in known.values())}."
        )
        raise UserError(f"there is no link {name!r:.60} between hosts in the catalogue; {meant}")
    return link


def _generic(name: str, device_bytes: int) -> Accelerator:
    """What is not in the catalogue: the rates of its smallest entry with as much memory, so that no plan promises more
    speed than there is."""
    known = sorted(
        accelerators().values(), key=lambda one: (not one.bf16, abs(one.device_bytes - device_bytes), one.fp16)
    )
    return replace(known[0], name=name.strip() or "accelerator", device_bytes=device_bytes, usable_bytes=device_bytes)


def _named(name: str) -> Accelerator | None:
    """By the catalogue's name, however it is spelled, or by the one that a driver gives."""
    known, asked = accelerators(), _plain(name)
    for key, accelerator in known.items():
        if asked == _plain(key):
            return accelerator
    memory = _MEMORY.search(name)
    bare = _plain(_MEMORY.sub("", name))
    kin = [one for key, one in known.items() if bare and bare == _plain(_MEMORY.sub("", key))]
    if memory is not None:
        # Drivers and sellers round: 79 GiB, 80 GB.
        kin = [one for one in kin if abs(one.device_bytes / _GIBIBYTE - int(memory[1])) <= 3]
    elif bare == "910b":
        return known["910B-64GB"]
    return kin[0] if len(kin) == 1 else None


def _suggestion(name: str) -> str:
    known, asked = list(accelerators()), _plain(_MEMORY.sub("", name))
    bare = {key: _plain(_MEMORY.sub("", key)) for key in known}
    near = [key for key in known if asked and bare[key].startswith(asked)]
    if not near:
        close = difflib.get_close_matches(asked, list(dict.fromkeys(bare.values())), n=2)
        near = sorted((key for key in known if bare[key] in close), key=lambda key: close.index(bare[key]))
    if (memory := _MEMORY.search(name)) and (alike := [key for key in near if key.endswith(f"-{memory[1]}GB")]):
        near = alike
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"it has {', '.join(known)}, and cpu:SIZE."


def _plain(name: str) -> str:
    """Without makers, forms and punctuation: `NVIDIA A100-SXM4-80GB` and `A100-80GB` are one."""
    plain = re.sub(r"[^a-z0-9]", "", _MAKERS.sub("", name).lower())
    # Ascend's tool says which bin of a chip it is: 910B3, 910_9392 (a die of a 910C).
    return re.sub(r"^91093\d*", "910c", re.sub(r"^910b\d(?!\d)", "910b", plain))
