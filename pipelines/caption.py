"""The caption stage: one VLM describes every image. Each captioner makes one table; another captioner is one more table."""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from pipelines.images import BadImageError, decode
from pipelines.models import local_model, model_version, pick_device
from pipelines.schema import CAPTIONS, IMAGES, IMAGES_PATH, captions_path
from pipelines.stage import OnProgress, Resources, Row, ShardOutput, StageResult, reject, run_shards
from pipelines.tables import Identity, Table

DEFAULT_PROMPT = "Describe the image."


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a caption is drawn from the model. A temperature of 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError(f"{self}: temperature must be >= 0, top_p in (0, 1], max_new_tokens >= 1")


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig:
    """A VLM with its prompt.

    Args:
        name: of the table under captions/, and of the captioner wherever captions compete.
        model: a local folder, a hub id, or a zoo://, hf:// or fsspec URI; any AutoModelForImageTextToText.
        revision: of a hub id.
        prompt: what the model is asked about each image.
        sampling: greedy unless told otherwise.
        max_image_size: longer sides are shrunk to so many pixels before the model's processor sees the image.
        engine: "transformers" runs anywhere.
        dtype: of the weights.
        batch_size: images in one call of the model; changes no value.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the images is refused.
    """

    name: str
    model: str
    revision: str | None = None
    prompt: str = DEFAULT_PROMPT
    sampling: SamplingConfig = SamplingConfig()
    max_image_size: int = 1024
    engine: Literal["transformers"] = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    batch_size: int = 16
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(f"captioner {self.name!r}: prompt={self.prompt!r} is empty; say what to describe")
        if not self.name or "/" in self.name or self.name[0] in "._":
            raise ValueError(f"captioner name {self.name!r} must be a plain folder name, such as 'llava'")


def caption_identity(dataset_uri: str, config: CaptionerConfig) -> Identity:
    """What the captions depend on: batch size, device and resources are left out."""
    values = asdict(config)
    settings = {name: values[name] for name in ("model", "prompt", "sampling", "max_image_size", "engine", "dtype")}
    images = Table(dataset_uri, IMAGES_PATH, IMAGES).require()
    models = {config.name: model_version(config.model, config.revision)}
    return Identity("caption", settings, models, {IMAGES_PATH: images.fingerprint})


def run_caption(dataset_uri: str, config: CaptionerConfig, *, on_progress: OnProgress = lambda _: None) -> StageResult:
    """Caption every image of a dataset into `captions/<name>`.

    Raises as `run_shards`, and MissingTableError if there are no images.
    """
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    return run_shards(
        Table(dataset_uri, captions_path(config.name), CAPTIONS),
        caption_identity(dataset_uri, config),
        images.list_shards(),
        read_shard=partial(images.read_shard, columns=["id", "image_bytes", "source_uri"]),
        make_worker=partial(Captioner, config),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
    )


class Captioner:
    """Ray Data actor: images -> captions, by a transformers VLM."""

    def __init__(self, config: CaptionerConfig):
        self.config = config
        path = local_model(config.model)
        options = {"revision": config.revision} if config.revision else {}
        self.device = pick_device(config.device)
        dtype = getattr(torch, config.dtype)
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **options)
        self.model = model.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(path, **options)
        self.processor.tokenizer.padding_side = "left"  # all captions of a batch begin at the same place
        content = [{"type": "image"}, {"type": "text", "text": config.prompt}]
        self.prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        self.generation = self._generation_config()

    def process(self, table: pa.Table) -> ShardOutput:
        """A row of captions for each image, or a reject."""
        rows: list[Row] = []
        rejects: list[Row] = []
        source = table.to_pylist()
        for start in range(0, len(source), self.config.batch_size):
            batch, images = [], []
            for row in source[start : start + self.config.batch_size]:
                try:
                    images.append(self._load(row["image_bytes"]))
                    batch.append(row)
                except BadImageError as error:
                    rejects.append(reject(row, error.reason, error.detail))
            for row, caption in zip(batch, self.caption(images) if images else [], strict=True):
                if caption["caption"]:
                    rows.append({"id": row["id"], **caption})
                else:
                    rejects.append(reject(row, "empty_caption", f"{self.config.model} answered with nothing"))
        return ShardOutput(rows, rejects)

    @torch.inference_mode()
    def caption(self, images: list[Image.Image]) -> list[Row]:
        """caption, num_tokens and finish_reason of each RGB image."""
        prompts, one_each = [self.prompt] * len(images), [[image] for image in images]
        inputs = self.processor(text=prompts, images=one_each, return_tensors="pt", padding=True).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        torch.manual_seed(self.config.sampling.seed)
        output = self.model.generate(**inputs, generation_config=self.generation)
        return [self._read_answer(answer) for answer in output[:, inputs["input_ids"].shape[1] :]]

    def _read_answer(self, answer: torch.Tensor) -> Row:
        stops = self.generation.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        ended = torch.isin(answer, torch.tensor(stops, device=answer.device)).nonzero()
        num_tokens = int(ended[0]) if len(ended) else len(answer)
        caption = self.processor.tokenizer.decode(answer[:num_tokens], skip_special_tokens=True).strip()
        return {"caption": caption, "num_tokens": num_tokens, "finish_reason": "stop" if len(ended) else "length"}

    def _load(self, image_bytes: bytes) -> Image.Image:
        image = decode(image_bytes)
        image.thumbnail((self.config.max_image_size,) * 2)
        return image

    def _generation_config(self) -> GenerationConfig:
        sampling, known = self.config.sampling, self.model.generation_config
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        eos = known.eos_token_id if known.eos_token_id is not None else self.processor.tokenizer.eos_token_id
        pad = known.pad_token_id if known.pad_token_id is not None else self.processor.tokenizer.pad_token_id
        return GenerationConfig(max_new_tokens=sampling.max_new_tokens, eos_token_id=eos, pad_token_id=pad, **options)
