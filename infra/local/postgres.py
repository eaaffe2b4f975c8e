"""A PostgreSQL for the MLflow server, on machines where it is installed."""

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from infra.local.processes import Process, as_user, wait_until

TOOLS = ("postgres", "initdb", "createdb")
START_SECONDS = 60.0


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL that is reached only through a socket file in `folder`, which only root and PostgreSQL's user may open."""

    folder: Path

    @property
    def uri(self) -> str:
        """The URI of its database, for SQLAlchemy."""
        return f"postgresql+psycopg2://{user().pw_name}@/mlflow?host={self.folder}"

    @classmethod
    def create(cls) -> "Postgres":
        """Make an empty one in a new temporary folder: its user may not be allowed to enter the cluster's folder.

        Raises RuntimeError if `initdb` fails.
        """
        folder = Path(tempfile.mkdtemp(prefix="sana-postgres-"))
        os.chown(folder, user().pw_uid, user().pw_gid)
        command = [tool("initdb"), f"--pgdata={folder}/data", "--auth=trust", "--no-sync", f"--username={user().pw_name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **as_user(user()))
        if done.returncode != 0:
            raise RuntimeError(f"`initdb` failed: {done.stderr.strip()}")
        return cls(folder)

    def start(self, log: Path) -> Process:
        """Start the server; its output is appended to `log`."""
        settings = ("listen_addresses=", f"unix_socket_directories={self.folder}")
        command = [tool("postgres"), "-D", f"{self.folder}/data", *(word for setting in settings for word in ("-c", setting))]
        return Process.start(command, log=log, environment=os.environ, user=user())

    def make_database(self) -> None:
        """Make the database as soon as the server answers. Raises TimeoutError after START_SECONDS."""
        command = [tool("createdb"), f"--host={self.folder}", f"--username={user().pw_name}", "mlflow"]

        def made() -> bool:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0

        wait_until(made, "postgres does not answer", seconds=START_SECONDS)

    def delete(self) -> None:
        """Delete the folder with all data."""
        shutil.rmtree(self.folder, ignore_errors=True)


def find_missing() -> str | None:
    """Say what is missing to use PostgreSQL; None if nothing is."""
    for name in TOOLS:
        if shutil.which(name) is None:
            return f"there is no `{name}`"
    return None if importlib.util.find_spec("psycopg2") else "there is no psycopg2"


def user() -> pwd.struct_passwd:
    """The user that PostgreSQL runs as, `postgres` or else `nobody`: it refuses to run as root."""
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def tool(name: str) -> str:
    """The path of a program of TOOLS, which `find_missing` has found."""
    found = shutil.which(name)
    assert found is not None
    return found
