"""Sana in plain torch: linear DiT, DC-AE, text encoder, rectified flow and Flow-DPM-Solver.

Needs torch, transformers, safetensors, pillow, fsspec and huggingface_hub, nothing else: lift the folder out and use it.
"""
