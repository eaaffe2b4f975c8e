"""Models that refuse prompts, and pictures that were drawn."""

from io import BytesIO
from typing import Any

import torch
from PIL import Image

from pipelines.score.config import ImageScorerConfig
from pipelines.score.images import Classifier
from pipelines.serve.config import PictureCheckConfig, PromptCheckConfig
from pipelines.workers.models import pick_device, pretrained

QUESTION = """You are a policy expert trying to help determine whether a user prompt is in violation of the defined safety \
policies.

<start_of_turn>
Human Question: {prompt}
<end_of_turn>

Our safety principle is defined in the below:

* {policy}

Does the human question violate the above principle? Your answer must start with 'Yes' or 'No'. And then walk through step by \
step to be sure we answer correctly."""
"""How ShieldGemma was trained to be asked (its model card; NVlabs' `app/safety_check.py` asks alike)."""


class PromptCheck:
    """The probability that a prompt is not to be drawn. Raises ValueError if the classifier has no such label."""

    def __init__(self, config: PromptCheckConfig, device: str | None):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        self.config = config
        path, options = pretrained(config.model)
        shape = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        self.classifies = (shape.architectures or [""])[0].endswith("ForSequenceClassification")
        kind = AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM
        dtype = getattr(torch, config.dtype)
        model: Any = kind.from_pretrained(path, dtype=dtype, trust_remote_code=False, **options)
        self.model = model.to(pick_device(device)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
        if self.classifies:
            labels = {str(name): int(number) for number, name in shape.id2label.items()}
            labels |= {str(number): number for number in labels.values()}
            if str(config.label) not in labels:
                raise ValueError(f"prompt_check.label={config.label}: {config.model} has the labels {', '.join(labels)}")
            self.answers = [labels[str(config.label)]]
        else:
            vocabulary = self.tokenizer.get_vocab()
            if not {"Yes", "No"} <= vocabulary.keys():
                raise ValueError(f"prompt_check.model={config.model} neither classifies texts nor has the words Yes and No")
            self.answers = [vocabulary["Yes"], vocabulary["No"]]

    def refuses(self, prompt: str) -> bool:
        return not self.score(prompt) < self.config.threshold  # a score that is not finite refuses

    @torch.inference_mode()
    def score(self, prompt: str) -> float:
        text = prompt if self.classifies else QUESTION.format(prompt=prompt, policy=self.config.policy)
        inputs = self.tokenizer(text, return_tensors="pt", truncation=self.classifies).to(self.model.device)
        logits = self.model(**inputs).logits.float()
        if self.classifies:
            return float(logits[0].softmax(-1)[self.answers[0]])
        return float(logits[0, -1, self.answers].softmax(-1)[0])


class PictureCheck:
    """The probability that a picture is not to be sent. Raises ValueError if the classifier has no such label."""

    def __init__(self, config: PictureCheckConfig, device: str | None):
        self.threshold = config.threshold
        self.classifier = Classifier(
            ImageScorerConfig(name="picture_check", model=config.model, label=config.label, dtype=config.dtype, device=device)
        )

    def refuses(self, png: bytes) -> bool:
        image = Image.open(BytesIO(png)).convert("RGB")
        pixels = self.classifier.processor(images=image, return_tensors="pt")["pixel_values"]
        return not float(self.classifier.score(pixels)[0]) < self.threshold
