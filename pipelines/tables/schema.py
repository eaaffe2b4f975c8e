"""Every table of a dataset: where it lies, its columns and their Arrow types. Nothing else spells a column's type."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from sana_model.files.inside import check_inside

ORIGINAL_CAPTIONER = "original"
"""The captioner's name for captions that came with the images: they are in `images`, and no table of captions holds them."""

NOT_IN_NAMES = "/ \\ * ? [ ]"
"""File systems take these for a folder, or for a pattern of other names."""

IMAGES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # sha256 of image_bytes, hex
        pa.field("image_bytes", pa.binary(), nullable=False),  # as found: never re-encoded
        pa.field("format", pa.string(), nullable=False),  # as Pillow names it: JPEG, PNG, WEBP ...
        pa.field("width", pa.int32(), nullable=False),  # pixels, after the EXIF orientation
        pa.field("height", pa.int32(), nullable=False),
        pa.field("phash", pa.string(), nullable=False),  # 64-bit perceptual hash, hex
        pa.field("caption", pa.string()),  # the original one
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("metadata", pa.string()),  # a JSON object: everything else that came with the image
    ]
)
IMAGE_SCORES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),  # its meaning depends on the scorer
        pa.field("detail", pa.string()),  # more from the scorer: for a near duplicate, the image that stands for it
    ]
)
CAPTIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),  # as the captioner counts; words where imported
        pa.field("finish_reason", pa.string(), nullable=False),  # "stop", or "length" where the caption was cut
        pa.field("flags", pa.list_(pa.string())),  # faults that did not lead to a reject: caption.config.FAULTS
    ]
)
SCORES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("clip_score", pa.float32(), nullable=False),  # 100 times the cosine of image and caption
    ]
)
LATENTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("latents", pa.binary(), nullable=False),  # (channels, height, width) in C order, scaled; dtype: the manifest's
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # of the latents
        pa.field("width", pa.int32(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),  # "HxW", pixels
    ]
)
CAPTION_EMBEDS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # of the image
        pa.field("embeds", pa.large_binary(), nullable=False),  # (num_tokens, width) in C order; dtype: the manifest's
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)
SAMPLES = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # the picture's number, from 0
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("image_bytes", pa.binary(), nullable=False),  # PNG
    ]
)
PROMPT_COLUMNS = (
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("metadata", pa.string(), nullable=False),  # a JSON object: what the prompt's source says of it
)
"""Further columns of samples whose prompts came with ids and metadata, as a published set's do."""
PROMPT_METADATA = "prompt_metadata"
"""The setting in the manifest of such samples: a hash of all ids and metadata."""

EVALUATIONS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # that of the picture
        pa.field("prompt", pa.string(), nullable=False),
    ]
)
"""The columns of every table of evaluations; each metric adds its own, see `evaluations_schema`."""
REJECTS = pa.schema(
    [
        pa.field("id", pa.string()),  # null where the bytes could not even be read
        pa.field("source_uri", pa.string()),
        pa.field("reject_reason", pa.string(), nullable=False),  # a short code
        pa.field("detail", pa.string(), nullable=False),  # for people
    ]
)


def image_embeds_schema(width: int) -> pa.Schema:
    """The schema of `image_embeds/<clip>` for a CLIP whose embeddings have `width` numbers; each embedding has length 1."""
    number = pa.field("item", pa.float16(), nullable=False)
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(number, width), nullable=False),
        ]
    )


FEATURES = pa.field("features", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False)
"""A model's features of a picture; of all pictures of a table as many."""

FOUND_OBJECT = pa.struct(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("box", pa.list_(pa.float32()), nullable=False),  # left, top, right, bottom, in pixels
        pa.field("color", pa.string()),  # where the prompt asks for one
    ]
)
DPG_ANSWER = pa.struct(
    [
        pa.field("question", pa.int32(), nullable=False),  # its number within the prompt
        pa.field("category", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("yes", pa.bool_(), nullable=False),
        pa.field("counts", pa.bool_(), nullable=False),  # it is yes, and so are the questions that it depends on
        pa.field("unclear", pa.bool_(), nullable=False),  # neither yes nor no
    ]
)

METRIC_COLUMNS: Mapping[str, tuple[pa.Field, ...]] = {
    "clip_score": (pa.field("clip_score", pa.float32(), nullable=False),),  # 100 times the cosine of picture and prompt
    "inception": (FEATURES,),
    "cmmd": (FEATURES,),
    "dino": (FEATURES,),
    "geneval": (
        pa.field("task", pa.string(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("faults", pa.list_(pa.string()), nullable=False),  # what was expected and what was found, for people
        pa.field("objects", pa.list_(FOUND_OBJECT), nullable=False),  # those that count
    ),
    "dpg": (
        pa.field("dpg", pa.float32(), nullable=False),  # share of the questions that count as yes
        pa.field("answers", pa.list_(DPG_ANSWER), nullable=False),
    ),
    "image_reward": (pa.field("image_reward", pa.float32(), nullable=False),),
    "hps": (pa.field("hps", pa.float32(), nullable=False),),
    "pick_score": (pa.field("pick_score", pa.float32(), nullable=False),),
    "aesthetic": (pa.field("aesthetic", pa.float32(), nullable=False),),
    "verifier": (
        pa.field("yes", pa.bool_(), nullable=False),
        pa.field("log_prob", pa.float32(), nullable=False),  # of "yes" as the answer's first word where it is yes, else of "no"
    ),
    "reconstruction": (
        pa.field("psnr", pa.float32(), nullable=False),  # dB, of 8-bit pictures
        pa.field("ssim", pa.float32(), nullable=False),
        pa.field("sharpness", pa.float32()),  # of flat pictures null
        pa.field("perceptual", pa.float32()),
        pa.field("features", FEATURES.type),  # of the picture, and of the decoded one
        pa.field("features_again", FEATURES.type),
    ),
    "shapes": (
        pa.field("asked", pa.string()),  # the prompt, if it asks for one object of the Shapes world
        pa.field("seen", pa.string()),  # what the judge sees in the picture then, as a caption
    ),
}
"""The columns that a metric adds to those of EVALUATIONS, by its name."""


def evaluations_schema(metric: str) -> pa.Schema:
    """The schema of `evaluations/<name>/<metric>`; of a metric that is unknown here, the columns that all have."""
    return pa.schema([*EVALUATIONS, *METRIC_COLUMNS.get(metric, ())])


def samples_schema(config: Mapping[str, Any]) -> pa.Schema:
    """The schema of a samples table with this configuration in its manifest."""
    return pa.schema([*SAMPLES, *PROMPT_COLUMNS]) if PROMPT_METADATA in config else SAMPLES


def check_folder_name(setting: str, name: str) -> None:
    """Raise ValueError if a name cannot be that of a folder of the tables below, on every file system."""
    try:
        check_inside(name)
    except ValueError as error:
        raise ValueError(f"{setting}={name!r} must be a plain folder name, such as 'llava-1.5': {error}") from error
    if name[0] in "._" or name != name.strip() or "::" in name or any(letter in name for letter in NOT_IN_NAMES.split()):
        raise ValueError(
            f"{setting}={name!r} must be a plain folder name, such as 'llava-1.5': without {NOT_IN_NAMES} and '::', a '.' or "
            "'_' at its begin, and spaces at its ends"
        )


def image_embeds_path(clip: str) -> str:
    return f"image_embeds/{clip}"


def image_scores_path(scorer: str) -> str:
    return f"image_scores/{scorer}"


def captions_path(captioner: str) -> str:
    return f"captions/{captioner}"


def scores_path(clip: str, captioner: str) -> str:
    return f"scores/{clip}/{captioner}"


def latents_path(autoencoder: str, resolution: int) -> str:
    return f"latents/{autoencoder}-{resolution}"


def caption_embeds_path(text_encoder: str, captioner: str) -> str:
    return f"caption_embeds/{text_encoder}/{captioner}"


def samples_path(name: str) -> str:
    return f"samples/{name}"


def evaluations_path(name: str, metric: str) -> str:
    return f"evaluations/{name}/{metric}"


IMAGES_PATH = "images"

TABLE_SCHEMAS = {
    IMAGES_PATH: IMAGES,
    "image_embeds": image_embeds_schema(-1),  # of unknown width; see `schema_of`
    "image_scores": IMAGE_SCORES,
    "captions": CAPTIONS,
    "scores": SCORES,
    "latents": LATENTS,
    "caption_embeds": CAPTION_EMBEDS,
    "samples": SAMPLES,
    "evaluations": EVALUATIONS,  # and the columns of a metric; see `schema_of`
}
"""Schemas by the first part of a table's path, in the order in which stages make the tables."""

ABOUT_CAPTIONS = ("scores", "caption_embeds")
"""Groups whose tables are about captions: a folder for each model, and in it a table for each captioner."""

NESTED = (*ABOUT_CAPTIONS, "evaluations")
"""Groups whose tables lie one floor deeper; evaluations have a folder for each samples table, and in it a table per metric."""

READ_WHOLE = ("captions", "scores", "image_scores")
"""Groups whose shards are small: they are read whole, by one request to an object store, whatever columns are asked for."""

MADE_BY = {
    IMAGES_PATH: "ingest",
    "image_embeds": "embed_images or jobs.score",
    "image_scores": "score_images or jobs.duplicates",
    "captions": "caption or jobs.import_captions",
    "scores": "score",
    "latents": "extract",
    "caption_embeds": "embed_captions",
    "samples": "sample or jobs.best_of",
    "evaluations": "evaluate",
}
"""The command that makes a table (or the two that may), by the first part of the table's path."""

FORMS = {"score": 2, "extract": 2, "embed_captions": 2, "evaluate": 2}
"""The version of the form in which a stage writes its table, by stage; it is 1 for every other stage.

1 -> 2: scores and embeddings of all captioners were in one table, latents held the captions, and the judgements of a picture
were all in one table.
"""


def form_of(stage: str) -> int:
    """The version of the form in which this program writes the table of a stage."""
    return FORMS.get(stage, 1)


def schema_of(path: str, config: Mapping[str, Any]) -> pa.Schema:
    """The schema of a table from its path and the configuration in its manifest."""
    group, *names = path.split("/")
    if group == "evaluations":
        return evaluations_schema(names[-1])
    if group == "samples":
        return samples_schema(config)
    if group == "image_embeds" and "width" in config:
        return image_embeds_schema(config["width"])
    return TABLE_SCHEMAS[group]


Row = dict[str, Any]
