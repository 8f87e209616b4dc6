"""What the demo's scenes are made of, and the captions that say so.

The words lie in the text files of this folder: sections in brackets, in them fields; # begins a line for
people. A field holds phrasings of one thing, parted by " / " or by the end of a line; captions draw among
them. In templates {main} is a field, {a main} the same behind its article.
"""
import configparser
import re
from pathlib import Path


def read_lists(name):
    """A text file of this folder -> {section: {field: [phrasing]}}"""
    parser = configparser.ConfigParser(delimiters=":", interpolation=None)
    parser.optionxform = str    # fields keep their capitals
    parser.read_string((Path(__file__).parent / name).read_text("utf-8"))
    return {section: {field: re.split(" / |\n", text.strip()) for field, text in parser.items(section)}
            for section in parser.sections()}


# object: {"kind", "look": a characteristic that the drawing shows}. The names are those of `emoji`, so that
# thirteen other languages come with them.
OBJECTS = read_lists("objects.txt")
# Never in a training picture or caption: what the tower makes of these it learned from their relatives. As
# many as are seen, since few would say little.
UNSEEN = OBJECTS.pop("unseen")["names"]
# background: {"place", "event": what happens there, "mood"}; painting.py draws what they say
BACKGROUNDS = read_lists("backgrounds.txt")
# verbs: what each kind does in a picture; relations: where the minor object is, seen from the main one;
# templates: of raw and short captions, and of the sentences of long ones
SENTENCES = read_lists("sentences.txt")
RELATIONS = SENTENCES["relations"]


def emoji_character(name):
    """"soccer ball" -> the emoji's character."""
    import emoji

    return emoji.emojize(f":{name.replace(' ', '_')}:")


def translated(name, language):
    """An object's name in a language, "de" say, as the Unicode CLDR has it."""
    import emoji

    translation = emoji.demojize(emoji_character(name), delimiters=("", ""), language=language)
    return translation.replace("_", " ")


def phrase(templates, fields, rng):
    """One of the templates, filled in; phrasings are drawn for all of them. fields: {name: [phrasing]}"""
    def words(match):
        article, name = match.groups()
        value = rng.choice(fields[name]) if len(fields[name]) > 1 else fields[name][0]
        if not article:
            return value
        return ("an " if value[0].lower() in "aeiou" and not value.startswith("uni") else "a ") + value

    return rng.choice([re.sub(r"{(a )?(\w+)}", words, template) for template in templates])


def upper(sentence):
    return sentence[0].upper() + sentence[1:]


def captions(scene, rng):
    """(main, minor, relation, background), random.Random -> raw, short and long caption.

    raw is like a web page's alt text, often only a name; short names everything once; long (40 to 90 words)
    also tells what the seven questions of the long prompt set ask: characteristics, what happens, the mood.
    """
    main, minor, relation, background = scene
    fields = {"main": [main], "minor": [minor], "rel": RELATIONS[relation], **BACKGROUNDS[background],
              **OBJECTS[main], "minor_kind": OBJECTS[minor]["kind"], "minor_look": OBJECTS[minor]["look"],
              "verb": [rng.choice(SENTENCES["verbs"][OBJECTS[main]["kind"][0]])]}

    def sentence(slot):
        return phrase(SENTENCES["templates"][slot], fields, rng)

    raw = sentence("raw")
    for size in ("big", "small"):
        fields[size] = [rng.choice(SENTENCES["sizes"][size])]
    short, opening, minor = (sentence(slot) for slot in ("short", "opening", "minor"))
    told = []
    for slot in ("event", "mood"):
        fields[slot], fields[f"other_{slot}"] = ([words] for words in rng.sample(fields[slot], 2))
        told.append(sentence(slot))
    event, mood = told
    # The minor object's sentence may speak of "it", so it follows the opening; what comes around is shuffled.
    orders = [opening, minor, event, mood], [mood, opening, minor, event], [opening, minor, mood, event]
    return raw, upper(short), " ".join(upper(sentence) for sentence in rng.choice(orders))
