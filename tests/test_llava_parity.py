"""clip + single + mlp + mistral with the weights of a LLaVA model is that model, to the last few bits."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

from chiasm.batch import Batch
from chiasm.prompt import IGNORE, Position
from chiasm.vlm import VLM
from chiasm_adapters.mlp import Mlp
from chiasm_adapters.single import Single
from chiasm_encoders.clip import ClipEncoder
from chiasm_llms.mistral import MistralLM

IMAGE_ID, VOCABULARY, TOKENS, EOS = 95, 96, 9, 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny random LLaVA, and ours made of folders that transformers wrote of its parts."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    text = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=None,
        initializer_range=0.3,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=42, patch_size=14
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, vision_feature_layer=-2
    )
    llava = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in llava.parameters():  # biases start at 0, which would hide a lost one
            parameter.add_(0.05 * torch.randn_like(parameter))
    llava.model.vision_tower.save_pretrained(folder / "vision")
    language = transformers.MistralForCausalLM(text)
    language.model.load_state_dict(llava.model.language_model.state_dict())
    language.lm_head.load_state_dict(llava.lm_head.state_dict())
    language.save_pretrained(folder / "text")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token=f"w{EOS}")
    tokenizer.save_pretrained(folder / "text")

    encoder = ClipEncoder.build(ClipEncoder.Config(pretrained=str(folder / "vision"), layers=-2))
    llm = MistralLM.build(MistralLM.Config(pretrained=str(folder / "text")))
    fusion = Single(Single.Config(), [encoder.geometry.features], 32)
    adapter = Mlp(Mlp.Config(), fusion.out, 32)
    projector = llava.model.multi_modal_projector
    first, _, second = adapter.layers
    first.load_state_dict(projector.linear_1.state_dict())
    second.load_state_dict(projector.linear_2.state_dict())
    vlm = VLM([encoder], fusion, adapter, llm).eval()
    vlm.set_trained(())
    return llava, vlm


def sequence(length: int, images: int, seed: int) -> list[int]:
    """Random ids, with the place of each image between them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_ID, (length,), generator=generator).tolist()
    return [1, *([IMAGE_ID] * TOKENS + ids[:2]) * images, *ids]


def as_batches(rows: list[list[int]], pad: str) -> tuple[dict[str, torch.Tensor], Batch, torch.Tensor]:
    """The same sequences as LLaVA takes them and as we do."""
    length = max(map(len, rows))

    def padded(row: list[int], fill: int) -> list[int]:
        return [fill] * (length - len(row)) + row if pad == "left" else row + [fill] * (length - len(row))

    ids = torch.tensor([padded(row, 0) for row in rows])
    mask = torch.tensor([padded([1] * len(row), 0) for row in rows])
    images = sum(row.count(IMAGE_ID) for row in rows) // TOKENS
    pixels = torch.randn(images, 3, 42, 42, generator=torch.Generator().manual_seed(9))
    kinds = torch.where(ids == IMAGE_ID, Position.VISUAL, Position.TEXT).where(mask.bool(), Position.PAD)
    ours = Batch(ids.where(kinds == Position.TEXT, 0), kinds, torch.full_like(ids, IGNORE), (pixels,))
    theirs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return theirs, ours, mask.bool()


ROWS = [sequence(5, 1, 0), sequence(17, 1, 1), sequence(9, 2, 2)]


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one", "lengths differ"])
def test_logits_are_equal(pair, rows, pad):
    llava, vlm = pair
    theirs, ours, mask = as_batches(rows, pad)
    with torch.no_grad():
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        wanted = llava(**theirs, position_ids=positions).logits
        found = vlm.logits(ours)
    assert wanted[mask].std() > 0.5  # a flat model would agree with anything
    torch.testing.assert_close(found[mask], wanted[mask], rtol=0, atol=1e-5)


def test_greedy_ids_are_equal(pair):
    llava, vlm = pair
    theirs, ours, _ = as_batches(ROWS, "left")
    with torch.no_grad():
        ids = llava.generate(**theirs, do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=EOS)
        found = vlm.llm.generate(vlm.embed(ours), ours.mask_BT, max_new_tokens=12)
    new = ids[:, theirs["input_ids"].shape[1] :].tolist()
    wanted = [row[: row.index(EOS)] if EOS in row else row for row in new]
    assert found == wanted
    assert len({tuple(row) for row in found}) == len(ROWS)
