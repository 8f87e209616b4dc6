"""embed.py, data/store.py and flame.Store promise:

* a store's vectors are what TextEncoder.encode gives, as unit vectors, in the order of captions.tsv;
* a window depends on nothing but its captions and the settings: ranks, shards, runs at the same time, and
  runs that were killed at any moment and started again, all end with the same bytes;
* the same command with other settings is refused and names the setting; nothing of another's is touched;
* an LLM whose weights are damaged costs nothing that was there (nor does a full disk: test_refusals.py);
* pictures inside of Parquet become tars in the store's folder, once, where training finds them;
* reading is as a slow twin reads; what is unfinished or asks other questions is refused.
"""
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

import embed
import flame
import train
from data.command import bar
from data.pictures import open_picture, places_of
from data.tars import write_tar

ROOT = Path(__file__).resolve().parent.parent
ROWS = [("key", "image", "raw", "short", "long")]
ROWS += [(f"k{n}", f"pics/{n}.png", f"thing {n % 4}", f"A thing {n}.", f"One thing, nr. {n}. " * (1 + n % 3))
         for n in range(23)]
KILLS = int(os.environ.get("FLAME_KILLS", 4))
STORE = Path("data/embeddings/small")


@pytest.fixture
def here(tmp_path, monkeypatch, byte_llm):
    """An empty folder with small.tsv, where $FLAME_LLM is a random LLM; windows are of five rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLAME_LLM", str(byte_llm))
    monkeypatch.setitem(embed.WINDOW, "cpu", 5)
    Path("small.tsv").write_text("".join("\t".join(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.fixture
def run(here, monkeypatch, capsys):
    """run(*arguments) -> what embed.py says on the screen; with code=2 the line that it ends with"""
    def run(*arguments, captions="small.tsv", code=0):
        command = ["embed.py", "--captions", captions, "--device", "cpu", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        exit_code = embed.main()
        screen = capsys.readouterr()
        assert exit_code == code and not re.search("0/0|: 0it", screen.err), screen.err
        if code:
            assert "Traceback" not in screen.err
            return screen.err.replace("\r", "\n").strip().splitlines()[-1]
        return screen.out
    return run


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def command(*arguments):
    return [sys.executable, ROOT / "embed.py", "--captions", "small.tsv", "--device", "cpu", "--window", "2",
            *map(str, arguments)]


# --- what is said

def test_without_a_terminal_a_bar_is_lines(capfd):
    with bar(total=3, desc="counting") as done:
        done.update(3)
        assert done.mininterval == 30
    said = capfd.readouterr().err
    assert re.search("^counting: 100%.* 3/3 ", said, re.M) and "\r" not in said


def test_a_missing_llm_is_named_with_the_cure(run, monkeypatch):
    message = run("--llm", "nowhere", "--out", "new", code=2)
    assert "nowhere" in message and "data/demo.py --make-only" in message and "$FLAME_LLM" in message
    monkeypatch.delenv("FLAME_LLM")
    assert embed.command_line().get_default("llm") == ROOT / "data/demo/llm"  # from any folder


# --- what is in a store

@pytest.mark.parametrize("positions", ["restart", "causal"])
def test_a_store_holds_what_encode_gives(run, byte_llm, positions):
    out = run("--dtype", "float32", *(["--mask", "causal"] if positions == "causal" else []))
    assert "5 of 5 windows of 5 rows to make; layer 1, float32 on 1 x cpu, " in out and "finished" in out
    store = flame.open_store(STORE)
    assert sorted(files_of(STORE)) == [*(f"{w:06d}.npy" for w in range(5)), "captions.tsv", "meta.json"]
    assert store.keys == [row[0] for row in ROWS[1:]] and store.images == [row[1] for row in ROWS[1:]]
    assert len(store) == 23
    about = store.meta
    assert (about["N"], about["D"], about["window"], about["columns"]) == (23, 32, 5, flame.COLUMNS)
    assert (about["llm"]["positions"], about["llm"]["path"]) == (positions, str(byte_llm))
    encoder = flame.TextEncoder(byte_llm, dtype=torch.float32, positions=positions)
    states = [encoder.encode([row[2 + n].strip() for row in ROWS[1:]], name)
              for n, name in enumerate(flame.PROMPTS)]
    expected = normalize(torch.cat(states, dim=1), dim=-1)
    torch.testing.assert_close(store.read(range(23), range(11)), expected, rtol=0, atol=2e-3)
    blocks = [np.load(STORE / f"{w:06d}.npy") for w in range(5)]
    assert [block.shape for block in blocks] == [(5, 11, 32)] * 4 + [(3, 11, 32)]
    assert all(block.dtype == np.float16 for block in blocks)
    assert run("--dtype", "float32", *(["--mask", "causal"] if positions == "causal" else [])).endswith(
        "23 x 11 embeddings of 32, finished\n")


def test_reading_is_as_the_slow_twin_reads(run):
    run()
    store = flame.open_store(STORE)
    vectors = np.concatenate([np.load(STORE / f"{w:06d}.npy") for w in range(5)]).astype(np.float32)
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


def test_what_is_unfinished_or_damaged_is_refused(run):
    with pytest.raises(flame.InputError, match="meta.json: no such file; make a store with embed.py"):
        flame.open_store(STORE)
    run()
    (STORE / "000003.npy").unlink()
    with pytest.raises(flame.InputError, match="000003.npy is missing; run the same embed.py command"):
        flame.open_store(STORE)
    (STORE / "000003.npy").write_bytes((STORE / "000002.npy").read_bytes()[:-9])
    with pytest.raises(flame.InputError, match="000003.npy: .*delete it and run"):
        flame.open_store(STORE).read([17], [0])
    meta = json.loads((STORE / "meta.json").read_text())
    meta["llm"]["questions"]["raw"]["facets"] = ["something else in one word:\""]
    for text, what in (("[]", "meta.json: "), ("{", "meta.json: "), ("{}", "no "),
                       (json.dumps(meta), "other questions")):
        (STORE / "meta.json").write_text(text)
        with pytest.raises(flame.InputError, match=what):
            flame.open_store(STORE)


# --- windows

def test_kills_at_any_moment_end_with_the_same_bytes(run):
    run("--out", "whole", "--window", 2)
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
    run("--out", "store", "--window", 2)
    assert files_of("store") == files_of("whole")  # nor is anything left over


def test_ranks_and_runs_at_once_equal_one(run):
    run("--out", "whole", "--window", 2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, *command("--out", "ranks")[1:]], check=True, capture_output=True)
    both = [subprocess.Popen(command("--out", "both"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert files_of("ranks") == files_of("both") == files_of("whole")


@pytest.mark.parametrize("flags, expected", [
    ([], [[0, 4, 8], [2, 6, 10]]), (["--shard", "0/4"], [[0, 8], [4]])])
def test_ranks_share_the_windows_that_are_missing(run, monkeypatch, flags, expected):
    """Be they all of one rank's: who has none to make would wait for the other."""
    run("--window", 2)
    for w in range(0, 11, 2):
        (STORE / f"{w:06d}.npy").unlink()
    made = []
    monkeypatch.setattr(embed.store, "write_window", lambda out, meta, w, block: made.append(w))
    monkeypatch.setattr(embed, "wait_for_all", lambda *written: None)
    monkeypatch.setattr(embed, "ranks", lambda: 2)
    for rank, windows in enumerate(expected):
        monkeypatch.setattr(embed, "rank", lambda: rank)
        run("--window", 2, *flags)
        assert made == windows
        made.clear()


def test_shards_in_one_folder_or_put_together_equal_one(run):
    run("--out", "whole")
    for shard in range(3):
        said = run("--shard", f"{shard}/3", "--out", "shared")
        assert ("finished" if shard == 2 else "windows missing") in said
        run("--shard", f"{shard}/3", "--out", f"part{shard}")
        shutil.copytree(f"part{shard}", "together", dirs_exist_ok=True)
    assert files_of("shared") == files_of("together") == files_of("whole")
    assert len(list(Path("part1").glob("*.npy"))) == 2
    for wrong in (["--shard", "3/3"], ["--shard", "x"], ["--shard", "1/3", "--overwrite"]):
        assert wrong[-1].split("/")[0] in run(*wrong, code=2)


# --- settings

@pytest.mark.parametrize("setting, arguments", [
    ("dtype bfloat16", ["--dtype", "float32"]), ("window 5", ["--window", 7]),
    ("llm: layer 1", ["--layer", 2]), ("llm: positions restart", ["--mask", "causal"]),
    ("captions: sha256", ["--join", "long=long.tsv"])])
def test_other_settings_are_refused_by_name(run, setting, arguments):
    Path("long.tsv").write_text("key\tlong\nk1\tother\n")
    run("--dtype", "bfloat16", "--out", "store")
    (Path("store") / "000002.npy").unlink()
    before = files_of("store")
    line = run("--dtype", "bfloat16", "--out", "store", *arguments, code=2)
    assert f"made with {setting}" in line and "--overwrite" in line and files_of("store") == before
    for out, more in (("store", ["--overwrite"]), ("new", [])):
        run("--dtype", "bfloat16", "--out", out, *arguments, *more)
    assert files_of("store") == files_of("new")


@pytest.mark.parametrize("module, moment", [(embed, "write_table"), (embed.store, "write_window")])
def test_a_run_ends_where_another_has_begun_another_store(run, monkeypatch, module, moment):
    """It would take the other's windows for its own, or the other its."""
    run("--out", "other", "--layer", 2)
    usual = getattr(module, moment)

    def late(*arguments):
        shutil.copy("other/meta.json", "store")
        usual(*arguments)
    monkeypatch.setattr(module, moment, late)
    assert "store/meta.json: made with llm: layer 2, now it is 1" in run("--out", "store", code=2)
    assert not list(Path("store").glob("*.npy"))


def test_captions_and_llm_may_move_but_not_change(run, byte_llm, monkeypatch):
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
def test_files_that_no_run_left_are_kept(run, name):
    Path("mine").mkdir()
    Path("mine", name).write_text("mine")
    for flags in ([], ["--overwrite"]):
        line = run("--out", "mine", *flags, code=2)
        assert f"{name}: no run of embed.py left this here; choose another --out" in line
        assert files_of("mine") == {name: b"mine"}
    Path("notes").mkdir()
    Path("notes/readme.txt").write_text("mine")
    run("--out", "notes")
    assert files_of("notes")["readme.txt"] == b"mine"


def test_what_the_stages_write_is_never_read_as_captions(run):
    """A store and a checkpoint inside the folder of captions."""
    Path("photos").mkdir()
    for n in range(7):
        Image.new("RGB", (8, 8)).save(f"photos/{n}.jpg")
        Path(f"photos/{n}.txt").write_text(f"thing {n}")
    run("--out", "photos/store", captions="photos")
    before = files_of("photos/store")
    os.remove("photos/store/000001.npy")
    Path("photos/out/x").mkdir(parents=True)
    Path("photos/out/x/skipped.txt").write_text("3\tUnidentifiedImageError")
    run("--out", "photos/store", captions="photos")
    assert files_of("photos/store") == before
    Path("photos/3.txt").write_text("another thing")
    assert "captions: sha256" in run("--out", "photos/store", captions="photos", code=2)


DAMAGE = {"NaN": lambda name, tensor: tensor * float("nan"), "zeros": lambda name, tensor: tensor * 0,
          "tiny": lambda name, tensor: tensor * 1e-30,
          "a norm of zeros": lambda name, tensor: tensor * ("input_layernorm" not in name)}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_weights_are_refused_before_anything_is_thrown_away(run, byte_llm, what):
    run("--out", "store")
    before = files_of("store")
    shutil.copytree(byte_llm, "llm")
    weights = load_file("llm/model.safetensors")
    save_file({name: DAMAGE[what](name, tensor) for name, tensor in weights.items()}, "llm/model.safetensors")
    for out, arguments in (("store", ["--overwrite"]), ("new", [])):
        assert "its states are" in run("--llm", "llm", "--out", out, *arguments, code=2)
    assert files_of("store") == before and not Path("new").exists()
    assert "none.tsv: no such file" in run("--out", "store", "--overwrite", captions="none.tsv", code=2)
    assert "layer 9" in run("--out", "store", "--overwrite", "--layer", 9, code=2)
    assert files_of("store") == before


def test_pictures_inside_of_parquet_become_tars_that_training_finds(run):
    """Of a file that Hugging Face's datasets wrote: a picture is a struct of bytes and a path."""
    import datasets
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (9, 9, 3), np.uint8) for _ in range(5)]
    columns = {"id": ["k0", "k1", "k2", "dot.ted", "k4"], "text": [f"Thing {n}." for n in range(5)],
               "image": [Image.fromarray(x) for x in pixels[:4]] + [None]}
    kinds = {"id": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    datasets.Dataset.from_dict(columns, datasets.Features(kinds)).to_parquet("hub.parquet")
    run(captions="hub.parquet")
    store = flame.open_store("data/embeddings/hub")
    Path("out").mkdir()
    found = train.pictures_of(store, None, Path("out"))
    assert len(store) == 5 and found[0].tolist() == [0, 1, 2]
    for n, place in enumerate(places_of(*found[1:])):
        assert np.array_equal(open_picture(place), pixels[n])
    written = Path(found[1][0]).stat().st_mtime_ns
    run(captions="hub.parquet")
    assert Path(found[1][0]).stat().st_mtime_ns == written  # it is done
    run("--overwrite", captions="hub.parquet")
    assert Path(found[1][0]).stat().st_mtime_ns > written
    duckdb.sql("SELECT id, text, [image] AS images FROM 'hub.parquet'").write_parquet("lists.parquet")
    run(captions="lists.parquet")  # captions, and lists of pictures: none is a row's
    assert not Path("data/embeddings/lists/pictures").exists()
    skipped = {}
    write_tar(duckdb.read_parquet("hub.parquet").project("id, image.bytes"), skipped, "x.tar")
    assert [*skipped.values()] == [(2, ["dot.ted", "k4"])]
