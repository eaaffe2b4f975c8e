"""A Redis for the state of Ray's head (GCS), on machines where it is installed: a head that was lost finds it again."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from infra.local.processes import Process

TOOL = "redis-server"
PORT = 6380
RECONNECT_SECONDS = 600
"""How long a host waits for its head to come back; KubeRay gives its workers the same time."""


@dataclass(frozen=True)
class Redis:
    """A Redis that listens on `address` and asks for a password; its data and configuration are in `folder`."""

    address: str
    folder: Path
    password: str

    def environment(self, host: int) -> dict[str, str]:
        """The environment variables of a host's Ray node: the head writes its state here, the others wait for it to return."""
        if host == 0:
            return {"RAY_REDIS_ADDRESS": f"{self.address}:{PORT}", "REDIS_PASSWORD": self.password}
        return {"RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_SECONDS)}

    def start(self, log: Path) -> Process:
        """Start the server; its output is appended to `log`. The password is in a file, which only this user may read."""
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "redis.conf"
        config.touch(mode=0o600)
        config.write_text(f"bind {self.address}\nport {PORT}\ndir {self.folder}\nappendonly yes\nrequirepass {self.password}\n")
        return Process.start([TOOL, str(config)], log=log, environment=os.environ)


def find_missing() -> str | None:
    """Say what is missing to use Redis; None if nothing is."""
    return None if shutil.which(TOOL) else f"there is no `{TOOL}`"
