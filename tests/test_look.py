"""Tests of data/show: search, the search page, contact sheets, and embed.py --inspect."""
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

import embed
import flame
from data import common
from data.images import ImageLocation, open_image
from data.show import page, search, sheet
from data.show.inspect import inspect_store
from data.compat import OpenClip
from data.encoders import Encoders, encode_images, encode_texts
from flame import InputError

LONG = "a red kite flies over the beach while two dogs run after it and a child laughs at them all"


@pytest.fixture(scope="module")
def gallery(tiny_llm, tmp_path_factory):
    """Return (args, locations of 12 images, encoders with random weights). One file name contains HTML."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for n in range(12):
        name = f"{n}.png" if n else "<img src=x onerror=alert(1)> {0}.png"
        Image.fromarray(rng.integers(0, 256, (2, 3, 3), np.uint8)).resize((60, 40)).save(folder / name)
    encoder = flame.TextEncoder(tiny_llm, dtype=torch.float32)
    args = SimpleNamespace(search=[], top=3, prompts=None, images=folder, out=folder.parent)
    torch.manual_seed(0)
    model = flame.Flame({"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "heads": 2,
                         "text_dim": 48, "projector_hidden": 24, "pool_first": True, "text_rank": 5,
                         "columns": ["raw.0", "long.0", "long.3", "long.5"]}).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 3
    encoders = Encoders(model, lambda: encoder, "cpu", args.out / "cache", "image tower", "text tower")
    return args, [ImageLocation(str(path)) for path in sorted(folder.iterdir())], encoders


def ranking(gallery, vector):
    """Return [(index, similarity)], all images sorted by similarity."""
    image, _ = encode_images(gallery[2], gallery[1])
    order = sorted(enumerate((image @ vector).tolist()), key=lambda pair: -pair[1])
    return [(i, pytest.approx(score, abs=1e-3)) for i, score in order]


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


def names(gallery, vector):
    """Return the captions that the page should show for a text or an image."""
    return [f"{score.expected:.3f} {Path(gallery[1][i].path).name}" for i, score in ranking(gallery, vector)]


def shown(client, query, name="/text"):
    """Return the captions of the page's gallery after a query."""
    result = client.predict(*query, api_name=name)
    return [entry["caption"] for entry in (result[0] if isinstance(result, tuple) else result)]


def test_page_shows_ranking_and_writes_no_files(gallery, client, capfd):
    args, locations, encoders = gallery
    vectors = (encode_texts(encoders, ["ein Drachen"], "raw"), encode_texts(encoders, [LONG], "long"),
               encode_images(encoders, [locations[7]])[0])
    cache = sorted((args.out / "cache").iterdir())
    capfd.readouterr()
    found = (shown(client, ["ein Drachen"]), shown(client, [LONG]),
             shown(client, [handle_file(locations[7].path)], "/image"))
    assert found == tuple(names(gallery, vector) for vector, in vectors)
    assert sorted((args.out / "cache").iterdir()) == cache and "texts" not in capfd.readouterr().err
    assert shown(client, ["  "]) == [Path(location.path).name for location in locations]


def test_page_shows_more_images_of_an_open_clip_model(gallery, small_clip, monkeypatch):
    monkeypatch.setattr(page, "TILES", 5)
    args, locations, _ = gallery
    model = OpenClip(small_clip).eval()
    encoders = Encoders(model, lambda: model, "cpu", None, "clip", "clip")
    blocks = page.serve(args, locations, encode_images(encoders, locations)[0], encoders)
    client = Client(blocks.local_url, verbose=False, analytics_enabled=False)
    expected = names((args, locations, encoders), encode_texts(encoders, [LONG], "raw")[0])
    assert shown(client, [LONG]) == expected[:5]
    by_text = next(event.fn for event in blocks.fns.values() if event.api_name == "text")
    *_, button, _ = by_text(LONG)
    assert button["value"] == "5 of 12 images shown; show 5 more" and button["visible"]
    assert [shown(client, [], "/more") for _ in range(2)] == [expected[:10], expected]
    blocks.close()


def test_page_reports_corrupt_image_and_keeps_working(gallery, client, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(Exception, match="bad.png"):
        client.predict(handle_file(str(tmp_path / "bad.png")), api_name="/image")
    assert len(shown(client, ["red"])) == len(gallery[1])


def test_page_is_local(client):
    assert client.src.startswith("http://127.0.0.1:")
    assert httpx.get(client.src, headers={"Host": "evil.com:7860"}).status_code == 400
    style = httpx.get(f"{client.src}theme.css").text
    assert "system-ui" in style
    hosts = re.findall(r"""(?:src=|<link[^>]*href=|@import\s+|url\()["']?(https?://[^/"')]+)""",
                       style + httpx.get(client.src).text)
    assert all(client.src.startswith(host) for host in hosts), hosts


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
    inspect_store(embed_args(tiny_llm, inspect="store"))
    out = capsys.readouterr().out
    assert re.search("all 23 rows are complete; 23 were encoded again and agree", out)
    shard, table, meta = Path("store/000001.npy"), Path("store/captions.tsv"), Path("store/meta.json")
    content, lines, x = shard.read_bytes(), table.read_text().splitlines(True), np.load(shard)
    table.write_text("".join([lines[0], *lines[:0:-1]]))
    with pytest.raises(InputError, match="captions.tsv: not the table that the embeddings were made from"):
        inspect_store(embed_args(tiny_llm, inspect="store"))
    table.write_text("".join(lines))
    digest = flame.shard_digest(json.loads(meta.read_text())["table_sha256"], 1, x[::-1])
    changed, swapped = "not the embeddings that embed.py wrote", x[[0, 1, 3, 2, *range(4, 8)]]
    for damage, end, message in (
            (x[::-1], digest, "row 8 has other embeddings"), (swapped, content[-32:], changed),
            (np.load("store/000000.npy"), Path("store/000000.npy").read_bytes()[-32:], changed),
            (x * 0, b"", changed), (3 * x, b"", changed), (x * np.nan, b"", changed),
            (x.astype(np.int16), b"", "int16 instead of"), (x[1:], b"", "")):
        common.write_array(shard, damage, end)
        with pytest.raises(InputError, match=f"000001.npy: .*{message}.*delete it( if it exists,)? and run"):
            inspect_store(embed_args(tiny_llm, inspect="store"))
    shard.write_bytes(content)
    meta.write_text(meta.read_text().replace(flame.llm_fingerprint(tiny_llm), "another"))
    with pytest.raises(InputError, match="another LLM"):
        inspect_store(embed_args(tiny_llm, inspect="store"))
