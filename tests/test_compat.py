"""The released FLAME, its text path and its file; our checkpoints under open_clip and clip_benchmark."""
import functools
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import embed
import evaluate
import flame
from data import peer, released as released_path
from test_decoders import tekken  # noqa: F401 (a fixture: Nemo's tokenizer.json)
from test_flame import CONFIG, centered_cosine, centered_error, path, their_tokenizer  # noqa: F401

CAPTIONS = [
    "A red kite flies above a calm sea at sunset, with a small boat to its left.", "A cat", "Is it a dog?",
    ' say "hi", he said', "trailing space ", "", '"Quoted"', "一只红色的风筝在海上飞。", "one\ntwo , three",
    "a\u0301 🦊\tand  two  spaces", "it's a fox, \"a red one\"", "<s> a caption with </s> special tokens",
    "Une très longue promenade " * 400]  # the last is cut at 1,024 tokens


# --- the text path, written anew from the released method's description, by transformers

RELEASED = {
    "raw":
        'Image description : "CAPTION" . After thinking step by step , '
        'this image description means in just one word:"',
    "short":
        'Image description : "CAPTION" . After thinking step by step , <s> '
        'this image description means in just one word:" '
        'the category of the main object in this image means in just one word:" '
        'the prominent characteristic or pattern of the main object in this image means in just one word:"',
    "long":
        'Detailed Image description : "CAPTION" . After thinking step by step , <s> '
        'this image description means in just one word:" '
        'the category of the main object in this image means in just one word:" '
        'the prominent characteristic or pattern of the main object in this image means in just one word:" '
        'the category of the minor object in this image means in just one word:" '
        'the prominent characteristic or pattern of the minor object in this image means in just one word:" '
        'the primary action or event taking place in this image means in just one word:" '
        'the overall atmosphere or emotion of this image means in just one word:"'}


def released_ids(tokenizer, caption, prompts):
    read = tokenizer(caption, max_length=1024, truncation=True).input_ids
    text = tokenizer.decode(read, skip_special_tokens=True)
    if len(text) > 0 and text[-1] not in '.?"\'':
        text = text + "."
    text = text.replace('"', "'")
    if len(text) > 0 and text[-1] == "?":
        text = text[:-1] + "."
    return tokenizer(RELEASED[prompts].replace("CAPTION", text), max_length=1536, truncation=True).input_ids


@functools.lru_cache
def released(llm_dir, prompts, captions):
    """float32 [N, K, D] of block all-but-the-last: all questions in one row, facets told by last tokens.

    The mask is drawn as a square, one caption at a time.
    """
    from transformers import AutoModelForCausalLM
    tokenizer = their_tokenizer(llm_dir)
    how = dict(dtype=torch.float32, attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(llm_dir, **how).eval()
    question = 'After thinking step by step , this image description means in just one word:"'
    comma = tokenizer(question).input_ids[-10]
    K, out = len(flame.PROMPTS[prompts].facets), []
    for caption in captions:
        ids = torch.tensor(released_ids(tokenizer, caption, prompts))
        ends = (ids == ids[-1]).nonzero().flatten()[-K:].tolist()
        starts = [(ids == comma).nonzero()[-1].item()] + ends[:-1]
        mask = torch.ones(len(ids), len(ids)).tril()
        for start, end in zip(starts[1:], ends[1:]):
            mask[start + 1:end + 1, starts[0] + 1:start + 1] = 0  # blind to the facets before it
        blind = torch.where(mask > 0, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            states = model(ids[None], attention_mask=blind, output_hidden_states=True).hidden_states
        out.append(states[model.config.num_hidden_layers - 1][0, ends])
    return torch.stack(out)


@pytest.fixture(scope="module")
def nemo(make_random_llm, tekken):  # noqa: F811
    """A small random Mistral with Nemo's tokenizer."""
    folder = make_random_llm(
        family="Mistral", head_dim=20, sliding_window=None, vocab_size=131072, hidden_size=32)
    (folder / "tokenizer.json").write_bytes((tekken / "tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize("prompts", ["raw", "short", "long"])
@pytest.mark.parametrize("model", ["llm", "nemo"])
def test_text_path_equals_the_released_one(request, path, model, prompts):  # noqa: F811
    """positions="sequential" gives the released states; what we do by default does not."""
    folder = request.getfixturevalue(model)
    captions = tuple(CAPTIONS if model == "nemo" else CAPTIONS[:-1])  # long ones take long
    theirs = released(folder, prompts, captions)
    encoder = released_path.text_encoder(folder, dtype=torch.float32, positions="sequential")
    ours = encoder.encode(captions, prompts)
    assert centered_cosine(ours, theirs).min() >= 0.9999 and centered_error(ours, theirs) <= 1e-3
    if prompts != "raw":
        plain = flame.TextEncoder(folder, dtype=torch.float32).encode(captions, prompts)
        assert centered_cosine(plain, theirs).mean() < 0.99


@pytest.mark.parametrize("model", ["llm", "nemo"])
def test_tokens_of_the_released_path(request, model):
    """The very ids of the released strings; in "short" and "long" a space and <s> lead the first question."""
    folder = request.getfixturevalue(model)
    ours, reference = flame.load_tokenizer(folder), their_tokenizer(folder)
    for prompts in flame.PROMPTS:
        tokens = released_path.tokenize(ours, CAPTIONS, prompts)
        for caption, prefix, facets in zip(CAPTIONS, *tokens, strict=True):
            assert prefix + sum(facets, []) == released_ids(reference, caption, prompts)
            assert reference.decode(facets[-1]).endswith('word:"')
            assert reference.decode(prefix).endswith(" ,")
            if model == "nemo" and prompts != "raw":
                assert facets[0][:2] == [1032, 1] and 1 not in sum(facets[1:], []) and prefix[0] == 1


def test_released_path_never_cuts_a_question(llm):
    """A caption that grows in the round trip, as " become ', gives way to the questions at 1,536 tokens."""
    encoder = released_path.text_encoder(llm, dtype=torch.float32, positions="sequential")
    caption = ' ","' * 1500  # a token each; with single quotes two
    prefixes, facets = released_path.tokenize(encoder.tokenizer, [caption], "long")
    assert len(prefixes[0]) + sum(map(len, facets[0])) > 1536
    (_, forest), = encoder.pack([caption], "long")
    assert encoder.truncated == 1 and 1500 < forest.positions.max() < 1536
    assert forest.tokens[forest.answers].tolist() == [f[-1] for f in facets[0]]


def embed_here(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, args), "--device", "cpu"])
    embed.main()


def write_tar(file, texts):
    """{name: text} -> the members of a tar."""
    with tarfile.open(file, "w") as tar:
        for name, text in texts.items():
            data = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("source", ["jsonl", "join", "tar"])
def test_compat_store_in_float16_equals_the_released_vectors(nemo, tmp_path, monkeypatch, source):
    """embed.py --compat --dtype float16: captions with line breaks and spaces, unit vectors in float16."""
    captions = [caption for caption in CAPTIONS[:-1] if caption.strip()] + ["  A fox\n\nand\r\n a  lamp \n"]
    rows = [{"key": f"{n:03}", "raw": text, "short": text, "long": text} for n, text in enumerate(captions)]
    file, joins, sets = tmp_path / "some.jsonl", [], ["raw", "short", "long"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if source == "tar":
        file, sets = tmp_path / "some.tar", ["raw"]
        write_tar(file, {row["key"] + ".txt": row["raw"] for row in rows})
    if source == "join":
        joins, sets = ["--join", f"long={file}", f"short={file}"], ["short", "long"]
        file = tmp_path / "raw.jsonl"
        file.write_text("".join(json.dumps({"key": row["key"], "raw": "another"}) + "\n" for row in rows))
    embed_here(monkeypatch, "--captions", file, *joins, "--llm", nemo, "--out", tmp_path / "store",
               "--prompts", ",".join(sets), "--compat", "--dtype", "float16")
    store = flame.open_store(tmp_path / "store")
    assert (store.meta["dtype"], store.meta["llm"]["positions"]) == ("float16", "sequential")
    ours = store.read(range(len(captions)), store.columns)
    states = torch.cat([released(nemo, name, tuple(captions)) for name in sets], dim=1)
    theirs = torch.nn.functional.normalize(states, dim=-1)
    assert centered_cosine(ours, theirs).min() >= 0.9999 and centered_error(ours, theirs) <= 1e-2


def test_float16_keeps_the_centered_states(llm):
    """A real LLM's largest values fit into float16. On CPU it is slow: few captions, few blocks."""
    captions = ["A tiny fox\nin the snow.", "A huge lamp."]
    exact, rounded = (
        released_path.text_encoder(llm, dtype=dtype, layer=4, positions="sequential").encode(captions, "raw")
        for dtype in (torch.float32, torch.float16))
    assert torch.isfinite(rounded).all()
    assert centered_cosine(rounded, exact).min() >= 0.9995


# --- the released checkpoint

@pytest.fixture
def their_model():
    """open_clip's VisionTransformer and the released projector on random weights; 128 / 64 = 2 heads."""
    from open_clip.transformer import VisionTransformer
    torch.manual_seed(0)
    visual = VisionTransformer(
        image_size=32, patch_size=8, width=128, layers=3, heads=2, mlp_ratio=4, output_dim=16,
        pool_type="avg", output_tokens=True).eval()
    mm = torch.nn.Sequential(
        torch.nn.Linear(128, 40), torch.nn.GELU(), torch.nn.Linear(40, 48), torch.nn.LayerNorm(48))
    for p in [*visual.parameters(), *mm.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    return visual, mm


def their_file(their_model, path, prefix="module.", **more):  # noqa: F811
    """Saves them as the released training code does: keys with a prefix, LLM and optimizer included.

    more: tensors to add or replace; None leaves one out.
    """
    visual, mm = their_model
    weights = {f"visual.{n}": t for n, t in visual.state_dict().items()}
    weights |= {f"mm.{n}": t for n, t in mm.state_dict().items()}
    weights |= {"logit_scale": torch.tensor(3.0), "logit_bias": torch.tensor(-9.0)}
    weights["text.model.layers.0.mlp.weight"] = torch.randn(8, 8).half()
    weights["text.lm_head.weight"] = torch.randn(8, 8).half()
    weights = {prefix + n: t for n, t in weights.items()} | more
    group = {"lr": np.float64(5e-4), "eps": np.float32(1e-8), "n": np.int64(3)}  # numpy scalars
    group |= {"betas": (0.9, 0.95), "params": [0]}
    state = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}
    torch.save({
        "epoch": 32, "name": "flame", "scaler": {"scale": 65536.0},
        "state_dict": {n: t for n, t in weights.items() if t is not None},
        "optimizer": {"state": state, "param_groups": [group]}}, path)
    return path


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_released_checkpoint_equals_open_clip_and_projector(their_model, tmp_path, prefix):
    visual, mm = their_model
    model = released_path.load(their_file(their_model, tmp_path / "epoch_32.pt", prefix))
    visual.ln_post = torch.nn.Identity()  # there, but never used
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        _, tokens = visual(pixels)
        expected = torch.nn.functional.normalize(mm(tokens).mean(1), dim=-1)
        ours = model.encode_image(pixels)
    assert centered_error(ours, expected) <= 1e-4 and not model.training
    assert model.config["llm"]["positions"] == "sequential"
    assert model.config["llm"]["layer"] is None  # all blocks but the last: 39 of Nemo's 40
    known = {"pool": "released", "image_size": 32, "patch_size": 8, "layers": 3, "heads": 2, "text_dim": 48}
    assert model.config | known == model.config
    assert (model.logit_scale.item(), model.logit_bias.item()) == (3.0, -9.0)
    assert model.config["columns"] == flame.COLUMNS  # their file does not say, so all that the prompts ask
    facets = torch.randn(2, 7, 48)
    unit = torch.nn.functional.normalize(facets, dim=-1)
    torch.testing.assert_close(model.encode_text(facets, "long"), unit)


def test_numpy_scalars_of_either_spelling_are_read(their_model, tmp_path):
    """numpy 1 wrote numpy.core.multiarray.scalar, numpy 2 writes numpy._core.multiarray.scalar."""
    import zipfile
    file = their_file(their_model, tmp_path / "new.pt")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "old.pt", "w", zipfile.ZIP_STORED) as new:
        data = {name: old.read(name) for name in old.namelist()}
        name, = (name for name in data if name.endswith("data.pkl"))
        either = {b"numpy._core.multiarray", b"numpy.core.multiarray"}
        (now,) = (spelling for spelling in either if spelling in data[name])
        data[name] = data[name].replace(now, *(either - {now}))
        for name, content in data.items():
            new.writestr(name, content)
    a, b = released_path.load(file).state_dict(), released_path.load(tmp_path / "old.pt").state_dict()
    assert a.keys() == b.keys() and all(a[n].equal(b[n]) for n in a)


class Executed:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("more, word", [
    ({"module.visual.new": torch.zeros(1)}, "visual.new"),
    ({"module.visual.projector": torch.zeros(1)}, "visual.projector"),
    ({"module.mm.5.weight": torch.zeros(1)}, "mm.5.weight"),
    ({"module.mm.2.weight": torch.zeros(48, 41)}, "mm.2.weight"),
    ({"module.visual.ln_pre.weight": None}, "visual.ln_pre.weight"),
    ({"x": Executed()}, "print")])
def test_checkpoint_that_does_not_match_is_refused_by_name(their_model, tmp_path, capsys, more, word):
    """One line that names the tensor; nothing in the file is executed."""
    file = their_file(their_model, tmp_path / "epoch_32.pt", **more)
    with pytest.raises(flame.InputError, match=re.escape(word)) as error:
        released_path.load(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "cat.txt").write_text("A cat.")
    torch.save([1], tmp_path / "list.pt")
    for name in ("cat.txt", "list.pt"):
        with pytest.raises(flame.InputError, match=f"{name}: not a FLAME checkpoint"):
            released_path.load(tmp_path / name)


def test_the_llms_tensors_are_not_read(their_model, tmp_path):
    """Their pages stay on disk: the file says 400 MB of LLM, loading takes less than 50."""
    llm = {f"module.text.model.{n}": torch.zeros(50 << 19, dtype=torch.float16) for n in range(8)}
    file = their_file(their_model, tmp_path / "big.pt", **llm)
    script = f"""if True:
        import re
        from data import released as released_path
        def peak():  # ru_maxrss would begin at the parent's
            return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
        before = peak()
        released_path.load({str(file)!r})
        print(peak() - before)"""
    here = Path(flame.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0, done.stderr
    assert file.stat().st_size > 400e6 and int(done.stdout) < 50e6


def test_evaluate_scores_the_released_checkpoint(their_model, tiny_llm, tmp_path, monkeypatch):
    """evaluate.py --checkpoint FILE: the released text path and pooling without being asked."""
    file, root = their_file(their_model, tmp_path / "epoch_32.pt"), tmp_path / "urban1k"
    rng = np.random.default_rng(0)
    captions = [f'A fox with {n} hats, {n * n} "lamps"' for n in range(40)]
    for folder in ("image", "caption"):
        (root / folder).mkdir(parents=True)
    for n, caption in enumerate(captions):
        picture = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        picture.resize((40, 32)).save(root / f"image/{n:02}.png")
        (root / f"caption/{n:02}.txt").write_text(caption)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    where = ["--data-root", "urban1k", "--checkpoint", str(file), "--llm", str(tiny_llm), "--device", "cpu"]
    assert evaluate.main(["--bench", "urban1k", *where]) == 0
    result, model = json.loads((tmp_path / "results/urban1k.json").read_text()), released_path.load(file)
    pictures = [model.preprocess(picture) for picture in sorted((root / "image").iterdir())]
    image = torch.cat([model.encode_image(pixels[None]) for pixels in pictures])
    encoder = released_path.text_encoder(tiny_llm, dtype=torch.float32, positions="sequential")
    text = torch.nn.functional.normalize(encoder.encode(captions, "long").mean(1), dim=-1)
    expected = evaluate.retrieval(text.numpy(), image.numpy(), np.arange(40))
    assert result["pool"] == "released"
    assert all(result[direction] == expected[direction] for direction in expected)


# --- FLAME checkpoints elsewhere

@pytest.fixture
def ours(tiny_llm, tmp_path):
    """A checkpoint with a text projection, its LLM, and pictures with two captions each."""
    from safetensors.torch import save_file
    torch.manual_seed(0)
    config = CONFIG | {"text_dim": 48, "text_rank": 4}
    model = flame.Flame(config)
    for name in ("mean", "basis", "gain"):
        torch.nn.init.normal_(getattr(model.text, name), std=0.1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    source = {"layer": 3, "positions": "restart"}
    (tmp_path / "config.json").write_text(json.dumps({"model": config, "llm": source}))
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(24)]
    captions = [[f"A {n}-legged fox in a lake.", f"A {n}-legged fox in a big old house."] for n in range(24)]
    return tmp_path, tiny_llm, pictures, captions


def batches(images, texts):
    return [(images[i:i + 8], texts[i:i + 8]) for i in range(0, len(images), 8)]


def test_clip_benchmark_gives_our_recall_and_accuracy(ours):
    """The README's example, but for float32, against evaluate.py's metrics."""
    checkpoint, llm, pictures, captions = ours
    names, labels = [f"fox {n % 6}" for n in range(6)], torch.arange(24) % 6
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
    model, encoder = flame.load(checkpoint), flame.TextEncoder(llm, dtype=torch.float32)

    class Clip:
        """What clip_benchmark calls. K facets become one unit vector of K * D, whose cosine is our mean."""
        def __init__(self, prompts):
            self.prompts, self.K = prompts, len(flame.PROMPTS[prompts].facets)
        def tokenizer(self, texts):
            return encoder.encode(texts, self.prompts)
        def encode_text(self, facets):
            return model.encode_text(facets, self.prompts).flatten(1)
        def encode_image(self, pixels):
            return model.encode_image(pixels).repeat(1, self.K)

    images = torch.stack([model.preprocess(picture) for picture in pictures])
    clip = Clip("long")
    found = zeroshot_retrieval.evaluate(
        clip, batches(images, captions), clip.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    clip, templates = Clip("raw"), ["A photo of a {c}.", "A {c}."]
    zero_shot = zeroshot_classification
    classes = zero_shot.zero_shot_classifier(clip, clip.tokenizer, names, templates, "cpu", amp=False)
    logits, _ = zero_shot.run_classification(clip, classes, batches(images, labels), "cpu", amp=False)
    accuracy = zero_shot.accuracy(logits, labels, topk=(1, 5))

    image = model.encode_image(images).numpy()
    text = model.encode_text(encoder.encode(sum(captions, []))).mean(1).numpy()
    filled = [[f"A photo of a {name}.", f"A {name}."] for name in names]
    states = [model.encode_text(encoder.encode(texts, "raw"), "raw") for texts in filled]
    classes = torch.nn.functional.normalize(torch.stack([unit.mean((0, 1)) for unit in states]), dim=-1)
    recall = evaluate.retrieval(text, image, np.arange(48) // 2)
    for k in (1, 5, 10):
        assert recall["text_to_image"][f"R@{k}"] == pytest.approx(100 * found[f"image_retrieval_recall@{k}"])
        assert recall["image_to_text"][f"R@{k}"] == pytest.approx(100 * found[f"text_retrieval_recall@{k}"])
    top = evaluate.classification(image, classes.numpy(), labels.numpy())
    assert [top["top1"], top["top5"]] == pytest.approx([100 * a for a in accuracy])
    assert 0 < top["top1"] < top["top5"]


def test_open_clip_reads_our_image_tower(ours):
    """Under the prefix "visual." lie all of its weights but ln_post and proj, which FLAME never uses."""
    from open_clip.transformer import VisionTransformer
    from safetensors.torch import load_file
    theirs = VisionTransformer(
        image_size=32, patch_size=8, width=48, layers=3, heads=4, mlp_ratio=4, output_dim=16,
        output_tokens=True).eval()
    saved = load_file(ours[0] / "model.safetensors")
    visual = {n.removeprefix("visual."): t for n, t in saved.items() if n.startswith("visual.")}
    keys = theirs.load_state_dict(visual, strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) == {"proj", "ln_post.weight", "ln_post.bias"}
    theirs.ln_post = torch.nn.Identity()
    model, pixels = flame.load(ours[0]), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.mm(theirs(pixels)[1]).mean(1), dim=-1)
        assert centered_error(model.encode_image(pixels), expected) <= 1e-4


@pytest.fixture
def small_clip(tmp_path):
    """A random open_clip model of a size of its own, its weights in a file -> "MODEL:FILE"."""
    import open_clip
    config = {"embed_dim": 64, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}
    (tmp_path / "tests-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tests-small.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tests-small").state_dict(), tmp_path / "small.pt")
    return f"tests-small:{tmp_path / 'small.pt'}"


def test_one_file_of_weights_run_by_two_architectures_shares_no_cache(small_clip, tmp_path):
    """As ViT-B-32 and ViT-B-32-quickgelu, whose activations have no weights."""
    import open_clip
    config = json.loads((tmp_path / "tests-small.json").read_text()) | {"quick_gelu": True}
    (tmp_path / "tests-small-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tests-small-quickgelu.json")
    name, _, weights = small_clip.partition(":")
    one, other = peer.OpenClip(small_clip), peer.OpenClip(f"{name}-quickgelu:{weights}")
    assert one.digest() == peer.OpenClip(small_clip).digest() != other.digest()


def test_an_open_clip_model_gets_clip_benchmarks_figures(small_clip, tmp_path, monkeypatch):
    """--open-clip: the same model, pictures and texts, by their code and by ours."""
    import open_clip
    from clip_benchmark.metrics import zeroshot_retrieval
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flame, "default_dtype", lambda device: torch.float32)
    rng = np.random.default_rng(0)
    rows = []
    for n in range(24):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 50)).save(tmp_path / f"{n}.png")
        rows += [f"{n}.png\tA {n}-legged fox in a lake.", f"{n}.png\tA house of {n} {'big ' * (n % 5)}rooms."]
    (tmp_path / "mine.tsv").write_text("\n".join(["image\tlong", *rows]) + "\n")
    command = ["--captions", "mine.tsv", "--open-clip", small_clip, "--device", "cpu"]
    assert evaluate.main(command) == 0
    result = json.loads((tmp_path / "results" / "mine-tests-small-small.json").read_text())

    name, _, weights = small_clip.partition(":")
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    images = torch.stack([preprocess(Image.open(tmp_path / f"{n}.png")) for n in range(24)])
    captions = [[row.split("\t")[1] for row in rows[2 * n:2 * n + 2]] for n in range(24)]
    tokenizer = open_clip.get_tokenizer(name)
    theirs = zeroshot_retrieval.evaluate(
        model.eval(), batches(images, captions), tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        for ours, their in (("text_to_image", "image"), ("image_to_text", "text")):
            assert abs(result[ours][f"R@{k}"] - 100 * theirs[f"{their}_retrieval_recall@{k}"]) <= 1e-4
    assert 0 < result["text_to_image"]["R@10"] < 100


def test_what_open_clip_does_not_know_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    (tmp_path / "mine.tsv").write_text("image\tlong\na.png\ta\nb.png\tb\n")
    for flags in (["--open-clip", "ViT-Nothing"], ["--open-clip", "ViT-B-32:no/such/file.pt"],
                  ["--open-clip", "ViT-B-32", "--facets"]):
        assert evaluate.main(["--captions", "mine.tsv", "--device", "cpu", *flags]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and "--open-clip" in told[0]
