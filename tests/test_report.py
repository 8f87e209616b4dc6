"""Several runs side by side: the paired interval of their difference, what is kept for it, a folder's page.

    pytest tests/test_report.py
"""
# ruff: noqa: F811  (the fixtures of test_benchmarks.py are imported, and named again by who wants them)
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import evaluate
from data.show import report, runs
from test_benchmarks import TREES, ColourWords, class_file, colours, picture, put, tree_coco  # noqa: F401
from test_evaluate import data_of

N = 200     # texts, each of a picture of its own


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Scores a checkpoint that is right for the texts with those numbers, wrong for the others."""
    monkeypatch.chdir(tmp_path)
    pictures = []
    for n in range(N):
        pictures.append(tmp_path / "photos" / f"{n}.png")
        picture(pictures[n], "red")
    put(tmp_path / "mine.tsv", "image\tlong\n")

    def score(checkpoint, right, out="results", texts=None, facets=None, peer=""):
        texts = texts or [f"text {n}" for n in range(N)]
        place = np.array([n if n in right else (n + 1) % N for n in range(N)])

        def scorer(towers, prompts, *data):
            owner = np.arange(N)
            shown = report.Shown(texts, np.eye(N)[place], pictures, np.eye(N), owner, owner, prompts)
            samples = evaluate.sampled_both_ways(shown.text, shown.image, owner)
            more = {"facets": facets} if facets else {}
            counts = evaluate.counted(pictures, shown.image, prompts, n_texts=N)
            return counts | more | evaluate.recalls(samples), shown

        args = evaluate.settings(["--captions", "mine.tsv", "--out", out, "--device", "cpu"])
        args.how = args.how._replace(score=scorer)
        args.open_clip = peer
        (tmp_path / out).mkdir(parents=True, exist_ok=True)
        towers = SimpleNamespace(model=SimpleNamespace(config={"columns": ["long.0"]}), pool="cosine")
        evaluate.evaluate(args, towers, checkpoint, (pictures, texts, list(range(N))), None)
    return score


def page_of(folder):
    """evaluate.py --report FOLDER -> (the page, its data)"""
    assert evaluate.main(["--report", str(folder)]) == 0
    html = (folder / "report.html").read_text(encoding="utf-8")
    return html, data_of(html)


def cell(data, name, run):
    """Of the table of all runs: [percent, interval, difference] -> the first run has no difference."""
    table = data["runs"]["tables"][0]
    row = next(row for row in table["rows"] if row["name"] == name)
    return row["cells"][table["names"].index(run)]


# ---------------------------------------------------------------- the difference

def test_the_paired_interval_is_narrower_and_that_of_the_differing_texts():
    """Runs right for 120 and for 150 of 200 texts, 120 of them the same: only 30 texts tell them apart."""
    few, many = [(np.arange(N) < right)[:, None] for right in (120, 150)]
    groups = np.arange(N)
    one, other = [evaluate.sampled(hits, groups, N)[:, 0] for hits in (many, few)]
    apart, low, high = evaluate.difference(one, other)
    binomial = np.percentile(100 * np.random.default_rng(1).binomial(N, 30 / N, 100_000) / N, [2.5, 97.5])
    assert apart == pytest.approx(15) and [low, high] == pytest.approx(binomial, abs=1)

    rng = np.random.default_rng(2)
    unpaired = np.percentile(rng.permutation(one[1:]) - rng.permutation(other[1:]), [2.5, 97.5])
    assert high - low < 0.7 * (unpaired[1] - unpaired[0])


def test_the_paired_interval_covers_a_known_difference():
    """Texts drawn from a population where the runs differ by 10: of a hundred intervals about 95 hold it."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        luck = rng.random((N, 1))
        harder = luck + rng.normal(0, 0.01, (N, 1))     # nearly the same texts are hard for both
        one, other = [evaluate.sampled(hits, np.arange(N), N)[:, 0] for hits in (luck < 0.6, harder < 0.5)]
        _, low, high = evaluate.difference(one, other)
        covered += low <= 10 <= high
    assert 88 <= covered <= 100


def test_a_run_against_itself_differs_by_nothing():
    samples = evaluate.sampled(np.arange(N)[:, None] % 3 == 0, np.arange(N), N)[:, 0]
    assert evaluate.difference(samples, samples) == [0, 0, 0]


def test_scoring_prints_the_difference_to_what_was_scored_before(scored, tmp_path, capsys):
    """An open_clip model beside a checkpoint; a checkpoint in another's place; itself again says nothing."""
    scored("out/a", range(150))
    assert "difference" not in capsys.readouterr().out
    scored("ViT-B-32:laion2b", range(120), peer="ViT-B-32:laion2b")
    line, = [line for line in capsys.readouterr().out.splitlines() if "out/a: text to image R@1" in line]
    assert line.startswith("difference to out/a: text to image R@1 -15.0 [-20")
    assert {path.name for path in (tmp_path / "results").glob("mine*.npz")} == {
        "mine.npz", "mine-ViT-B-32-laion2b.npz"}
    scored("out/b", range(150))
    told = capsys.readouterr().out
    assert "difference to ViT-B-32:laion2b: text to image R@1 +15.0 [" in told
    assert "difference to out/a: text to image R@1 +0.0 [0.0, 0.0]" in told
    scored("out/b", range(150))
    assert "difference to out/b" not in capsys.readouterr().out


def test_other_texts_are_not_compared_and_a_line_says_so(scored, tmp_path, capsys):
    scored("out/a", range(150), "all/a")
    scored("out/b", range(120), "all/b", texts=[f"another text {n}" for n in range(N)])
    capsys.readouterr()
    _, data = page_of(tmp_path / "all")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "b/mine.json: no difference to " in told[0] and "other texts" in told[0]
    cells = data["runs"]["tables"][0]["rows"][0]["cells"]
    assert [(round(value), apart) for value, _, apart in cells] == [(75, None), (60, None)]
    assert data["runs"]["apart"] == []


@pytest.mark.parametrize("bench", TREES)
def test_every_benchmark_keeps_what_its_figures_are_of(bench, colours, tmp_path, monkeypatch, capsys):
    """The JSON has none of it; a second checkpoint that takes red for green loses by some of them."""
    TREES[bench](tmp_path / "data" / bench)
    code, result = colours(bench, *class_file(bench, tmp_path))
    path = tmp_path / "results" / f"{bench}.json"
    figures = runs.compared(result)
    assert code == 0 and '"samples"' not in path.read_text()
    samples = runs.read_kept(path.with_suffix(".npz"), figures)["samples"]
    assert figures and samples.keys() == figures.keys()
    for figure, interval in runs.compared(result, "ci95").items():
        assert evaluate.bounds(samples[figure][1:, None])[0] == pytest.approx(interval, abs=1e-3)

    monkeypatch.setattr(ColourWords, "lies", {"red": "green", "rouge": "green"})
    (tmp_path / "out" / "run").rename(tmp_path / "out" / "other")
    (tmp_path / "results" / "cache.sqlite").unlink()
    capsys.readouterr()
    colours(bench, *class_file(bench, tmp_path))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("difference to")]
    assert len(told) == len({figure.rpartition("/")[0] for figure in figures})     # a line a part
    assert any(" -" in line for line in told) or bench == "fashionmnist"


# ---------------------------------------------------------------- the page of a folder

def test_runs_stand_side_by_side_with_their_paired_difference(scored, tmp_path):
    """The open_clip model comes first: the checkpoint's difference is to it."""
    scored("out/a", range(150))
    scored("ViT-B-32:laion2b", range(120), peer="ViT-B-32:laion2b")
    html, data = page_of(tmp_path / "results")
    assert data["runs"]["tables"][0]["names"] == ["ViT-B-32:laion2b", "out/a"]
    value, interval, apart = cell(data, "text to image R@1", "out/a")
    assert value == pytest.approx(75) and interval[0] < 75 < interval[1]
    assert apart[0] == pytest.approx(15, abs=1e-4) and 9 < apart[1] < 15 < apart[2] < 21
    assert cell(data, "text to image R@1", "ViT-B-32:laion2b")[2] is None
    assert "src=" not in html and "href=" not in html and html.count("<script") == 1   # self-contained
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_where_two_runs_disagree_is_shown_six_each_way(scored, tmp_path):
    """First is right for 0..149, the other for 50..199: the texts shown are of 0..49 and of 150..199."""
    scored("out/a", range(150), "all/a")
    scored("out/b", range(50, 200), "all/b")
    _, data = page_of(tmp_path / "all")
    apart, = data["runs"]["apart"]
    assert apart["names"] == [f"out/{run} ({tmp_path / 'all' / run})" for run in "ab"]
    numbers = [int(row["text"].split()[1]) for row in apart["texts"]]
    assert len(numbers) == 12 and all(n < 50 for n in numbers[:6]) and all(n >= 150 for n in numbers[6:])
    for row in apart["texts"]:
        good = [own["rank"] == 0 for own in row["found"]]
        assert good == [own["found"][0]["right"] for own in row["found"]] and sum(good) == 1
        for own in row["found"]:
            assert own["of"] == N and len(own["found"]) == 5
            for tile in own["found"]:
                assert data["pictures"][tile["picture"]].startswith("data:image/jpeg;base64,")


def test_hostile_strings_in_a_folder_do_not_become_markup(scored, tmp_path):
    evil = "</script><script>alert(1)</script> <!-- <img src=x onerror=alert(2)> \u2028"
    texts = [f"{n} {evil}" for n in range(N)]
    scored(evil, range(150), "all/a", texts=texts)
    scored(f"{evil} again", range(50, 200), "all/b", texts=texts)
    row = {"name": evil, "figures": {"<img src=x>/top1": 3}, "ci95": {}}
    put(tmp_path / "all" / "sweep-k.json", json.dumps({"bench": evil, "rows": [row]}))
    html, data = page_of(tmp_path / "all")
    assert html.count("</script>") == html.count("<script") == 1 and "<img" not in html
    assert evil in data["runs"]["apart"][0]["texts"][0]["text"]
    assert data["runs"]["tables"][1]["names"] == [evil]


def test_a_part_may_have_any_name_and_a_pipe_is_passed_over(scored, tmp_path):
    scored("out/a", range(150))
    result = {"bench": "b", "checkpoint": "x", "parts": {"one/of/two": {"top1": 3}}}
    put(tmp_path / "results" / "b.json", json.dumps(result))
    for name in ("sweep-k.json", "sweep-k.png", "c.json"):
        os.mkfifo(tmp_path / "results" / name)
    _, data = page_of(tmp_path / "results")
    assert cell(data, "one/of/two top1", "x") == [3, None, None]


def test_groups_stand_side_by_side_without_a_difference(tmp_path, capsys):
    for run in "ab":
        group = {"bench": "long", "checkpoint": run, "text_to_image": {"R@1": 5}, "benchmarks": {}}
        put(tmp_path / run / "long.json", json.dumps(group))
    _, data = page_of(tmp_path)
    row, = data["runs"]["tables"][0]["rows"]
    assert row["cells"] == [[5, None, None]] * 2 and capsys.readouterr().err == ""


def test_results_of_one_title_and_checkpoint_all_stand_on_the_page(scored, tmp_path):
    """A result and its copy: neither takes the other's place. One of another split is no such copy."""
    scored("out/a", range(150))
    result = (tmp_path / "results" / "mine.json").read_text()
    put(tmp_path / "results" / "mine-all.json", json.dumps(json.loads(result) | {"split": "all"}))
    _, data = page_of(tmp_path / "results")
    table = data["runs"]["tables"][0]
    assert table["names"] == ["out/a"]
    assert {row["title"] for row in table["rows"]} == {"mine", "", "mine (all)"}
    put(tmp_path / "results" / "mine-old.json", result)
    _, data = page_of(tmp_path / "results")
    names = [f"out/a ({name}.json)" for name in ("mine-all", "mine-old", "mine")]
    assert sorted(data["runs"]["tables"][0]["names"]) == sorted(names)


@pytest.mark.parametrize("name, damage, stays", [
    ("a/mine.json", b"{", 1),
    ("a/mine.json", b"[1]", 1),
    ("a/mine.json", b'{"bench": "mine", "checkpoint": "x", "text_to_image": 5}', 1),
    ("a/mine.json", b'{"bench": "mine", "checkpoint": "x", "parts": [3]}', 1),
    ("a/mine.npz", b"PK\x03\x04 not a zip", 2),
    ("a/mine.npz", b"", 2),
    ("sweep-k.json", b"[]", 2),
    ("sweep-k.png", b"\x89PNG", 2),
])
def test_a_damaged_file_of_a_folder_is_left_out_with_a_line(scored, tmp_path, capsys, name, damage, stays):
    scored("out/a", range(150), "all/a")
    scored("out/b", range(120), "all/b")
    (tmp_path / "all" / name).write_bytes(damage)
    capsys.readouterr()
    _, data = page_of(tmp_path / "all")
    told = capsys.readouterr().err.splitlines()
    assert name in told[0] and told[0].endswith("left out") and len(told) == 1 + ("npz" in name)
    assert len(data["runs"]["tables"][0]["names"]) == stays


def test_what_is_kept_of_another_run_than_the_json_is_not_compared(scored, tmp_path, capsys):
    """As a run leaves them that was killed between the two files."""
    scored("out/a", range(150), "all/a")
    scored("out/b", range(120), "all/b")
    (tmp_path / "all" / "b" / "mine.npz").replace(tmp_path / "all" / "a" / "mine.npz")
    capsys.readouterr()
    _, data = page_of(tmp_path / "all")
    assert "a/mine.npz: not of the run whose JSON lies beside it; left out" in capsys.readouterr().err
    assert all(apart is None for row in data["runs"]["tables"][0]["rows"] for _, _, apart in row["cells"])


def test_vanished_pictures_are_grey_and_damaged_indices_a_line(scored, tmp_path, capsys):
    scored("out/a", range(150), "all/a")
    scored("out/b", range(50, 200), "all/b")
    for photo in (tmp_path / "photos").glob("*.png"):
        photo.unlink()
    _, data = page_of(tmp_path / "all")
    assert len(data["runs"]["apart"][0]["texts"]) == 12
    path = tmp_path / "all" / "b" / "mine.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"best": arrays["best"] + 10**6})
    capsys.readouterr()
    _, data = page_of(tmp_path / "all")
    assert data["runs"]["apart"] == [] and "b/mine.json: " in capsys.readouterr().err


def test_sweeps_and_facets_of_a_folder_are_on_its_page(scored, tmp_path, monkeypatch):
    recalls = {"text_to_image": {"R@1": 40.0}, "image_to_text": {"R@1": 50.0},
               "ci95": {"text_to_image": {"R@1": [35, 45]}, "image_to_text": {"R@1": [45, 55]}}}
    kinds = (("in order", [1]), ("alone", [1]))
    facets = [{"kind": kind, "facets": numbers, **recalls} for kind, numbers in kinds]
    scored("out/a", range(150), facets=facets)
    results = tmp_path / "results"
    rows = [{"name": "K = 1", "figures": {"/text_to_image": 40.0}, "ci95": {"/text_to_image": [35, 45]}},
            {"name": "K = 3", "figures": {"long/text_to_image": 50.0}, "ci95": {}}]
    put(results / "sweep-k.json", json.dumps({"bench": "demo", "rows": rows}))
    Image.new("RGBA", (30, 20), "red").save(results / "sweep-k.png")
    _, data = page_of(results)
    sweep = data["runs"]["tables"][1]
    assert sweep["title"] == "sweep-k" and sweep["names"] == ["K = 1", "K = 3"]
    assert [row["name"] for row in sweep["rows"]] == ["text to image R@1", "long text to image R@1"]
    assert sweep["rows"][0]["cells"] == [[40, [35, 45], None], [None, None, None]]
    names, urls = zip(*data["runs"]["plots"])
    assert names == ("mine, what each facet is worth: out/a", "sweep-k")
    assert all(url.startswith("data:image/png;base64,") for url in urls)


def test_report_alone_needs_results_and_goes_with_no_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for flags, words in ((["--report", "empty"], "empty: no results; score something first"),
                         (["--report"], "results: no results"),
                         (["--report", "empty", "--bench", "coco"], "--report DIR is the page")):
        assert evaluate.main(flags) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and words in told[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty"]


def test_pictures_in_no_file_are_kept_as_none(colours, tmp_path):
    """Of CIFAR and the like: in memory alone; and of folders the path, which holds from everywhere."""
    TREES["fashionmnist"](tmp_path / "data" / "fashionmnist")
    colours("fashionmnist", *class_file("fashionmnist", tmp_path))
    tree_coco(tmp_path / "data" / "coco")
    colours("coco")
    for bench, start in (("fashionmnist", None), ("coco", f"{tmp_path}/data/coco/")):
        with np.load(tmp_path / "results" / f"{bench}.npz") as file:
            first = json.loads(file["said"].tobytes())["pictures"][0]
        assert first is None if start is None else first.startswith(start)
