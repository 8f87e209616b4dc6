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


# object: {"kind", "name": what else it is called, "look": what the drawing shows, "fact": what holds of any}.
# The names are those of `emoji`, so that thirteen other languages come with them.
OBJECTS = read_lists("objects.txt")
# Never in a training picture or caption: what the tower makes of these it learned from their relatives. As
# many as are seen, since few would say little.
UNSEEN = OBJECTS.pop("unseen")["names"]
# background: {"place", "event", "detail", "mood", "truth"}; painting.py draws what they say
BACKGROUNDS = read_lists("backgrounds.txt")
# verbs: what each kind does in a picture; relations: where the minor object is, seen from the main one;
# sentences: templates, and the words that fit every scene
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


def draw(phrasings, rng):
    """One of them, the first most often: as in natural text few words make up most of it, many are rare."""
    return phrasings[int(len(phrasings) * rng.random() ** 2)]


def phrase(template, fields, rng):
    """A template, filled in by fields, {name: [phrasing]}, that may be templates, too."""
    def words(match):
        article, name = match.groups()
        value = phrase(draw(fields[name], rng), fields, rng)
        if not article:
            return value
        return ("an " if value[0].lower() in "aeiou" and not value.startswith("uni") else "a ") + value

    return re.sub(r"{(a )?(\w+)}", words, template)


def capitals(text):
    return re.sub(r"(^|[.!] )([a-z])", lambda match: match[0].upper(), text)


def captions(scene, rng):
    """(main, minor, relation, background), random.Random -> raw, short and long caption.

    raw is like a web page's alt text, often only a name; short names everything once; long (40 to 90 words)
    also tells what the seven questions of the long prompt set ask: characteristics, what happens, the mood.
    """
    main, minor, relation, background = scene
    fields = {**SENTENCES["sentences"], **BACKGROUNDS[background], **OBJECTS[main], "main": [main],
              "minor": [minor], **{f"minor_{field}": words for field, words in OBJECTS[minor].items()},
              "rel": RELATIONS[relation], "verb": [draw(SENTENCES["verbs"][OBJECTS[main]["kind"][0]], rng)]}
    for field in ("event", "mood", "detail", "fact"):   # what a caption may tell two of
        fields[field], fields[f"other_{field}"] = ([words] for words in rng.sample(fields[field], 2))
    raw, short, long = (phrase("{%s}" % kind, fields, rng) for kind in ("raw", "short", "long"))
    while not 40 <= len(long.split()) <= 90:
        long = phrase("{long}", fields, rng)
    return raw, capitals(short), capitals(long)
