"""Peaks of memory of a local Ray and of its driver, and the CPU seconds of its workers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address  # Ray has no public way to its store's use

MIB = 2**20


@dataclass
class Peaks:
    """Peaks in bytes of the Ray at `address`, sampled by a thread."""

    address: str
    driver: int = 0
    workers: int = 0
    object_store: int = 0
    cpu_seconds: dict[int, float] = field(default_factory=dict)  # of the workers by process id, since each began
    stopped: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        me, state = psutil.Process(), get_state_from_address(self.address)
        while not self.stopped.wait(0.2):
            workers = 0
            for process in me.children(recursive=True):
                try:
                    memory = process.memory_info()
                    user, system, *_ = process.cpu_times()
                    name = " ".join(process.cmdline()[:1])
                except psutil.Error:
                    continue  # it has just ended
                if name.startswith("ray::"):
                    workers += memory.rss - memory.shared
                    self.cpu_seconds[process.pid] = user + system
            stats = get_memory_info_reply(state).store_stats
            self.object_store = max(self.object_store, stats.object_store_bytes_used)
            memory = me.memory_info()
            self.driver = max(self.driver, memory.rss - memory.shared)
            self.workers = max(self.workers, workers)


@contextmanager
def watch_memory() -> Iterator[Peaks]:
    peaks = Peaks(ray.get_runtime_context().gcs_address)
    thread = threading.Thread(target=peaks.watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        peaks.stopped.set()
        thread.join()
