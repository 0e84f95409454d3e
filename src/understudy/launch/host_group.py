"""The hosts that run one job together, each with a launcher of its own: what they tell one another. Imports no torch.

Every launcher writes all that it has said under one key of a store that the first host keeps, once in a while, with a
count that moves as long as it lives; and reads what the others wrote. A thread does both, so that a network that is
gone holds up nobody.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from understudy.errors import LostHostError, StoppedError, UnderstudyError, UserError
from understudy.launch.cause import FailedRunError, Standing

__all__ = ["Alone", "Group", "HostGroup", "Store"]

TICK_SECONDS = 0.25
"""Between two exchanges with the store, which cannot wake anybody; who waits for one looks more often."""
LOST_SECONDS = 60.0
"""A host whose count stands still for so long while it prepares is lost. Loading libraries can hold it up."""
LOST_WHILE_RUNNING_SECONDS = 6.0
"""While its launcher only watches processes."""
FAREWELL_SECONDS = 3.0
"""For the others to hear the last that was said."""
REMIND_SECONDS = 30.0
MEETING_SECONDS = 1800.0
"""For a host that has not come yet."""


class Store(Protocol):
    """What a host keeps for all. Any call may raise, or never return, when that host is gone."""

    def set(self, key: str, value: str) -> Any: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class Group(Protocol):
    """What launchers of a job need of one another. All must call the same methods in the same order."""

    node: int
    members: tuple[int, ...]
    """The hosts that take part now, in order; the first one leads."""

    @property
    def leads(self) -> bool: ...

    def share(self, name: str, value: Any, check: Callable[[], None], *, tolerant: bool = False) -> dict[int, Any]:
        """What each member said under `name`, this one `value` (JSON), once all have; `check` is called meanwhile and
        may raise. Raises `UserError` when hosts disagree on how many and which they are, `FailedRunError` when another
        one gave up, `LostHostError` when one was lost; with `tolerant`, for after a failure, those are left out in
        place of that, and not waited for as long."""
        ...

    def drop(self, lost: Collection[int]) -> None:
        """Goes on without some members."""
        ...

    def lost(self, nodes: Collection[int]) -> LostHostError:
        """The error of hosts that are lost."""
        ...

    def trouble(self, attempt: int) -> UnderstudyError | None:
        """Why the processes of this attempt, which run now, cannot go on: those of another host failed, or it is
        lost."""
        ...

    def give_up(self, error: BaseException) -> None:
        """Tells the others that this host ends, and why."""
        ...


class Alone:
    """The only host of a job."""

    node = 0
    members: tuple[int, ...] = (0,)
    leads = True

    def share(self, name: str, value: Any, check: Callable[[], None], *, tolerant: bool = False) -> dict[int, Any]:
        return {0: value}

    def drop(self, lost: Collection[int]) -> None:
        assert not lost, "there is nobody to lose"

    def lost(self, nodes: Collection[int]) -> LostHostError:
        raise AssertionError("there is nobody to lose")

    def trouble(self, attempt: int) -> UnderstudyError | None:
        return None

    def give_up(self, error: BaseException) -> None:
        pass


class HostGroup:
    """This host among `nodes`, which meet in `store`. `say` is given a line when another host keeps this one waiting;
    `close` must be called at the end."""

    def __init__(self, store: Store, node: int, nodes: int, name: str, say: Callable[[str], None]) -> None:
        self.node = node
        self.members: tuple[int, ...] = tuple(range(nodes))
        self._store = store
        self._say = say
        self._lock = threading.Lock()
        self._said: dict[str, Any] = {"name": name, "nodes": nodes, "token": secrets.token_hex(8)}
        self._heard: dict[int, dict[str, Any]] = {node: self._said}
        self._moved = dict.fromkeys(range(nodes), time.monotonic())
        """When each host's count was last seen to move; our own when the store last answered."""
        self._counts: dict[int, int] = {}
        self._double: str | None = None
        """The name of another host that takes itself for this one."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="hosts", daemon=True)
        self._thread.start()

    @property
    def leads(self) -> bool:
        return self.node == self.members[0]

    def name(self, node: int) -> str:
        """What to call a host."""
        own = self._heard.get(node, {}).get("name")
        return f"host {node}" if own is None else f"host {node} ({own})"

    def share(self, name: str, value: Any, check: Callable[[], None], *, tolerant: bool = False) -> dict[int, Any]:
        with self._lock:
            self._said[name] = value
        began = time.monotonic()
        remind_at = began + REMIND_SECONDS
        patience = LOST_WHILE_RUNNING_SECONDS if tolerant else LOST_SECONDS
        while True:
            self._require_own_place()
            missing = [node for node in self.members if name not in self._heard.get(node, {})]
            gone = [node for node in missing if self._is_gone(node, patience)]
            if not missing or (tolerant and gone == missing):
                return {node: self._heard[node][name] for node in self.members if node not in missing}
            if gone and not tolerant:
                raise self._why(gone[0], patience)
            if time.monotonic() - began > MEETING_SECONDS and (absent := [n for n in missing if n not in self._heard]):
                raise LostHostError(
                    f"{' and '.join(map(self.name, absent))} did not come within {MEETING_SECONDS / 60:.0f} minutes; "
                    "start this command on every host, each with its own NODE_RANK."
                )
            check()
            if time.monotonic() > remind_at:
                self._say(f"waiting for {', '.join(map(self.name, missing))}")
                remind_at = time.monotonic() + REMIND_SECONDS
            time.sleep(TICK_SECONDS / 5)

    def _require_own_place(self) -> None:
        if self._double is not None:
            raise UserError(
                f"NODE_RANK={self.node} is told to two launchers, here on {self._said['name']} and on {self._double}; "
                "give each host a number of its own."
            )
        ours = self._said["nodes"]
        for node in self.members:
            if (theirs := self._heard.get(node, {}).get("nodes", ours)) != ours:
                raise UserError(
                    f"NNODES is {theirs} on {self.name(node)}, but {ours} on {self.name(self.node)}; make it the same "
                    "on every host."
                )

    def drop(self, lost: Collection[int]) -> None:
        self.members = tuple(node for node in self.members if node not in lost)

    def trouble(self, attempt: int) -> UnderstudyError | None:
        for node in self.members:
            if node == self.node:
                if self._still(node, LOST_WHILE_RUNNING_SECONDS):
                    return self._cut_off()
            elif self._heard.get(node, {}).get(f"outcome {attempt}") is not None:
                return FailedRunError(f"processes of {self.name(node)} failed.", 5, standing=Standing.HEARD)
            elif self._is_gone(node, LOST_WHILE_RUNNING_SECONDS):
                return self._why(node, LOST_WHILE_RUNNING_SECONDS)
        return None

    def give_up(self, error: BaseException) -> None:
        status = error.exit_status if isinstance(error, UnderstudyError) else 1
        with self._lock:
            self._said["end"] = {"message": str(error), "status": status, "wrong_input": isinstance(error, UserError)}

    def close(self) -> None:
        """Leaves, once the others have heard all that was said, or are gone too."""
        with self._lock:
            self._said["left"] = True
        self._closing.set()
        if not self._still(self.node, LOST_WHILE_RUNNING_SECONDS):  # or nobody would hear it
            self._thread.join(FAREWELL_SECONDS)

    def _is_gone(self, node: int, seconds: float) -> bool:
        """Whether nothing more is to be expected of a host."""
        heard = self._heard.get(node)
        if heard is None and node != 0 and not self._still(self.node, seconds):
            return False  # it has not come yet
        return (heard is not None and "end" in heard) or self._still(node, seconds) or self._still(self.node, seconds)

    def _still(self, node: int, seconds: float) -> bool:
        return time.monotonic() - self._moved[node] > seconds

    def _why(self, node: int, seconds: float) -> UnderstudyError:
        end: Mapping[str, Any] | None = self._heard.get(node, {}).get("end")
        if end is not None and end["status"] == StoppedError.exit_status:
            return StoppedError(f"{self.name(node)}: {end['message']}", begun=False)
        if end is not None:
            message = end["message"] if end["wrong_input"] else f"{self.name(node)}: {end['message']}"
            return FailedRunError(message, end["status"], refused=end["wrong_input"])
        return self._cut_off() if self._still(self.node, seconds) else self.lost([node])

    def _cut_off(self) -> LostHostError:
        return LostHostError(f"{self.name(0)}, where all hosts meet, no longer answers {self.name(self.node)}.")

    def lost(self, nodes: Collection[int]) -> LostHostError:
        """The error of hosts that are lost."""
        if 0 in nodes:  # without the first host's store nobody knows of the others
            return self._cut_off()
        names = " and ".join(self.name(node) for node in nodes)
        answer = "answers" if len(nodes) == 1 else "answer"
        return LostHostError(f"{names} no longer {answer}; the host is down, or its network or launcher is gone.")

    def _exchange(self) -> None:
        count = 0
        while True:
            last = self._closing.is_set()
            count += 1
            with self._lock:
                ours = json.dumps({"count": count, "said": self._said})
            try:
                self._look_for_double()
                self._store.set(f"understudy host {self.node}", ours)
                for node in self.members:
                    if node != self.node:
                        self._read(node)
            # Whatever a store raises: it is gone, and `_moved` says since when.
            except Exception:  # noqa: BLE001
                if last:
                    return
            else:
                self._moved[self.node] = time.monotonic()
                if last and (self.node or self._all_left()):  # the first host's store must outlast the others
                    return
            time.sleep(TICK_SECONDS)

    def _look_for_double(self) -> None:
        key = f"understudy host {self.node}"
        if self._store.check([key]):
            said = json.loads(self._store.get(key))["said"]
            if said["token"] != self._said["token"]:
                self._double = said["name"]

    def _read(self, node: int) -> None:
        key = f"understudy host {node}"
        if not self._store.check([key]):
            return
        told = json.loads(self._store.get(key))
        if self._counts.get(node) != told["count"]:
            self._counts[node], self._moved[node] = told["count"], time.monotonic()
        self._heard[node] = told["said"]

    def _all_left(self) -> bool:
        return all(self._heard.get(n, {}).get("left") or self._still(n, 2.0) for n in self.members if n != self.node)
