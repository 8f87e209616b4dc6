"""What the demo's scenes are made of, and the captions that say so."""
import functools

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


def entries(text):
    """"name: words; name: words" -> {name: words}"""
    return dict(entry.split(": ") for entry in " ".join(text.split()).split("; "))


@functools.cache
def objects():
    """Objects seen in training -> (kind, characteristic)."""
    table = {}
    for kind, (_, text) in KINDS.items():
        for name, characteristic in entries(text).items():
            table[name] = (kind, characteristic)
    return table


@functools.cache
def emoji_table():
    """English name -> (character, {language: name}) for every emoji that has a name in all 14 languages."""
    import emoji

    emoji.config.load_language()
    table = {}
    for character, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == emoji.STATUS["fully_qualified"] and entry.keys() >= set(emoji.LANGUAGES):
            names = {code: entry[code].strip(":").replace("_", " ") for code in emoji.LANGUAGES}
            # \ufe0f is a request for colour, which the font has anyway
            table[names["en"]] = (character.replace("\ufe0f", ""), names)
    return table


# ---------------------------------------------------------------- captions

# What the sentences of a long caption say, each in several ways. look, kind: the main object's.
OPENINGS = (
    "{big_main} with {look} {verb} {place}.",
    "the picture shows {big_main} {place}, {a_kind} with {look}.",
    "{place} {verb} {big_main}. This {kind} has {look}.",
    "{a_main} fills most of this drawing: {a_kind} with {look}. It {verb} {place}.",
    "this is an illustration of {big_main} {place}. The {main} has {look}.",
)
MINORS = (
    "{rel} the {main} there is {small_minor} with {minor_look}.",
    "a much smaller {minor}, {a_minor_kind} with {minor_look}, can be seen {rel} it.",
    "{small_minor} is placed {rel} the {main}; the {minor} has {minor_look}.",
    "the second object is {small_minor} {rel} the {main}. It has {minor_look}.",
    "it is not alone: {rel} it one finds {small_minor} with {minor_look}.",
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
    "it gives {a_mood} impression.",
)


def a(noun):
    return ("an " if noun[0].lower() in "aeiou" and not noun.startswith("uni") else "a ") + noun


def upper(sentence):
    return sentence[0].upper() + sentence[1:]


def captions(scene, rng):
    """(main, minor, relation, background), random.Random -> raw, short and long caption.

    raw is like a web page's alt text, often only a name; short names everything once; long (40 to 90 words)
    also tells what the seven questions of the long prompt set ask: characteristics, what happens, the mood.
    """
    main, minor, relation, background = scene
    where, events, moods = (phrasings.split(", ") for phrasings in BACKGROUNDS[background])
    kind, look = objects()[main]
    minor_kind, minor_look = objects()[minor]
    verb = rng.choice(KINDS[kind][0].split())

    def rel():
        return rng.choice(RELATIONS[relation])

    def place():
        return rng.choice(where)

    raw = rng.choice([
        main, main, a(main), f"{main} picture", f"{main} clip art",
        f"{main} and {minor}", f"{a(main)} and {a(minor)}",
        f"{main} {place()}", f"{a(main)} with {a(minor)} {place()}", f"{minor} {rel()} {a(main)}",
    ])
    big_main = a(rng.choice(["large", "big", "huge"]) + " " + main)
    small_minor = a(rng.choice(["small", "little", "tiny"]) + " " + minor)
    short = rng.choice([
        f"{a(main)} {verb} {place()}, with {small_minor} {rel()} it.",
        f"{small_minor} {rel()} {big_main} {place()}.",
        f"{place()} there is {a(main)}, and {rel()} it {small_minor}.",
        f"{big_main} with {look} {place()}; {a(minor)} is {rel()} it.",
    ])
    words = {"main": main, "a_main": a(main), "big_main": big_main, "kind": kind, "a_kind": a(kind),
             "look": look, "verb": verb, "minor": minor, "small_minor": small_minor,
             "a_minor_kind": a(minor_kind), "minor_look": minor_look}
    first = rng.choice([template.format(place=place(), **words) for template in OPENINGS])
    second = rng.choice([template.format(rel=rel(), **words) for template in MINORS])
    event, other_event = rng.sample(events, 2)
    third = rng.choice(EVENTS).format(event=event, other_event=other_event, **words)
    mood, other_mood = rng.sample(moods, 2)
    mood = rng.choice(MOODS).format(mood=mood, other_mood=other_mood, a_mood=a(mood))
    # The minor object's sentence may speak of "it", so it follows the opening; what comes around is shuffled.
    orders = [first, second, third, mood], [mood, first, second, third], [first, second, mood, third]
    sentences = rng.choice(orders)
    return raw, upper(short), " ".join(upper(sentence) for sentence in sentences)
