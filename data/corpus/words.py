"""What the demo's scenes are made of, and the captions that say so."""
import re


def entries(text):
    """"name: words; name: words" -> {name: words}"""
    return dict(entry.split(": ") for entry in " ".join(text.split()).split("; "))


# kind: (what it does in a picture, its objects). An object is `name: a characteristic the drawing shows`;
# the names are those of `emoji`, so that thirteen other languages come with them.
KINDS = {
    "animal": ("stands waits rests", """
        fox: orange fur and white cheeks; cat: an orange coat and a raised tail;
        dog: an orange coat and a collar; rabbit: black and white fur and long ears;
        panda: a white face with black patches; bear: brown fur and round ears;
        tiger: orange fur with black stripes; lion: a big brown mane; cow: a brown hide with a white patch;
        pig: smooth pink skin; monkey: brown fur and a long tail; wolf: dark gray fur;
        horse: a plain brown coat; unicorn: a horn and a red and blue mane; zebra: black and white stripes;
        deer: branching antlers; giraffe: a very long orange neck; elephant: a long gray trunk;
        camel: a sandy orange coat and a hump; hedgehog: a back full of brown spines;
        skunk: black fur with a white stripe; chipmunk: a big bushy brown tail; frog: a round green face;
        turtle: a patterned green shell; crocodile: a long green body; snail: a round brown shell"""),
    "bird": ("stands waits poses", """
        chicken: a white face and a red comb; penguin: a black back and a white belly;
        owl: gray feathers and big eyes; duck: a green head and brown feathers; eagle: broad brown wings;
        swan: a long curved white neck; flamingo: pink feathers and thin legs;
        peacock: a fan of green and blue feathers; parrot: red and blue feathers"""),
    "sea animal": ("floats rests waits", """
        whale: a smooth blue back; shark: gray skin and a pointed fin; octopus: eight red arms;
        crab: two red claws; jellyfish: a purple bell and trailing tentacles;
        tropical fish: blue and yellow stripes"""),
    "insect": ("sits rests waits", """
        butterfly: light blue wings; honeybee: a yellow and black body;
        lady beetle: red wings with black dots"""),
    "fruit": ("lies rests sits", """
        red apple: shiny red skin; banana: a curved yellow peel; watermelon: red flesh and a green rind;
        strawberry: red skin full of seeds; pineapple: a brown body and green leaves;
        lemon: bright yellow skin; peach: soft pink skin; avocado: green flesh and a brown stone"""),
    "vegetable": ("lies rests sits", """
        eggplant: glossy purple skin; carrot: an orange root and green leaves;
        mushroom: a red cap with white spots"""),
    "snack": ("lies rests waits", """
        croissant: a golden crust; pretzel: an orange crust twisted into a knot;
        hamburger: a bun with green lettuce; pizza: melted yellow cheese; doughnut: a hole and yellow icing;
        cupcake: pink frosting in a blue cup; lollipop: a red and white spiral"""),
    "vehicle": ("stands waits rests", """
        bicycle: a red frame and two thin wheels; automobile: red paint and blue windows;
        bus: a long red body; fire engine: red paint and a ladder; ambulance: white paint with a red stripe;
        tractor: a green body and big wheels; locomotive: a black boiler and red wheels;
        airplane: wide gray wings; helicopter: a red cabin and a rotor; rocket: a red body and blue fins;
        sailboat: gray sails and a brown hull"""),
    "instrument": ("stands lies rests", """
        guitar: a red body and a long neck; violin: dark brown wood; trumpet: bright yellow brass;
        drum: a red side and two sticks"""),
    "plant": ("grows stands rises", """
        cactus: green arms with spines; sunflower: yellow petals around an orange center;
        tulip: an orange blossom; Christmas tree: colorful balls and a yellow star"""),
    "thing": ("stands lies waits", """
        umbrella: a round purple canopy; balloon: round red rubber; soccer ball: black and white patches;
        camera: a round dark lens; telephone: red plastic and round keys; light bulb: glowing yellow glass;
        key: an orange metal bow; hammer: a gray head and a brown handle;
        crown: yellow gold and tall points; top hat: black felt and a yellow band;
        robot: a square gray head; jack-o-lantern: an orange face with yellow eyes; house: a red roof;
        alarm clock: a round white face; wrapped gift: yellow paper and a red ribbon"""),
}
# objects seen in training: (kind, characteristic)
OBJECTS = {name: (kind, look) for kind, (_, text) in KINDS.items() for name, look in entries(text).items()}
# Never in a training picture or caption: what the tower makes of these it learned from their relatives. As
# many as are seen, since few would say little.
UNSEEN = """leopard, donkey, gorilla, lizard, badger, bat, beaver, bison, boar, goat, hamster, hippopotamus,
kangaroo, koala, llama, moose, mouse, orangutan, otter, polar bear, raccoon, rhinoceros, sloth, water
buffalo, goose, rooster, turkey, dove, dodo, baby chick, dolphin, lobster, blowfish, squid, shrimp, orca,
ant, cockroach, mosquito, spider, scorpion, green apple, tangerine, grapes, mango, pear, cherries, kiwi
fruit, coconut, blueberries, cucumber, tomato, potato, broccoli, onion, garlic, bagel, sandwich, pancakes,
waffle, french fries, hot dog, taco, popcorn, taxi, motorcycle, police car, speedboat, tram, racing car,
pickup truck, motor scooter, ferry, canoe, flying saucer, saxophone, banjo, accordion, flute, harp, rose,
palm tree, hibiscus, evergreen tree, potted plant, volleyball, castle, screwdriver, basketball, axe,
scissors, kite, anchor, chair, teapot, lighthouse""".replace("\n", " ").split(", ")

# background: (where, what happens there, its mood); phrasings are separated by commas, and painting.py draws
# what they say
BACKGROUNDS = {
    "meadow": (
        "in a sunny green meadow, on a grassy field under a blue sky, on a bright summer lawn",
        "the sun shines on the grass, sunlight warms the flowers, white clouds drift by",
        "cheerful, happy and fresh, bright and carefree",
    ),
    "night": (
        "under a starry night sky, in the dark night under a crescent moon, on a dark hill at night",
        "the stars twinkle, the moon lights the hill, countless stars glow",
        "mysterious, quiet and secretive, still and dreamy",
    ),
    "snow": (
        "on a snowy field, in a white winter landscape, in deep white snow",
        "snowflakes fall, snow drifts down from a pale sky, it is snowing softly",
        "cold and peaceful, wintry and calm, frosty and silent",
    ),
    "beach": (
        "on a sandy beach, at the seaside on yellow sand, on the shore of a blue sea",
        "waves roll onto the sand, the sea washes ashore, small waves break",
        "relaxed, easy like a holiday, lazy and warm",
    ),
    "sunset": (
        "in front of an orange sunset, under a red evening sky, before a glowing sunset",
        "the sun sinks behind dark hills, the day is ending, the red sun goes down",
        "romantic, warm and tender, solemn and glowing",
    ),
    "rain": (
        "in heavy rain under gray clouds, on a gray rainy day, on a wet gray street in the rain",
        "rain pours from the clouds, raindrops splash into puddles, it is raining hard",
        "gloomy, sad and gray, dull and lonely",
    ),
    "sea": (
        "deep under water, at the bottom of the blue sea, in deep blue water",
        "bubbles rise to the surface, seaweed sways in the current, light fades in the depth",
        "silent and weightless, cool and hushed, strange and enchanting",
    ),
    "autumn": (
        "in an autumn wood, among brown autumn trunks, in a forest of fallen leaves",
        "orange leaves fall, dry leaves drift to the ground, the wind scatters leaves",
        "nostalgic, melancholic and mellow, wistful",
    ),
    "city": (
        "in front of a city skyline at dusk, in a big city in the evening, "
        + "before tall office blocks with lit windows",
        "the windows light up, lights go on in the towers, the city comes alive",
        "busy, lively and modern, restless and urban",
    ),
    "blossom": (
        "under pink cherry blossoms, in a pink spring garden, among pale pink spring flowers",
        "petals float in the air, pink petals drift down, the branches are in bloom",
        "gentle and hopeful, tender and sweet, delicate",
    ),
}
# relation: phrasings of where the minor object is, seen from the main one
RELATIONS = {"left": ("to the left of", "on the left side of", "left of"),
             "right": ("to the right of", "on the right side of", "right of"),
             "above": ("above", "high above", "over"),
             "below": ("below", "beneath", "underneath"),
             "front": ("in front of", "directly in front of", "just in front of")}


def emoji_character(name):
    """"soccer ball" -> the emoji's character."""
    import emoji

    return emoji.emojize(f":{name.replace(' ', '_')}:")


def translated(name, language):
    """An object's name in a language, "de" say, as the Unicode CLDR has it."""
    import emoji

    translation = emoji.demojize(emoji_character(name), delimiters=("", ""), language=language)
    return translation.replace("_", " ")


# ---------------------------------------------------------------- captions

# Templates. {main} is a field, {a main} the same behind its article; a field that has several phrasings, such
# as {place}, is drawn anew wherever it stands.
RAWS = (
    "{main}", "{main}", "{a main}", "{main} picture", "{main} clip art",
    "{main} and {minor}", "{a main} and {a minor}",
    "{main} {place}", "{a main} with {a minor} {place}", "{minor} {rel} {a main}",
)
SHORTS = (
    "{a main} {verb} {place}, with {a small} {minor} {rel} it.",
    "{a small} {minor} {rel} {a big} {main} {place}.",
    "{place} there is {a main}, and {rel} it {a small} {minor}.",
    "{a big} {main} with {look} {place}; {a minor} is {rel} it.",
)
# What the sentences of a long caption say. look, kind: the main object's.
OPENINGS = (
    "{a big} {main} with {look} {verb} {place}.",
    "the picture shows {a big} {main} {place}, {a kind} with {look}.",
    "{place} {verb} {a big} {main}. This {kind} has {look}.",
    "{a main} fills most of this drawing: {a kind} with {look}. It {verb} {place}.",
    "this is an illustration of {a big} {main} {place}. The {main} has {look}.",
)
MINORS = (
    "{rel} the {main} there is {a small} {minor} with {minor_look}.",
    "a much smaller {minor}, {a minor_kind} with {minor_look}, can be seen {rel} it.",
    "{a small} {minor} is placed {rel} the {main}; the {minor} has {minor_look}.",
    "the second object is {a small} {minor} {rel} the {main}. It has {minor_look}.",
    "it is not alone: {rel} it one finds {a small} {minor} with {minor_look}.",
)
EVENTS = (
    "in the background {event}, while the {main} keeps the {minor} company.",
    "{event}, and the {main} {verb} peacefully beside the {minor}.",
    "while the {main} quietly {verb} there, {event}.",
    "nothing moves but the scene behind: {event} and {other_event}.",
)
MOODS = (
    "the atmosphere of the picture is {mood}.",
    "the whole picture feels {mood}.",
    "the mood is {mood}, even {other_mood}.",
    "everything looks {mood}.",
    "it gives {a mood} impression.",
)


def a(noun):
    return ("an " if noun[0].lower() in "aeiou" and not noun.startswith("uni") else "a ") + noun


def phrase(templates, fields, rng):
    """One of the templates, filled in; phrasings are drawn for all of them.

    fields: {name: its words, or a sequence of phrasings}
    """
    def words(match):
        article, name = match.groups()
        value = fields[name] if isinstance(fields[name], str) else rng.choice(fields[name])
        return a(value) if article else value

    return rng.choice([re.sub(r"{(a )?(\w+)}", words, template) for template in templates])


def upper(sentence):
    return sentence[0].upper() + sentence[1:]


def captions(scene, rng):
    """(main, minor, relation, background), random.Random -> raw, short and long caption.

    raw is like a web page's alt text, often only a name; short names everything once; long (40 to 90 words)
    also tells what the seven questions of the long prompt set ask: characteristics, what happens, the mood.
    """
    main, minor, relation, background = scene
    where, events, moods = (phrasings.split(", ") for phrasings in BACKGROUNDS[background])
    kind, look = OBJECTS[main]
    minor_kind, minor_look = OBJECTS[minor]
    fields = {"main": main, "kind": kind, "look": look, "minor": minor, "minor_kind": minor_kind,
              "minor_look": minor_look, "verb": rng.choice(KINDS[kind][0].split()),
              "place": where, "rel": RELATIONS[relation]}
    raw = phrase(RAWS, fields, rng)
    fields["big"] = rng.choice(["large", "big", "huge"])
    fields["small"] = rng.choice(["small", "little", "tiny"])
    short, opening, other = (phrase(templates, fields, rng) for templates in (SHORTS, OPENINGS, MINORS))
    fields["event"], fields["other_event"] = rng.sample(events, 2)
    event = phrase(EVENTS, fields, rng)
    fields["mood"], fields["other_mood"] = rng.sample(moods, 2)
    mood = phrase(MOODS, fields, rng)
    # The minor object's sentence may speak of "it", so it follows the opening; what comes around is shuffled.
    orders = [opening, other, event, mood], [mood, opening, other, event], [opening, other, mood, event]
    return raw, upper(short), " ".join(upper(sentence) for sentence in rng.choice(orders))
