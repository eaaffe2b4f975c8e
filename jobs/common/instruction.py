"""The instruction before every prompt, of which diffusers' layout has no place."""

from sana_model.nn.config import DIFFUSERS_PROMPTS, TextEncoderConfig


def note_instruction(layout: str, prompts: TextEncoderConfig) -> None:
    """Print what a diffusers folder needs to be told, if its text encoder was prompted in another way than diffusers' own."""
    if layout == "diffusers" and prompts != DIFFUSERS_PROMPTS:
        print("diffusers prompts with its own instruction: pass complex_human_instruction= for the one that was trained with")
