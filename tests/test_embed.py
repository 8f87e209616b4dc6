"""embed.py and data/captions.py: what lands in the store, resuming to the same bytes, and bad input."""
import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
import io
import json
import os
import itertools
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

import embed
import flame
from data import captions, store as stores
from data.show import look
from data.captions import read_captions

ROOT = Path(__file__).resolve().parent.parent
ROWS = []
for i in range(23):
    ROWS.append({
        "key": f"k{i}",
        "image": f"pics/{i}.png",
        "raw": f"thing {i % 4}",
        "short": f"A thing number {i}.",
        "long": f"There is one thing. It is number {i}. " * (1 + i % 3),
    })


def write_tsv(path, rows, header=("key", "image", "raw", "short", "long")):
    table = [header] + [[row[name] for name in header] for row in rows]
    path.write_text("".join("\t".join(cells) + "\n" for cells in table), encoding="utf-8")
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


def test_causal_mask_embeds_without_facet_decoupled_attention(here, tiny_llm):
    write_tsv(here / "small.tsv", ROWS)
    main("--captions", "small.tsv", "--llm", tiny_llm, "--dtype", "float32", "--mask", "causal")
    store = flame.open_store("data/embeddings/small")
    assert store.meta["llm"]["positions"] == "causal"
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32, positions="causal")
    expected = torch.nn.functional.normalize(encoder.encode([r["long"] for r in ROWS]), dim=-1)
    torch.testing.assert_close(store.read(range(23), range(4, 11)), expected, rtol=0, atol=2e-3)


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
    for i, row in enumerate([7, 0, 22, 7]):
        assert some[i].equal(everything[row, picks[i]])
    torch.testing.assert_close(everything.norm(dim=-1), torch.ones(23, 11))


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_reading_in_one_pass_and_step_by_step(here, tiny_llm, monkeypatch, store):
    write_tsv(here / "small.tsv", ROWS)
    main("--captions", "small.tsv", "--llm", tiny_llm, "--store", store)
    opened, random = flame.open_store("data/embeddings/small"), np.random.default_rng()
    rows, columns = random.integers(0, 23, 50), random.integers(0, 11, (50, 6))
    fast = opened.read(rows, columns), opened.read(rows, [3, 1])
    for bad in ((23, 0), (-1, 0), (0, 11), (0, -1)):
        with pytest.raises(ValueError):
            opened.read([bad[0]], [bad[1]])
    assert opened.read([], [0, 1]).shape == (0, 2, 48) and opened.read(3, [0]).equal(opened.read([3], [0]))
    monkeypatch.setattr(flame, "flame_ext", None)
    slow = opened.read(rows, columns), opened.read(rows, [3, 1])
    for a, b in zip(fast, slow):
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_prompts_choose_columns(here, tiny_llm):
    write_tsv(here / "small.tsv", ROWS[:3])
    known = ["--llm", tiny_llm, "--dtype", "float32"]
    main("--captions", "small.tsv", *known, "--prompts", "long,raw", "--out", "some/where")
    store = flame.open_store("some/where")
    assert store.meta["columns"] == ["raw.0"] + [f"long.{k}" for k in range(7)]
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    expected = torch.nn.functional.normalize(encoder.encode([r["long"] for r in ROWS[:3]], "long"), dim=-1)
    read = store.read(range(3), range(4, 11))  # columns have the numbers of flame.COLUMNS in every store
    torch.testing.assert_close(read, expected, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="columns"):
        store.read([0], [1])


@pytest.mark.parametrize("where", [1, 3, 4])
def test_an_interrupted_run_resumes_to_the_same_bytes(here, tiny_llm, monkeypatch, where):
    write_tsv(here / "small.tsv", ROWS)
    command = ("--captions", "small.tsv", "--llm", tiny_llm, "--out")
    main(*command, "whole")

    class Killed(BaseException):
        pass

    calls, original = [], embed.start

    def start(*args):
        calls.append(1)
        if len(calls) == 3 * where + 2:  # in the middle of a window: each has a packed row per prompt set
            raise Killed
        return original(*args)

    monkeypatch.setattr(embed, "start", start)
    with pytest.raises(Killed):
        main(*command, "killed")
    with pytest.raises(flame.InputError, match="same embed.py command"):
        flame.open_store("killed")
    with open("killed/windows-0.txt", "a") as log:
        log.write("4")  # a line that the crash cut short
    calls.clear(), calls.extend([1] * 99)
    main(*command, "killed")
    assert len(calls) - 99 == 3 * (5 - where)  # no finished window is encoded again
    same_bytes("whole", "killed")


def same_bytes(a, b):
    for name in sorted(os.listdir(a)):
        if name != "meta.json":
            assert Path(a, name).read_bytes() == Path(b, name).read_bytes(), name


def many_rows(n):
    rows = []
    for i in range(n):
        rows.append({
            "key": f"k{i}",
            "image": "",
            "raw": f"thing {i % 7}",
            "short": f"A thing number {i}.",
            "long": f"It is number {i}. " * (1 + i % 5),
        })
    return rows


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_sigkill_at_any_moment_ends_with_the_same_bytes(here, tiny_llm, store):
    write_tsv(here / "many.tsv", many_rows(400))
    command = [sys.executable, ROOT / "embed.py", "--captions", "many.tsv", "--llm", tiny_llm,
               "--window", "4", "--store", store]
    log = here / "data/embeddings/many/windows-0.txt"
    random = np.random.default_rng()
    kills = 0

    def windows():
        return log.read_text().count("\n") if log.exists() else 0

    for share in sorted(random.uniform(0, 0.9, 3)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and windows() < share * 100:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        kills += process.wait() == -9
    assert kills
    assert subprocess.run(command).returncode == 0
    main("--captions", "many.tsv", "--llm", tiny_llm, "--window", 4, "--store", store, "--out", "whole")
    same_bytes("whole", "data/embeddings/many")


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_two_ranks_equal_one(here, tiny_llm, store):
    write_tsv(here / "small.tsv", ROWS)
    command = ["--captions", "small.tsv", "--llm", tiny_llm, "--dtype", "float32", "--window", 5,
               "--store", store]
    main(*command, "--out", "one")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*run, ROOT / "embed.py", *map(str, command), "--out", "two"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one = flame.open_store("one")
    two = flame.open_store("two")
    assert one.keys == two.keys and one.images == two.images
    vectors, others = (store.read(range(23), range(11)) for store in (one, two))
    torch.testing.assert_close(vectors, others, rtol=0, atol=2e-3)
    assert sorted(os.listdir("two")) == sorted(os.listdir("one"))


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_merged_shards_equal_one_run(here, tiny_llm, store, capsys, monkeypatch):
    write_tsv(here / "small.tsv", ROWS)
    command = ["--captions", "small.tsv", "--llm", tiny_llm, "--window", 5, "--store", store]
    main(*command, "--out", "whole")
    for shard in range(3):
        main(*command, "--shard", f"{shard}/3")
    parts = [f"data/embeddings/small-{shard}-of-3" for shard in range(3)]
    its_windows = *range(5, 10), *range(20, 23)
    assert flame.open_store(parts[1]).keys == [f"k{i}" for i in its_windows]
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(parts[0])
        main("--merge", ".", here / parts[1], here / parts[2])  # the name of a shard that is called "."
    same_bytes("whole", "data/embeddings/small")
    main("--merge", parts[2], parts[0], parts[1], "--out", "merged")
    same_bytes("whole", "merged")
    main(*command, "--out", "merged")
    assert "finished already" in capsys.readouterr().out
    for wrong in (
        ["--merge", parts[0], parts[1], "--out", "no"],
        ["--merge", *parts, "--out", "merged"],
        [*command, "--shard", "3/3"],
        [*command, "--shard", "7/9"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(*wrong)
        assert stop.value.code == 2
    merged = np.load(Path(parts[0], "statistics.npy")) if store == "int8" else None
    if store == "int8":  # a shard whose machine rounds otherwise is brought to the first one's statistics
        np.save(Path(parts[1], "statistics.npy"), merged * np.float32(1.01))
        expected = flame.open_store(parts[1]).read(range(5), range(11))
        main("--merge", *parts, "--out", "again")
        got = flame.open_store("again").read(range(5, 10), range(11))
        torch.testing.assert_close(got, expected, rtol=0, atol=5e-3)


def test_int8_keeps_what_whitening_looks_at(here, llm):
    """The real LLM's states, one of whose dimensions holds most of the norm: plain int8 is useless (0.62)."""
    write_tsv(here / "many.tsv", many_rows(96))
    for store in ("int8", "float16"):
        main("--captions", "many.tsv", "--llm", llm, "--prompts", "short", "--store", store, "--out", store)
    small, large = flame.open_store("int8"), flame.open_store("float16")
    assert small.vectors.nbytes * 2 == large.vectors.nbytes
    a, b = (s.read(range(96), s.columns) for s in (small, large))
    mean, deviation = b.mean(0), b.std(0)
    a, b = ((x - mean) / deviation for x in (a, b))
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() > 0.998


def test_only_one_run_writes_a_store(here, tiny_llm, capsys):
    write_tsv(here / "small.tsv", ROWS)
    os.makedirs("store")
    with open("store/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as stop:
            main("--captions", "small.tsv", "--llm", tiny_llm, "--out", "store")
    assert stop.value.code == 2 and "another run" in capsys.readouterr().err
    main("--captions", "small.tsv", "--llm", tiny_llm, "--out", "store")


def test_a_lock_that_was_just_removed_keeps_nobody_else_out(here, monkeypatch):
    """One run leaves between another's opening and locking of the lock: a third would make and hold its own.
    """
    lock = fcntl.flock

    def after_the_other_left(file, how):
        os.unlink("store/lock")
        lock(file, how)
    os.makedirs("store")
    monkeypatch.setattr(fcntl, "flock", after_the_other_left)
    with pytest.raises(flame.InputError, match="another run"), stores.lock(Path("store"), False):
        pass


def test_states_that_are_not_finite_are_not_stored(here, tiny_llm, monkeypatch, capsys):
    """As where float16 overflows."""
    write_tsv(here / "small.tsv", ROWS)
    decode = flame.decode
    monkeypatch.setattr(flame, "decode", lambda *args: decode(*args) * float("nan"))
    with pytest.raises(SystemExit) as stop:
        main("--captions", "small.tsv", "--llm", tiny_llm)
    assert stop.value.code == 2 and "not finite; give --dtype" in capsys.readouterr().err
    assert not Path("data/embeddings/small/meta.json").exists()


def test_a_renamed_folder_of_pictures_is_other_captions(here, tiny_llm, capsys):
    os.makedirs("photos/a")
    for name in "xy":
        Path(f"photos/a/{name}.jpg").write_bytes(b"")
        Path(f"photos/a/{name}.txt").write_text(f"caption {name}")
    main("--captions", "photos", "--llm", tiny_llm)
    os.rename("photos/a", "photos/b")
    with pytest.raises(SystemExit):
        main("--captions", "photos", "--llm", tiny_llm)
    assert "made with captions" in capsys.readouterr().err


def test_pictures_without_captions_are_embedded_by_joined_ones(here, tiny_llm):
    write_tar(here / "p.tar", [(f"k{i}.jpg", b"") for i in range(3)])
    rows = [{"key": f"k{i}", "long": f"Caption {i}."} for i in range(3)]
    write_tsv(here / "long.tsv", rows, ("key", "long"))
    main("--captions", "p.tar", "--llm", tiny_llm, "--join", "long=long.tsv")
    assert flame.open_store("data/embeddings/p").keys == ["k0", "k1", "k2"]


def test_a_disk_that_is_too_small_is_found_before_the_first_caption(tmp_path, tiny_llm, refused):
    write_tsv(tmp_path / "small.tsv", ROWS)
    command = [sys.executable, ROOT / "embed.py", "--captions", "small.tsv", "--llm", tiny_llm]

    def limit():  # embeddings.npy would take 24 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit)
    refused(done, "embeddings.npy", "GB are needed")
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


def test_a_caption_is_cut_where_the_context_ends_and_the_prompt_never(make_random_llm):
    encoder = flame.TextEncoder(make_random_llm(max_position_embeddings=200), dtype=torch.float32)
    words = " ".join(f"word{i}" for i in range(300))
    states = encoder.encode(["A cat.", words, "A dog."], "long")
    assert encoder.truncated == 1
    prefix, facets = encoder.longest_beginning(words, "long")
    longest = len(prefix) + max(map(len, facets))  # no string is all facets
    assert 190 < longest <= 200 < len(prefix) + sum(map(len, facets))
    assert torch.isfinite(states).all()
    assert facets == flame.tokenize(encoder.tokenizer, ["A cat."], "long")[1][0]


def test_plan_counts_what_the_run_will_do(here, tiny_llm, capsys, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    write_tsv(here / "small.tsv", ROWS)
    main("--captions", "small.tsv", "--llm", tiny_llm, "--plan", "1000000")
    text = capsys.readouterr().out
    size = "[1000000, 11, 48], float16 1.1 GB, int8 0.6 GB"
    for part in ("23 captions, planned as 1000000", size, "here", "8 H100"):
        assert part in text
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    rows, forest = next(encoder.pack([r["long"] for r in ROWS], "long"))
    with FlopCounterMode(display=False) as counter:
        encoder.run(forest, len(rows))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    config = encoder.decoder.config
    seen = 3 * flame.visible(forest).sum()
    attention = 4 * config["num_attention_heads"] * config["head_dim"] * seen
    assert look.flops(config, 3, forest) == products + attention


def test_inspect_finds_what_is_wrong(here, tiny_llm, capsys):
    write_tsv(here / "small.tsv", ROWS)
    main("--captions", "small.tsv", "--llm", tiny_llm, "--out", "store")
    main("--inspect", "store", "--llm", tiny_llm)
    text = capsys.readouterr().out
    for part in ("rows never written: 0", "NaN or infinite: 0", "unit length: 0", "k0: There is one thing."):
        assert part in text
    vectors = np.load("store/embeddings.npy", mmap_mode="r+")
    vectors[3, 2], vectors[5], vectors[7, 0, 0], vectors[8] = 0, 0, np.nan, 2 * vectors[8]
    vectors.flush()
    main("--inspect", "store", "--llm", tiny_llm)
    text = capsys.readouterr().out
    for part in ("rows never written: 2, the first: k3", "NaN or infinite: 1, the first: k7",
                 "unit length: 1, the first: k8"):
        assert part in text


def test_another_runs_store_is_not_touched(here, tiny_llm, make_random_llm, capsys, monkeypatch):
    write_tsv(here / "small.tsv", ROWS[:4])
    command = ["--captions", "small.tsv", "--llm", tiny_llm, "--out", "store"]
    main(*command)
    before = (here / "store/embeddings.npy").stat().st_mtime_ns
    main(*command)
    assert "finished already" in capsys.readouterr().out
    for change, what in (
        (["--prompts", "raw"], "prompts"),
        (["--layer", "2"], "llm"),
        (["--window", "99"], "window"),
        (["--llm", make_random_llm(seed=3)], "llm"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(*command, *change)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and f"made with {what}" in message and "--overwrite" in message
    monkeypatch.setitem(flame.BUDGET, "cpu", 99)
    with pytest.raises(SystemExit):
        main(*command)
    assert "made with budget" in capsys.readouterr().err
    assert (here / "store/embeddings.npy").stat().st_mtime_ns == before
    main(*command, "--prompts", "raw", "--overwrite")
    assert flame.open_store("store").meta["M"] == 1


# --- captions files

def captions_of(path):
    skipped = {}
    return list(read_captions(path, skipped)), skipped


def test_official_conceptual_captions(tmp_path):
    text = "a cat\thttp://x/1.jpg\na dog\n\nüber\thttp://x/4.jpg\n"
    (tmp_path / "cc3m.tsv").write_text(text, encoding="utf-8")
    rows, skipped = captions_of(tmp_path / "cc3m.tsv")
    # A bad row keeps its number; all 11 embeddings are of the one caption there is.
    assert [(r.key, r.image) for r in rows] == [("000000000", ""), ("000000003", "")]
    assert rows[1].captions == dict.fromkeys(flame.PROMPTS, "über")
    assert skipped == {"too few fields": [1, [2]], "empty line": [1, [3]]}


def test_missing_captions_fall_back_to_the_best_present(tmp_path):
    (tmp_path / "a.tsv").write_text("long\tother\traw\nL\tx\tR\nL2\tx\t\n\tx\tR3\n")
    rows, _ = captions_of(tmp_path / "a.tsv")
    best = [list(r.captions.values()) for r in rows]
    assert best == [["R", "L", "L"], ["L2", "L2", "L2"], ["R3", "R3", "R3"]]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_json(tmp_path, form):
    rows = [{"key": "a", "image": "a.jpg", "short": "S"}, 7, {"key": "b"}, {"raw": "R\nR"}]
    text = json.dumps(rows) if form == "list" else "\n".join(map(json.dumps, rows))
    if form == "lines":
        text = text.replace("7", "{7")
    (tmp_path / "a.json").write_text(text)
    got, skipped = captions_of(tmp_path / "a.json")
    rows = [(r.key, r.image, r.captions["long"]) for r in got]
    assert rows == [("a", "a.jpg", "S"), ("000000003", "", "R R")]
    reason = "not a JSON object" if form == "list" else "not JSON"
    assert skipped == {"no caption": [1, [3]], reason: [1, [2]]}


def test_bad_rows_are_skipped_counted_and_reported(here, tiny_llm, capsys):
    (here / "a.tsv").write_bytes("key\traw\nk1\tgood\nk2\nk3\tb\xe4d\nk4\t  \nk5\tgut\n".encode("latin-1"))
    main("--captions", "a.tsv", "--llm", tiny_llm)
    assert flame.open_store("data/embeddings/a").keys == ["k1", "k5"]
    message = capsys.readouterr().err
    for part in ("skipped 1 row: too few fields (line 3)", "invalid UTF-8 (line 4)", "no caption (line 5)"):
        assert part in message


def test_a_row_with_a_tab_or_comma_too_many_is_counted(tmp_path):
    (tmp_path / "a.tsv").write_text("key\traw\tlong\nk1\ta\tcat\tlong\nk2\tb\tlong\nk3\tc\tlong\t\n")
    rows, skipped = captions_of(tmp_path / "a.tsv")
    assert [row.key for row in rows] == ["k2", "k3"]  # a tab at the end is no matter
    assert skipped == {"too many fields: a tab or comma in a caption?": [1, [2]]}
    (tmp_path / "b.csv").write_text('key,raw\nk1,fine\nk2,"a quote without end\nk3,swallowed\n')
    rows, skipped = captions_of(tmp_path / "b.csv")
    assert [row.key for row in rows] == ["k1"] and [*skipped] == ["not CSV (unexpected end of data)"]


@pytest.mark.parametrize("first", ["[Photo] a cat", "{a} cat"])
def test_a_tsv_is_a_table_whatever_its_first_caption_begins_with(tmp_path, first):
    (tmp_path / "cc.tsv").write_text(f"{first}\thttp://x/1.jpg\na dog\thttp://x/2.jpg\n")
    rows, skipped = captions_of(tmp_path / "cc.tsv")
    assert [row.captions["raw"] for row in rows] == [first, "a dog"] and not skipped


def test_what_is_no_text_is_no_caption(tmp_path):
    """A gap in a table of pandas is NaN in its JSON."""
    wrong = [float("nan"), None, [None], {"x": 1}, True, 7]
    entries = [{"key": str(i), "raw": f"cat {i}", "long": value} for i, value in enumerate(wrong)]
    (tmp_path / "a.json").write_text(json.dumps([*entries, {"key": "none", "raw": [None]}]))
    rows, skipped = captions_of(tmp_path / "a.json")
    assert [row.captions["long"] for row in rows] == [f"cat {i}" for i in range(6)]
    assert skipped == {"no caption": [1, [7]]}


def test_csv_with_quotes_and_open_clips_names(tmp_path):
    lines = (b"filepath,title,other", b'1.jpg,"a ""red"" kite,\nhigh up",x', b"2.jpg", b"3.jpg,b\xe4d,x",
             b"4.jpg,ok,x", b"")
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    rows, skipped = captions_of(tmp_path / "a.csv")
    assert [(r.key, r.image, r.captions["long"]) for r in rows] == [
        ("000000000", "1.jpg", 'a "red" kite, high up'),
        ("000000003", "4.jpg", "ok"),
    ]
    assert skipped == {"too few fields": [1, [4]], "invalid UTF-8": [1, [5]]}
    (tmp_path / "b.csv").write_text("filepath\ttitle\n1.jpg\tA, b.\n")  # open_clip's own default separator
    assert [(r.image, r.captions["raw"]) for r in captions_of(tmp_path / "b.csv")[0]] == [("1.jpg", "A, b.")]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.json", "a.jsonl"])
def test_gzip(tmp_path, name, refused):
    plain = {
        "a.tsv": "key\traw\nk\tR\n",
        "a.csv": "key,raw\nk,R\n",
        "a.json": '[{"key": "k", "raw": "R"}]',
        "a.jsonl": '{"key": "k", "raw": "R"}\n',
    }[name]
    path = tmp_path / (name + ".gz")
    path.write_bytes(gzip.compress(plain.encode()))
    assert [(r.key, r.captions["raw"]) for r in captions_of(path)[0]] == [("k", "R")]
    path.write_bytes(gzip.compress(plain.encode() * 999)[:-20])
    with pytest.raises(flame.InputError, match="gzip data damaged or cut off"):
        captions_of(path)


JSON_ROWS = st.dictionaries(st.sampled_from(["key", "raw", "x"]), st.text(max_size=9), max_size=3)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.one_of(st.integers(), st.none(), JSON_ROWS)),
    chunk=st.integers(1, 40),
    spaced=st.booleans(),
)
def test_a_json_list_is_read_piece_by_piece_like_whole(tmp_path, rows, chunk, spaced):
    text = json.dumps(rows, indent=1 if spaced else None, ensure_ascii=spaced)
    errors = "surrogatepass" if spaced else "replace"
    (tmp_path / "a.json").write_text(text, encoding="utf-8", errors=errors)
    expected = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    before, captions.CHUNK = captions.CHUNK, chunk
    try:
        got = list(captions.json_entries(open(tmp_path / "a.json", "rb"), "a.json"))
    finally:
        captions.CHUNK = before
    assert got == expected


@pytest.mark.parametrize("text", [
    "[1,]", "[1 2]", "[", '[{"raw": "x"}', '[{"raw": "x"}] 7', "[1]]", '[{"raw": "x"}, nope]', '["\\x"]'])
def test_what_is_no_json_list(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(flame.InputError, match="a.json"):
        captions_of(tmp_path / "a.json")


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_tars(tmp_path):
    picture = b"\xff\xd8" * 999
    write_tar(tmp_path / "cc-000.tar", [
        ("000.jpg", picture),
        ("000.txt", b"a cat"),
        ("000.json", b'{"caption": "A CAT", "key": "no", "long": "A long cat."}'),
        ("../x.txt", b"evil"),
        ("001.txt", b"\xff"),
        ("002.json", b'{"caption": "C"}'),
        ("003.json", b"[1]"),
    ])
    write_tar(tmp_path / "cc-001.tar", [("100.txt", b"D"), ("101.txt", b"E" * 600)])
    whole = (tmp_path / "cc-001.tar").read_bytes()
    (tmp_path / "cc-001.tar").write_bytes(whole[:512 * 3 + 100])  # the second sample's text is cut off
    for path in (tmp_path, tmp_path / "cc-{000..001}.tar"):
        rows, skipped = captions_of(path)
        assert [(r.key, r.image, r.captions["raw"], r.captions["long"]) for r in rows] == [
            ("000", "", "a cat", "A long cat."),
            ("002", "", "C", "C"),
            ("100", "", "D", "D"),
        ]
        counts = {reason.split(" (")[0]: n for reason, (n, _) in skipped.items()}
        assert counts == {
            "path climbs out of the tar": 1,
            "not UTF-8 text or not a JSON object": 2,
            "no caption": 2,
            "tar that is none, or damaged from there on": 1,
        }
    before = captions.fingerprint([tmp_path])
    (tmp_path / "cc-001.tar").write_bytes(whole)
    assert before != captions.fingerprint([tmp_path])
    with pytest.raises(flame.InputError, match="cc-002.tar"):
        captions_of(tmp_path / "cc-{000..002}.tar")


def test_joined_recaptions(here, tiny_llm, capsys):
    raw = [{"__key__": f"{i}", "raw": f"raw {i}"} for i in range(4)]
    long = [{"__key__": f"{i}", "minicpm": f"Long  {i}."} for i in (0, 2, 3, 9)]
    short = [{"key": str(i), "short": f"Short {i}."} for i in range(4)]
    (here / "raw.json").write_text(json.dumps(raw))
    (here / "long.json").write_text(json.dumps(long))
    (here / "short.jsonl").write_text("\n".join(map(json.dumps, short)))
    recaptions = {"long": "long.json", "short": "short.jsonl"}
    joins = {name: captions.read_join(name, here / file, {}) for name, file in recaptions.items()}
    rows = list(read_captions(here / "raw.json", joins=joins))
    assert rows[0].captions == {"raw": "raw 0", "short": "Short 0.", "long": "Long 0."}
    assert rows[1].captions == {"raw": "raw 1", "short": "Short 1.", "long": "Short 1."}
    command = ["--captions", "raw.json", "--llm", tiny_llm, "--dtype", "float32",
               "--join", "long=long.json", "short=short.jsonl"]
    main(*command)
    message = capsys.readouterr().err.replace(str(here) + "/", "")
    assert "key without a long caption in the joined file" in message
    assert "long.json: 1 keys are not in raw.json" in message
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    expected = encoder.encode(["Long 0.", "Short 1.", "Long 2.", "Long 3."], "long")
    expected = torch.nn.functional.normalize(expected, dim=-1)
    got = flame.open_store("data/embeddings/raw").read(range(4), range(4, 11))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
    (here / "long.json").write_text(json.dumps([{"__key__": "0", "minicpm": "Other."}]))
    for wrong, what in ((command, "made with captions"), (command[:-2] + ["lang=long.json"], "--join")):
        with pytest.raises(SystemExit) as stop:
            main(*wrong)
        assert stop.value.code == 2 and what in capsys.readouterr().err


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_a_key_that_occurs_before_is_skipped(here, tiny_llm, capsys, store):
    for name, rows in (("a", ROWS[:7] + ROWS[2:4] + ROWS[7:]), ("b", ROWS)):
        write_tsv(here / f"{name}.tsv", rows)
        main("--captions", f"{name}.tsv", "--llm", tiny_llm, "--store", store, "--out", name)
    assert "skipped 2 rows: key occurs before (row 7, row 8)" in capsys.readouterr().err
    same_bytes("a", "b")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(
    st.binary(max_size=80),
    st.text("\t\n[]{}\":,aäkeyrawlong", max_size=80).map(str.encode),
    st.dictionaries(st.sampled_from(["key", "raw", "long", "image"]), st.text(), max_size=4).map(
        lambda row: json.dumps([row]).encode()),
    st.binary(max_size=40).map(lambda line: b"key\traw\n" + line),
))
@example(b"key,raw\ra,A cat.\r")  # lines that end as they did on old Macs
def test_no_file_makes_a_traceback(tmp_path, data):
    for name, content in {
        "x": data,
        "x.csv": data,
        "x.tsv.gz": gzip.compress(data),
        "x.gz": b"\x1f\x8b" + data,
        "x.tar": data,
        "y.tar": b"a.txt".ljust(124, b"\0") + data,
    }.items():
        (tmp_path / name).write_bytes(content)
        try:
            rows, _ = captions_of(tmp_path / name)
            assert rows
            for row in rows:
                assert set(row.captions) == set(flame.PROMPTS) and all(row.captions.values())
            "".join(r.key + r.image + "".join(r.captions.values()) for r in rows).encode()
        except flame.InputError as e:
            assert str(tmp_path / name) in str(e) and "\n" not in str(e)


def test_bad_input_on_the_command_line(run, refused, tmp_path, tiny_llm):
    refused(run("embed.py", "--captions", "none.tsv", "--llm", tiny_llm), "none.tsv", "No such file")
    (tmp_path / "empty.tsv").write_text("")
    refused(run("embed.py", "--captions", "empty.tsv", "--llm", tiny_llm), "empty.tsv", "empty")
    (tmp_path / "columns.tsv").write_text("key\timage\tnote\na\tb\tc\n")
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
    wanted = [tuple(int(c[i:i + 2], 16) for i in (1, 3, 5)) for c in look.PALETTE[:11]]
    # Eleven segments: opening and caption, "the", two shared facet openings, seven endings.
    assert set(wanted) <= colors


# --- input that is refused: exit code 2, one line that names the file or the flag, nothing changed on disk

@pytest.fixture
def quick(monkeypatch):
    """An LLM is read from its folder once, however often a test runs embed.py."""
    for name in ("load_tokenizer", "load_decoder"):
        monkeypatch.setattr(flame, name, functools.cache(getattr(flame, name)))


@pytest.fixture
def rejected(capsys):
    """rejected(*args, names=...) runs embed.py and asserts the promise about bad input."""
    def check(*args, names=()):
        before = everything_under(Path.cwd())
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(*args)
        message = last_line(capsys)
        assert stop.value.code == 2 and message.startswith("embed.py: ")
        assert all(str(name) in message for name in names), message
        assert everything_under(Path.cwd()) == before
    return check


def last_line(capsys):
    """Of stderr, where progress bars are drawn too."""
    return capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]


def everything_under(folder):
    """{path: content} of all that lies in a folder; links by where they point to."""
    content = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            content[path] = os.readlink(path)
        else:
            content[path] = path.read_bytes() if path.is_file() else None
    return content


def make_store(out, tiny_llm, *more, rows=ROWS):
    """-> the command that made a finished store there."""
    write_tsv(Path("small.tsv"), rows)
    command = ["--captions", "small.tsv", "--llm", tiny_llm, "--out", out, *more]
    main(*command)
    return command


def unfinish(out, windows="0\n1\n"):
    """Turns a finished store into one whose run was killed when these windows were written."""
    meta = json.loads((out / "meta.json").read_text())
    settings = {name: meta[name] for name in stores.SETTINGS}
    (out / "journal.json").write_text(json.dumps({"settings": settings, "N": 23, "total": 23, "repeats": []}))
    (out / "windows-0.txt").write_text(windows)
    (out / "meta.json").unlink()


@pytest.mark.parametrize("device", ["foo", "mps", "meta", "", "cuda:99", "cuda:x",
    "cuda" if not torch.cuda.is_available() else "cuda:98"])
def test_a_device_that_is_not_there(here, tiny_llm, rejected, device):
    write_tsv(here / "small.tsv", ROWS)
    for more in ([], ["--plan"]):
        command = "--captions", "small.tsv", "--llm", tiny_llm, "--device", device
        rejected(*command, *more, names=["--device", device])


@pytest.mark.parametrize("setting", [
    "--budget 1e12", "--window 0", "--window -1", "--window 1e3", "--window 99999999",
    "--layer -1", "--layer 0", "--layer 2.5", "--plan -5", "--plan 0", "--plan 1e6", "--shard 1/1",
    "--shard -1/2", "--shard 1",
    "--shard 0/0", "--shard 0/99999999999999999999", "--prompts rew", "--prompts raw,", "--join long",
    "--join lang=x", "--join long=", "--store int4", "--dtype int8", "--nothing 1"])
def test_settings_are_checked_before_anything_is_read(here, rejected, setting):
    flag, value = setting.split()
    rejected("--captions", "nowhere.tsv", "--llm", "nowhere", f"{flag}={value}", names=[flag])


def test_a_layer_that_the_llm_has_not(here, tiny_llm, rejected):
    write_tsv(here / "small.tsv", ROWS)
    for more in ([], ["--plan"]):
        command = "--captions", "small.tsv", "--llm", tiny_llm, "--layer", "5"
        rejected(*command, *more, names=["--layer 5", "4 blocks"])


def test_a_range_of_tars_that_runs_backwards(here, tiny_llm, rejected):
    for more in ([], ["--plan"]):
        rejected("--captions", "x-{0005..0001}.tar", "--llm", tiny_llm, *more, names=["x-{0005..0001}.tar"])


def test_a_picture_gets_a_suffix_or_is_refused(here, tiny_llm, rejected):
    draw = ("--draw", "A cat.", "--llm", tiny_llm, "--out")
    main(*draw, "f7")
    assert (here / "f7.png").read_bytes().startswith(b"\x89PNG")
    (here / "folder.png").mkdir()
    (here / "file").write_text("")
    rejected(*draw, "f7.xyz", names=["f7.xyz"])
    rejected(*draw, "f7.psd", names=["f7.psd"])
    rejected(*draw, "folder.png", names=["folder.png"])
    rejected(*draw, "file/f7.png", names=["file"])
    rejected("--draw", "word " * 3000, "--llm", tiny_llm, names=["--draw", "shorter"])
    rejected("--draw", "caf\udce9", "--llm", tiny_llm, names=["--draw", "UTF-8"])
    rejected("--draw", "A cat.", "--llm", "nowhere", "--out", "f7.xyz", names=["f7.xyz"])  # no LLM was read


def test_an_llm_that_does_not_hold_together_leaves_nothing_behind(here, tiny_llm, rejected, monkeypatch):
    from safetensors.torch import load_file, save_file
    weights = load_file(tiny_llm / "model.safetensors")
    shutil.copytree(tiny_llm, "broken")
    some = {name: x for name, x in weights.items() if "layers.1.mlp" not in name}
    save_file(some, "broken/model.safetensors")
    write_tsv(here / "small.tsv", ROWS)
    rejected("--captions", "small.tsv", "--llm", "broken", names=["broken", "layers.1.mlp"])
    make_store("store", tiny_llm)
    rejected("--captions", "small.tsv", "--llm", "broken", "--out", "store", "--overwrite", names=["broken"])


NOT_AN_OBJECT = [b"", b"{", b"null", b"[]", b"7", b"{}", b"\xff\xfe", b"[" * 9999]


@pytest.mark.parametrize("text", NOT_AN_OBJECT)
def test_a_journal_or_meta_that_is_damaged(here, tiny_llm, rejected, quick, text):
    command = make_store("store", tiny_llm)
    (here / "store/meta.json").write_bytes(text)
    for how in (command, ["--inspect", "store"], ["--merge", "store", "--out", "other"]):
        rejected(*how, names=["store/meta.json", "--overwrite"])
    main(*command, "--overwrite")
    unfinish(here / "store")
    (here / "store/journal.json").write_bytes(text)
    rejected(*command, names=["store/journal.json", "--overwrite"])


@pytest.mark.parametrize("key, value", [
    ("N", "23"), ("N", -1), ("N", None), ("N", True), ("N", 10 ** 30), ("D", "48"), ("D", 0),
    ("columns", "raw.0"), ("columns", {}), ("columns", []), ("columns", ["raw.9"]),
    ("columns", [[]]), ("columns", ["long.0", "raw.0"]), ("llm", None), ("llm", []), ("llm", "tiny"),
    ("llm.name", 7), ("llm.layer", "3"), ("llm.fingerprint", None), ("llm", {}),
    ("captions", None), ("captions.path", 5), ("captions.sha256", []), ("store", 8), ("store", "int4")])
def test_a_meta_whose_entries_are_of_another_kind(here, tiny_llm, quick, key, value):
    make_store("store", tiny_llm, rows=ROWS)
    path = here / "store/meta.json"
    change(path, key, value)
    not_opened("store/")


def not_opened(name):
    """flame.open_store says in one line which of the store's files is wrong, and the cure."""
    with pytest.raises(flame.InputError) as error:
        flame.open_store("store")
    message = str(error.value)
    assert message.startswith(name) and "--overwrite" in message and "\n" not in message


def change(path, key, value):
    """Sets a.b in a JSON file; a value of None takes it out."""
    whole = json.loads(path.read_text())
    *outer, last = key.split(".")
    entries = whole
    for name in outer:
        entries = entries[name]
    if value is None:
        del entries[last]
    else:
        entries[last] = value
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize("key, value", [
    ("N", "23"), ("N", 22), ("N", None), ("N", 0), ("total", 24), ("total", -1), ("total", 10 ** 30),
    ("total", 23.0), ("repeats", None), ("repeats", {}), ("repeats", ["1"]), ("repeats", [[1]]),
    ("settings", None), ("settings", []), ("settings.llm", None), ("settings.llm", "x"),
    ("settings.captions", []), ("settings.captions.sha256", 7), ("settings.window", "5"),
    ("settings.window", 0), ("settings.shard", None), ("settings.shard", [0]), ("settings.columns", [1])])
def test_a_journal_whose_entries_are_of_another_kind(here, tiny_llm, rejected, quick, key, value):
    command = make_store("store", tiny_llm)
    unfinish(here / "store")
    change(here / "store/journal.json", key, value)
    rejected(*command, names=["store/journal.json", "--overwrite"])


@pytest.mark.parametrize("text", ["5\n", "-1\n", "0\nx\n", "0\n\n", "1.0\n", "0 1\n",
    "99999999999999999999999\n", "\u0663\n", "\x00\x00\n"])
def test_a_line_that_is_no_window(here, tiny_llm, rejected, quick, text):
    command = make_store("store", tiny_llm)
    unfinish(here / "store", text)
    rejected(*command, names=["store/windows-0.txt", f"line {text.count(chr(10))}", "delete the file"])
    (here / "store/windows-0.txt").unlink()
    main(*command)


def damaged_arrays(array):
    """{what: bytes of a file} that is not this array."""
    def saved(x, **how):
        file = io.BytesIO()
        np.save(file, x, **how)
        return file.getvalue()

    archive = io.BytesIO()
    np.savez(archive, array)
    whole = saved(array)
    return {
        "another dtype": saved(array.astype(np.float64)),
        "another byte order": saved(array.astype(array.dtype.newbyteorder(">"))),
        "columns first": saved(np.asfortranarray(array)), "another shape": saved(array[..., :-1]),
        "flat": saved(array.ravel()), "no rows": saved(array[:0]),
        "an archive": archive.getvalue(), "a pickle": saved(np.array([{}], object), allow_pickle=True),
        "empty": b"", "text": b"text", "cut short": whole[:-1],
        "cut in its header": whole[:50], "a header that lies": whole[:128].replace(b"(", b"(9") + whole[128:]}


@pytest.mark.parametrize("what", [*damaged_arrays(np.zeros((3, 2), np.float16)), "a folder", "missing"])
@pytest.mark.parametrize("name", ["embeddings", "scales", "statistics"])
def test_an_array_that_is_not_as_wanted(here, tiny_llm, rejected, quick, name, what):
    command = make_store("store", tiny_llm, "--store", "int8")
    path = here / f"store/{name}.npy"
    contents = damaged_arrays(np.load(path))
    if what == "another byte order" and name == "embeddings":
        return  # int8 has none
    path.unlink()
    if what in contents:
        path.write_bytes(contents[what])
    elif what == "a folder":
        path.mkdir()
    not_opened(f"store/{name}.npy")
    unfinish(here / "store")
    if (name, what) != ("statistics", "missing"):  # then the run was killed before they were made
        rejected(*command, names=[f"store/{name}.npy", "--overwrite"])


@pytest.mark.parametrize("name", ["keys.txt", "images.txt"])
def test_lines_of_a_store_that_are_not_as_wanted(here, tiny_llm, quick, name):
    make_store("store", tiny_llm)
    path = here / "store" / name
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x\n", b"", b"\xff" + whole,
        b"\xff\xfe" + whole.decode().encode("utf-16-le"), None, "a folder", "a pipe"):
        path.rmdir() if path.is_dir() else path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "a folder":
            path.mkdir()
        elif content == "a pipe":
            os.mkfifo(path)
        else:
            (here / "nowhere").write_text("")
            path.symlink_to("nowhere at all")
        not_opened(f"store/{name}")


def test_shards_that_do_not_belong_together(here, tiny_llm, rejected, quick):
    for shard in range(2):
        make_store(f"part-{shard}-of-2", tiny_llm, "--shard", f"{shard}/2")
    parts = ["part-0-of-2", "part-1-of-2"]
    rejected("--merge", parts[1], parts[1], "--out", "no", names=["shard 0 of 2"])
    rejected("--merge", *parts, "--out", parts[1], "--overwrite", names=[parts[1],
        "--out"])  # would eat what it reads
    path, whole = here / parts[1] / "meta.json", (here / parts[1] / "meta.json").read_text()
    for key, value in (("shard", None), ("shard", "1/2"), ("shard", [1, 2, 3]), ("window", 0), ("window",
        6), ("window", None), ("dtype", "float16"), ("captions.sha256", "0")):
        change(path, key, value)
        rejected("--merge", *parts, "--out", "no", names=["part-" if key != "shard" else "shard"])
        path.write_text(whole)
    main("--merge", *reversed(parts))  # -> part
    assert flame.open_store("part").keys == [r["key"] for r in ROWS]


# --- files of ours that are not ours

@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["lock", *stores.FILES, "windows-0.txt"])
def test_nothing_is_written_through_a_link(here, tiny_llm, quick, name, overwrite, capsys):
    write_tsv(here / "small.tsv", ROWS)
    (here / "precious").write_text("not yours")
    (here / "store").mkdir()
    (here / "store" / name).symlink_to("../precious")
    stops = name == "lock" or not overwrite and name != "windows-0.txt"
    with pytest.raises(SystemExit) if stops else nullcontext() as stop:
        main("--captions", "small.tsv", "--llm", tiny_llm, "--out", "store", *overwrite)
    if stop:
        assert stop.value.code == 2 and f"store/{name}" in capsys.readouterr().err
        assert os.listdir("store") == [name]
    assert (here / "precious").read_text() == "not yours"


@pytest.mark.parametrize("name", ["embeddings.npy", "windows-0.txt", "windows-1.txt"])
def test_a_killed_runs_files_are_not_links(here, tiny_llm, quick, name, rejected):
    command = make_store("store", tiny_llm)
    unfinish(here / "store")
    path = here / "store" / name
    path.exists() and path.rename("precious") or (here / "precious").write_text("0\n")
    path.symlink_to("../precious")
    rejected(*command, names=[f"store/{name}", "link"])


@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.parametrize("name", ["lock", "windows-0.txt", "windows-3.txt"])
def test_a_killed_runs_files_are_files(here, tiny_llm, quick, name, kind, rejected):
    command = make_store("store", tiny_llm)
    unfinish(here / "store")
    (here / "store" / name).unlink(missing_ok=True)
    (os.mkfifo if kind == "pipe" else os.mkdir)(here / "store" / name)
    rejected(*command, names=[f"store/{name}"])


def test_files_that_no_run_left_are_kept(here, tiny_llm, quick, rejected):
    write_tsv(here / "small.tsv", ROWS)
    (here / "mine").mkdir()
    (here / "mine/keys.txt").write_text("my keys\n")
    rejected("--captions", "small.tsv", "--llm", tiny_llm, "--out", "mine", names=["mine/keys.txt", "--out"])


# --- a full disk

@pytest.fixture(params=["file system", "files"])
def disk(request, tmp_path, monkeypatch):
    """with small(pages): a small file system under tmp_path / "disk", or a limit on each file's size."""
    folder, limit = tmp_path / "disk", resource.getrlimit(resource.RLIMIT_FSIZE)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", folder, "-o"]
    mounted = request.param == "file system" and shutil.which("mount")
    if mounted:
        mounted = subprocess.run([*mount, "size=4k"], capture_output=True).returncode == 0

    def resize(pages):
        subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", folder], check=True)

    @contextlib.contextmanager
    def small(pages):
        if mounted:
            resize(pages)
        else:  # where it may not be mounted, the limit is tested twice
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * pages, limit[1]))
        try:
            yield
        finally:  # at once: what the test runner writes is not limited
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            if mounted:
                resize(1 << 20)

    yield small
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_a_disk_that_is_full_at_any_point(here, tiny_llm, quick, disk, store, capsys):
    """One line, and once there is room the same command ends with the same bytes."""
    write_tsv(here / "small.tsv", ROWS[:3])
    command = ["--captions", "small.tsv", "--llm", tiny_llm, "--prompts", "raw", "--store", store,
        "--window", 1, "--out"]
    main(*command, "whole")
    out, named = here / "disk/store", []
    for pages in itertools.count(1):
        capsys.readouterr()
        try:
            with disk(pages):
                main(*command, out)
            break
        except SystemExit as stop:
            message = last_line(capsys)
            assert stop.code == 2 and message.startswith(f"embed.py: {out}"), message
            named.append(message.split(":")[1].removeprefix(f" {out}/"))
        main(*command, out)
        same_bytes("whole", out)
        shutil.rmtree(out)
    assert {"embeddings.npy", "journal.json", "meta.json"} <= set(named) and set(named) <= {*stores.FILES,
        "windows-0.txt"}


def test_a_disk_that_is_full_while_shards_are_merged(here, tiny_llm, quick, disk, capsys):
    parts = ["part-0-of-2", "part-1-of-2"]
    for shard, part in enumerate(parts):
        make_store(part, tiny_llm, "--shard", f"{shard}/2", "--prompts", "raw", "--store", "int8")
    main("--merge", *parts)
    for pages in itertools.count(1):
        capsys.readouterr()
        try:
            with disk(pages):
                main("--merge", *parts, "--out", "disk/merged")
            break
        except SystemExit as stop:
            assert stop.code == 2 and last_line(capsys).startswith("embed.py: disk/merged/")
        assert os.listdir("disk") == []
    same_bytes("part", "disk/merged")


@pytest.mark.parametrize("call", range(1, 6))
def test_a_disk_that_is_full_in_the_middle(here, tiny_llm, quick, call, monkeypatch, capsys):
    """As where room is not kept for a file: the window that could not be written is not counted as there."""
    command = make_store("whole", tiny_llm)[:-1]
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(1)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        main(*command, "store")
    assert stop.value.code == 2 and "store/embeddings.npy: No space left" in capsys.readouterr().err
    assert (here / "store/windows-0.txt").read_text().count("\n") == call - 1
    main(*command, "store")
    same_bytes("whole", "store")


def test_the_mask_drawn_is_the_extensions_and_flames(here, tiny_llm, monkeypatch):
    draw = "--draw", "Two people \U0001f468\u200d\U0001f469\nand a dog.", "--llm", tiny_llm, "--out"
    called = []
    if flame.flame_ext:
        mask = flame.flame_ext.mask
        monkeypatch.setattr(flame.flame_ext, "mask", lambda *args: called.append(1) or mask(*args))
    main(*draw, "extension.png")
    assert called == [1] * bool(flame.flame_ext)
    monkeypatch.setattr(flame, "flame_ext", None)
    main(*draw, "flame.png")
    assert (here / "extension.png").read_bytes() == (here / "flame.png").read_bytes()


# --- questions of one's own

MINE = {"long": {"prefix": 'A drawing : "{}" .', "facets": [f'property {k} in one word:"' for k in range(9)]}}


def test_own_questions_are_asked_and_remembered(tmp_path, tiny_llm, run, refused):
    """Nine questions in the long set's place: embedded, trained on, and asked at last; in processes of their
    own."""
    from PIL import Image
    rows = []
    for i in range(8):
        image = f"{i}.png"
        Image.new("RGB", (32, 32), (30 * i, 100, 200)).save(tmp_path / image)
        rows.append({"key": str(i), "image": image, "raw": "x", "short": "y", "long": f"number {i}"})
    write_tsv(tmp_path / "mine.tsv", rows)
    (tmp_path / "mine.json").write_text(json.dumps(MINE))
    known = ["--llm", tiny_llm, "--dtype", "float32"]
    done = run("embed.py", "--captions", "mine.tsv", "--prompts-file", "mine.json", *known)
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "data/embeddings/mine/meta.json").read_text())
    assert meta["llm"]["questions"] == MINE and meta["columns"][-1] == "long.8" and len(meta["columns"]) == 13
    store = np.load(tmp_path / "data/embeddings/mine/embeddings.npy")
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    ids = encoder.tokenizer.encode('A drawing : "number 3." . property 8 in one word:"')
    expected = flame.decode(encoder.decoder, flame.build_forest([ids]))[0]
    expected = torch.nn.functional.normalize(expected, dim=0)
    torch.testing.assert_close(torch.from_numpy(store[3, 12]).float(), expected, rtol=0, atol=2e-3)

    done = run("train.py", "--steps", "2", "--batch", "4", "--projector-hidden", "48")
    assert done.returncode == 0, done.stderr
    done = run("evaluate.py", "--captions", "mine.tsv", "--llm", tiny_llm, "--facets", "--report")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results/mine.json").read_text())
    assert result["columns"] == [f"long.{k}" for k in range(9)]
    assert max(len(row["facets"]) for row in result["facets"]) == 9

    papers = run("embed.py", "--captions", "mine.tsv", *known)
    refused(papers, "meta.json", "--out", "--overwrite")


@pytest.mark.parametrize("questions", [
    '{"long": {"prefix": "no place", "facets": ["a"]}}', '{"long": {"prefix": "{}", "facets": []}}',
    '{"long": {"prefix": "{}", "facets": [3]}}', '{"other": {"prefix": "{}", "facets": ["a"]}}',
    '{"long": {"prefix": "\\ud800 {}", "facets": ["a"]}}',
    '{"long": 3}', "[]", "{}"])
def test_bad_questions_are_refused_before_anything_is_made(tmp_path, tiny_llm, run, refused, questions):
    write_tsv(tmp_path / "mine.tsv", ROWS[:2])
    (tmp_path / "mine.json").write_text(questions)
    done = run("embed.py", "--captions", "mine.tsv", "--prompts-file", "mine.json", "--llm", tiny_llm)
    refused(done, "mine.json")
    assert not (tmp_path / "data").exists()


def test_an_encoder_asks_the_questions_of_a_store_that_is_opened_later(tiny_llm, monkeypatch):
    monkeypatch.setattr(flame, "ASKED", [])
    monkeypatch.setattr(flame, "PROMPTS", dict(flame.PROMPTS))
    monkeypatch.setattr(flame, "COLUMNS", list(flame.COLUMNS))
    before = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    facets = before.encode(["A red cat."]).shape[1]
    other = {"long": {"prefix": 'Seen : "{}" .', "facets": [*flame.PROMPTS["long"].facets[1:], "its age"]}}
    flame.use_prompts(other, "a store")
    after = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    assert facets == 7
    torch.testing.assert_close(before.encode(["A red cat."]), after.encode(["A red cat."]))
    flame.facet_ids.cache_clear()  # other tests ask the paper's


def test_one_process_asks_one_set_of_questions(monkeypatch):
    monkeypatch.setattr(flame, "ASKED", [{}])
    with pytest.raises(flame.InputError, match="process"):
        flame.use_prompts(MINE, "another/meta.json")
    assert len(flame.PROMPTS["long"].facets) == 7
