"""Heartbeats between the processes of a run, so that none waits for hours for one that is gone.

If a process raises or is killed, the launcher ends its peers within seconds on the same machine. What remains are hung
processes and disconnected machines: collectives would wait for their timeout, which is long, because one process may
have hours of work to do (a download, a cache) while the others wait. Each process therefore sends a heartbeat every
few seconds, from its own thread, whatever else it does.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from utils.config.terminal import print_line

if TYPE_CHECKING:
    from torch.distributed import TCPStore

INTERVAL = 3.0  # seconds between heartbeats
ENDED = b"ended"


class Heartbeat:
    """Sends this process's heartbeats and watches those of the others.

    One thread talks to the store, where it can get stuck if a machine is disconnected; another checks the times.

    Args:
        address: host and port of the store that the processes share.
        rank: number of this process.
        num_processes: number of processes of the run.
        patience: seconds without a heartbeat after which a process is presumed dead and this one ends.
    """

    def __init__(self, address: tuple[str, int], rank: int, num_processes: int, patience: float):
        self._address = address
        self._rank = rank
        self._others = [other for other in range(num_processes) if other != rank]
        self._patience = patience
        self._over = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}  # last heartbeat of each process, and when it arrived
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._talk, self._watch)]

    def start(self) -> None:
        """Starts sending and watching."""
        self._heard.update(dict.fromkeys(self._others, (b"", time.monotonic())))
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Reports that this process is done, and stops watching."""
        self._over.set()
        self._threads[0].join(timeout=INTERVAL + 5)

    def _talk(self) -> None:
        store, count = None, 0
        while True:
            is_over = self._over.wait(INTERVAL)
            count += 1
            try:
                store = store or self._connect()
                self._exchange(store, ENDED if is_over else str(count).encode())
            except (OSError, RuntimeError):  # the machine with the store may be gone, or come back soon
                store = None
            if is_over:
                return

    def _connect(self) -> "TCPStore":
        from torch.distributed import TCPStore

        return TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))

    def _exchange(self, store: "TCPStore", sign: bytes) -> None:
        """Stores this process's heartbeat and reads new ones of the others."""
        store.set(f"heartbeat/{self._rank}", sign)
        for other, (known, _) in self._heard.items():
            key = f"heartbeat/{other}"
            if store.check([key]) and (heard := store.get(key)) != known:
                self._heard[other] = heard, time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            for other, (sign, since) in self._heard.items():
                if sign != ENDED and time.monotonic() - since > self._patience:
                    self._give_up(other)

    def _give_up(self, other: int) -> None:
        print_line(
            f"error: process {other} has sent no heartbeat for {self._patience:g} s (--peer_timeout), so process "
            f"{self._rank} ends; continue with --resume_from_checkpoint latest",
            sys.stderr,
        )
        os._exit(1)  # the main thread may be waiting in a collective, which no exception reaches


@contextmanager
def watching(rank: int, num_processes: int, patience: float) -> Iterator[None]:
    """Context manager: the processes watch each other, if there are several and they share a store."""
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
