"""A process that takes a lease, says so, and holds it until told to end (or killed, or paused) by the test.

python lease_holder.py <uri> <seconds> <owner, or -> [host id]: writes "held", "refused <message>" or "lost <message>".
"""

import sys
import time

from pipelines.storage import lease
from pipelines.storage.errors import LeaseHeldError, LeaseLostError
from pipelines.storage.lease import LeaseConfig, hold


def main() -> None:
    uri, seconds, owner, *elsewhere = sys.argv[1:]
    if elsewhere:
        lease.host_id = lambda: elsewhere[0]  # type: ignore[assignment]  # as if on another machine
    config = LeaseConfig(owner=None if owner == "-" else owner, seconds=float(seconds))
    try:
        with hold(uri, config) as held:
            print("held", flush=True)
            while not _told_to_end():
                held.check()
                time.sleep(0.05)
        print("ended", flush=True)
    except LeaseHeldError as error:
        print(f"refused {error}", flush=True)
    except LeaseLostError as error:
        print(f"lost {error}", flush=True)


def _told_to_end() -> bool:
    import select

    return bool(select.select([sys.stdin], [], [], 0)[0])


if __name__ == "__main__":
    main()
