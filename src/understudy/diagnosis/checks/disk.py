"""Directories that a run writes to: whether it may, how much room they have, and how fast their disks are."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from understudy.diagnosis.check import Finding, Host, all_of, broken, check, ok, warning
from understudy.diagnosis.sizes import GIB, KIB, MIB, shown
from understudy.errors import is_full_disk
from understudy.recipe.environment import cache_directory

WRITTEN_BYTES = 32 * MIB
SYNCS = 5
LEAST_BYTES, LITTLE_BYTES = 256 * MIB, 20 * GIB
"""Less than the first is as good as full; a checkpoint of 1 B parameters takes some 12 GB with its moments."""
SLOW_BYTES_PER_SECOND = 50 * MIB
SLOW_SYNC_SECONDS = 0.25
NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|afs|9p|ncpfs|lustre|gpfs|beegfs|ceph|wekafs|fuse\.(sshfs|glusterfs|ceph|s3fs|.*nfs)"
)
"""Types of file systems that lie on other machines."""
SECONDS = 60.0
STUCK = "Its disk or its file server does not answer; name a directory on another one"
ELSEWHERE = "name a directory on another disk in"


@check("cache-directory", seconds=SECONDS, alone=True, if_lost=f"{STUCK} in UNDERSTUDY_CACHE.")
def cache(host: Host) -> Finding:
    """Where prepared data, compiled operators and converted weights are kept."""
    directory = cache_directory()
    findings = [_tried(directory, broken, f"{ELSEWHERE} UNDERSTUDY_CACHE")]
    if (kind := network_type(directory, host.root)) is not None:
        findings.append(
            warning(
                f"it is on a network file system ({kind})",
                "Processes of several hosts can share it so, but wait for it; for speed, name a directory on a local "
                "disk in UNDERSTUDY_CACHE.",
            )
        )
    return all_of(findings)


@check("working-directory", seconds=SECONDS, alone=True, if_lost=f"{STUCK} as `output_dir`.")
def working(host: Host) -> Finding:
    """Where runs are written to, unless a recipe says otherwise."""
    return _tried(Path.cwd(), warning, "run from another directory, or name one as `output_dir`")


@check("temporary-directory", seconds=SECONDS, if_lost=f"{STUCK} in TMPDIR.")
def temporary(host: Host) -> Finding:
    """Where compilers and processes that find each other write."""
    return _room(Path(tempfile.gettempdir()), "the disk of temporary files", GIB, f"{ELSEWHERE} TMPDIR")


def network_type(directory: Path, root: Path = Path("/")) -> str | None:
    """The type of the file system that `directory` is on, or will be once it is made, when it lies on another machine.
    None elsewhere, and where the system does not tell (proc(5), mountinfo)."""
    try:
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    path = os.path.realpath(directory)
    best, kind = "", ""
    for line in mounts:
        before, _, after = line.partition(" - ")
        mounted = before.split(" ")[4].replace("\\040", " ")
        inside = path == mounted or path.startswith(mounted.rstrip("/") + "/")
        if inside and len(mounted) >= len(best):  # a later one hides an earlier one of the same place
            best, kind = mounted, after.split(" ")[0]
    return kind if NETWORK.fullmatch(kind) else None


def _tried(directory: Path, unwritable: Callable[..., Finding], elsewhere: str) -> Finding:
    """Whether it can be written to, with what room, and how fast. Nothing stays behind."""
    try:
        place = directory
        while not place.exists() and place != place.parent:  # it is made once it is needed
            place = place.parent
        room = _room(place, str(directory), LITTLE_BYTES, elsewhere)
        if room.status == "broken":
            return room
        bytes_per_second, sync_seconds = _speed(place)
    except OSError as error:
        if is_full_disk(error):
            return broken(
                f"{directory}: no space is left on its disk", f"Free some, or {elsewhere}.", path=str(directory)
            )
        return unwritable(
            f"{directory} cannot be written to ({error.strerror})",
            f"Let this user write there, or {elsewhere}.",
            path=str(directory),
        )
    details = {"path": str(directory), "bytes_per_second": bytes_per_second, "sync_seconds": sync_seconds}
    found = f"writes {shown(bytes_per_second)}/s, waits {sync_seconds * 1000:.1f} ms for the disk"
    if bytes_per_second < SLOW_BYTES_PER_SECOND or sync_seconds > SLOW_SYNC_SECONDS:
        fix = f"Checkpoints will take their time; {elsewhere}."
        return all_of([room, warning(f"it {found}, which is slow", fix, **details)])
    return all_of([room, ok(f"it {found}", **details)])


def _speed(directory: Path) -> tuple[float, float]:
    """Bytes a second written in one go and brought to the disk, and the median of the seconds that a small write takes
    to get there."""
    block = os.urandom(MIB)  # a disk that compresses has nothing to win
    with tempfile.TemporaryFile(dir=directory) as file:
        began = time.monotonic()
        for _ in range(WRITTEN_BYTES // MIB):
            file.write(block)
        os.fsync(file.fileno())
        written_seconds = time.monotonic() - began
        syncs = []
        for _ in range(SYNCS):
            began = time.monotonic()
            os.pwrite(file.fileno(), block[: 4 * KIB], 0)
            os.fsync(file.fileno())
            syncs.append(time.monotonic() - began)
    return WRITTEN_BYTES / written_seconds, sorted(syncs)[SYNCS // 2]


def _room(place: Path, named: str, little_bytes: int, elsewhere: str) -> Finding:
    free = shutil.disk_usage(place).free
    found, fix = f"{named} has {shown(free)} free", f"Free some, or {elsewhere}."
    if free < LEAST_BYTES:
        return broken(found, fix, free_bytes=free)
    if free < little_bytes:
        return warning(found, fix, free_bytes=free)
    return ok(found, free_bytes=free)
