"""No damage of a shard passes: flipped bits, zeros, swapped halves, another file in its place, a seal that was cut out."""

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.tables.errors import DamagedShardError
from pipelines.tables.schema import CAPTIONS, IMAGES, REJECTS
from pipelines.tables.sealed import SEAL, SEALED, SealedFile, write_sealed
from pipelines.tables.table import FACTS_KEY, Table

FLIPS = 1000
SHARD = "00000"
Read = Callable[[Table], object]
READS: dict[str, Read] = {
    "read_shard": lambda table: table.read_shard(SHARD),
    "iter_shard": lambda table: list(table.iter_shard(SHARD, 3)),
}


def image_rows(count: int) -> pa.Table:
    random = np.random.default_rng(7)
    rows = [
        {
            "id": random.bytes(32).hex(),
            "image_bytes": random.bytes(40),
            "format": "PNG",
            "width": 4,
            "height": 2,
            "phash": random.bytes(8).hex(),
            "caption": f"a red circle {number}" if number % 2 else None,
            "source_uri": f"photos/{number}.png",
            "metadata": None,
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, IMAGES)


@pytest.fixture
def images(tmp_path: Path) -> Table:
    table = Table(str(tmp_path), "images", IMAGES)
    table.write_shard(SHARD, image_rows(30), fingerprint="f", figures={"psnr": 30.0})
    return table


def path_of(table: Table) -> Path:
    return Path(table.shard_uri(SHARD))


def passes(table: Table, read: Read) -> bool:
    try:
        read(table)
    except DamagedShardError:
        return False
    return True


@pytest.mark.parametrize("name", READS)
def test_of_a_thousand_single_flipped_bits_none_passes(images: Table, name: str) -> None:
    path, content = path_of(images), path_of(images).read_bytes()
    for bit in np.random.default_rng(0).choice(8 * len(content), FLIPS, replace=False).tolist():
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert not passes(images, READS[name]), f"byte {bit // 8} of {len(content)}"
    path.write_bytes(content)
    assert passes(images, READS[name])


def test_every_bit_of_the_footer_is_checked_by_whoever_reads_only_the_footer_or_one_column(images: Table) -> None:
    path, content = path_of(images), path_of(images).read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for place in range(start, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        assert not passes(images, lambda table: table.read_facts(SHARD)), place
    path.write_bytes(content[:-1] + b"2")
    assert not passes(images, lambda table: table.read_shard(SHARD, ["id"]))


def test_columns_that_are_not_read_cost_nothing_and_those_that_are_read_come_in_the_order_asked_for(images: Table) -> None:
    path, rows = path_of(images), images.read_shard(SHARD)
    with path.open("r+b") as file:
        file.seek(pq.read_metadata(path).row_group(0).column(1).data_page_offset + 20)  # of image_bytes
        file.write(b"\0\0\0\0")
    assert images.read_shard(SHARD, ["width", "id"]) == rows.select(["width", "id"])
    with pytest.raises(DamagedShardError, match=r"column image_bytes of row group 0 is not what was written"):
        images.read_shard(SHARD, ["id", "image_bytes"])
    with pytest.raises(DamagedShardError, match="no_such_column"):
        images.read_shard(SHARD, ["no_such_column"])


def without_seal(content: bytes, *, schema_too: bool = False) -> bytes:
    """The file as another program would write it again."""
    table, buffer = pq.read_table(BytesIO(content)), BytesIO()
    metadata = {
        key: value for key, value in (table.schema.metadata or {}).items() if key != SEAL and not (schema_too and key == SEALED)
    }
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


def without_metadata(content: bytes) -> bytes:
    """One zero ends the footer where the list of its metadata begins."""
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    first = min(content.index(key, start) for key in (SEAL, SEALED, FACTS_KEY, b"ARROW:schema"))
    return content[: first - 4] + b"\0" + content[first - 3 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-30],
    "cut to its magic": lambda content: b"PAR1",
    "cut at the front": lambda content: content[100:],
    "zeroed bytes": lambda content: content[:500] + bytes(64) + content[564:],
    "zeroed footer": lambda content: content[:-300] + bytes(200) + content[-100:],
    "swapped halves": lambda content: content[len(content) // 2 :] + content[: len(content) // 2],
    "an HTML page": lambda content: b"<html><body>503 Service Unavailable</body></html>",
    "twice": lambda content: content + content,
    "bytes between data and footer": lambda content: content[:1000] + b"\0" + content[1000:],
    "a footer of 2 GiB": lambda content: content[:-8] + (2**31).to_bytes(4, "little") + b"PAR1",
    "a footer of no bytes": lambda content: content[:-8] + bytes(4) + b"PAR1",
    "its seal renamed": lambda content: content.replace(SEAL + b"\x18", b"sana.sael\x18"),
    "its seal cut out": without_seal,
    "a footer without its metadata": without_metadata,
    "another magic": lambda content: b"PAR2" + content[4:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_damage(images: Table, damage: str) -> None:
    content = path_of(images).read_bytes()
    assert DAMAGES[damage](content) != content
    path_of(images).write_bytes(DAMAGES[damage](content))
    for read in READS.values():
        with pytest.raises(DamagedShardError, match=r"images/00000\.parquet is damaged"):
            read(images)


def test_a_copy_of_another_shard_or_table_is_refused_by_name(images: Table) -> None:
    images.write_shard("00001", image_rows(5))
    other = Table(images.dataset_uri, "captions/b", CAPTIONS)
    ours = Table(images.dataset_uri, "captions/a", CAPTIONS)
    for table in (other, ours):
        table.write_shard(SHARD, pa.Table.from_pylist([], CAPTIONS))
    shutil.copy(images.shard_uri("00001"), images.shard_uri(SHARD))
    shutil.copy(other.shard_uri(SHARD), ours.shard_uri(SHARD))
    with pytest.raises(DamagedShardError, match=r"images/00000\.parquet is damaged \(it is a copy of images/00001\.parquet\)"):
        images.read_shard(SHARD, ["id"])
    with pytest.raises(DamagedShardError, match=r"a/00000\.parquet is damaged \(it is a copy of captions/b/00000\.parquet\)"):
        ours.read_facts(SHARD)


def test_shards_of_earlier_versions_are_read_and_their_page_checksums_verified(images: Table) -> None:
    rows, old = images.read_shard(SHARD), BytesIO()
    pq.write_table(rows, old, compression="zstd", write_page_checksum=True)
    path_of(images).write_bytes(old.getvalue())
    assert images.read_shard(SHARD) == rows and images.read_shard(SHARD, ["width", "id"]).column_names == ["width", "id"]
    assert pa.Table.from_batches(list(images.iter_shard(SHARD, 7))).to_pylist() == rows.to_pylist()
    column = pq.read_metadata(path_of(images)).row_group(0).column(1)
    place = (
        (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 2
    )  # in a page: of its header nothing would tell
    content = old.getvalue()
    path_of(images).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    for read in READS.values():
        with pytest.raises(DamagedShardError, match="CRC"):
            read(images)
    path_of(images).write_bytes(without_seal(content, schema_too=True))  # no checksums at all
    assert images.read_shard(SHARD) == rows


@pytest.mark.parametrize(("num_rows", "rows_per_group"), [(0, 1), (1, 1000), (500, 1), (1500, 3)])
def test_any_number_of_row_groups(num_rows: int, rows_per_group: int) -> None:
    rejects = [{"id": None, "source_uri": f"{n}", "reject_reason": "x", "detail": '{"footer": "'} for n in range(num_rows)]
    rows = pa.Table.from_pylist(rejects, REJECTS)
    content = BytesIO(write_sealed(rows, rows_per_group, folder='f"\\', name="é"))
    file = SealedFile(content, folder='f"\\', name="é")
    assert file.metadata.num_row_groups == max(-(-num_rows // rows_per_group), 1)
    assert file.read() == rows and sum(batch.num_rows for batch in file.iter_batches(2)) == num_rows
    assert file.read(["detail"], groups=[0]).num_rows == min(rows_per_group, num_rows)
