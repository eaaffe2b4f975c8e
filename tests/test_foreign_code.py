"""No code that lies beside weights is ever run unasked, and nothing asks whether it may: every call says so itself."""

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.caption import CaptionJob
from jobs.common.config import from_dict, parse_config
from pipelines.caption.config import CaptionerConfig, QualityConfig
from pipelines.caption.rows import CaptionJudge
from pipelines.caption.transformers_engine import TransformersCaptioner
from pipelines.caption.vllm_engine import stop_tokens
from pipelines.score.config import ImageScorerConfig
from pipelines.score.images import Classifier
from pipelines.workers.clip import ClipModel, embedding_width
from sana_model.files.models import load_text_encoder

ROOT = Path(__file__).parents[1]
FOREIGN = ("transformers", "diffusers", "peft", "sentence_transformers")
LOADERS = ("from_pretrained", "from_config")
MAY_TRUST = "pipelines/caption/"  # its engines pass on what the captioner's configuration says, which is False by default
UNSAFE = {"unsafe_load", "full_load", "load_module", "exec", "eval", "import_module", "trust_all"}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def foreign_names(tree: ast.AST) -> set[str]:
    """Names that a file imports from libraries that may run code which they find beside weights."""
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.asname or alias.name for node in froms if node.module.split(".")[0] in FOREIGN for alias in node.names}  # type: ignore[union-attr]


def safe_loaders(tree: ast.AST) -> set[str]:
    """Names of YAML loaders that make nothing but plain values."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and "SafeLoader" in ast.unparse(node)}
    return {"yaml.SafeLoader", "yaml.CSafeLoader", *own}


def faults(path: str, source: str) -> list[str]:
    """Calls in a file that might run foreign code, or ask whether they may."""
    tree, found = ast.parse(source), []
    foreign = foreign_names(tree)
    for call in calls(tree):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        name = ast.unparse(call.func)
        base, _, method = name.rpartition(".")
        if method in LOADERS and base.split(".")[0] in (*foreign, *FOREIGN):
            trusts = keywords.get("trust_remote_code")
            says_no = isinstance(trusts, ast.Constant) and trusts.value is False
            if trusts is None or not (says_no or path.startswith(MAY_TRUST)):
                found.append(f"{path}:{call.lineno} {name} does not say trust_remote_code=False")
        if name == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True":
            found.append(f"{path}:{call.lineno} torch.load does not say weights_only=True")
        if method in UNSAFE and (base or name in ("exec", "eval")) and not (method == "eval" and base):
            found.append(f"{path}:{call.lineno} {name}")
        loader = ast.unparse(keywords["Loader"]) if "Loader" in keywords else ""
        pickles = ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) != "False"
        if pickles or (name == "yaml.load" and loader not in safe_loaders(tree)):
            found.append(f"{path}:{call.lineno} {name}")
    return found


@pytest.mark.parametrize("package", ["sana_model", "pipelines", "jobs", "infra"])
def test_every_call_that_loads_a_model_says_that_it_runs_no_code(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    sources = {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}
    assert [line for path, source in sources.items() for line in faults(path, source)] == []
    loading = [path for path, source in sources.items() if foreign_names(ast.parse(source)) and "from_pretrained(" in source]
    assert package in ("jobs", "infra") or loading, "the test looks for nothing"


@pytest.mark.parametrize(
    ("source", "is_fault"),
    [
        ("from transformers import AutoModel\nAutoModel.from_pretrained('x')", True),
        ("from transformers import AutoModel as M\nM.from_pretrained('x', **options)", True),
        ("import transformers\ntransformers.AutoModel.from_config(c)", True),
        ("from transformers import AutoModel\nAutoModel.from_pretrained('x', trust_remote_code=trusted)", True),
        ("from transformers import AutoModel\nAutoModel.from_pretrained('x', trust_remote_code=False)", False),
        ("from sana_model import TextToImage\nTextToImage.from_pretrained('x')", False),
        ("import torch\ntorch.load('x')", True),
        ("import torch\ntorch.load('x', weights_only=False)", True),
        ("import torch\ntorch.load('x', weights_only=True)", False),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", True),
        ("import numpy as np\nnp.load('x', allow_pickle=False)", False),
        ("import yaml\nyaml.unsafe_load('x')", True),
        ("import yaml\nyaml.load('x', Loader=yaml.Loader)", True),
        ("import yaml\nyaml.load('x', Loader=yaml.SafeLoader)", False),
        ("model.eval()", False),
        ("eval('1')", True),
    ],
)
def test_a_planted_call_is_found(source: str, is_fault: bool) -> None:
    assert bool(faults("pipelines/x.py", source)) == is_fault


def write_model_with_code(folder: Path) -> Path:
    """A folder as a model with code of its own has it. Returns the file that appears if any of the code runs."""
    mark = folder / "it ran"
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import PretrainedConfig\nclass Evil(PretrainedConfig): pass\n"
    (folder / "custom_generate").mkdir(parents=True)
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForImageClassification")
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": dict.fromkeys(kinds, "evil.Evil")}))
    tools = {name: f"evil.{name}" for name in ("AutoProcessor", "AutoImageProcessor")} | {"AutoTokenizer": ["evil.Evil", None]}
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"auto_map": tools, "tokenizer_class": "Evil", "processor_class": "Evil"}))
    return mark


LOADS: dict[str, Callable[[str], object]] = {
    "CLIP": ClipModel,
    "CLIP's width": embedding_width,
    "text encoder": load_text_encoder,
    "classifier": lambda path: Classifier(ImageScorerConfig(name="x", model=path, label="x")),
    "captioner": lambda path: TransformersCaptioner(CaptionerConfig(name="x", model=path)),
    "budget's tokenizer": lambda path: CaptionJudge(
        CaptionerConfig(name="x", model=path, quality=QualityConfig(budget_tokenizer=path))
    ),
    "vLLM's stop tokens": lambda path: stop_tokens(CaptionerConfig(name="x", model=path, engine="vllm")),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_code_beside_weights_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[str], object]
) -> None:
    def answer(question: str) -> str:
        raise AssertionError(f"somebody was asked: {question}")

    monkeypatch.setattr("builtins.input", answer)
    mark = write_model_with_code(tmp_path / "model")
    with pytest.raises(ValueError, match="contains custom code"):
        load(str(tmp_path / "model"))
    assert not mark.exists()


ZEN = "{class_path: this.Zen, init_args: {source: x}}"  # the module that prints when it is imported
SECTIONS = {
    "a section": f"dataset_uri: x\ncaptioner: {ZEN}",
    "a section's text": "dataset_uri: x\ncaptioner: this.Zen",
    "a part of a section": f"dataset_uri: x\ncaptioner: {{name: a, model: b, sampling: {ZEN}}}",
    "what may be anything": f"dataset_uri: x\ncaptioner: {{name: a, model: b, http: {{extra: {{a: {ZEN}}}}}}}",
    "what may be anything, whole": f"dataset_uri: x\ncaptioner: {{name: a, model: b, http: {{extra: {ZEN}}}}}",
    "engine arguments": f"dataset_uri: x\ncaptioner: {{name: a, model: b, vllm: {{engine_args: {{a: [{ZEN}]}}}}}}",
    "a whole file": ZEN,
}


@pytest.mark.parametrize("content", SECTIONS.values(), ids=SECTIONS)
def test_a_configuration_imports_and_calls_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str) -> None:
    sys.modules.pop("this", None)
    config = tmp_path / "job.yaml"
    config.write_text(content)
    try:
        job = parse_config(CaptionJob, ["--config", str(config)], prog="caption", description="")
    except SystemExit as ended:
        assert ended.code == 2
    else:
        assert "this.Zen" in str(job), "it is a value like any other"
    assert "Zen of Python" not in capfd.readouterr().out and "this" not in sys.modules


class Touch:
    def __init__(self, path: str):
        Path(path).touch()


def test_a_configuration_calls_nothing_that_is_imported_already(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    call = {"class_path": "tests.test_foreign_code.Touch", "init_args": {"path": str(mark)}}
    for extra in (call, {"a": call}, {"a": [call]}):
        captioner = from_dict(CaptionerConfig, {"name": "a", "model": "b", "http": {"extra": extra}})
        assert captioner.http.extra == extra and not mark.exists()
