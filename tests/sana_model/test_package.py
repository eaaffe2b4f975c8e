"""`sana_model` can be lifted out: it needs neither the cluster's libraries nor its peers; and its names are imported lazily."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sana_model

ROOT = Path(sana_model.__file__).parent
README_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

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
modules = [name for name in modules if ".triton_" not in name or importlib.util.find_spec("triton")]  # an extra
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


def test_importing_the_package_costs_no_import_of_torch():
    program = (
        "import sys, sana_model; from sana_model import SanaConfig; assert 'SanaTransformer' in dir(sana_model);"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", sana_model._MODULE_OF)
def test_every_public_name_is_that_of_its_module(name):
    module = import_module(f"sana_model.{sana_model._MODULE_OF[name]}")
    found = getattr(sana_model, name)
    assert found is getattr(module, name) and found.__module__ == module.__name__
    assert name in dir(sana_model)


def test_type_checkers_see_the_names_that_are_there():
    guarded = next(node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(guarded.test) == "TYPE_CHECKING"
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    declared = {alias.name: node.module.removeprefix("sana_model.") for node in imports for alias in node.names}
    assert declared == sana_model._MODULE_OF


def test_an_unknown_name_is_an_attribute_error_as_of_any_module():
    with pytest.raises(AttributeError, match="module 'sana_model' has no attribute 'SanaVideo'"):
        sana_model.SanaVideo  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SanaVideo' from 'sana_model'"):
        from sana_model import SanaVideo  # noqa: F401


@pytest.mark.parametrize("code", README_BLOCKS, ids=range(len(README_BLOCKS)))
def test_the_readmes_examples_run(code, tmp_path, monkeypatch):
    """Only the imports run of an example that downloads published weights."""
    monkeypatch.chdir(tmp_path)
    program = ast.parse(code)
    if "hf://" in code:
        program.body = [node for node in program.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(program, "README.md", "exec"), {})
    if ".save(" in code and "hf://" not in code:
        assert list(tmp_path.glob("*.png"))
