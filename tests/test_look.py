"""Tests of data/show: search, the search page, words of patches, contact sheets, --inspect and --draw."""
import json
import re
import shutil
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import gradio
import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradio_client import Client, handle_file
from PIL import Image
from safetensors.torch import load_file, save_file

import embed
import flame
from data import common
from data.images import ImageLocation, open_image, images_in
from data.show import look, page, search, sheet, words
from data.compat import OpenClip
from data.encoders import Encoders, encode_facets, encode_images, encode_texts
from flame import FACET_COLUMNS, InputError

LONG = "a red kite flies over the beach while two dogs run after it and a child laughs at them all"


def tiny_model(side=4, columns=FACET_COLUMNS):
    """Return a Flame with random weights and side x side patches."""
    torch.manual_seed(0)
    model = flame.Flame({"image_size": 8 * side, "patch_size": 8, "width": 16, "layers": 1, "heads": 2,
                         "text_dim": 48, "projector_hidden": 24, "pool_first": True, "text_rank": 5,
                         "columns": columns})
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 3
    return model.eval()


@pytest.fixture(scope="module")
def gallery(tiny_llm, tmp_path_factory):
    """Return (args, locations of 12 images, encoders with random weights). One file name contains HTML."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n in range(12):
        name = f"{n}.png" if n else "<img src=x onerror=alert(1)> {0}.png"
        Image.fromarray(rng.integers(0, 256, (2, 3, 3), np.uint8)).resize((60, 40)).save(folder / name)
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    args = SimpleNamespace(search=[], vectors=None, top=3, prompts=None, images=folder, out=folder.parent)
    model = tiny_model(columns=["raw.0", "long.0", "long.3", "long.5"])
    encoders = Encoders(model, lambda: encoder, "cpu", args.out / "cache", "image tower", "text tower")
    return args, [ImageLocation(str(path)) for path in sorted(folder.iterdir())], encoders


def ranking(gallery, vector):
    """Return [(index, similarity)], all images sorted by similarity."""
    image, _ = encode_images(gallery[2], gallery[1])
    order = sorted(enumerate((image @ vector).tolist()), key=lambda pair: -pair[1])
    return [(i, pytest.approx(score, abs=1e-3)) for i, score in order]


def test_vectors_are_image_embeddings_with_paths_beside_them(gallery, tmp_path):
    args, locations, encoders = gallery
    folder = shutil.copytree(Path(locations[0].path).parent, tmp_path / "copy")
    (folder / Path(locations[11].path).name).rename(folder / "last\none.png")
    locations = images_in(folder)
    image, kept = encode_images(encoders, locations)
    paths = [locations[i].path.replace("\n", " ") for i in kept]
    for name in ("out.npy", "out.1"):
        search.search(SimpleNamespace(**vars(args) | {"vectors": tmp_path / name}), locations, encoders)
        written = tmp_path / f"{name.removesuffix('.npy')}.npy"
        assert np.array_equal(np.load(written), image) and len(image) == 12
        assert written.with_suffix(".txt").read_text().splitlines() == paths


def test_image_is_encoded_again_after_temporary_disk_error(gallery, tmp_path, monkeypatch):
    _, locations, encoders = gallery
    expected, _ = encode_images(encoders, locations)
    encoders = encoders._replace(cache=tmp_path)

    def failing(location):
        if location == locations[3]:
            raise OSError(5, "Input/output error")
        return open_image(location)

    with monkeypatch.context() as patch:
        patch.setattr("data.encoders.open_image", failing)
        assert encode_images(encoders, locations)[1] == [0, 1, 2, *range(4, 12)]
    image, kept = encode_images(encoders, locations)
    assert kept == [*range(12)] and np.allclose(image, expected, atol=1e-6)


def test_search_prints_ranking_and_draws_sheet(gallery, capsys):
    args, locations, encoders = gallery
    args.search = ["a red kite", LONG, locations[4].path]
    search.search(args, locations, encoders)
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    vectors = *encode_texts(encoders, ["a red kite"], "raw"), *encode_texts(encoders, [LONG], "long")
    image, _ = encode_images(encoders, [locations[4]])
    expected = [pair for vector in (*vectors, *image) for pair in ranking(gallery, vector)[:3]]
    assert [(path, float(score)) for _, score, path in lines] == [(locations[i].path, s) for i, s in expected]
    assert lines[6][2] == locations[4].path and Image.open(args.out / "search.png").height > 3 * sheet.SIDE


@pytest.fixture(scope="module")
def client(gallery):
    """Serve the page in this process; return gradio's client of it."""
    args, locations, encoders = gallery
    image, _ = encode_images(encoders, locations)
    blocks = page.serve(args, locations, image, encoders, unreadable=3)
    assert "12 images of" in str(blocks.config) and "3 unreadable" in str(blocks.config)
    yield Client(blocks.local_url, verbose=False, analytics_enabled=False)
    blocks.close()


def tiles(html):
    """Return [(index, similarity)] of the page's gallery, or False if it has no scores."""
    pairs = re.findall(r'data-image="(\d+)".*?<b>(.*?)</b>', html)
    return "tiles plain" not in html and [(int(i), float(score)) for i, score in pairs]


def test_page_shows_ranking_and_writes_no_files(gallery, client, capfd):
    args, locations, encoders = gallery
    cache = sorted((args.out / "cache").iterdir())
    html, switches, _ = client.predict("ein Drachen", api_name="/text")
    found, _, _ = client.predict(handle_file(locations[7].path), api_name="/image")
    assert sorted((args.out / "cache").iterdir()) == cache and "texts" not in capfd.readouterr().err
    assert tiles(html) == ranking(gallery, encode_texts(encoders, ["ein Drachen"], "raw")[0])
    assert not switches["visible"]  # the raw prompt set has only one facet
    assert tiles(found) == ranking(gallery, encode_images(encoders, [locations[7]])[0][0])
    assert not tiles(client.predict("  ", api_name="/text")[0])


def test_page_searches_with_chosen_facets(gallery, client):
    """There is a checkbox for each facet that the checkpoint was trained on."""
    names = [page.facet_label(flame.PROMPTS["long"].facets[k]) for k in (0, 3, 5)]
    facets = encode_facets(gallery[2], [LONG], "long")[0]
    html, switches, _ = client.predict(LONG, api_name="/text")
    assert [name for name, _ in switches["choices"]] == switches["value"] == names and switches["visible"]
    assert [i for i, _ in tiles(html)] == [i for i, _ in ranking(gallery, facets.mean(0))]
    for k, name in enumerate(names):
        html, switches, _ = client.predict(LONG, [name], api_name="/facets")
        assert switches["value"] == [name] and tiles(html) == ranking(gallery, facets[k])
    # a checkbox of another prompt set, which the page still shows after the text was edited
    html, _, _ = client.predict("red", [names[1]], api_name="/facets")
    assert tiles(html) == ranking(gallery, encode_texts(gallery[2], ["red"], "raw")[0])


def test_page_labels_an_added_facet_prompt(gallery, monkeypatch):
    args, locations, encoders = gallery
    eight = flame.PROMPTS["long"]._replace(facets=(*flame.FACETS, "the season:"))
    monkeypatch.setitem(flame.PROMPTS, "long", eight)
    monkeypatch.setattr(flame, "FACET_COLUMNS", [*FACET_COLUMNS, "long.7"])
    encoders = encoders._replace(model=tiny_model(columns=flame.FACET_COLUMNS), cache=None)
    by_text, *_ = page.callbacks(gradio, args, locations, encode_images(encoders, locations)[0], encoders)
    labels = [label for label, _ in by_text(LONG)[1].choices]
    assert len(set(labels)) == 8 and labels[-1] == "the season:"


def test_page_shows_more_images_and_their_names(gallery, monkeypatch):
    args, locations, encoders = gallery
    monkeypatch.setattr(page, "TILES", 5)
    monkeypatch.setattr(page, "MORE", 4)
    args = SimpleNamespace(**vars(args) | {"top": 1})
    by_text, *_ = page.callbacks(gradio, args, locations, encode_images(encoders, locations)[0], encoders)
    html, more = by_text("red")[0].split("<details>")
    assert "5 of 12 images shown; show 4 more" in more and len(tiles(html)) == 5 and len(tiles(more)) == 4
    assert re.findall('alt="(.*?)"', unescape(html)) == [Path(locations[i].path).name for i, _ in tiles(html)]


def test_page_of_open_clip_model_has_no_facets_or_words(gallery, small_clip):
    args, locations, _ = gallery
    model = OpenClip(small_clip).eval()
    encoders = Encoders(model, lambda: model, "cpu", None, "clip", "clip")
    image, _ = encode_images(encoders, locations)
    blocks = page.serve(args, locations, image, encoders)
    client = Client(blocks.local_url, verbose=False, analytics_enabled=False)
    html, switches, _ = client.predict(LONG, api_name="/text")
    assert tiles(html) == ranking((args, locations, encoders), encode_texts(encoders, [LONG], "raw")[0])
    assert tiles(client.predict(handle_file(locations[7].path), api_name="/image")[0])[0][0] == 7
    names = [each["api_name"] for each in client.config["dependencies"]]
    assert not switches["visible"] and "facets" in names and "words" not in names
    blocks.close()


def click(client, i):
    """Click on image i of the gallery by gradio's protocol, which its client does not support."""
    number = next(each["id"] for each in client.config["dependencies"] if each["api_name"] == "words")
    event = {"data": [], "fn_index": number, "session_hash": "test", "event_data": {"image": i}}
    httpx.post(f"{client.src}gradio_api/queue/join", json=event).raise_for_status()
    with httpx.stream("GET", f"{client.src}gradio_api/queue/data?session_hash=test", timeout=60) as response:
        for line in response.iter_lines():
            message = json.loads(line.removeprefix("data: ") or "{}")
            if message.get("msg") == "process_completed":
                return message["output"]


def test_click_shows_words_of_patches(gallery, client, tiny_llm):
    html, = click(client, 5)["data"]
    with open_image(gallery[1][5]) as image:
        grid, strengths = words.words_of(gallery[2].model, tiny_llm, image)
    spans = re.findall(r"<span.*?opacity: (.*?)\">(.*?)</span>", html)
    assert spans == [(f"{share:.2f}", word) for share, word in zip(strengths.flat, grid.flat)]
    assert len(set(strengths.flat)) > 1 and "fainter means a lower cosine" in html


def test_page_reports_corrupt_image_and_keeps_working(gallery, client, tmp_path):
    _, locations, _ = gallery
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(Exception, match="bad.png"):
        client.predict(handle_file(str(tmp_path / "bad.png")), api_name="/image")
    content = Path(locations[3].path).read_bytes()
    for changed, refused in ((content[:60], True), (content, False)):
        Path(locations[3].path).write_bytes(changed)
        assert ("error" in click(client, 3)) == refused
    assert len(tiles(client.predict("red", api_name="/text")[0])) == len(locations)


def test_page_is_local_and_escapes_file_names(client):
    assert client.src.startswith("http://127.0.0.1:")
    assert httpx.get(client.src, headers={"Host": "evil.com:7860"}).status_code == 400
    style = httpx.get(f"{client.src}theme.css").text
    assert "system-ui" in style
    hosts = re.findall(r"""(?:src=|<link[^>]*href=|@import\s+|url\()["']?(https?://[^/"')]+)""",
                       style + httpx.get(client.src).text)
    assert all(client.src.startswith(host) for host in hosts), hosts
    html, _, _ = client.predict("red", api_name="/text")
    assert "&lt;img src=x" in html and "<img src=x" not in html


@pytest.mark.parametrize("side", [4, 5])
def test_patch_states_are_in_space_before_text_projection(side):
    """The product of a patch state and any u equals that of the pooled patches and A u."""
    model = tiny_model(side)
    text, c = model.text_projection, FACET_COLUMNS.index("long.0")
    text.basis[c] = torch.linalg.qr(torch.randn(48, 5))[0]
    text.gain[c], text.rest[c] = torch.rand(5) * 9, 0.5
    A = 0.5 * torch.eye(48) + text.basis[c] @ text.gain[c].diag() @ text.basis[c].T
    pixels, u = torch.randn(3, 8 * side, 8 * side), torch.randn(48, 9)
    step = 2 - side % 2
    with torch.inference_mode():
        tokens = model.visual(pixels[None])[0, 1:].reshape(side, side, -1)
        for y, x in np.ndindex(side // step, side // step):
            cell = tokens[y * step:(y + 1) * step, x * step:(x + 1) * step]
            z = model.mm(cell.flatten(0, 1).mean(0))
            torch.testing.assert_close(words.patch_states(model, pixels)[y, x] @ u, z @ A @ u)


@pytest.mark.parametrize("family, offset", [("Llama", 0), ("Gemma3", 1)])
def test_word_of_patch_has_highest_logit_of_whole_words(gallery, make_random_llm, family, offset):
    _, locations, encoders = gallery
    llm = make_random_llm(family=family)
    weights = load_file(llm / "model.safetensors")
    weights["model.norm.weight"] = torch.randn(48)
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    norm = weights["model.norm.weight"] + offset
    unembedding = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()
    tokenizer = flame.load_tokenizer(llm)
    texts = map(tokenizer.decode, zip(range(len(unembedding))))
    names = {i: text[1:] for i, text in enumerate(texts) if re.fullmatch(r" [^\W\d_]{3,}", text)}
    with open_image(locations[2]) as image:
        states = words.patch_states(encoders.model, encoders.model.preprocess(image)).flatten(0, 1)
        grid, strengths = words.words_of(encoders.model, llm, image)
    best = [max(names, key=row.__getitem__) for row in (states * norm @ unembedding.T).tolist()]
    assert [*grid.flat] == [names[i] for i in best]
    cosines = [F.cosine_similarity(row, unembedding[i] * norm, 0).item() for row, i in zip(states, best)]
    assert strengths.flatten() == pytest.approx(np.array(cosines) / max(cosines), abs=1e-5)


def test_sheet_marks_correct_image(tmp_path, monkeypatch):
    """It is among the five best, or the sixth. A missing image is gray. Texts may be in any script."""
    rows, draw_row = [], sheet.draw_row
    monkeypatch.setattr(sheet, "draw_row", lambda *row: rows.append(row) or draw_row(*row))
    for n in range(10):
        Image.new("RGB", (50, 50), (20 * n, 90, 200)).save(tmp_path / f"{n}.png")
    locations = [ImageLocation(str(tmp_path / f"{n}.png")) for n in range(11)]
    for correct, text in ((3, "一只红色的鸟"), (7, "طائر أحمر 🐦"), (7, 500 * "字"), (7, "a bird \x07")):
        scores = np.linspace(1, 0.1, 10)[None]
        examples = sheet.Examples([text], scores, locations, np.eye(10), np.array([correct]), "long")
        sheet.draw_sheet(examples, "words by a tower", tmp_path / "sheet.png")
        pixels = np.array(Image.open(tmp_path / "sheet.png"))
        green = (pixels == (0, 168, 80)).all(-1).any(0).nonzero()[0]
        assert (green.min() - 16 - sheet.TEXT_WIDTH) / sheet.CELL == min(correct, 5)
        assert tuple(pixels[16 + 54 + 64, int(green.mean())]) == (20 * correct, 90, 200)
        corner = pixels[16 + 54 + sheet.FRAME:, green.min() + sheet.FRAME:][:50, :50].reshape(-1, 3)
        assert {(0, 168, 80), (255, 255, 255)} < set(map(tuple, corner.tolist()))  # the tick and its edge
        assert re.match("words by a tower\nticked: .* last if it is not among the best", rows[-2][0])
        assert [label for _, label, _ in rows[-1][2] if label] == [f"correct: rank {correct + 1}"]
    assert sheet.thumbnail(locations[10], 9).getpixel((0, 0)) == (208, 208, 208)


def embed_args(llm, **options):
    return SimpleNamespace(llm=llm, captions="c.tsv", layer=3, mask="decoupled", device="cpu", **options)


@pytest.fixture
def captions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"k{n}\tthing {n % 4}\tA thing, number {n}.\tThere is a thing, number {n}." for n in range(23)]
    Path("c.tsv").write_text("\n".join(["key\traw\tshort\tlong", *rows]))


def test_inspect_finds_corrupt_shard_and_other_llm(tiny_llm, captions, capsys, monkeypatch):
    command = f"embed.py --captions c.tsv --no-images --llm {tiny_llm} --out store --shard-size 8"
    monkeypatch.setattr(sys, "argv", command.split())
    embed.main()
    look.inspect(embed_args(tiny_llm, inspect="store"))
    out = capsys.readouterr().out
    assert re.search("all 23 rows are complete; 23 were.*\n(.*\n)*k0: There is a thing, number 0.", out)
    shard, table, meta = Path("store/000001.npy"), Path("store/captions.tsv"), Path("store/meta.json")
    content, lines, x = shard.read_bytes(), table.read_text().splitlines(True), np.load(shard)
    table.write_text("".join([lines[0], *lines[:0:-1]]))
    with pytest.raises(InputError, match="captions.tsv: not the table that the embeddings were made from"):
        look.inspect(embed_args(tiny_llm, inspect="store"))
    table.write_text("".join(lines))
    digest = flame.shard_digest(json.loads(meta.read_text())["table_sha256"], 1, x[::-1])
    changed, swapped = "not the embeddings that embed.py wrote", x[[0, 1, 3, 2, *range(4, 8)]]
    for damage, end, message in (
            (x[::-1], digest, "row 8 has other embeddings"), (swapped, content[-32:], changed),
            (np.load("store/000000.npy"), Path("store/000000.npy").read_bytes()[-32:], changed),
            (x * 0, b"", changed), (3 * x, b"", changed), (x * np.nan, b"", changed),
            (x.astype(np.int16), b"", "int16 instead of"), (x[1:], b"", "")):
        common.write_array(shard, damage, end)
        with pytest.raises(InputError, match=f"000001.npy: .*{message}.*delete it and run"):
            look.inspect(embed_args(tiny_llm, inspect="store"))
    shard.write_bytes(content)
    meta.write_text(meta.read_text().replace(flame.llm_fingerprint(tiny_llm), "another"))
    with pytest.raises(InputError, match="another LLM"):
        look.inspect(embed_args(tiny_llm, inspect="store"))


def test_draw_shows_every_segment(tiny_llm, captions):
    """There are eleven: prefix and caption, "the", two beginnings shared by facets, and seven ends."""
    look.draw(embed_args(tiny_llm, out="a.png", draw="Two $people$ \U0001f468\u200d\U0001f469\nand a $."))
    counts = Image.open("a.png").convert("RGB").getcolors(1 << 24)
    colors = {color for count, color in counts if count > 100}
    assert {tuple(bytes.fromhex(color[1:])) for color in look.PALETTE[:11]} <= colors
