"""One short script per command: `python -m jobs.<command>`, or `ray job submit --working-dir . -- python -m jobs.<command>`.

`python -m jobs` lists them. A command's module imports `jobs.common` and its room's configuration; what is heavy (torch, ray,
mlflow, transformers, reports) is imported in the function that does the work, so that `--help` answers at once.
"""

import sys
from importlib.util import find_spec

if find_spec("jsonargparse") is None:
    sys.exit(
        f"{sys.executable} lacks what this project needs: run `make install` once, and `source .venv/bin/activate` in every "
        "new terminal, or type .venv/bin/python in place of python"
    )
