"""ILLUME+ as a reproducible experiment package: DualViTok, diffusion decoder and unified multimodal LLM.

Floors, from below: sizes and layouts (standard library only) -> ``nn`` (pure torch) and ``data`` (LitData)
-> ``lit`` (Lightning) -> ``callbacks`` -> ``cli``. Imports go only downwards.
"""

__version__ = "0.1.0"
