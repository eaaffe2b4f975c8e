"""The published models of Sana by name: what their files do not tell, and where they lie. Imports no torch."""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sana_model.nn.config import AUTOENCODER_PRESETS, DEFAULT_TEXT_ENCODER, PRESETS, SanaConfig

DIFFUSERS = "_diffusers"
HED_WEIGHTS = "hf://lllyasviel/Annotators/ControlNetHED.pth"
"""The detector of outlines that the published ControlNets were trained with."""


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A model on the Hugging Face hub.

    id: owner/name. short: the name under which `TextToImage.from_pretrained` knows it; "" if it has none.
    kind: "transformer" (a file of NVlabs), "pipeline" (a folder of diffusers), "controlnet", "autoencoder", "text encoder", or
        "not read".
    resolution: pixels along a side; 0 if it has none. dtype: of the published weights.
    config: shape and inputs of the transformer; None if it has none that is known here.
    flow_shift: shift of the sampling grid. note: what else is to be known, or why it is not read.
    """

    id: str
    short: str = ""
    kind: str
    resolution: int = 0
    dtype: str = "float32"
    config: SanaConfig | None = None
    flow_shift: float = 3.0
    note: str = ""


SMALL, LARGE = PRESETS["sana-0.6b"], PRESETS["sana-1.6b"]
NORMED: dict[str, Any] = {"qk_norm": True, "cross_qk_norm": True}
SPRINT: dict[str, Any] = {**NORMED, "guidance_embeds": True, "time_input": "unit"}
TEACHER: dict[str, Any] = {**NORMED, "time_input": "unit"}
AT_512, AT_1024 = {"base_size": 16}, {"base_size": 32}
TRANSFORMERS: list[tuple[str, str, str, SanaConfig, dict[str, Any], int, str, float]] = [
    ("Sana_600M_512px", "", "sana-0.6b-512", SMALL, AT_512, 512, "float16", 3.0),
    ("Sana_600M_1024px", "", "sana-0.6b-1024", SMALL, AT_1024, 1024, "float16", 4.0),
    ("Sana_1600M_512px", "", "sana-1.6b-512-english", LARGE, AT_512, 512, "float16", 3.0),
    ("Sana_1600M_512px_MultiLing", "", "sana-1.6b-512", LARGE, AT_512, 512, "float16", 3.0),
    ("Sana_1600M_1024px", "", "sana-1.6b-1024-english", LARGE, AT_1024, 1024, "float16", 3.0),
    ("Sana_1600M_1024px_MultiLing", "", "sana-1.6b-1024-multilingual", LARGE, AT_1024, 1024, "float16", 3.0),
    ("Sana_1600M_1024px_BF16", "", "sana-1.6b-1024", LARGE, AT_1024, 1024, "bfloat16", 3.0),
    ("Sana_1600M_2Kpx_BF16", "", "sana-1.6b-2k", PRESETS["sana-1.6b-2k"], {}, 2048, "bfloat16", 3.0),
    ("Sana_1600M_4Kpx_BF16", "", "sana-1.6b-4k", PRESETS["sana-1.6b-4k"], {}, 4096, "bfloat16", 6.0),
    ("SANA1.5_1.6B_1024px", "", "sana-1.5-1.6b", LARGE, NORMED, 1024, "bfloat16", 3.0),
    ("SANA1.5_4.8B_1024px", "", "sana-1.5-4.8b", PRESETS["sana-4.8b"], {}, 1024, "bfloat16", 3.0),
    ("Sana_Sprint_0.6B_1024px", "", "sana-sprint-0.6b", SMALL, SPRINT, 1024, "bfloat16", 3.0),
    ("Sana_Sprint_1.6B_1024px", "", "sana-sprint-1.6b", LARGE, SPRINT, 1024, "bfloat16", 3.0),
    ("Sana_Sprint_0.6B_1024px_teacher", "", "sana-sprint-0.6b-teacher", SMALL, TEACHER, 1024, "bfloat16", 3.0),
    (
        *("Sana_Sprint_1.6B_1024px_teacher", "SANA_Sprint_1.6B_1024px_teacher_diffusers", "sana-sprint-1.6b-teacher"),
        *(LARGE, TEACHER, 1024, "bfloat16", 3.0),
    ),
]
"""NVlabs' name, diffusers' name ("": the same and "_diffusers"), short name, base, fields, pixels, dtype, shift."""


def _transformers() -> list[PublishedModel]:
    """Every transformer in both layouts, which differ in the null caption."""
    found = []
    for name, theirs, short, base, fields, pixels, dtype, shift in TRANSFORMERS:
        config = replace(base, **{"time_input": "whole", "null_caption": "caption_mask", **fields})
        owner = "Efficient-Large-Model"
        found += [
            PublishedModel(
                id=f"{owner}/{name}",
                short=short,
                kind="transformer",
                config=config,
                flow_shift=shift,
                resolution=pixels,
                dtype=dtype,
            ),
            PublishedModel(
                id=f"{owner}/{theirs or name + DIFFUSERS}",
                short=short + "-diffusers",
                kind="pipeline",
                config=replace(config, null_caption="own_mask"),
                flow_shift=6.0 if shift == 6.0 else 3.0,
                resolution=pixels,
                dtype=dtype,
            ),
        ]
    return found


def _others() -> list[PublishedModel]:
    owner = "Efficient-Large-Model"
    wide = replace(PRESETS["sana-1.6b"], ffn_dim=5632, time_input="whole")
    quantized = "4-bit SVDQuant weights are not read"
    control = {
        f"{owner}/Sana_600M_1024px_ControlNet_HED": "float16",
        f"{owner}/Sana_1600M_1024px_BF16_ControlNet_HED": "bfloat16",
        "ishan24/Sana_600M_1024px_ControlNet_diffusers": "float16",
        "ishan24/Sana_600M_1024px_ControlNetPlus_diffusers": "float16",
    }
    classes = [
        f"mit-han-lab/dc-ae-f{scale}-in-1.0-{name}-in-512px"
        for scale in ("32c32", "64c128")
        for name in ("uvit-s", "uvit-h", "uvit-2b", "usit-h", "usit-2b", "dit-xl")
    ]
    not_read = {
        "nunchaku-tech/nunchaku-sana": quantized,
        "mit-han-lab/svdq-int4-sana-1600m": quantized,
        "yitongl/SANA_LinearFFN": "its feed-forward has no convolution",
        f"{owner}/NVILA-Lite-2B-Verifier": "a vision-language model that picks pictures",
        **dict.fromkeys(classes, "draws ImageNet classes"),
        **{f"Photoroom/prx-512-t2i-dc-ae{end}": "another transformer" for end in ("", "-sft", "-sft-distilled")},
        **dict.fromkeys(("dc-ai/dc-ae-f32c128-1.5", "dc-ai/dc-ae-f64c128-1.5"), "named in code, not released"),
    }
    return [
        PublishedModel(
            id="Lawrence-cj/Sana_1600M_1024px_BF16_diffusers_ch5632",
            kind="pipeline", resolution=1024, dtype="bfloat16", config=wide, note="feed-forward padded for SVDQuant",
        ),
        *(PublishedModel(id=name, kind="controlnet", resolution=1024, dtype=dtype) for name, dtype in control.items()),
        PublishedModel(id=DEFAULT_TEXT_ENCODER, kind="text encoder", dtype="bfloat16"),
        *(PublishedModel(id=name, kind="not read", note=note) for name, note in not_read.items()),
    ]  # fmt: skip


def _autoencoders() -> list[PublishedModel]:
    names = [f"mit-han-lab/{name}" for name in AUTOENCODER_PRESETS if name != "tiny"]
    ids = [*names, *(f"{name}-diffusers" for name in names), "dc-ai/dc-ae-lite-f32c32", "dc-ai/dc-ae-lite-f32c32-diffusers"]
    return [PublishedModel(id=name, kind="autoencoder") for name in ids]


PUBLISHED = (*_transformers(), *_others(), *_autoencoders())
BY_SHORT = {model.short: model for model in PUBLISHED if model.short}
BY_NAME = {model.id.rpartition("/")[2]: model for model in PUBLISHED}


def find_published(path: str | Path) -> PublishedModel | None:
    """The published model that a path names: by its short name, its id, its folder in the hub's cache, or its file's name.

    Of several names in one path the last counts: a file's own comes before its folder's.
    """
    text = str(path).removeprefix("hf://")
    if text in BY_SHORT:
        return BY_SHORT[text]
    *folders, last = text.split("/")
    last = Path(last).stem if last.endswith((".pth", ".safetensors")) else last
    names = (part.partition("@")[0].rpartition("--")[2] for part in (last, *reversed(folders)))
    return next((BY_NAME[name] for name in names if name in BY_NAME), None)


def name_near(path: str) -> str:
    """What somebody may have meant by a path that is not there: "; did you mean ...?"; "" if nothing is near."""
    ids = {name.lower(): f"hf://{model.id}" for model in PUBLISHED for name in (model.id, model.id.rpartition("/")[2])}
    near = get_close_matches(path.lower(), [*BY_SHORT, *ids], n=1, cutoff=0.85)
    return f"; did you mean {ids.get(near[0], near[0])}?" if near else ""
