"""The demo's vocabulary, and captions made from it.

The words are in the text files of this folder: sections in brackets, fields in sections, comments after #. A
field has alternative phrasings, separated by " / " or a line break, from which captions draw. In a template,
{main} is a field and {a main} the same with an article.
"""
import configparser
import re
from pathlib import Path


def read_lists(name):
    """Return {section: {field: [phrasing]}} from a text file of this folder."""
    parser = configparser.RawConfigParser(delimiters=":")
    parser.optionxform = str  # keep capitals
    parser.read_string(Path(__file__).with_name(name).read_text("utf-8"))
    return {section: {field: re.split(" / |\n", text.strip()) for field, text in parser.items(section)}
            for section in parser.sections()}


# object: {"kind", "name": other names, "look": features of the drawing, "fact": facts about the object}. The
# objects are named as in `emoji`, which has the names in 13 other languages.
OBJECTS = read_lists("objects.txt")
UNSEEN = OBJECTS.pop("unseen")["names"]  # objects in no training image or caption, as many as the others
# background: {"place", "event", "detail", "mood", "truth"}; painting.py draws them
BACKGROUNDS = read_lists("backgrounds.txt")
# verbs: for each kind of object; relations: position of the minor object relative to the main one; sentences:
# templates, and words that fit every scene
SENTENCES = read_lists("sentences.txt")
RELATIONS = SENTENCES["relations"]


def emoji_character(name):
    """"soccer ball" -> the emoji character"""
    import emoji

    return emoji.emojize(f":{name.replace(' ', '_')}:")


def translated(name, language):
    """Return an object's name in a language such as "de", from the Unicode CLDR."""
    import emoji

    translation = emoji.demojize(emoji_character(name), delimiters=("", ""), language=language)
    return translation.replace("_", " ")


def draw(phrasings, rng):
    """Return a random phrasing, the first ones most often: as in natural text, many words are rare."""
    return phrasings[int(len(phrasings) * rng.random() ** 2)]


def phrase(template, fields, rng):
    """Fill in a template with phrasings of fields {name: [phrasing]}, which may be templates too."""
    def words(match):
        article, name = match.groups()
        value = phrase(draw(fields[name], rng), fields, rng)
        if not article:
            return value
        return ("an " if value[0].lower() in "aeiou" and not value.startswith("uni") else "a ") + value

    return re.sub(r"{(a )?(\w+)}", words, template)


def capitalize_sentences(text):
    return re.sub(r"(^|[.!] )([a-z])", lambda match: match[0].upper(), text)


def captions(scene, rng):
    """Return the raw, short and long caption of a scene (main, minor, relation, background).

    raw is like a web page's alt text, often only a name. short names everything once. long (40 to 90 words)
    covers what the seven long prompts ask for: also characteristics, an event and the mood.
    """
    main, minor, relation, background = scene
    fields = {**SENTENCES["sentences"], **BACKGROUNDS[background], **OBJECTS[main], "main": [main],
              "minor": [minor], **{f"minor_{field}": words for field, words in OBJECTS[minor].items()},
              "rel": RELATIONS[relation], "verb": [draw(SENTENCES["verbs"][OBJECTS[main]["kind"][0]], rng)]}
    for field in ("event", "mood", "detail", "fact"):  # a caption may have two of each
        fields[field], fields[f"other_{field}"] = ([words] for words in rng.sample(fields[field], 2))
    raw, short, long = (phrase(template, fields, rng) for template in ("{raw}", "{short}", "{long}"))
    while not 40 <= len(long.split()) <= 90:
        long = phrase("{long}", fields, rng)
    return raw, capitalize_sentences(short), capitalize_sentences(long)
