"""Finds the columns of tables by their usual names, and tells what a column of a Parquet file may hold."""

from collections import Counter
from collections.abc import Callable, Iterable

import pyarrow as pa

IMAGE_COLUMNS = ("image", "image_bytes", "jpg", "jpeg", "png", "webp", "img", "bytes")
URL_COLUMNS = ("url", "image_url", "uri", "key", "file_name", "path")


def unique_names(names: Iterable[str]) -> list[str]:
    """Names of columns in which none comes twice: the second "text" is called "text (2)"."""
    seen: Counter[str] = Counter()
    unique: dict[str, None] = {}
    for name in names:
        candidate = name
        while candidate in unique:
            seen[name] += 1
            candidate = f"{name} ({seen[name] + 1})"
        unique[candidate] = None
    return list(unique)


def unique_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with its columns renamed by `unique_names`."""
    return pa.schema([field.with_name(name) for field, name in zip(schema, unique_names(schema.names), strict=True)])


def find_column(
    schema: pa.Schema, given: str | None, names: tuple[str, ...], fits: Callable[[pa.DataType], bool]
) -> str | None:
    """The first of `find_columns`; None if there is none."""
    return next(iter(find_columns(schema, given, names, fits)), None)


def find_columns(
    schema: pa.Schema, given: str | None, names: tuple[str, ...], fits: Callable[[pa.DataType], bool]
) -> list[str]:
    """Find the given column, or those of `names` (in any case, in this order), whose type `fits`.

    Args:
        schema: whose names are unique.
    """
    there = {given: given} if given in schema.names else {name.lower(): name for name in schema.names}
    wanted = [there[name] for name in ((given,) if given else [name.lower() for name in names]) if name in there]
    return [name for name in dict.fromkeys(wanted) if name is not None and fits(schema.field(name).type)]


def holds_images(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as Hugging Face's `datasets` writes images
        kind = kind.field("bytes").type
    return is_binary(kind)


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column holds a text in each row."""
    if pa.types.is_dictionary(kind):  # a column of categories, as pandas writes it
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def holds_captions(kind: pa.DataType) -> bool:
    """Whether a column holds a text, as text or as bytes, or a list of texts, in each row."""
    kind = _plain(kind)
    return holds_text(kind) or is_binary(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    any_length = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return any_length or pa.types.is_fixed_size_binary(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of a list's values, whatever kind of list it is; any other type as it is."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    if any(is_list(kind) for is_list in lists) or pa.types.is_large_list_view(kind):
        return kind.value_type
    return kind
