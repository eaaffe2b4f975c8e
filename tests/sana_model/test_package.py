"""`sana_model` can be lifted out: it needs neither the cluster's libraries nor its peers."""

import subprocess
import sys

BLOCKED = ("ray", "mlflow", "pyarrow", "diffusers", "vllm", "deepspeed", "pipelines", "jobs")
PROGRAM = f"""
import importlib, importlib.machinery, pkgutil, sys

class WithoutBlocked(importlib.machinery.PathFinder):  # the usual finder; the blocked packages are not installed to it
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {BLOCKED!r} else super().find_spec(name, path, target)

assert importlib.machinery.PathFinder in sys.meta_path
sys.meta_path = [WithoutBlocked if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import sana_model

modules = [module.name for module in pkgutil.walk_packages(sana_model.__path__, "sana_model.")]
for name in modules:
    importlib.import_module(name)
assert importlib.util.find_spec("diffusers") is None
loaded = sorted(set(name.split(".")[0] for name in sys.modules) & set({BLOCKED!r}))
assert not loaded, loaded

import torch
from sana_model.nn.transformer import SanaTransformer
model = SanaTransformer.from_preset("tiny")
model(torch.randn(1, 8, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 64)).sum().backward()
print(len(modules))
"""


def test_every_module_imports_and_works_without_the_cluster_and_the_peers():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) >= 13


def test_import_has_no_side_effect_on_torch():
    program = (
        "import torch; before = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed());"
        "import sana_model.pipeline, sana_model.files.models;"
        "assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
