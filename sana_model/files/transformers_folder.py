"""Folders that transformers reads: what is wrong with one, in words; transformers would speak of ids on the hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sana_model.files.json_files import find_stand_in, parse_json
from sana_model.files.tensors import check_count

CONTENT = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Endings of the files that transformers may read."""
NOT_PARSED = "tokenizer.json"
"""It is large, and read by a parser that does not recurse."""
LAYERS = re.compile(r"layers?$|blocks?$|depth|hidden_layers|n_layer|stages$")
MOST_LAYERS = 1000

TOKENIZER = "tokenizer"
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
"""Names of the files of which a tokenizer must have one."""


def check_folder(folder: Path) -> None:
    """Raise ValueError if a file stands in for another, or a configuration is absurd: transformers would try it for hours."""
    for file in sorted(file for file in folder.iterdir() if file.suffix in CONTENT and file.is_file()):
        if stand_in := find_stand_in(file):
            raise ValueError(f"{file} is {stand_in}")
        if file.suffix == ".safetensors":
            check_count(file)
        if file.suffix == ".json" and file.name != NOT_PARSED:
            settings = parse_json(file.read_bytes(), file)
            if file.name == "config.json":
                _check_sizes(settings, file)


def _check_sizes(settings: Any, file: Path) -> None:
    """Raise ValueError for a number of layers that no model has, at any depth."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            if isinstance(value, int) and LAYERS.search(name) and value > MOST_LAYERS:
                raise ValueError(f"{file}: {name}={value} is more than any model has ({MOST_LAYERS})")
            _check_sizes(value, file)
    elif isinstance(settings, list):
        for value in settings:
            _check_sizes(value, file)


@contextmanager
def naming_the_folder(path: str | Path, kind: str) -> Iterator[None]:
    """Within, a `from_pretrained` of transformers reads `path`: a folder, or a model id on the hub, whose errors stay.

    Args:
        kind: what should be there, for messages; TOKENIZER needs a file of VOCABULARIES.

    Raises FileNotFoundError if `path` is no model id and nothing is there, ValueError if transformers cannot read the folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or str(path)[:1] in ".~" or str(path).count("/") != 1:
            raise FileNotFoundError(f"no folder {str(path)!r} for a {kind}; a model on the hub is written owner/name")
        yield
        return
    if kind == TOKENIZER and not any(any(folder.glob(name)) for name in VOCABULARIES):  # transformers would take an empty one
        raise FileNotFoundError(f"{folder} holds no tokenizer: no {VOCABULARIES[0]}, nor {', '.join(VOCABULARIES[1:])}")
    check_folder(folder)
    try:
        yield
    except Exception as error:  # of transformers, tokenizers, safetensors: of nearly every type
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} holds no {kind} that transformers can read: {first}") from error
