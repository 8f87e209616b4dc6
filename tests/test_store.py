"""Tests of embed.py (stage 1) and of flame.Store. The same bytes result from several ranks, --part,
concurrent runs, and runs that are killed and restarted. test_refusals.py tests a full disk.
"""
import fcntl
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

import embed
import flame
from data import common
from data.common import progress_bar

ROOT = Path(__file__).resolve().parent.parent
ROWS = [("key", "image", "raw", "short", "long")]
ROWS += [(f"k{n}", f"pics/{n}.png", f"thing {n % 4}", f"A thing {n}.", f"One thing, nr. {n}. " * (1 + n % 3))
         for n in range(23)]
KILLS = int(os.environ.get("FLAME_KILLS", 4))
STORE = Path("data/embeddings/small")


@pytest.fixture
def here(tmp_path, monkeypatch, byte_llm):
    """Change to a folder with only small.tsv; set $FLAME_LLM to a random LLM and the shard size to 5 rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLAME_LLM", str(byte_llm))
    monkeypatch.setitem(embed.SHARD_SIZE, "cpu", 5)
    Path("small.tsv").write_text("".join("\t".join(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.fixture
def run(here, monkeypatch, capsys):
    """run(*arguments) -> stdout of embed.py; with code=2, the last line of stderr"""
    def run(*arguments, captions="small.tsv", code=0):
        command = ["embed.py", "--captions", captions, "--device", "cpu", *map(str, arguments)]
        command += ["--no-images"] * (captions == "small.tsv")
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        exit_code = embed.main()
        out, err = capsys.readouterr()
        assert exit_code == code and not re.search("0/0|: 0it", err), err
        if code:
            assert "Traceback" not in err
            return err.replace("\r", "\n").strip().splitlines()[-1]
        return out
    return run


def read_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def command(*arguments):
    return [sys.executable, ROOT / "embed.py", "--captions", "small.tsv", "--no-images", "--device", "cpu",
            "--shard-size", "2", *map(str, arguments)]


# --- messages

def test_progress_bar_prints_lines_without_a_terminal(capfd):
    with progress_bar(total=3, desc="counting") as bar:
        bar.update(3)
        assert bar.mininterval == 30
    err = capfd.readouterr().err
    assert re.search("^\r?counting: 100%.* 3/3 .*\n", err, re.M)


def test_missing_llm_is_reported_with_the_fix(run, monkeypatch):
    message = run("--llm", "nowhere", "--out", "new", code=2)
    assert "nowhere" in message and "data/demo.py --make-only" in message and "$FLAME_LLM" in message
    monkeypatch.delenv("FLAME_LLM")
    assert embed.build_parser().get_default("llm") == ROOT / "data/demo/llm"  # absolute


# --- contents of a store

@pytest.mark.parametrize("mask", ["decoupled", "causal"])
def test_store_has_the_embeddings_of_encode(run, byte_llm, mask):
    flags = ["--dtype", "float32", *(["--mask", "causal"] if mask == "causal" else [])]
    out = run(*flags)
    assert "computing 5 of 5 shards of 5 rows; layer 1, float32 on 1 x cpu, " in out and "finished" in out
    store = flame.open_store(STORE)
    assert sorted(read_files(STORE)) == [*(f"{i:06d}.npy" for i in range(5)), "captions.tsv", "meta.json"]
    assert store.keys == [row[0] for row in ROWS[1:]] and store.images == [row[1] for row in ROWS[1:]]
    assert len(store) == 23
    meta = store.meta
    assert (meta["N"], meta["D"], meta["shard_size"], meta["columns"]) == (23, 32, 5, flame.FACET_COLUMNS)
    assert (meta["llm"]["mask"], meta["llm"]["path"]) == (mask, str(byte_llm))
    encoder = flame.TextEncoder(byte_llm, dtype=torch.float32, mask=mask)
    states = [encoder.encode([row[2 + n].strip() for row in ROWS[1:]], name)
              for n, name in enumerate(flame.PROMPTS)]
    expected = normalize(torch.cat(states, dim=1), dim=-1)
    torch.testing.assert_close(store.read(range(23), range(11)), expected, rtol=0, atol=2e-3)
    shards = [np.load(STORE / f"{i:06d}.npy") for i in range(5)]
    assert [shard.shape for shard in shards] == [(5, 11, 32)] * 4 + [(3, 11, 32)]
    assert all(shard.dtype == np.float16 for shard in shards)
    assert run(*flags).endswith("23 x 11 embeddings of dimension 32, finished\n")


def test_read_equals_reference(run):
    run()
    store = flame.open_store(STORE)
    vectors = np.concatenate([np.load(STORE / f"{i:06d}.npy") for i in range(5)]).astype(np.float32)
    random = np.random.default_rng()
    rows = random.integers(0, 23, 50)
    for columns in (random.integers(0, 11, (50, 6)), np.array([3, 1])):
        read = store.read(rows, columns)
        assert read.dtype == torch.float32 and read.shape == (50, columns.shape[-1], 32)
        for n, row in enumerate(rows):
            expected = vectors[row, columns[n] if columns.ndim == 2 else columns]
            expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
            np.testing.assert_allclose(read[n].numpy(), expected, rtol=0, atol=1e-6)
    assert store.read([], [0, 1]).shape == (0, 2, 32)
    for row, column in ((23, 0), (0, 11), (-1, 0)):
        with pytest.raises((IndexError, flame.InputError)):
            store.read([row], [column])
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 300 and again.read([3], [1]).equal(store.read([3], [1]))
    assert again.keys == store.keys


def test_unfinished_or_corrupt_store_is_refused(run):
    with pytest.raises(flame.InputError, match="meta.json: no such file; make a store with embed.py"):
        flame.open_store(STORE)
    run()
    (STORE / "000003.npy").unlink()
    with pytest.raises(flame.InputError, match="000003.npy: no such file; .* run the same embed.py command"):
        flame.open_store(STORE)
    (STORE / "000003.npy").write_bytes((STORE / "000002.npy").read_bytes()[:-41])  # 32 are the digest
    with pytest.raises(flame.InputError, match="000003.npy: .*delete it if it exists, and run the same"):
        flame.open_store(STORE).read([17], [0])
    meta = json.loads((STORE / "meta.json").read_text())
    meta["llm"]["prompts"]["raw"]["facets"] = ["something else in one word:\""]
    for text, message in (("[]", "meta.json: "), ("{", "meta.json: "), ("{}", "no "),
                          (json.dumps(meta), "meta.json: made with .*prompts")):
        (STORE / "meta.json").write_text(text)
        with pytest.raises(flame.InputError, match=message):
            flame.open_store(STORE)


# --- shards

def test_killed_and_restarted_runs_end_with_the_same_bytes(run):
    run("--out", "whole", "--shard-size", 2)
    random = np.random.default_rng()
    kills = 0
    for share in sorted(random.uniform(0, 1, KILLS)):
        process = subprocess.Popen(command("--out", "store"), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(Path("store").glob("0*.npy"))) < 11 * share:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        kills += process.wait() == -9
    assert kills
    run("--out", "store", "--shard-size", 2)
    assert read_files("store") == read_files("whole")  # and no temporary files


def test_several_ranks_or_concurrent_runs_end_with_the_same_bytes(run):
    run("--out", "whole", "--shard-size", 2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, *command("--out", "ranks")[1:]], check=True, capture_output=True)
    both = [subprocess.Popen(command("--out", "both"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert read_files("ranks") == read_files("both") == read_files("whole")


@pytest.mark.parametrize("flags, expected", [
    ([], [[0, 4, 8], [2, 6, 10]]), (["--part", "0/4"], [[0, 8], [4]])])
def test_missing_shards_are_divided_among_ranks(run, monkeypatch, flags, expected):
    """All missing shards have even numbers. If ranks took shards by number, one rank would have nothing."""
    run("--shard-size", 2)
    for i in range(0, 11, 2):
        (STORE / f"{i:06d}.npy").unlink()
    written = []
    monkeypatch.setattr(embed, "write_shard", lambda out, meta, i, array: written.append(i))
    monkeypatch.setattr(embed, "barrier", lambda *path: None)
    monkeypatch.setattr(embed, "world_size", lambda: 2)
    for rank, shards in enumerate(expected):
        monkeypatch.setattr(embed, "rank", lambda: rank)
        run("--shard-size", 2, *flags)
        assert written == shards
        written.clear()


def test_parts_in_one_folder_or_copied_together_equal_one_run(run):
    run("--out", "whole")
    for part in range(3):
        out = run("--part", f"{part}/3", "--out", "shared")
        assert ("finished" if part == 2 else "shards missing") in out
        run("--part", f"{part}/3", "--out", f"part{part}")
        shutil.copytree(f"part{part}", "together", dirs_exist_ok=True)
    assert read_files("shared") == read_files("together") == read_files("whole")
    assert len(list(Path("part1").glob("*.npy"))) == 2
    for wrong in (["--part", "3/3"], ["--part", "x"], ["--part", "1/3", "--overwrite"]):
        assert wrong[-1].split("/")[0] in run(*wrong, code=2)


# --- settings

@pytest.mark.parametrize("setting, arguments", [
    ("dtype bfloat16", ["--dtype", "float32"]), ("shard_size 5", ["--shard-size", 7]),
    ("llm: layer 1", ["--layer", 2]), ("llm: mask decoupled", ["--mask", "causal"]),
    ("captions: sha256", ["--join", "long=long.tsv"])])
def test_changed_setting_is_refused_by_name(run, setting, arguments):
    Path("long.tsv").write_text("key\tlong\nk1\tother\n")
    run("--dtype", "bfloat16", "--out", "store")
    (Path("store") / "000002.npy").unlink()
    before = read_files("store")
    line = run("--dtype", "bfloat16", "--out", "store", *arguments, code=2)
    assert f"made with {setting}" in line and "--overwrite" in line and read_files("store") == before
    for out, more in (("store", ["--overwrite"]), ("new", [])):
        run("--dtype", "bfloat16", "--out", out, *arguments, *more)
    assert read_files("store") == read_files("new")


@pytest.mark.parametrize("name", ["write_table", "write_shard"])
def test_run_stops_if_another_run_has_begun_another_store(run, monkeypatch, name):
    """Otherwise shards of both would be mixed."""
    run("--out", "other", "--layer", 2)
    original = getattr(embed, name)

    def after_another_run(*arguments):
        shutil.copy("other/meta.json", "store")
        return original(*arguments)
    monkeypatch.setattr(embed, name, after_another_run)
    assert "store/meta.json: made with llm: layer 2, now it is 1" in run("--out", "store", code=2)
    assert not list(Path("store").glob("*.npy"))


def test_overwrite_needs_the_store_alone(run):
    run("--out", "store")
    with common.locked_folder("store", fcntl.LOCK_SH):
        assert "finished" in run("--out", "store")
        assert "another process" in run("--out", "store", "--overwrite", code=2)
    with common.locked_folder("store"):
        assert "another process" in run("--out", "store", code=2)
    assert "finished" in run("--out", "store", "--overwrite")


def test_captions_and_llm_may_be_moved_but_not_changed(run, byte_llm, monkeypatch):
    run("--out", "store")
    shutil.copytree(byte_llm, "llm")
    Path("elsewhere").mkdir()
    shutil.copy("small.tsv", "elsewhere/small.tsv")
    assert "finished" in run("--out", "store", "--llm", "llm", captions="elsewhere/small.tsv")
    Path("small.tsv").write_text(Path("small.tsv").read_text().replace("thing 3", "thing 9"))
    assert "made with captions: sha256" in run("--out", "store", code=2)
    weights = load_file("llm/model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, "llm/model.safetensors")
    assert "made with llm: fingerprint" in run("--out", "store", "--llm", "llm", code=2,
                                               captions="elsewhere/small.tsv")


@pytest.mark.parametrize("name", ["captions.tsv", "000000.npy"])
def test_files_not_written_by_embed_are_kept(run, name):
    Path("mine").mkdir()
    Path("mine", name).write_text("mine")
    for flags in ([], ["--overwrite"]):
        line = run("--out", "mine", *flags, code=2)
        assert f"{name}: exists without meta.json, so embed.py did not write it" in line
        assert read_files("mine") == {name: b"mine"}
    Path("notes").mkdir()
    Path("notes/readme.txt").write_text("mine")
    run("--out", "notes")
    assert read_files("notes")["readme.txt"] == b"mine"


def test_store_and_checkpoint_in_the_caption_folder_are_not_read_as_captions(run):
    Path("photos").mkdir()
    for n in range(7):
        Image.new("RGB", (8, 8)).save(f"photos/{n}.jpg")
        Path(f"photos/{n}.txt").write_text(f"thing {n}")
    run("--out", "photos/store", captions="photos")
    before = read_files("photos/store")
    os.remove("photos/store/000001.npy")
    Path("photos/out/x").mkdir(parents=True)
    Path("photos/out/x/skipped.txt").write_text("3\tUnidentifiedImageError")
    run("--out", "photos/store", captions="photos")
    assert read_files("photos/store") == before
    Path("photos/3.txt").write_text("another thing")
    assert "captions: sha256" in run("--out", "photos/store", captions="photos", code=2)


DAMAGE = {"NaN": lambda name, tensor: tensor * float("nan"), "zeros": lambda name, tensor: tensor * 0,
          "tiny": lambda name, tensor: tensor * 1e-30,
          "zero norms": lambda name, tensor: tensor * ("input_layernorm" not in name)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_weights_are_refused_before_the_old_store_is_deleted(run, byte_llm, damage):
    run("--out", "store")
    before = read_files("store")
    shutil.copytree(byte_llm, "llm")
    weights = load_file("llm/model.safetensors")
    weights = {name: DAMAGE[damage](name, tensor) for name, tensor in weights.items()}
    save_file(weights, "llm/model.safetensors")
    for out, arguments in (("store", ["--overwrite"]), ("new", [])):
        assert "embeddings are" in run("--llm", "llm", "--out", out, *arguments, code=2)
    assert read_files("store") == before and not Path("new").exists()
    assert "none.tsv: no such file" in run("--out", "store", "--overwrite", captions="none.tsv", code=2)
    assert "cannot run 9 layers" in run("--out", "store", "--overwrite", "--layer", 9, code=2)
    assert read_files("store") == before


def test_single_invalid_embedding_stops_the_run(run, monkeypatch):
    run("--out", "store")
    os.remove("store/000002.npy")
    original = flame.hidden_states

    def overflow(decoder, forest):  # in one state, as may happen in float16
        *states, last = original(decoder, forest)
        return torch.stack([*states, last * float("inf")])
    monkeypatch.setattr(flame, "hidden_states", overflow)
    assert "embeddings are equal, zero, NaN or infinite" in run("--out", "store", code=2)
    assert not Path("store/000002.npy").exists()
