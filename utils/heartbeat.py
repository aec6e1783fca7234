"""Signs of life between the processes of a run, so that none waits for hours for one that is gone.

A process that raises or is killed ends its peers by the launcher, within seconds on its own machine. What is left is
one that hangs, and a machine that is cut off: collectives would wait for their timeout, which is long, because one
process may have hours of work to do (a download, a cache) while the others wait. So each process says every few seconds
that it lives, from a thread of its own, whatever else it does.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

INTERVAL = 3.0  # seconds between signs
ENDED = b"ended"


class Heartbeat(threading.Thread):
    """Gives this process's signs of life, and watches those of the others.

    Args:
        address: host and port of the store that the processes share.
        patience: seconds of silence after which a process is taken for dead, and this one ends.
    """

    def __init__(self, address: tuple[str, int], rank: int, num_processes: int, patience: float):
        super().__init__(name="heartbeat", daemon=True)
        self._address = address
        self._rank = rank
        self._others = [other for other in range(num_processes) if other != rank]
        self._patience = patience
        self._over = threading.Event()
        self._store = None

    def run(self) -> None:
        """Until `end`: says that this process lives, and ends it when another does not any more."""
        heard = dict.fromkeys(self._others, (b"", time.monotonic()))  # the last sign of each, and when it came
        count = 0
        while not self._over.wait(INTERVAL):
            count += 1
            try:
                now = self._exchange(str(count).encode())
            except (OSError, RuntimeError):  # the machine that keeps the store may be gone, or be back soon
                self._store, now = None, {}
            for other, (sign, since) in heard.items():
                if now.get(other, sign) != sign:
                    heard[other] = now[other], time.monotonic()
                elif sign != ENDED and time.monotonic() - since > self._patience:
                    self._give_up(other)

    def end(self) -> None:
        """Says that this process has done its part, and no longer watches."""
        self._over.set()
        self.join()
        try:
            self._exchange(ENDED)
        except (OSError, RuntimeError):
            return  # the others are gone

    def _exchange(self, sign: bytes) -> dict[int, bytes]:
        """Leaves this process's sign; gives those of the others that have given one."""
        from torch.distributed import TCPStore

        if self._store is None:
            self._store = TCPStore(
                *self._address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)
            )
        self._store.set(f"heartbeat/{self._rank}", sign)
        return {
            other: self._store.get(key) for other in self._others if self._store.check([key := f"heartbeat/{other}"])
        }

    def _give_up(self, other: int) -> None:
        print(
            f"error: process {other} has given no sign of life for {self._patience:g} s (--peer_timeout), so process "
            f"{self._rank} ends; go on with --resume_from_checkpoint latest",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread may be waiting in a collective, which no exception reaches


@contextmanager
def watching(rank: int, num_processes: int, patience: float) -> Iterator[None]:
    """Within it the processes watch each other, where there are several and they share a store."""
    address = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if num_processes == 1 or not patience or not all(address):
        yield
        return
    heartbeat = Heartbeat((address[0], int(address[1])), rank, num_processes, patience)
    heartbeat.start()
    try:
        yield
    finally:
        heartbeat.end()
