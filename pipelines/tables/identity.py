"""The identity of a table, from which its fingerprint is computed, and the manifest that records it."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from pipelines.tables.schema import form_of
from sana_model.files.redact import redact_values

MANIFEST = "_manifest.json"
PACKAGES = ("sana-on-ray", "ray", "torch", "transformers", "diffusers", "deepspeed", "vllm", "pyarrow", "pillow")


@dataclass(frozen=True)
class Identity:
    """Everything that can change a value in a table."""

    stage: str
    config: Mapping[str, Any]
    models: Mapping[str, str]
    """The revision or the hash of the weights, by model."""
    inputs: Mapping[str, str]
    """The fingerprints of the input tables, by path."""
    rows_of: str = field(default="", compare=False)
    """Path of the input whose rows the table is about: each is a row of the table, or one of its rejects. Empty: of the only
    input, or of none. It is no part of the fingerprint."""

    @cached_property
    def fingerprint(self) -> str:
        """Hex; the same for equal content on every machine."""
        content = json.dumps({"schema_version": form_of(self.stage), **self.values()}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def values(self) -> dict[str, Any]:
        """What the fingerprint is computed from, besides the version of the table's form."""
        return {name: value for name, value in asdict(self).items() if name != "rows_of"}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`_manifest.json` of a table. Counts are those of the last finished run; `complete`: no shard was missing then."""

    fingerprint: str
    stage: str
    config: dict[str, Any]
    models: dict[str, str]
    inputs: dict[str, str]
    rows_of: str = ""
    """As in `Identity`."""
    schema_version: int = 1
    """Version of the table's form, see `schema.FORMS`."""
    complete: bool = False
    num_shards: int = 0
    num_rows: int = 0
    num_rejects: int = 0
    num_bytes: int | None = None
    """Of the files of the shards and of their rejects; None where an earlier version counted. See `Table.count_bytes`."""
    rejects_by_reason: dict[str, int]
    figures: dict[str, float] = field(default_factory=dict)
    """"<figure>.mean" and "<figure>.min" over the shards, and the sums of counts."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the software that began the table. They do not change the fingerprint."""
    license: str | None = None
    """License of the images, as given to ingest. It does not change the fingerprint."""
    begun: str = ""
    updated: str = ""

    def identity(self) -> Identity:
        return Identity(self.stage, self.config, self.models, self.inputs, self.rows_of)

    @property
    def is_old(self) -> bool:
        """Whether an earlier version of this program made the table, in a form that is no longer read."""
        return self.schema_version != form_of(self.stage)


class LaterVersionError(ValueError):
    """A manifest has fields that this version does not know, or is of a form that it does not know."""

    remedy: ClassVar = "use that version, or a later one"


def to_manifest(content: Any) -> Manifest:
    """The manifest from the content of its file.

    Raises LaterVersionError; TypeError or another ValueError if it is no manifest.
    """
    if isinstance(content, dict) and (unknown := content.keys() - {one.name for one in fields(Manifest)}):
        raise LaterVersionError(f"a later version wrote it: it has {', '.join(sorted(unknown))}")
    manifest = Manifest(**content)
    for name in ("config", "models", "inputs", "rejects_by_reason", "figures"):
        if not isinstance(value := getattr(manifest, name), dict):
            raise ValueError(f"its {name} are {value!r}")
    if manifest.schema_version > (known := form_of(manifest.stage)):
        raise LaterVersionError(f"a later version wrote it: it is of form {manifest.schema_version}, this one knows {known}")
    return manifest


def value_settings(config: Any) -> dict[str, Any]:
    """The settings of a configuration (a dataclass) that can change a value in a table, in JSON's types, for an `Identity`.

    Passwords and keys are hidden: they are in no manifest, and another password makes no other table.

    Every field counts, except those that its class names in `NO_VALUE`, a tuple: table names, batch sizes, resources and so
    on. Fields that it names in `SINCE` were added after tables were made without them: they count only where they are not
    their default, which must mean what was done before. Nested configurations have a `NO_VALUE` and a `SINCE` of their own.
    """
    known = {one.name: one for one in fields(config)}
    no_value, since = (getattr(type(config), name, ()) for name in ("NO_VALUE", "SINCE"))
    unknown = {*no_value, *since} - known.keys()
    assert not unknown, f"{type(config).__name__}.NO_VALUE or SINCE names no field: {unknown}"
    values = {name: getattr(config, name) for name in known if name not in no_value}
    kept = {name: value for name, value in values.items() if name not in since or value != _default(known[name])}
    return redact_values({name: _plain(value) for name, value in kept.items()})


def _default(of: Field[Any]) -> Any:
    return of.default if of.default_factory is MISSING else of.default_factory()


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return value_settings(value)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_differences(old: Identity, new: Identity) -> list[str]:
    """A line "field: old -> new" for each field that differs."""
    before, after = flatten(old.values()), flatten(new.values())
    absent = "(absent)"
    return [
        f"{name}: {_shorten(before.get(name, absent))} -> {_shorten(after.get(name, absent))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, absent) != after.get(name, absent)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values in nested dicts, by their dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{name}" if prefix else name)
    return flat


def _shorten(value: object, limit: int = 80) -> str:
    text = repr(value) if value != "(absent)" else "(absent)"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def software_versions() -> dict[str, str]:
    """The versions of Python and of those PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
