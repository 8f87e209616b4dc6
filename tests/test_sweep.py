"""data/sweep.py: a list of values, each embedded, trained and scored, on a tiny LLM and eight pictures."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import flame
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
        checkpoint, = store.glob(f"out/sweep/mine-facets-{value}-*-0")
        config = json.loads((checkpoint / "config.json").read_text())
        assert config["model"]["columns"] == [f"long.{k}" for k in range(K)]
        scored = json.loads((store / f"results/sweep-facets/{value}-0.json").read_text())
        assert scored["checkpoint"].endswith(checkpoint.name) and scored["n_texts"] == 8
    again = run(*command)
    assert again.returncode == 0 and again.stdout.count("finished already") == 2
    assert "evaluate.py" not in again.stdout
    assert json.loads((store / "results/sweep-facets.json").read_text()) == result
    longer = run(*command, "--weight-decay", "0.1")  # other flags train other runs, not these a little more
    assert longer.returncode == 0 and len(list(store.glob("out/sweep/mine-facets-1-*-0"))) == 2


def test_a_mask_is_embedded_anew_where_it_is_another(store, run):
    done = run("data/sweep.py", "--captions", "mine.tsv", "--vary", "mask", "decoupled", "causal", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ python embed.py") == 1
    meta = json.loads((store / "data/embeddings/sweep/mine-mask-causal/meta.json").read_text())
    assert meta["llm"]["positions"] == "causal"
    for value, positions in (("decoupled", "restart"), ("causal", "causal")):
        checkpoint, = store.glob(f"out/sweep/mine-mask-{value}-*-0")
        config = json.loads((checkpoint / "config.json").read_text())
        assert config["llm"]["positions"] == positions
    own = np.load(store / "data/embeddings/mine/embeddings.npy")
    causal = np.load(store / "data/embeddings/sweep/mine-mask-causal/embeddings.npy")
    assert np.allclose(own[:, 4], causal[:, 4], atol=2e-3)      # long.0 sees no other question either way
    assert np.abs(own[:, 5:] - causal[:, 5:]).max() > 0.01


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """sweep(flags) -> (exit code, the lines of the stages); these only leave files. A score is the count."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLAME_LLM", "elsewhere")
    llm = {"layer": 3, "path": "/llm", "positions": "restart"}
    meta = {"llm": llm, "captions": {"path": "mine.tsv"}, "prompts": ["long"], "dtype": "float32",
            "store": "float16"}
    store = SimpleNamespace(path=Path("data/embeddings/mine"), meta=meta)
    monkeypatch.setattr(flame, "open_store", lambda path: store)
    lines = []

    def stage(script, *arguments):
        line = [script, *map(str, arguments)]
        lines.append(" ".join(line))
        given = dict(zip(line[1::2], line[2::2]))
        if script == "train.py":
            weights = tmp_path / "out" / given["--name"] / "model.safetensors"
            weights.parent.mkdir(parents=True, exist_ok=True)
            if not weights.exists():
                weights.touch()
        if script == "evaluate.py":
            bench = given.get("--bench") or Path(given["--captions"]).stem
            result = {"bench": bench, "checkpoint": "x", "top1": len(lines), "ci95": {"top1": [0, 100]}}
            out = tmp_path / given["--out"]
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{bench}.json").write_text(json.dumps(result))

    def run(flags):
        lines.clear()
        return sweep.main(f"--embeddings mine {flags}".split()), list(lines)
    monkeypatch.setattr(sweep, "stage", stage)
    return SimpleNamespace(run=run, llm=llm)


def test_a_result_answers_the_flags_it_was_scored_with(stages):
    """In one folder: the same again is kept; another benchmark, split or folder of data is scored anew."""
    scored = []
    for flags in ("--bench coco", "--bench coco", "--bench docci", "--bench coco --split val",
                  "--bench coco --split val --data-root there", "--captions coco.tsv", "--bench long"):
        code, lines = stages.run(f"{flags} --vary lr 1e-3")
        assert code == 0
        scored.append(sum(line.startswith("evaluate.py") for line in lines))
    assert scored == [1, 0, 1, 1, 1, 1, 1]
    result = json.loads(Path("results/sweep-lr.json").read_text())
    assert result["bench"] == "long" and not Path("results/sweep-lr/long.json").exists()


@pytest.mark.parametrize("vary, told", [
    ("seed 3 4", ["--seed 3", "--seed 4"]), ("compile true false", ["--compile", "--no-compile"]),
    ("loss infonce sigmoid", ["--loss infonce", "--loss sigmoid"])])
def test_every_setting_of_training_can_vary(stages, vary, told):
    code, lines = stages.run(f"--bench coco --vary {vary}")
    trained = [line for line in lines if line.startswith("train.py")]
    assert code == 0 and len(trained) == 2 and trained[0] != trained[1]
    assert all(f" {flag}" in line for flag, line in zip(told, trained))


def test_a_store_is_named_by_the_mask_it_has(stages, capsys):
    """One made with --mask causal is not taken for the decoupled one, nor one of --compat for either."""
    stages.llm["positions"] = "causal"
    assert stages.run("--bench coco --vary mask causal")[0] == 0
    stages.llm["positions"] = "sequential"
    for mask in ("causal", "decoupled"):
        code, lines = stages.run(f"--bench coco --vary mask {mask}")
        assert code == 2 and lines == [] and "made with --compat" in capsys.readouterr().err


def test_each_llm_of_a_sweep_is_scored_by_itself(stages):
    """Whatever $FLAME_LLM says."""
    _, lines = stages.run("--bench coco --vary llm store other/llm")
    scored = [line.partition(" --llm ")[2].split()[:1] for line in lines if line.startswith("evaluate.py")]
    assert scored == [["/llm"], ["other/llm"]]


@pytest.mark.parametrize("flags, word", [
    ("--vary seed 1 --bench nothing", "nothing"), ("--vary loss x --bench coco --split all", "--split"),
    ("--vary facets 1 3 --bench demo", "asks by others"),
    ("--vary compile 1 --captions mine.tsv", "true and false"),
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
