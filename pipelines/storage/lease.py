"""The lease of a table: `_lease.json` in its folder says who writes it, and keeps a second writer away.

A thread of the holder renews the lease. If the holder is killed, the lease expires after `seconds`. The next writer waits for
that, or takes over at once if it can tell that the holder is gone (its process on this host has ended) or is the same owner
(the job was restarted). The clocks of all hosts must agree to within half of `seconds`.

A holder that finds its lease lost stops. Whatever writes into the table (a shard, the manifest, a plan) looks at the lease
right before, when all is ready to be written. So only one write can still come too late: one whose bytes were on their way to
the storage while its holder slept for longer than the lease. It is a whole file, of the same content unless the table was
rebuilt with other settings in that moment; `jobs.verify` would show that.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Self

from pipelines.storage.errors import LeaseHeldError, LeaseLostError, StorageError
from pipelines.storage.swap import read_if_there, swap

LEASE = "_lease.json"
RENEWALS = 4  # within the time in which a lease expires
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeaseConfig:
    """Settings of the leases that keep other writers from a job's tables.

    Args:
        owner: a job that is restarted under the same name resumes at once. None: the submission id of the Ray job.
        seconds: without renewal for this long (the writer died), the next writer takes over.
    """

    owner: str | None = None
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.seconds < 1:
            raise ValueError(f"lease.seconds={self.seconds} must be at least 1")


DEFAULT_LEASE = LeaseConfig()


@dataclass(frozen=True, kw_only=True)
class LeaseRecord:
    """The content of `_lease.json`. `host_id` and `process_start` tell a process from others of the same id; times are UTC."""

    token: str
    owner: str
    host: str
    host_id: str
    pid: int
    process_start: str
    since: str
    renewed: float
    seconds: float

    @property
    def expires(self) -> float:
        """Unix time."""
        return self.renewed + self.seconds

    def is_alive(self) -> bool:
        """Whether the holder may be at work: the lease has not expired, and its process is not known to have ended."""
        return time.time() < self.expires and not self.is_gone()

    def describe(self) -> str:
        until = datetime.fromtimestamp(self.expires, UTC).isoformat(timespec="seconds")
        return f"{self.owner} (process {self.pid} on {self.host}) since {self.since}; its lease runs until {until}"

    def is_gone(self) -> bool:
        """Whether the holder ran on this host and has ended."""
        return self.host_id == host_id() and process_start(self.pid) != self.process_start

    def is_running_here(self) -> bool:
        """Whether the holder is a process of this host that is still running."""
        return self.host_id == host_id() and process_start(self.pid) == self.process_start

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def parse_lease(content: bytes | None) -> LeaseRecord | None:
    """Read the content of `_lease.json`. None if there is no file, or it is not a whole record: nobody holds the lease then."""
    try:
        return LeaseRecord(**json.loads(content)) if content else None
    except (ValueError, TypeError):
        return None


def read_lease(uri: str) -> LeaseRecord | None:
    """Read the lease of the table at `uri`, which its holder may have left by dying. Raises StorageError."""
    return parse_lease(read_if_there(f"{uri}/{LEASE}"))


@cache
def host_id() -> str:
    """Identify the host, container and boot: process ids begin anew in each of them."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def process_start(pid: int) -> str:
    """The time at which a process started, in the kernel's ticks; "" if no such process runs (a zombie does not)."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if state == "Z" else rest[18]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return ""
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "running"


@dataclass(frozen=True)
class Ticket:
    """A reference to a lease, for the tasks on any host that write under it."""

    uri: str
    token: str

    def check(self) -> None:
        """Raises LeaseLostError if another writer has the lease now."""
        record = read_lease(self.uri)
        if record is None or record.token != self.token:
            raise _lost(self.uri, record)


def _lost(uri: str, record: LeaseRecord | None) -> LeaseLostError:
    now = f"{record.describe()} writes it" if record else f"{LEASE} is gone: another writer has come and ended"
    return LeaseLostError(f"the lease of {uri} is lost, {now}. This job writes nothing more; start it again to go on")


class Lease:
    """A lease that this process holds."""

    def __init__(self, uri: str, record: LeaseRecord):
        self.ticket = Ticket(uri, record.token)
        self.record = record
        self.lost = False
        self.failure: StorageError | None = None
        self.renewed = time.monotonic()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")

    def start(self) -> None:
        self._thread.start()

    def check(self) -> None:
        """Raises LeaseLostError if another writer has the table now, or may have it: the lease could not be renewed in time."""
        if not self.lost and time.monotonic() - self.renewed > self.record.seconds:
            self._renew()  # this process slept, or the store did: whoever renews first has it
        if self.lost:
            raise _lost(self.ticket.uri, read_lease(self.ticket.uri))
        if self.failure is not None and time.monotonic() - self.renewed > self.record.seconds:
            raise LeaseLostError(
                f"the lease of {self.ticket.uri} could not be renewed for {self.record.seconds:g} s: {self.failure}"
            ) from self.failure

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if not self.lost:
                swap(f"{self.ticket.uri}/{LEASE}", self.record.to_bytes(), None)
        except StorageError as error:
            logger.warning("the lease stays until it expires: %s", error)

    def _keep(self) -> None:
        while not self._stop.wait(self.record.seconds / RENEWALS) and not self.lost:
            self._renew()

    def _renew(self) -> None:
        with self._lock:
            renewed = replace(self.record, renewed=time.time())
            try:
                if swap(f"{self.ticket.uri}/{LEASE}", self.record.to_bytes(), renewed.to_bytes()):
                    self.record, self.renewed, self.failure = renewed, time.monotonic(), None
                else:
                    self.lost = True
            except StorageError as error:
                self.failure = error


@contextmanager
def hold(uri: str, config: LeaseConfig = DEFAULT_LEASE) -> Iterator[Lease]:
    """Take the lease of the table (or other folder) at `uri`, and release it at the end of the block.

    Raises:
        LeaseHeldError: another writer is at work, in this process or elsewhere.
        LeaseLostError: at the end, in place of what went wrong, if another writer has taken over.
        StorageError
    """
    lease = Lease(uri, _acquire(uri, config))
    lease.start()
    try:
        yield lease
        lease.check()
    except Exception as error:
        if type(error) is not LeaseLostError:  # a task of Ray may have met it, and says so in an error of another type
            lease.ticket.check()
        raise
    finally:
        lease.release()


class Leases:
    """The leases that one job holds, released together at the end of the job's `with` block.

    The job passes them to its stage, which takes the lease of the table that it writes from them: the deletion of a stale
    table and its rebuilding, for example, happen under one lease, so no other writer comes in between.
    """

    def __init__(self, config: LeaseConfig = DEFAULT_LEASE):
        self.config = config
        self._held: dict[str, Lease] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        self._held.clear()
        return self._stack.__exit__(*error)

    def take(self, uri: str) -> Lease:
        """The lease of the table at `uri`, which is acquired unless it is held here already. Raises as `hold`."""
        if uri not in self._held:
            self._held[uri] = self._stack.enter_context(hold(uri, self.config))
        return self._held[uri]


@contextmanager
def shared(leases: Leases | None) -> Iterator[Leases]:
    """The given leases; if there are none, new ones, which are released at the end of the block."""
    if leases is not None:
        yield leases
        return
    with Leases() as own:
        yield own


def _acquire(uri: str, config: LeaseConfig) -> LeaseRecord:
    file = f"{uri}/{LEASE}"
    watched: bytes | None = None
    deadline = 0.0
    while True:
        content = read_if_there(file)
        other = parse_lease(content)
        mine = _new_record(config)
        expired = watched is not None and content == watched and time.monotonic() >= deadline
        if other is None or other.owner == mine.owner or other.is_gone() or expired:
            if swap(file, content, mine.to_bytes(), settle=True):
                return mine
            continue
        if other.is_running_here() or content != (watched or content):
            raise LeaseHeldError(
                f"{uri} is being written by {other.describe()}. "
                "Let it finish, or stop it and start this job again. (--lease.owner names a job that may be restarted.)"
            )
        if watched is None:
            watched = content
            left = min(max(other.expires - time.time(), 0.0), other.seconds)
            deadline = time.monotonic() + left
            logger.warning("%s was being written by %s: waiting %.0f s whether it is renewed", uri, other.describe(), left)
        time.sleep(min(POLL_SECONDS, max(deadline - time.monotonic(), 0.0)))


def _new_record(config: LeaseConfig) -> LeaseRecord:
    token = uuid.uuid4().hex
    now = time.time()
    return LeaseRecord(
        token=token,
        owner=config.owner or submission_id() or f"job {token[:8]}",
        host=socket.gethostname(),
        host_id=host_id(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()),
        since=datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        renewed=now,
        seconds=config.seconds,
    )


def submission_id() -> str | None:
    """The submission id of the Ray job whose entrypoint is this process; None if it is not one."""
    try:
        return json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    except (KeyError, ValueError, TypeError):
        return None
