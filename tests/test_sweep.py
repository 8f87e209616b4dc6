"""data/sweep.py: a list of values, each embedded, trained and scored, on a tiny LLM and eight pictures."""
import json

import numpy as np
import pytest
from PIL import Image

from data import sweep

SMALL = ["--train", "--steps", "3", "--batch", "4", "--projector-hidden", "48", "--width", "24"]


@pytest.fixture
def store(tmp_path, tiny_llm, run):
    rows = ["key\timage\traw\tshort\tlong"]
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 255 - 30 * i, 100)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}\t{i}.png\traw {i}\tshort {i}\tlong {i}")
    (tmp_path / "mine.tsv").write_text("\n".join(rows) + "\n")
    done = run("embed.py", "--captions", "mine.tsv", "--llm", tiny_llm, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_facets_train_and_score_each_and_go_on(store, run):
    """K = 1 and 3: two runs, a table, a JSON, a plot; the same command again does nothing twice."""
    command = ["data/sweep.py", "--captions", "mine.tsv", "--vary", "facets", "1", "3", *SMALL]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((store / "results/sweep-facets.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["1", "3"]
    assert all(row["seeds"] == 1 for row in result["rows"])
    assert (store / "results/sweep-facets.png").stat().st_size > 10_000
    for value, K in (("1", 1), ("3", 3)):
        config = json.loads((store / f"out/sweep/mine-facets-{value}-0/config.json").read_text())
        assert config["model"]["columns"] == [f"long.{k}" for k in range(K)]
        scored = json.loads((store / f"results/sweep-facets/{value}-0.json").read_text())
        assert scored["checkpoint"].endswith(f"mine-facets-{value}-0") and scored["n_texts"] == 8
    again = run(*command)
    assert again.returncode == 0 and again.stdout.count("finished already") == 2
    assert "evaluate.py" not in again.stdout
    assert json.loads((store / "results/sweep-facets.json").read_text()) == result


def test_a_mask_is_embedded_anew_where_it_is_another(store, run):
    done = run("data/sweep.py", "--captions", "mine.tsv", "--vary", "mask", "decoupled", "causal", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ python embed.py") == 1
    meta = json.loads((store / "data/embeddings/sweep/mine-mask-causal/meta.json").read_text())
    assert meta["llm"]["positions"] == "causal"
    for value, positions in (("decoupled", "restart"), ("causal", "causal")):
        config = json.loads((store / f"out/sweep/mine-mask-{value}-0/config.json").read_text())
        assert config["llm"]["positions"] == positions
    own = np.load(store / "data/embeddings/mine/embeddings.npy")
    causal = np.load(store / "data/embeddings/sweep/mine-mask-causal/embeddings.npy")
    assert np.allclose(own[:, 4], causal[:, 4], atol=2e-3)      # long.0 sees no other question either way
    assert np.abs(own[:, 5:] - causal[:, 5:]).max() > 0.01


@pytest.mark.parametrize("flags, word", [
    ("--vary nothing 1 --captions mine.tsv", "nothing"),
    ("--vary facets many --captions mine.tsv", "facets 1 3 7"),
    ("--vary loss --captions mine.tsv", "values"), ("--vary loss infonce", "--bench"),
    ("--vary loss infonce --bench demo --embeddings nowhere", "nowhere"),
])
def test_mistakes_are_one_line(tmp_path, run, refused, flags, word):
    refused(run("data/sweep.py", *flags.split()), word)
    assert not list(tmp_path.iterdir())


def test_a_stage_that_fails_ends_the_sweep_with_its_code(store, run, refused):
    done = run("data/sweep.py", "--captions", "mine.tsv", "--vary", "facets", "9", *SMALL)
    refused(done, "long.7")


def test_summary_is_the_mean_over_seeds():
    results = [{"bench": "b", "text_to_image": {"R@1": x}, "ci95": {"text_to_image": {"R@1": [x - 2, x + 2]}}}
               for x in (10.0, 14.0)]
    row = sweep.summary("v", results)
    assert row["figures"] == {"/text_to_image": 12.0} and row["ci95"] == {"/text_to_image": [10.0, 14.0]}
    assert row["deviation"] == {"/text_to_image": pytest.approx(8 ** 0.5)}
    assert "text to image R@1" in sweep.table([row])[1] and "12.0 [10.0, 14.0] ±2.8" in sweep.table([row])[1]
    assert sweep.plain("raw=whiten:0.3,long=none") == "raw_whiten_0.3_long_none"
