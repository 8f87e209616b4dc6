"""The demo's captions in new words: what training captions say, in words that none of them has.

Here a frozen LLM must show what it knows and its pupil was never told: that a vixen is a fox, a monsoon rain.
Only validation and test scenes are described so, and settings that were chosen by the words of the one are
scored by others. tests/test_demo.py holds every word against training's.
"""
from data.corpus.words import capitals, phrase, read_lists

REWORDING = read_lists("rewording.txt")
SYNONYMS = REWORDING["synonyms"]    # object: two other names or descriptions of it


def reworded(scene, split, rng):
    """(main, minor, relation, background), "val" or "test" -> a caption of 20 to 50 words, telling all four.

    The first half of every list of phrasings is validation's, the second the test's.
    """
    main, minor, relation, background = scene
    lists = {"main": SYNONYMS[main], "minor": SYNONYMS[minor], "rel": REWORDING["relations"][relation],
             "place": REWORDING["places"][background], "mood": REWORDING["moods"][background],
             **REWORDING["sentences"]}
    fields = {name: words[:len(words) // 2] if split == "val" else words[len(words) // 2:]
              for name, words in lists.items()}
    return capitals(phrase("{caption}", fields, rng))
