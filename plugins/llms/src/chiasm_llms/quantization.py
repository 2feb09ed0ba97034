"""Weights held in 8 or 4 bits, by bitsandbytes through transformers.

Where bitsandbytes is installed the tests make such models on the CPU, with the check for a GPU replaced, and compare
their weights with both formulas; its CUDA kernels are run by no test.
"""

from __future__ import annotations

import logging
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
    if not _installed():
        raise ConfigError(
            f"quantize: {quantize!r} needs bitsandbytes, which is not installed: pip install 'chiasm-llms[quantize]', "
            f"{remedy}"
        )
    if not _gpu():
        raise ConfigError(
            f"quantize: {quantize!r} needs a GPU, and torch sees none: run it where there is one, {remedy}"
        )
    if quantize == "8bit":
        # said by every layer in every pass
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_no_cast_to_float16)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _installed() -> bool:
    return find_spec("bitsandbytes") is not None


def _gpu() -> bool:
    return torch.cuda.is_available()


def _no_cast_to_float16(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in record.msg
