"""`make test-image`: build the images on this machine, run the demo in one, and serve MLflow from the other with PostgreSQL.

It needs root on Linux, and Debian's packages `buildah podman runc debootstrap postgresql`. Where no registry of images is
reached, the base image is made from Debian's packages instead. Behind a proxy, give what a build must see with --volume, such
as `--volume /etc/ssl/certs:/etc/ssl/certs:ro --volume /etc/pip.conf:/etc/pip.conf:ro`.
"""

import argparse
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from infra.local.postgres import find_missing, tool, user
from infra.local.processes import ROOT, Process, as_user, wait_until
from infra.local.servers import is_open

TOOLS = ("buildah", "podman", "runc", "debootstrap")
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
TARGETS = ("cpu", "mlflow")
NAME, MLFLOW = "localhost/sana", "sana-images-mlflow"
RIGHTS = (
    "--user",
    "1000",
    "--read-only",
    "--cap-drop",
    "all",
    "--security-opt",
    "no-new-privileges",
    "--tmpfs",
    "/tmp:size=8g",
)
"""As the manifests run them: a user without rights, and a disk of which only /tmp can be written."""
LIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000")
RUN = ("podman", "--runtime", "runc", "run", "--rm", "--network", "host", "--shm-size", "2g", *LIMITS, *RIGHTS)
POSTGRES_PORT, MLFLOW_PORT = 15432, 15000
DEMO_PLACES = ("--dataset_uri", "/tmp/demo/data", "--ingest.source", "/tmp/demo/raw")
DEMO_SIZES = ("--world.num_images", "200", "--world.num_prompts", "8", "--train.num_steps", "20")


def main(argv: Sequence[str] | None = None) -> int:
    """Build and try the images; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--volume", action="append", default=[], help="HOST:IMAGE[:ro], seen by every build; may be repeated")
    parser.add_argument("--torch_index", help="package index with the CPU build of torch (default: that of the Dockerfile)")
    options = parser.parse_args(argv)
    if os.geteuid() != 0:
        return complain("images are built by root here: run it with sudo")
    if missing := [name for name in TOOLS if shutil.which(name) is None]:
        return complain(f"there is no `{missing[0]}`: apt-get install {' '.join(missing)}")
    if (no_database := find_missing()) is not None:
        return complain(
            f"{no_database}, the database of the MLflow image: apt-get install postgresql, pip install psycopg2-binary"
        )
    try:
        with step("base image"):
            print(provide_base(re.search(r"^FROM (\S+) AS base", DOCKERFILE.read_text(), re.MULTILINE)[1]))  # type: ignore[index]
        for target in TARGETS:
            with step(f"build {target}"):
                build(target, options.volume, options.torch_index)
        for target in TARGETS:
            print(f"{'size of ' + target:<24} {image_bytes(target) / 1e9:.2f} GB")
        with step("demo in cpu"):
            run_demo()
        with step("MLflow in mlflow"):
            serve_mlflow()
    except (subprocess.CalledProcessError, TimeoutError, RuntimeError) as error:
        return complain(str(error))
    return 0


def complain(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 1


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say how long a step took."""
    begin = time.monotonic()
    yield
    print(f"{name:<24} {time.monotonic() - begin:.0f} s", flush=True)


def provide_base(name: str) -> str:
    """Have the base image here: from its registry, or made of Debian's packages under its name. Returns which of the two."""
    if subprocess.run(["buildah", "inspect", "--type", "image", name], capture_output=True, check=False).returncode == 0:
        return f"{name} was here"
    if subprocess.run(["buildah", "pull", "--quiet", name], capture_output=True, check=False).returncode == 0:
        return f"{name} came from its registry"
    with tempfile.TemporaryDirectory() as folder:
        packages = "--include=python3,python3-venv,python3-dev,ca-certificates"
        run("debootstrap", "--variant=minbase", packages, "bookworm", f"{folder}/root")
        Path(folder, "root/usr/local/bin/python").symlink_to("/usr/bin/python3")
        run("tar", "-C", f"{folder}/root", "-cf", f"{folder}/root.tar", ".")
        run("podman", "import", "--quiet", f"{folder}/root.tar", f"docker.io/library/{name}")
    return f"{name} is made of Debian's packages: no registry answers"


def build(target: str, volumes: Sequence[str], torch_index: str | None) -> None:
    """Build one target of the Dockerfile, as it stands."""
    options = [word for volume in volumes for word in ("--volume", volume)]
    if torch_index:
        options += ["--build-arg", f"TORCH_INDEX={torch_index}"]
    command = ["buildah", "build", "--isolation", "chroot", "--network", "host", "--layers", "--pull=never", *LIMITS]
    run(*command, *options, "--file", str(DOCKERFILE), "--target", target, "--tag", f"{NAME}:{target}", str(ROOT))


def image_bytes(target: str) -> int:
    """The size of an image."""
    command = ["podman", "image", "inspect", f"{NAME}:{target}"]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)[0]["Size"])


def run_demo() -> None:
    """Run a small demo in the image `cpu`. Raises RuntimeError if it does not end well."""
    command = [
        *RUN,
        "--env",
        "HOME=/tmp",
        f"{NAME}:cpu",
        "python",
        "-m",
        "jobs.demo",
        "--config",
        "jobs/configs/demo.yaml",
    ]
    done = subprocess.run([*command, *DEMO_PLACES, *DEMO_SIZES], capture_output=True, text=True, check=False)
    print("\n".join(done.stdout.splitlines()[-4:]))
    if done.returncode != 0:
        raise RuntimeError(f"the demo ended with {done.returncode}: {done.stderr[-3000:]}")


def serve_mlflow() -> None:
    """Serve MLflow from its image with a PostgreSQL of this machine, and write and read an experiment there."""
    with postgres() as uri:
        arguments = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(MLFLOW_PORT), "--workers", "1"]
        arguments += ["--backend-store-uri", uri, "--artifacts-destination", "/tmp/artifacts", "--serve-artifacts"]
        log = Path(tempfile.mkdtemp(prefix="sana-images-")) / "mlflow.log"
        command = [*RUN, "--name", MLFLOW, "--env", "HOME=/tmp", f"{NAME}:mlflow", *arguments]
        server = Process.start(command, log=log, environment=os.environ)
        try:

            def answers() -> bool:
                if not server.is_running():
                    raise RuntimeError(f"MLflow did not start: see {log}")
                return is_open("127.0.0.1", MLFLOW_PORT)

            wait_until(answers, f"MLflow does not answer: see {log}", seconds=180)
            name = f"images-{secrets.token_hex(4)}"
            made = ask("experiments/create", {"name": name})["experiment_id"]
            found = ask("experiments/search", {"max_results": 10, "filter": f"name = '{name}'"})["experiments"]
            if [one["experiment_id"] for one in found] != [made]:
                raise RuntimeError(f"MLflow made experiment {made} and finds {found}")
            print(f"experiment {made} was written and read")
        finally:
            subprocess.run(
                ["podman", "rm", "--force", "--time", "0", MLFLOW], capture_output=True, check=False
            )  # it may be gone
            server.kill()


def ask(path: str, body: dict[str, object]) -> dict[str, object]:
    """Send a request to the MLflow server; return its answer."""
    address = f"http://127.0.0.1:{MLFLOW_PORT}/api/2.0/mlflow/{path}"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.loads(answer.read()))


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL on loopback that asks for a password, and its URI."""
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="sana-images-postgres-") as folder:
        secret = Path(folder, "password")
        secret.write_text(password)
        for path in (Path(folder), secret):
            os.chown(path, user().pw_uid, user().pw_gid)
        make = [tool("initdb"), f"--pgdata={folder}/data", "--auth=scram-sha-256", "--username=mlflow", f"--pwfile={secret}"]
        subprocess.run(make, check=True, capture_output=True, cwd="/", **as_user(user()))
        settings = [
            "-c",
            f"port={POSTGRES_PORT}",
            "-c",
            "listen_addresses=127.0.0.1",
            "-c",
            f"unix_socket_directories={folder}",
        ]
        command = [tool("postgres"), "-D", f"{folder}/data", *settings]
        server = Process.start(command, log=Path(folder, "log"), environment=os.environ, user=user())
        try:
            wait_until(lambda: is_open("127.0.0.1", POSTGRES_PORT), "postgres does not answer", seconds=60)
            yield f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{POSTGRES_PORT}/postgres"
        finally:
            server.kill()


def run(*command: str) -> None:
    """Run a command; its output goes where this one's goes. Raises CalledProcessError."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
