"""Weights held in 8 or 4 bits, by bitsandbytes through transformers.

The tests make quantised models on the CPU where bitsandbytes is installed, with the check for a GPU replaced; its CUDA
kernels are not run by them.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from chiasm.errors import ConfigError
from chiasm_llms.settings import Quantize


def quantization(quantize: Quantize) -> BitsAndBytesConfig:
    """How transformers is to hold the weights of the blocks: LLM.int8 (arXiv 2208.07339), or NF4 (arXiv 2305.14314).

    Embeddings, normalisations and the output head stay in bfloat16, in which products are computed too.

    Raises:
        ConfigError: bitsandbytes is not installed, or there is no GPU.
    """
    remedy = "or set quantize to null"
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantize: {quantize!r} needs bitsandbytes, which is not installed: pip install 'chiasm-llms[quantize]', "
            f"{remedy}"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"quantize: {quantize!r} needs a GPU, and torch sees none: run it where there is one, {remedy}"
        )
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
