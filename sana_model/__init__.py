"""Sana in plain torch: linear DiT, DC-AE, text encoder, rectified flow and Flow-DPM-Solver.

Needs torch, transformers, safetensors, pillow, fsspec, huggingface_hub, tenacity and tqdm: lift the folder out and use it.
"""
