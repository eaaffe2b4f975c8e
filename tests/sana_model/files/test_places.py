"""Models on a real S3 that spoils some of its answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.storage.files import upload_folder
from sana_model.files import places
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import TINY, scramble
from tests.support.s3 import BUCKET, FaultyProxy, faulty_s3, serve_s3


@pytest.fixture
def proxy() -> Iterator[FaultyProxy]:
    with serve_s3() as endpoint, faulty_s3(endpoint) as proxy:
        yield proxy


def test_a_model_is_loaded_whole_from_a_storage_that_fails_now_and_then(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scramble(SanaTransformer(TINY), 0)
    model.save_pretrained(tmp_path / "model")
    upload_folder(tmp_path / "model", f"s3://{BUCKET}/model")
    proxy.share, proxy.faults = 0.4, ("503", "500", "reset", "cut")
    for turn in range(4):
        monkeypatch.setattr(places, "CACHE_DIR", tmp_path / f"cache{turn}")
        loaded = SanaTransformer.from_pretrained(f"s3://{BUCKET}/model").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert proxy.spoiled.total() > 5
    proxy.share = 0.0
    with pytest.raises(FileNotFoundError, match="nothing at 's3://bucket/none'"):
        SanaTransformer.from_pretrained(f"s3://{BUCKET}/none")
