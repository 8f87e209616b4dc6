"""The demo's captions in new words: what training captions say, in words that none of them has.

Here a frozen LLM must show what it knows and its pupil was never told: that a vixen is a fox, a monsoon rain.
Only validation and test scenes are described so. tests/test_demo.py holds every word against training's.
"""
from data.corpus.words import phrase, read_lists, upper

REWORDING = read_lists("rewording.txt")
SYNONYMS = REWORDING["synonyms"]    # object: two other names or descriptions of it


def reworded(scene, rng):
    """(main, minor, relation, background), random.Random -> a caption of 20 to 50 words, telling all four."""
    main, minor, relation, background = scene
    parts = {
        "place": REWORDING["places"][background],
        "mood": REWORDING["moods"][background],
        "rel": REWORDING["relations"][relation],
    }
    fields = {name: [rng.choice(phrasings)] for name, phrasings in parts.items()}
    for size, thing in {"big": main, "small": minor}.items():
        fields[size] = [f"{rng.choice(REWORDING['sizes'][size])} {rng.choice(SYNONYMS[thing])}"]
    return upper(phrase(REWORDING["templates"]["caption"], fields, rng))
