"""What there is to look at.

* --search ranks pictures by texts and by a picture as sorting all similarities does; --vectors writes them.
* The page answers gradio's client: texts, pictures, facets one by one, words of a picture that is clicked. A
  damaged picture is told there, and it goes on. It keeps nothing, asks nobody else for anything, and names
  are no markup. Of an open_clip model it hides what only an LLM's facets have.
* A patch's word is the nearest of the LLM's whole words, in the space from before the text projection; its
  opacity is its cosine.
* The contact sheet shows the right picture in green and ticked, be it the last, and says so.
* --inspect finds what is wrong in a store; --draw shows every segment.
"""
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

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
from data.images import ImageLocation, open_image, images_in
from data.show import look, page, search, sheet, words
from data.compat import OpenClip
from data.encoders import Encoders, encode_facets, encode_images, encode_texts
from flame import FACET_COLUMNS, InputError

LONG = "a red kite flies over the beach while two dogs run after it and a child laughs at them all"


def tiny_model(side=4, columns=FACET_COLUMNS):
    """An untrained Flame of random weights, side x side patches."""
    torch.manual_seed(0)
    model = flame.Flame({"image_size": 8 * side, "patch_size": 8, "width": 16, "layers": 1, "heads": 2,
                         "text_dim": 48, "projector_hidden": 24, "pool_first": True, "text_rank": 5,
                         "columns": columns})
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 3
    return model.eval()


@pytest.fixture(scope="module")
def world(tiny_llm, tmp_path_factory):
    """args, places, towers: a dozen pictures, one with a hostile name, and random towers."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for n in range(12):
        name = f"{n}.png" if n else "<img src=x onerror=alert(1)> {0}.png"
        Image.fromarray(random.integers(0, 256, (2, 3, 3), np.uint8)).resize((60, 40)).save(folder / name)
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    args = SimpleNamespace(search=[], vectors=None, top=3, prompts=None, images=folder, out=folder.parent)
    model = tiny_model(columns=["raw.0", "long.0", "long.3", "long.5"])
    towers = Encoders(model, lambda: encoder, "cpu", args.out / "cache", "image tower", "text tower")
    return args, [ImageLocation(str(path)) for path in sorted(folder.iterdir())], towers


def ranked(world, vector):
    """[(index, similarity)], by sorting all of them."""
    image, _ = encode_images(world[2], world[1])
    order = sorted(enumerate((image @ vector).tolist()), key=lambda pair: -pair[1])
    return [(i, pytest.approx(score, abs=1e-3)) for i, score in order]


def test_vectors_of_a_folder_are_the_towers_and_paths_lie_beside(world, tmp_path):
    args, places, towers = world
    folder = shutil.copytree(Path(places[0].path).parent, tmp_path / "copy")
    (folder / Path(places[11].path).name).rename(folder / "last\none.png")
    places = images_in(folder)
    image, kept = encode_images(towers, places)
    paths = [places[i].path.replace("\n", " ") for i in kept]
    for name in ("out.npy", "out.1"):
        search.search(SimpleNamespace(**vars(args) | {"vectors": tmp_path / name}), places, towers)
        written = tmp_path / f"{name.removesuffix('.npy')}.npy"
        assert np.array_equal(np.load(written), image) and len(image) == 12
        assert written.with_suffix(".txt").read_text().splitlines() == paths


def test_a_picture_that_failed_for_a_moment_is_there_the_next_time(world, tmp_path, monkeypatch):
    _, places, towers = world
    towers = towers._replace(cache=tmp_path)
    whole, _ = encode_images(world[2], places)

    def failing(place):
        if place == places[3]:
            raise OSError(5, "Input/output error")
        return open_image(place)
    with monkeypatch.context() as moment:
        moment.setattr("data.encoders.open_image", failing)
        assert encode_images(towers, places)[1] == [0, 1, 2, *range(4, 12)]
    image, kept = encode_images(towers, places)
    assert kept == [*range(12)] and np.allclose(image, whole, atol=1e-6)


def test_search_ranks_as_sorting_does_and_writes_a_sheet(world, capsys):
    args, places, towers = world
    args.search = ["a red kite", LONG, places[4].path]
    search.search(args, places, towers)
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    vectors = *encode_texts(towers, ["a red kite"], "raw"), *encode_texts(towers, [LONG], "long")
    image, _ = encode_images(towers, [places[4]])
    expected = [pair for vector in (*vectors, *image) for pair in ranked(world, vector)[:3]]
    assert [(path, float(score)) for _, score, path in lines] == [(places[i].path, s) for i, s in expected]
    assert lines[6][2] == places[4].path and Image.open(args.out / "search.png").height > 3 * sheet.SIDE


@pytest.fixture(scope="module")
def client(world):
    """gradio's client of the page, which is served in this process."""
    args, places, towers = world
    image, _ = encode_images(towers, places)
    blocks = page.serve(args, places, image, towers, unreadable=3)
    assert "12 images of" in str(blocks.config) and "3 unreadable" in str(blocks.config)
    yield Client(blocks.local_url, verbose=False, analytics_enabled=False)
    blocks.close()


def tiles(html):
    """The page's gallery -> [(index, similarity)]; none where it is as it was"""
    pairs = re.findall(r'data-image="(\d+)".*?<b>(.*?)</b>', html)
    return "tiles plain" not in html and [(int(i), float(score)) for i, score in pairs]


def test_the_page_finds_what_sorting_finds_and_keeps_nothing(world, client, capfd):
    args, places, towers = world
    kept = sorted((args.out / "cache").iterdir())
    html, switches, _ = client.predict("ein Drachen", api_name="/text")
    found, _, _ = client.predict(handle_file(places[7].path), api_name="/image")
    assert sorted((args.out / "cache").iterdir()) == kept and "texts" not in capfd.readouterr().err
    assert tiles(html) == ranked(world, encode_texts(towers, ["ein Drachen"], "raw")[0])
    assert not switches["visible"]      # of one question there is nothing to choose
    assert tiles(found) == ranked(world, encode_images(towers, [places[7]])[0][0])
    assert not tiles(client.predict("  ", api_name="/text")[0])     # without scores


def test_a_switch_a_facet_shows_what_each_question_finds(world, client):
    """Those that the checkpoint was trained on, by their names."""
    names = [page.facet_label(flame.PROMPTS["long"].facets[k]) for k in (0, 3, 5)]
    facets = encode_facets(world[2], [LONG], "long")[0]
    html, switches, _ = client.predict(LONG, api_name="/text")
    assert [name for name, _ in switches["choices"]] == switches["value"] == names and switches["visible"]
    assert [i for i, _ in tiles(html)] == [i for i, _ in ranked(world, facets.mean(0))]
    for k, name in enumerate(names):
        html, switches, _ = client.predict(LONG, [name], api_name="/facets")
        assert switches["value"] == [name]
        assert tiles(html) == ranked(world, facets[k])


def test_the_page_of_an_open_clip_model_has_texts_and_pictures_alone(world, small_clip):
    args, places, _ = world
    clip = OpenClip(small_clip).eval()
    towers = Encoders(clip, lambda: clip, "cpu", None, "clip", "clip")
    image, _ = encode_images(towers, places)
    blocks = page.serve(args, places, image, towers)
    client = Client(blocks.local_url, verbose=False, analytics_enabled=False)
    html, switches, _ = client.predict(LONG, api_name="/text")
    assert tiles(html) == ranked((args, places, towers), encode_texts(towers, [LONG], "raw")[0])
    assert tiles(client.predict(handle_file(places[7].path), api_name="/image")[0])[0][0] == 7
    names = [each["api_name"] for each in client.config["dependencies"]]
    assert not switches["visible"] and "facets" in names and "words" not in names
    blocks.close()


def clicked(client, picture):
    """What a click on a picture of the gallery gives: gradio's client has none, its protocol does."""
    number = next(each["id"] for each in client.config["dependencies"] if each["api_name"] == "words")
    event = {"data": [], "fn_index": number, "session_hash": "test", "event_data": {"image": picture}}
    httpx.post(f"{client.src}gradio_api/queue/join", json=event).raise_for_status()
    with httpx.stream("GET", f"{client.src}gradio_api/queue/data?session_hash=test", timeout=60) as answer:
        for line in answer.iter_lines():
            message = json.loads(line.removeprefix("data: ") or "{}")
            if message.get("msg") == "process_completed":
                return message["output"]


def test_a_click_shows_the_words_of_the_patches(world, client, tiny_llm):
    html, = clicked(client, 5)["data"]
    with open_image(world[1][5]) as image:
        grid, strengths = words.words_of(world[2].model, tiny_llm, image)
    spans = re.findall(r"<span.*?opacity: (.*?)\">(.*?)</span>", html)
    assert spans == [(f"{share:.2f}", word) for share, word in zip(strengths.flat, grid.flat)]
    assert len(set(strengths.flat)) > 1 and "fainter means a lower cosine" in html


def test_what_is_damaged_is_told_and_the_page_goes_on(world, client, tmp_path):
    _, places, _ = world
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(Exception, match="bad.png"):
        client.predict(handle_file(str(tmp_path / "bad.png")), api_name="/image")
    content = Path(places[3].path).read_bytes()
    for some, refused in ((content[:60], True), (content, False)):
        Path(places[3].path).write_bytes(some)
        assert ("error" in clicked(client, 3)) == refused
    assert len(tiles(client.predict("red", api_name="/text")[0])) == len(places)


def test_the_page_is_of_this_machine_alone_and_names_are_no_markup(client):
    assert client.src.startswith("http://127.0.0.1:")
    style = httpx.get(f"{client.src}theme.css").text
    assert "system-ui" in style
    asked = re.findall(r"""(?:src=|<link[^>]*href=|@import\s+|url\()["']?(https?://[^/"')]+)""",
                       style + httpx.get(client.src).text)
    assert not [host for host in asked if not client.src.startswith(host)], asked
    html, _, _ = client.predict("red", api_name="/text")
    assert "&lt;img src=x" in html and "<img src=x" not in html


@pytest.mark.parametrize("side", [4, 5])
def test_patch_states_are_led_back_through_the_text_projection(side):
    """Against four patches pooled by hand, and a state's product with any u led there by A."""
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
def test_words_of_a_picture(world, make_random_llm, family, offset):
    """The best of all tokens that are whole words, looked for one by one."""
    _, places, towers = world
    llm = make_random_llm(family=family)
    weights = load_file(llm / "model.safetensors")
    weights["model.norm.weight"] = torch.randn(48)
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    norm = weights["model.norm.weight"] + offset
    unembedding = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()
    tokenizer = flame.load_tokenizer(llm)
    texts = map(tokenizer.decode, zip(range(len(unembedding))))
    names = {i: text[1:] for i, text in enumerate(texts) if re.fullmatch(r" [^\W\d_]{3,}", text)}
    with open_image(places[2]) as image:
        states = words.patch_states(towers.model, towers.model.preprocess(image)).flatten(0, 1)
        grid, strengths = words.words_of(towers.model, llm, image)
    best = [max(names, key=row.__getitem__) for row in (states * norm @ unembedding.T).tolist()]
    assert [*grid.flat] == [names[i] for i in best]
    cosines = [F.cosine_similarity(row, unembedding[i] * norm, 0).item() for row, i in zip(states, best)]
    assert strengths.flatten() == pytest.approx(np.array(cosines) / max(cosines), abs=1e-5)


def test_the_sheet_shows_the_right_picture_in_green_and_ticked(tmp_path, monkeypatch):
    """Among the five best, else the sixth; a picture that is gone is grey; texts of any script."""
    rows, draw_row = [], sheet.draw_row
    monkeypatch.setattr(sheet, "draw_row", lambda *row: rows.append(row) or draw_row(*row))
    for n in range(10):
        Image.new("RGB", (50, 50), (20 * n, 90, 200)).save(tmp_path / f"{n}.png")
    places = [ImageLocation(str(tmp_path / f"{n}.png")) for n in range(11)]
    for right, text in ((3, "一只红色的鸟"), (7, "طائر أحمر 🐦"), (7, 500 * "字"), (7, "a bird \x07")):
        scores = np.linspace(1, 0.1, 10)[None]
        shown = sheet.Examples([text], scores, places, np.eye(10), np.array([right]), "long")
        sheet.draw_sheet(shown, "words by a tower", tmp_path / "sheet.png")
        pixels = np.array(Image.open(tmp_path / "sheet.png"))
        green = (pixels == (0, 168, 80)).all(-1).any(0).nonzero()[0]
        assert (green.min() - 16 - sheet.TEXT_WIDTH) / sheet.CELL == min(right, 5)
        assert tuple(pixels[16 + 54 + 64, int(green.mean())]) == (20 * right, 90, 200)
        corner = pixels[16 + 54 + sheet.FRAME:, green.min() + sheet.FRAME:][:50, :50].reshape(-1, 3)
        assert {(0, 168, 80), (255, 255, 255)} < set(map(tuple, corner.tolist()))   # the tick and its edge
        assert re.match("words by a tower\nticked: .* last if it is not among the best", rows[-2][0])
        assert [words for _, words, _ in rows[-1][2] if words] == [f"correct: rank {right + 1}"]
    assert sheet.thumbnail(places[10], 9).getpixel((0, 0)) == (208, 208, 208)


def embed_args(llm, **more):
    return SimpleNamespace(llm=llm, captions="c.tsv", layer=3, mask="decoupled", join={}, **more)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"k{n}\tthing {n % 4}\tA thing, number {n}.\tThere is a thing, number {n}." for n in range(23)]
    Path("c.tsv").write_text("\n".join(["key\traw\tshort\tlong", *rows]))


def test_inspect_finds_what_is_wrong(tiny_llm, here, capsys, monkeypatch):
    command = f"embed.py --captions c.tsv --llm {tiny_llm} --out store --shard-size 8"
    monkeypatch.setattr(sys, "argv", command.split())
    embed.main()
    look.inspect(embed_args(tiny_llm, inspect="store"))
    out = capsys.readouterr().out
    assert re.search("all 23 rows are complete\n(.*\n)*k0: There is a thing, number 0.", out)
    whole = Path("store/000001.npy").read_bytes()
    Path("store/000001.npy").write_bytes(whole[:1000])
    with pytest.raises(InputError, match="000001.npy: .*delete it and run"):
        look.inspect(embed_args(tiny_llm, inspect="store"))
    Path("store/000001.npy").write_bytes(whole)
    meta = Path("store/meta.json")
    meta.write_text(meta.read_text().replace(flame.llm_fingerprint(tiny_llm), "another"))
    with pytest.raises(InputError, match="another LLM"):
        look.inspect(embed_args(tiny_llm, inspect="store"))


def test_draw_shows_every_segment(tiny_llm, here):
    """Eleven: opening and caption, "the", two openings that facets share, seven endings. Any letters do."""
    look.draw(embed_args(tiny_llm, out="a.png", draw="Two $people$ \U0001f468\u200d\U0001f469\nand a $."))
    counts = Image.open("a.png").convert("RGB").getcolors(1 << 24)
    colours = {colour for count, colour in counts if count > 100}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in look.PALETTE[:11]} <= colours
