"""embed.py and data/captions.py: what lands in the store, resuming to the same bytes, and bad input."""
import fcntl
import gzip
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st

import embed
import flame
from data import captions
from data.show import look
from data.captions import read_captions

ROOT = Path(__file__).resolve().parent.parent
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
    monkeypatch.setattr(flame, "flame_ext", None)
    slow = opened.read(rows, columns), opened.read(rows, [3, 1])
    for a, b in zip(fast, slow):
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_no_packed_row_of_a_full_window_brings_a_new_size(tiny_llm, monkeypatch):
    """For every new number of rows oneDNN compiles kernels and keeps them: memory would grow for as long as they come."""
    encoder, random, lengths, attention_over = flame.TextEncoder(tiny_llm, dtype=torch.float32), np.random.default_rng(), [], flame.attention_over
    monkeypatch.setattr(flame, "attention_over", lambda forest, device: lengths.append(len(forest.tokens)) or attention_over(forest, device))
    embed.settle_memory(encoder)
    settled = sorted(lengths)
    assert settled == list(range(1088, 2049, 64))
    lengths.clear()
    for name in flame.PROMPTS:
        encoder.encode([f"{i} words " + "and more " * n for i, n in enumerate(random.integers(0, 20, 256))], name)
    assert len(lengths) > 12 and set(lengths) <= set(settled)


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

    calls, original = [], flame.TextEncoder.run

    def run(self, *args):
        calls.append(1)
        if len(calls) == 3 * where + 2:  # in the middle of a window: each has a packed row per prompt set
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(flame.TextEncoder, "run", run)
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
    return [{"key": f"k{i}", "image": "", "raw": f"thing {i % 7}", "short": f"A thing number {i}.", "long": f"It is number {i}. " * (1 + i % 5)} for i in range(n)]


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_sigkill_at_any_moment_ends_with_the_same_bytes(here, tiny_llm, store):
    write_tsv(here / "many.tsv", many_rows(400))
    command = [sys.executable, ROOT / "embed.py", "--captions", "many.tsv", "--llm", tiny_llm, "--window", "4", "--store", store]
    log, random = here / "data/embeddings/many/windows-0.txt", np.random.default_rng()
    kills, windows = 0, lambda: log.read_text().count("\n") if log.exists() else 0
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
    command = ["--captions", "small.tsv", "--llm", tiny_llm, "--dtype", "float32", "--window", 5, "--store", store]
    main(*command, "--out", "one")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "embed.py", *map(str, command), "--out", "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = flame.open_store("one"), flame.open_store("two")
    assert one.keys == two.keys and one.images == two.images
    torch.testing.assert_close(one.read(range(23), range(11)), two.read(range(23), range(11)), rtol=0, atol=2e-3)
    assert sorted(os.listdir("two")) == sorted(os.listdir("one"))


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_merged_shards_equal_one_run(here, tiny_llm, store, capsys):
    write_tsv(here / "small.tsv", ROWS)
    command = ["--captions", "small.tsv", "--llm", tiny_llm, "--window", 5, "--store", store]
    main(*command, "--out", "whole")
    for shard in range(3):
        main(*command, "--shard", f"{shard}/3")
    parts = [f"data/embeddings/small-{shard}-of-3" for shard in range(3)]
    assert flame.open_store(parts[1]).keys == [f"k{i}" for i in (*range(5, 10), *range(20, 23))]  # its windows only
    main("--merge", parts[2], parts[0], parts[1], "--out", "merged")
    same_bytes("whole", "merged")
    main(*command, "--out", "merged")
    assert "finished already" in capsys.readouterr().out
    for wrong in (["--merge", parts[0], parts[1], "--out", "no"], ["--merge", *parts, "--out", "merged"], [*command, "--shard", "3/3"], [*command, "--shard", "7/9"]):
        with pytest.raises(SystemExit) as stop:
            main(*wrong)
        assert stop.value.code == 2
    merged = np.load(Path(parts[0], "statistics.npy")) if store == "int8" else None
    if store == "int8":  # a shard whose machine rounds otherwise is brought to the first one's statistics
        np.save(Path(parts[1], "statistics.npy"), merged * np.float32(1.01))
        expected = flame.open_store(parts[1]).read(range(5), range(11))
        main("--merge", *parts, "--out", "again")
        torch.testing.assert_close(flame.open_store("again").read(range(5, 10), range(11)), expected, rtol=0, atol=5e-3)


def test_int8_keeps_what_whitening_looks_at(here, llm):
    """The real LLM's states, one of whose dimensions holds most of the norm: plain int8 of them would be useless (0.62)."""
    write_tsv(here / "many.tsv", many_rows(96))
    for store in ("int8", "float16"):
        main("--captions", "many.tsv", "--llm", llm, "--prompts", "short", "--store", store, "--out", store)
    small, large = flame.open_store("int8"), flame.open_store("float16")
    assert small.vectors.nbytes * 2 == large.vectors.nbytes
    a, b = (s.read(range(96), range(3)) for s in (small, large))
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


def test_a_disk_that_is_too_small_is_found_before_the_first_caption(tmp_path, tiny_llm, refused):
    write_tsv(tmp_path / "small.tsv", ROWS)
    command = [sys.executable, ROOT / "embed.py", "--captions", "small.tsv", "--llm", tiny_llm]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # embeddings.npy would take 24 kB
    refused(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit), "embeddings.npy", "GB are needed")
    assert subprocess.run(command, cwd=tmp_path).returncode == 0


def test_a_caption_is_cut_where_the_context_ends_and_the_prompt_never(make_random_llm):
    encoder = flame.TextEncoder(make_random_llm(max_position_embeddings=200), dtype=torch.float32)
    words = " ".join(f"word{i}" for i in range(300))
    states = encoder.encode(["A cat.", words, "A dog."], "long")
    assert encoder.truncated == 1
    (prefix,), (facets,) = encoder._fitting(words, "long")
    assert 190 < len(prefix) + sum(map(len, facets)) <= 200
    assert torch.isfinite(states).all() and facets == flame.tokenize(encoder.tokenizer, ["A cat."], "long")[1][0]


def test_plan_counts_what_the_run_will_do(here, tiny_llm, capsys, monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    write_tsv(here / "small.tsv", ROWS)
    main("--captions", "small.tsv", "--llm", tiny_llm, "--plan", "1000000")
    text = capsys.readouterr().out
    assert "23 captions, planned as 1000000" in text and "[1000000, 11, 48], float16 1.1 GB, int8 0.6 GB" in text and "here" in text and "8 H100" in text
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    rows, forest = next(encoder.pack([r["long"] for r in ROWS], "long"))
    monkeypatch.setattr(flame, "SIZES", 1)  # idle tokens are not planned as work
    with FlopCounterMode(display=False) as counter:
        encoder.run(forest, len(rows))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    everything = np.arange(len(forest.tokens))
    config = encoder.decoder.config
    seen = 2 * flame.visible(forest, everything, everything).sum() + flame.visible(forest, np.unique(forest.answers), everything).sum()
    assert look.flops(config, 3, forest) == products + 4 * config["num_attention_heads"] * config["head_dim"] * seen


def test_inspect_finds_what_is_wrong(here, tiny_llm, capsys):
    write_tsv(here / "small.tsv", ROWS)
    main("--captions", "small.tsv", "--llm", tiny_llm, "--out", "store")
    main("--inspect", "store", "--llm", tiny_llm)
    text = capsys.readouterr().out
    assert "rows never written: 0" in text and "NaN or infinite: 0" in text and "unit length: 0" in text and "k0: There is one thing." in text
    vectors = np.load("store/embeddings.npy", mmap_mode="r+")
    vectors[3, 2], vectors[5], vectors[7, 0, 0], vectors[8] = 0, 0, np.nan, 2 * vectors[8]
    vectors.flush()
    main("--inspect", "store", "--llm", tiny_llm)
    text = capsys.readouterr().out
    assert "rows never written: 2, the first: k3" in text and "NaN or infinite: 1, the first: k7" in text and "unit length: 1, the first: k8" in text


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


def test_csv_with_quotes_and_open_clips_names(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'filepath,title,other\n1.jpg,"a ""red"" kite,\nhigh up",x\n2.jpg\n3.jpg,b\xe4d,x\n4.jpg,ok,x\n')
    rows, skipped = captions_of(tmp_path / "a.csv")
    assert [(r.key, r.image, r.captions["long"]) for r in rows] == [("000000000", "1.jpg", 'a "red" kite, high up'), ("000000003", "4.jpg", "ok")]
    assert skipped == {"too few fields": [1, [4]], "invalid UTF-8": [1, [5]]}
    (tmp_path / "b.csv").write_text("filepath\ttitle\n1.jpg\tA, b.\n")  # open_clip's own default separator
    assert [(r.image, r.captions["raw"]) for r in captions_of(tmp_path / "b.csv")[0]] == [("1.jpg", "A, b.")]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.json", "a.jsonl"])
def test_gzip(tmp_path, name, refused):
    plain = {"a.tsv": "key\traw\nk\tR\n", "a.csv": "key,raw\nk,R\n", "a.json": '[{"key": "k", "raw": "R"}]', "a.jsonl": '{"key": "k", "raw": "R"}\n'}[name]
    path = tmp_path / (name + ".gz")
    path.write_bytes(gzip.compress(plain.encode()))
    assert [(r.key, r.captions["raw"]) for r in captions_of(path)[0]] == [("k", "R")]
    path.write_bytes(gzip.compress(plain.encode() * 999)[:-20])
    with pytest.raises(flame.InputError, match="gzip data damaged or cut off"):
        captions_of(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.one_of(st.integers(), st.none(), st.dictionaries(st.sampled_from(["key", "raw", "x"]), st.text(max_size=9), max_size=3))), chunk=st.integers(1, 40), spaced=st.booleans())
def test_a_json_list_is_read_piece_by_piece_like_whole(tmp_path, rows, chunk, spaced):
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1 if spaced else None, ensure_ascii=spaced), encoding="utf-8", errors="surrogatepass" if spaced else "replace")
    expected = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    before, captions.CHUNK = captions.CHUNK, chunk
    try:
        got = list(captions._json_list(open(tmp_path / "a.json", "rb"), "a.json", {}))
    finally:
        captions.CHUNK = before
    assert got == [(i, i + 1, row) for i, row in enumerate(expected) if isinstance(row, dict)]


@pytest.mark.parametrize("text", ["[1,]", "[1 2]", "[", '[{"raw": "x"}', '[{"raw": "x"}] 7', "[1]]", '[{"raw": "x"}, nope]', '["\\x"]'])
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
    write_tar(tmp_path / "cc-000.tar", [("000.jpg", picture), ("000.txt", b"a cat"), ("000.json", b'{"caption": "A CAT", "key": "no", "long": "A long cat."}'),
                                        ("../x.txt", b"evil"), ("001.txt", b"\xff"), ("002.json", b'{"caption": "C"}'), ("003.json", b"[1]")])
    write_tar(tmp_path / "cc-001.tar", [("100.txt", b"D"), ("101.txt", b"E" * 600)])
    whole = (tmp_path / "cc-001.tar").read_bytes()
    (tmp_path / "cc-001.tar").write_bytes(whole[:512 * 3 + 100])  # the second sample's text is cut off
    for path in (tmp_path, tmp_path / "cc-{000..001}.tar"):
        rows, skipped = captions_of(path)
        assert [(r.key, r.image, r.captions["raw"], r.captions["long"]) for r in rows] == [("000", "", "a cat", "A long cat."), ("002", "", "C", "C"), ("100", "", "D", "D")]
        counts = {reason.split(" (")[0]: n for reason, (n, _) in skipped.items()}
        assert counts == {"path climbs out of the tar": 1, "not UTF-8 text or not a JSON object": 2, "no caption": 2, "tar that is none, or damaged from there on": 1}
    before = captions.fingerprint([tmp_path])
    (tmp_path / "cc-001.tar").write_bytes(whole)
    assert before != captions.fingerprint([tmp_path])
    with pytest.raises(flame.InputError, match="cc-002.tar"):
        captions_of(tmp_path / "cc-{000..002}.tar")


def test_joined_recaptions(here, tiny_llm, capsys):
    (here / "raw.json").write_text(json.dumps([{"__key__": f"{i}", "raw": f"raw {i}"} for i in range(4)]))
    (here / "long.json").write_text(json.dumps([{"__key__": f"{i}", "minicpm": f"Long  {i}."} for i in (0, 2, 3, 9)]))
    (here / "short.jsonl").write_text("\n".join(json.dumps({"key": str(i), "short": f"Short {i}."}) for i in range(4)))
    joins = {name: captions.read_join(name, here / file, {}) for name, file in (("long", "long.json"), ("short", "short.jsonl"))}
    rows = list(read_captions(here / "raw.json", joins=joins))
    assert [r.captions for r in rows[:2]] == [{"raw": "raw 0", "short": "Short 0.", "long": "Long 0."}, {"raw": "raw 1", "short": "Short 1.", "long": "Short 1."}]
    command = ["--captions", "raw.json", "--llm", tiny_llm, "--dtype", "float32", "--join", "long=long.json", "short=short.jsonl"]
    main(*command)
    message = capsys.readouterr().err
    assert "key without a long caption in the joined file" in message and "long.json: 1 keys are not in raw.json" in message.replace(str(here) + "/", "")
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    expected = torch.nn.functional.normalize(encoder.encode(["Long 0.", "Short 1.", "Long 2.", "Long 3."], "long"), dim=-1)
    torch.testing.assert_close(flame.open_store("data/embeddings/raw").read(range(4), range(4, 11)), expected, rtol=0, atol=2e-3)
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
@given(st.one_of(st.binary(max_size=80), st.text("\t\n[]{}\":,aäkeyrawlong", max_size=80).map(lambda s: s.encode()),
                 st.dictionaries(st.sampled_from(["key", "raw", "long", "image"]), st.text(), max_size=4).map(lambda d: json.dumps([d]).encode()), st.binary(max_size=40).map(lambda b: b"key\traw\n" + b)))
@example(b"key,raw\ra,A cat.\r")  # lines that end as they did on old Macs
def test_no_file_makes_a_traceback(tmp_path, data):
    for name, content in (("x", data), ("x.csv", data), ("x.tsv.gz", gzip.compress(data)), ("x.gz", b"\x1f\x8b" + data), ("x.tar", data), ("y.tar", b"a.txt".ljust(124, b"\0") + data)):
        (tmp_path / name).write_bytes(content)
        try:
            rows, _ = captions_of(tmp_path / name)
            assert rows and all(set(r.captions) == set(flame.PROMPTS) and all(r.captions.values()) for r in rows)
            "".join(r.key + r.image + "".join(r.captions.values()) for r in rows).encode()
        except flame.InputError as e:
            assert str(tmp_path / name) in str(e) and "\n" not in str(e)


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
    wanted = [tuple(int(c[i:i + 2], 16) for i in (1, 3, 5)) for c in look.PALETTE[:11]]
    assert set(wanted) <= colors  # eleven segments: opening and caption, "the", two shared facet openings, seven endings
