"""Paths, hub addresses and URIs of checkpoints."""

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import boto3
import fsspec
import huggingface_hub
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.storage.files import upload_folder
from sana_model.files import places
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.transformer import SanaTransformer
from tests.support.peers import TINY, assert_same_tensors, scramble
from tests.support.s3 import BUCKET, FaultyProxy, faulty_s3, serve_s3


def test_hub_addresses_name_owner_revision_and_folder(tmp_path, monkeypatch):
    """Against a cache as the hub's own client lays it out; nothing is fetched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    for revision, seed in (("main", 0), ("refs/pr/3", 1)):
        commit = f"{seed:040x}"
        ref = repository / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        scramble(SanaTransformer(TINY), seed).save_pretrained(repository / "snapshots" / commit / "transformer")
    for address, seed in [("owner/name", 0), ("owner/name/transformer", 0), ("owner/name@refs%2Fpr%2F3/transformer", 1)]:
        loaded = SanaTransformer.from_pretrained(f"hf://{address}")
        assert_same_tensors(loaded.state_dict(), scramble(SanaTransformer(TINY), seed).state_dict())
    with pytest.raises(FileNotFoundError, match="holds no 'vae'"):
        DCAutoencoder.from_pretrained("hf://owner/name/vae")
    with pytest.raises(ValueError, match="hf://owner/name"):
        SanaTransformer.from_pretrained("hf://gpt2")


class UnstampedFileSystem(MemoryFileSystem):
    """Does not tell when a file changed, like https."""

    protocol = "unstamped"

    def info(self, path, **kwargs):
        return {name: value for name, value in super().info(path, **kwargs).items() if name != "created"}


def test_a_uri_that_tells_no_time_is_fetched_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "CACHE_DIR", tmp_path / "cache")
    fsspec.register_implementation("unstamped", UnstampedFileSystem, clobber=True)
    for seed in (0, 1):
        model = scramble(SanaTransformer(TINY), seed)
        model.save_pretrained(tmp_path / "ours")
        fsspec.filesystem("unstamped").put(str(tmp_path / "ours") + "/", "unstamped://run/", recursive=True)
        assert_same_tensors(SanaTransformer.from_pretrained("unstamped://run").state_dict(), model.state_dict())


class CountingFileSystem(MemoryFileSystem):
    """Is slow, and notes which files are fetched."""

    protocol = "counting"
    fetched: ClassVar[list[str]] = []

    def get_file(self, rpath, lpath, **kwargs):
        time.sleep(0.05)
        self.fetched.append(rpath)
        super().get_file(rpath, lpath, **kwargs)


def test_of_workers_that_start_together_one_fetches(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "CACHE_DIR", tmp_path / "cache")
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    scramble(SanaTransformer(TINY), 0).save_pretrained(tmp_path / "ours")
    fsspec.filesystem("counting").put(str(tmp_path / "ours") + "/", "counting://run/", recursive=True)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: places.resolve("counting://run"), range(8)))
    (place,) = found
    names = sorted(path.name for path in place.iterdir())
    assert names and sorted(name.rpartition("/")[2] for name in CountingFileSystem.fetched) == names


def test_fsspec_uri_loads_and_a_changed_file_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "CACHE_DIR", tmp_path / "cache")
    uri = f"memory://{uuid.uuid4().hex}"
    for seed in (0, 1):
        model = scramble(SanaTransformer(TINY), seed)
        model.save_pretrained(tmp_path / "ours")
        fsspec.filesystem("memory").put(str(tmp_path / "ours") + "/", f"{uri}/run/", recursive=True)
        loaded = SanaTransformer.from_pretrained(f"{uri}/run")
        assert_same_tensors(loaded.state_dict(), model.state_dict())
    model.save_pretrained(tmp_path / "x.pth", layout="nvlabs")
    fsspec.filesystem("memory").put(str(tmp_path / "x.pth"), f"{uri}/x.pth")
    assert SanaTransformer.from_pretrained(f"{uri}/x.pth", num_cross_heads=4).config.depth == TINY.depth
    with pytest.raises(FileNotFoundError, match="nothing at"):
        SanaTransformer.from_pretrained(f"{uri}/none")


def test_saving_to_a_uri_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for layout in ("sana", "diffusers", "nvlabs"):
        for model in (SanaTransformer(TINY), DCAutoencoder.from_preset("tiny")):
            with pytest.raises(ValueError, match="s3://bucket/x' is a URI"):
                model.save_pretrained("s3://bucket/x", layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def proxy() -> Iterator[FaultyProxy]:
    with serve_s3() as endpoint, faulty_s3(endpoint) as proxy:
        yield proxy


def test_a_model_is_loaded_whole_from_a_storage_that_fails_now_and_then(proxy, tmp_path, monkeypatch):
    model = scramble(SanaTransformer(TINY), 0)
    model.save_pretrained(tmp_path / "model")
    upload_folder(tmp_path / "model", f"s3://{BUCKET}/model")
    proxy.share, proxy.faults = 0.4, ("503", "500", "reset", "cut")
    for turn in range(4):
        monkeypatch.setattr(places, "CACHE_DIR", tmp_path / f"cache{turn}")
        assert_same_tensors(SanaTransformer.from_pretrained(f"s3://{BUCKET}/model").state_dict(), model.state_dict())
    assert proxy.spoiled.total() > 5
    proxy.share = 0.0
    with pytest.raises(FileNotFoundError, match="nothing at 's3://bucket/none'"):
        SanaTransformer.from_pretrained(f"s3://{BUCKET}/none")


def test_a_model_in_a_bucket_writes_nothing_outside_the_cache(proxy, tmp_path, monkeypatch):
    """Markers of folders, which consoles make, do no harm; keys with ".." are refused."""
    monkeypatch.setattr(places, "CACHE_DIR", tmp_path / "a" / "b" / "cache")
    client = boto3.client("s3", endpoint_url=proxy.url)
    for key in ("good/", "good/config.json", "good/transformer/", "good/transformer/config.json", "evil/a", "evil/../../x"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"" if key.endswith("/") else b"{}")
    copied = places.resolve(f"s3://{BUCKET}/good")
    files = sorted(path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file())
    assert files == ["config.json", "transformer/config.json"]
    with pytest.raises(ValueError, match=r"cannot be copied.*'\.\./\.\./x' leads out"):
        places.resolve(f"s3://{BUCKET}/evil")
    assert not list(tmp_path.rglob("x"))
