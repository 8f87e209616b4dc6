"""Tests of tests/clipart.py on a small tree with the layout of the Debian packages."""
import re

import numpy as np
import pytest
from PIL import Image

import clipart
from data.benchmarks import read_tsv

SVG = """<svg xmlns:dc="http://purl.org/dc"><title>not this</title><metadata><dc:title>{title}</dc:title>
<dc:description>{description}</dc:description><dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<cc:Agent><dc:title>An artist</dc:title></cc:Agent></metadata></svg>"""
WORDS = [a + b for a in ("ba", "ke", "mo", "lu", "ti") for b in ("ran", "pel", "dos", "gim", "wat", "zor")]


def noise(seed, brighter=0):
    pixels = np.random.default_rng(seed).integers(0, 200, (12, 12, 3)) + brighter
    return Image.fromarray(pixels.astype(np.uint8)).resize((120, 90), Image.NEAREST)


@pytest.fixture
def corpus(tmp_path, capsys):
    """Write the packages and make the corpus. Return ({file: rows}, printed lines)."""
    share = tmp_path / "packages/usr/share"

    def draw(n, title, name=None, keywords=("fruit", "hash(0x85)"), brighter=0, description="HASH(0x85)"):
        for kind in ("svg", "png"):
            (share / f"openclipart/{kind}/food").mkdir(parents=True, exist_ok=True)
        items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
        svg = SVG.format(title=title, keywords=items, description=description)
        (share / f"openclipart/svg/food/{name or n}.svg").write_text(svg)
        noise(n, brighter).save(share / f"openclipart/png/food/{name or n}.png")

    for n, word in enumerate(WORDS):
        draw(n, f"A {word} 2", keywords=("fruit",), description="Seen &amp; drawn.")
        draw(n, f"The old {word}", name=f"{n}-like", brighter=9)      # the same image, a little brighter
        draw(1000 + n, f"a {word} 03", name=f"{n}-same-words")
    for n in range(21):
        draw(2000 + n, "Set of things")
    draw(3000, "flat icons")
    draw(3001, "Pear", keywords=())
    (share / "openclipart/svg/food/3001.svg").rename(share / "openclipart/svg/3001.svg")
    draw(3002, "Lost pear")
    (share / "openclipart/png/food/3002.png").write_bytes(b"no image")
    folder = share / "tuxpaint/stamps/animals"
    folder.mkdir(parents=True)
    for n, word in enumerate(WORDS):
        lines = [f"A small {word}.", f"fr.utf8=Un petit {word}.", f"de.utf8=A small {word}.", "tlh.utf8=x"]
        (folder / f"{n}.txt").write_text("\n".join(lines))
        noise(4000 + n).save(folder / f"{n}.png")

    assert clipart.main([str(tmp_path / "packages"), str(tmp_path / "out")]) == 0
    tables = {path.stem: read_tsv(path) for path in (tmp_path / "out").glob("*.tsv")}
    return tables, capsys.readouterr().out.splitlines()


def correlations(folder, some, others):
    grays = [[np.asarray(Image.open(folder / row["image"]).convert("L").resize((16, 16))).ravel()
              for row in rows] for rows in (some, others)]
    return [np.corrcoef(a, b)[0, 1] for a in grays[0] for b in grays[1]]


def test_splits_share_no_title_sentence_or_image(corpus, tmp_path):
    tables, printed = corpus
    test, val = (tables[split] + tables[f"{split}-en"] for split in ("test", "val"))
    train = tables["train"]
    assert min(len(train), len(test), len(val)) > 5 and len(tables["test-en"]) > 3
    for some, others in ((test, train + val), (val, train)):
        assert max(correlations(tmp_path / "out", some, others)) <= 0.9
        stems = [{" ".join(re.findall("[a-z]+", row["raw"].lower())) for row in rows}
                 for rows in (some, others)]
        assert stems[0].isdisjoint(stems[1]) and len(stems[0]) == len(some)
    removed = {line.split(": ")[1]: int(line.split()[1][:-1]) for line in printed if "removed" in line}
    assert removed["title of more than 20 files"] == 21 and removed["fewer than two words"] == 1
    assert removed["title is a file name, a number or a collection"] == 1
    assert 1 == removed["no image, or an empty one"]
    assert removed["test image too similar to one of train or val"] > 0
    assert len(test + val + train) + sum(removed.values()) == 4 * len(WORDS) + 24
    assert {Image.open(path).size for path in (tmp_path / "out/images").iterdir()} == {(96, 96)}


def test_captions_and_translations(corpus):
    tables, _ = corpus
    clipart_rows = [row for split in ("train", "val", "test") for row in tables[split]]
    row = next(row for row in clipart_rows if re.fullmatch(r"A \w+ 2", row["raw"]))
    assert row["short"] == f"{row['raw']}: fruit"
    assert row["long"] == f"{row['raw']}. Seen & drawn. fruit. food"
    plain = next(row for row in clipart_rows if row["raw"].startswith("The old"))
    assert plain["long"] == f"{plain['raw']}. fruit. food"  # no hash values
    french = {row["key"]: row["raw"] for row in tables["test-fr"]}
    english = {row["key"]: row["raw"] for row in tables["test-en"]}
    assert french == {key: text.replace("A small", "Un petit") for key, text in english.items()}
    assert not {"test-de", "test-tlh"} & tables.keys()  # not translated; not a language of XM3600
