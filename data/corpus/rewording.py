"""The demo's captions in new words: the same content in words that no training caption has.

They test what the LLM knows and training never showed, for example that a vixen is a fox. Only validation
and test scenes have such captions. The two splits share no words, so settings are not tuned on test words.
tests/test_demo.py compares every word with those of training.
"""
from data.corpus.words import capitalize_sentences, phrase, read_lists

REWORDING = read_lists("rewording.txt")
SYNONYMS = REWORDING["synonyms"]  # object: two other names or descriptions


def reworded(scene, split, rng):
    """Return a caption of 20 to 50 words for a scene (main, minor, relation, background) of "val" or "test".

    The first half of every list of phrasings is for validation, the second half for test.
    """
    main, minor, relation, background = scene
    lists = {"main": SYNONYMS[main], "minor": SYNONYMS[minor], "rel": REWORDING["relations"][relation],
             "place": REWORDING["places"][background], "mood": REWORDING["moods"][background],
             **REWORDING["sentences"]}
    fields = {name: words[:len(words) // 2] if split == "val" else words[len(words) // 2:]
              for name, words in lists.items()}
    return capitalize_sentences(phrase("{caption}", fields, rng))
