"""embed.py and data/captions.py: what lands in the store, resuming to the same bytes, and bad input."""
import hashlib
import json
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import embed
import flame
from data.captions import read_captions

ROWS = [{"key": f"k{i}", "image": f"pics/{i}.png", "raw": f"thing {i % 4}", "short": f"A thing number {i}.", "long": f"There is one thing. It is number {i}. " * (1 + i % 3)} for i in range(23)]


def write_tsv(path, rows, header=("key", "image", "raw", "short", "long")):
    path.write_text("\n".join("\t".join(r) for r in [header] + [[row[h] for h in header] for row in rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(embed.WINDOW, "cpu", 5)
    return tmp_path


def main(*args):
    """embed.py's main() in this process: quicker than a new one, and its parts can be patched."""
    before, sys.argv = sys.argv, ["embed.py", *map(str, args)]
    try:
        embed.main()
    finally:
        sys.argv = before


def test_store_holds_what_encode_gives(here, tiny_llm):
    write_tsv(here / "small.tsv", ROWS)
    main("--captions", "small.tsv", "--llm", tiny_llm, "--dtype", "float32")
    store = flame.open_store("data/embeddings/small")
    assert store.keys == [r["key"] for r in ROWS] and store.images == [r["image"] for r in ROWS]
    assert store.meta["columns"] == flame.COLUMNS and (store.meta["N"], store.meta["D"]) == (23, 48)
    assert store.meta["captions"]["sha256"] == hashlib.sha256((here / "small.tsv").read_bytes()).hexdigest()
    vectors = np.load("data/embeddings/small/embeddings.npy", mmap_mode="r")
    assert vectors.dtype == np.float16 and vectors.shape == (23, 11, 48)
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    expected = torch.cat([encoder.encode([r[name] for r in ROWS], name) for name in flame.PROMPTS], dim=1)
    expected = torch.nn.functional.normalize(expected, dim=-1)
    everything = store.read(range(23), range(11))
    torch.testing.assert_close(everything, expected, rtol=0, atol=2e-3)  # float16 of unit vectors
    picks = np.random.default_rng(0).integers(0, 11, (4, 3))
    some = store.read([7, 0, 22, 7], picks)
    assert all(some[i, j].equal(everything[row, picks[i, j]]) for i, row in enumerate([7, 0, 22, 7]) for j in range(3))
    torch.testing.assert_close(everything.norm(dim=-1), torch.ones(23, 11))


def test_prompts_choose_columns(here, tiny_llm):
    write_tsv(here / "small.tsv", ROWS[:3])
    main("--captions", "small.tsv", "--llm", tiny_llm, "--prompts", "long,raw", "--out", "some/where")
    assert flame.open_store("some/where").meta["columns"] == ["raw.0"] + [f"long.{k}" for k in range(7)]


@pytest.mark.parametrize("where", [1, 3, 4])
def test_an_interrupted_run_resumes_to_the_same_bytes(here, tiny_llm, monkeypatch, where):
    write_tsv(here / "small.tsv", ROWS)
    command = ("--captions", "small.tsv", "--llm", tiny_llm, "--out")
    main(*command, "whole")

    class Killed(BaseException):
        pass

    calls, original = [], flame.TextEncoder.encode_batches

    def encode_batches(self, *args):
        calls.append(1)
        if len(calls) == 3 * where + 2:  # in the middle of a window's second prompt set
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(flame.TextEncoder, "encode_batches", encode_batches)
    with pytest.raises(Killed):
        main(*command, "killed")
    with pytest.raises(flame.InputError, match="same embed.py command"):
        flame.open_store("killed")
    calls.clear(), calls.extend([1] * 99)
    main(*command, "killed")
    assert len(calls) - 99 == 3 * (5 - where)  # no finished window is encoded again
    for name in ("embeddings.npy", "keys.txt", "images.txt"):
        assert (here / "whole" / name).read_bytes() == (here / "killed" / name).read_bytes()


def test_another_runs_store_is_not_touched(here, tiny_llm, make_random_llm, capsys):
    write_tsv(here / "small.tsv", ROWS[:4])
    command = ["--captions", "small.tsv", "--llm", tiny_llm, "--out", "store"]
    main(*command)
    before = (here / "store/embeddings.npy").stat().st_mtime_ns
    main(*command)
    assert "finished already" in capsys.readouterr().out
    for change, what in ((["--prompts", "raw"], "prompts"), (["--layer", "2"], "llm"), (["--budget", "99"], "budget"), (["--llm", make_random_llm(seed=3)], "llm")):
        with pytest.raises(SystemExit) as stop:
            main(*command, *change)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and f"made with {what}" in message and "--overwrite" in message
    assert (here / "store/embeddings.npy").stat().st_mtime_ns == before
    main(*command, "--prompts", "raw", "--overwrite")
    assert flame.open_store("store").meta["M"] == 1


# --- captions files

def captions_of(path):
    skipped = {}
    return list(read_captions(path, skipped)), skipped


def test_official_conceptual_captions(tmp_path):
    (tmp_path / "cc3m.tsv").write_text("a cat\thttp://x/1.jpg\na dog\n\nüber\thttp://x/4.jpg\n", encoding="utf-8")
    rows, skipped = captions_of(tmp_path / "cc3m.tsv")
    assert [(r.key, r.image) for r in rows] == [("000000000", ""), ("000000003", "")]  # a bad row keeps its number
    assert rows[1].captions == dict.fromkeys(flame.PROMPTS, "über")  # all 11 embeddings from the one caption there is
    assert skipped == {"too few fields": [1, [2]], "empty line": [1, [3]]}


def test_missing_captions_fall_back_to_the_best_present(tmp_path):
    (tmp_path / "a.tsv").write_text("long\tother\traw\nL\tx\tR\nL2\tx\t\n\tx\tR3\n")
    rows, _ = captions_of(tmp_path / "a.tsv")
    assert [list(r.captions.values()) for r in rows] == [["R", "L", "L"], ["L2", "L2", "L2"], ["R3", "R3", "R3"]]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_json(tmp_path, form):
    rows = [{"key": "a", "image": "a.jpg", "short": "S"}, 7, {"key": "b"}, {"raw": "R\nR"}]
    text = json.dumps(rows) if form == "list" else "\n".join(map(json.dumps, rows))
    if form == "lines":
        text = text.replace("7", "{7")
    (tmp_path / "a.json").write_text(text)
    got, skipped = captions_of(tmp_path / "a.json")
    assert [(r.key, r.image, r.captions["long"]) for r in got] == [("a", "a.jpg", "S"), ("000000003", "", "R R")]
    assert skipped == {"no caption": [1, [3]], ("not a JSON object" if form == "list" else "not JSON"): [1, [2]]}


def test_bad_rows_are_skipped_counted_and_reported(here, tiny_llm, capsys):
    (here / "a.tsv").write_bytes("key\traw\nk1\tgood\nk2\nk3\tb\xe4d\nk4\t  \nk5\tgut\n".encode("latin-1"))
    main("--captions", "a.tsv", "--llm", tiny_llm)
    assert flame.open_store("data/embeddings/a").keys == ["k1", "k5"]
    message = capsys.readouterr().err
    for part in ("skipped 1 row: too few fields (line 3)", "invalid UTF-8 (line 4)", "no caption (line 5)"):
        assert part in message


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=80), st.text("\t\n[]{}\":,aäkeyrawlong", max_size=80).map(lambda s: s.encode()), st.binary(max_size=40).map(lambda b: b"key\traw\n" + b)))
def test_no_file_makes_a_traceback(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    try:
        rows, _ = captions_of(tmp_path / "x")
        assert rows and all(set(r.captions) == set(flame.PROMPTS) and all(r.captions.values()) for r in rows)
    except flame.InputError as e:
        assert str(tmp_path / "x") in str(e) and "\n" not in str(e)


def test_bad_input_on_the_command_line(run, refused, tmp_path, tiny_llm):
    refused(run("embed.py", "--captions", "none.tsv", "--llm", tiny_llm), "none.tsv", "No such file")
    (tmp_path / "empty.tsv").write_text("")
    refused(run("embed.py", "--captions", "empty.tsv", "--llm", tiny_llm), "empty.tsv", "empty")
    (tmp_path / "columns.tsv").write_text("key\timage\ttext\na\tb\tc\n")
    refused(run("embed.py", "--captions", "columns.tsv", "--llm", tiny_llm), "columns.tsv", "line 1", "raw")
    write_tsv(tmp_path / "good.tsv", ROWS[:2])
    refused(run("embed.py", "--captions", "good.tsv", "--llm", tmp_path), tmp_path, "config.json")
    refused(run("embed.py", "--captions", "good.tsv", "--llm", tiny_llm, "--prompts", "rew"), "rew")
    refused(run("embed.py"), "--captions")
    assert not os.path.exists(tmp_path / "data")


def test_draw_shows_every_token_of_the_forest(here, tiny_llm):
    from PIL import Image
    main("--draw", "A red kite above a beach.", "--llm", tiny_llm, "--out", "forest.png")
    with Image.open("forest.png") as image:
        colors = {color for count, color in image.convert("RGB").getcolors(1 << 24) if count > 100}
    wanted = [tuple(int(c[i:i + 2], 16) for i in (1, 3, 5)) for c in embed.PALETTE[:11]]
    assert set(wanted) <= colors  # eleven segments: opening and caption, "the", two shared facet openings, seven endings
