"""Whose tensor names and files saved weights have. Imports no torch, so a command line may name them."""

from typing import Literal

Layout = Literal["sana", "diffusers", "nvlabs"]
