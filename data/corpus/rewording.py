"""The demo's captions in new words: what training captions say, in words that none of them has.

Here a frozen LLM must show what it knows and its pupil was never told: that a vixen is a fox, a monsoon rain.
Only validation and test scenes are described so. tests/test_demo.py holds every word against training's.
"""
from data.corpus.words import entries, phrase, upper

# object: two other names or descriptions of it, each of which can follow an article
SYNONYMS = entries("""
    fox: vixen, reynard; cat: kitty, tabby; dog: puppy, barking canine; rabbit: bunny, burrowing coney;
    panda: bamboo eater from Sichuan, bamboo-munching Chinese mammal; bear: grizzly, salmon-catching ursine;
    tiger: Bengal jungle predator, ferocious Siberian feline; lion: king of beasts, roaring savanna predator;
    cow: heifer, dairy bovine; pig: hog, oinking swine; monkey: macaque, chattering capuchin;
    wolf: howling lupine predator, wild canine that howls; horse: stallion, mare;
    unicorn: fairytale steed, mythical equine; zebra: bar-coded African equine, Serengeti grazer;
    deer: stag, buck; giraffe: lofty acacia browser, loftiest African ungulate; elephant: pachyderm, tusker;
    camel: dromedary, desert beast of burden; hedgehog: prickly quilled mammal, bristly slug-eater;
    skunk: smelly polecat, stinky sprayer; chipmunk: acorn-hoarding rodent, cousin of the squirrel;
    frog: croaking amphibian, toad; turtle: tortoise, terrapin; crocodile: alligator, caiman;
    snail: slimy gastropod, escargot;

    chicken: hen, clucking fowl; penguin: flightless Antarctic swimmer, tuxedo-clad Antarctic emperor;
    owl: hooting raptor, wise nocturnal hooter; duck: mallard, quacker; swan: cygnet, elegant lake fowl;
    eagle: soaring raptor, American national raptor; flamingo: coral-hued wader, shrimp-eating lagoon wader;
    peacock: peafowl, strutting pheasant; parrot: macaw, squawking cockatoo;

    whale: spouting cetacean, leviathan; shark: toothy ocean predator, gilled man-eater;
    octopus: ink-squirting cephalopod, kraken; crab: pincered crustacean, scuttling crustacean;
    jellyfish: medusa, stinging gelatinous invertebrate; tropical fish: guppy, exotic aquarium pet;

    butterfly: fluttering monarch, metamorphosed caterpillar; honeybee: buzzing nectar gatherer, hive worker;
    lady beetle: speckled aphid eater, aphid-munching bug;

    red apple: crimson McIntosh, ripe cider ingredient; banana: ripe plantain, potassium-rich Chiquita;
    watermelon: juicy melon, picnic melon wedge; strawberry: shortcake berry, Wimbledon berry;
    pineapple: ananas, spiky Hawaiian crop; lemon: sour citrus, limoncello ingredient;
    peach: nectarine, fuzzy apricot; avocado: guacamole ingredient, creamy toast spread;

    eggplant: aubergine, brinjal; carrot: parsnip, crunchy carotene-rich veggie; mushroom: toadstool, fungus;

    croissant: flaky Parisian pastry, French morning pastry;
    pretzel: salty Bavarian bread, looped bakery treat;
    hamburger: Whopper, beef patty with ketchup; pizza: pepperoni pie, margherita;
    doughnut: donut, glazed Krispy Kreme; cupcake: muffin, party dessert; lollipop: sucker, swirly candy;

    bicycle: pushbike, cycle with pedals; automobile: car, sedan; bus: double-decker, passenger coach;
    fire engine: brigade truck with hoses, hose-carrying rescue lorry;
    ambulance: paramedic van, hospital transport with a siren; tractor: plow-pulling farm machine, John Deere;
    locomotive: steam train, choo-choo; airplane: jetliner, Boeing; helicopter: chopper, whirring Chinook;
    rocket: spaceship, NASA launcher; sailboat: yacht, sloop;

    guitar: Stratocaster, strummed six-string; violin: fiddle, Stradivarius; trumpet: bugle, cornet;
    drum: snare, bongo;

    cactus: saguaro, prickly desert succulent; sunflower: Helianthus, Van Gogh vase motif;
    tulip: Dutch perennial from Holland, Keukenhof perennial; Christmas tree: Yuletide fir, decorated spruce;

    umbrella: parasol, brolly; balloon: helium inflatable, party inflatable;
    soccer ball: football, FIFA kicking sphere; camera: Kodak, photographic Nikon;
    telephone: landline, handset with a dial; light bulb: incandescent lamp, Edison invention;
    key: door opener, unlocking tool; hammer: mallet, nail-driving tool; crown: tiara, royal diadem;
    top hat: stovepipe chapeau, magician fedora; robot: android, cyborg;
    jack-o-lantern: carved pumpkin, grinning Halloween gourd; house: cottage, bungalow;
    alarm clock: ringing timepiece, bedroom chronometer; wrapped gift: birthday present, surprise parcel
""")
SYNONYMS = {name: both.split(", ") for name, both in SYNONYMS.items()}
# background: (where, its mood); phrasings are separated by commas
SETTINGS = {
    "meadow": (
        "on a pasture in July, amid daisies and clover at noon, on turf in glorious daytime weather",
        "joyful, merry and sprightly, gleeful, jolly and breezy",
    ),
    "night": (
        "at the witching hour amid constellations, in nocturnal gloaming near a lunar sickle, "
        + "amid nocturnal constellations",
        "enigmatic, spellbound and slumbering, arcane and hypnotic",
    ),
    "snow": (
        "in an Arctic blizzard, amid January flurries, on the frozen tundra, on a glacier during flurries",
        "chilly and serene, glacial and tranquil, icy yet composed",
    ),
    "beach": (
        "on coastal dunes near the ocean, by the surf on a vacation coast, on a Mediterranean coast",
        "unhurried, idle and content, leisurely and balmy",
    ),
    "sunset": (
        "against a crimson horizon at eventide, in scarlet twilight, against a fiery twilight horizon",
        "amorous, ardent and stately, passionate and majestic",
    ),
    "rain": (
        "in a monsoon, in a drenching thunderstorm, amid drizzle on soaked asphalt",
        "dreary, mournful and bleak, dismal and forlorn",
    ),
    "sea": (
        "submerged amid kelp and coral, on a submerged reef, in the fathomless abyss",
        "eerie and buoyant, noiseless and unearthly, muffled and spellbinding",
    ),
    "autumn": (
        "amid October maples shedding foliage, amid oaks and maples in November, "
        + "in a copse of withered foliage",
        "plaintive, pensive and yearning, rueful and reminiscent",
    ),
    "city": (
        "downtown amid skyscrapers, in a metropolis of neon and skyscrapers, on a metropolitan boulevard",
        "bustling, hectic and contemporary, energetic and frenzied",
    ),
    "blossom": (
        "amid sakura and magnolias in April, in a Kyoto orchard in April, amid budding sakura at Easter",
        "dainty, optimistic and affectionate, fragile and promising",
    ),
}
# relation: phrasings of where the minor object is, seen from the main one; as on a map, up is north
RELATIONS = {
    "left": ("to the west of", "on the western flank of", "westward from"),
    "right": ("to the east of", "on the eastern flank of", "eastward from"),
    "above": ("to the north of", "perched atop", "at a greater altitude than"),
    "below": ("to the south of", "at the foot of", "lower than"),
    "front": ("partly covering", "nearer to the viewer than", "obscuring part of"),
}
CAPTIONS = (
    "{place}, {a big} dominates the view; {a small} appears {rel} it, and the vibe is {mood}.",
    "notice how {a small}, positioned {rel} {a big}, completes this rather {mood} composition, set {place}.",
    "viewers first notice {a big} {place}. Then {a small} emerges {rel} it. Altogether the tone is {mood}.",
    "somebody sketched {a big} {place}, added {a small} {rel} it, and thereby conveyed something {mood}.",
    "{a mood} spirit reigns {place}, where {a big} claims all attention and {a small} appears {rel} it.",
    "{place}, {rel} {a big}, we discover {a small}. Presumably the artist intended {a mood} ambience.",
    "the protagonist, {a big}, appears {place}; {rel} it we discover {a small}. Critics call it {mood}.",
    "imagine {a big} {place}. Now add {a small} {rel} it, and let the ambience become {mood}.",
)


def reworded(scene, rng):
    """(main, minor, relation, background), random.Random -> a caption of 20 to 50 words, telling all four."""
    main, minor, relation, background = scene
    where, moods = SETTINGS[background]
    fields = {
        "place": rng.choice(where.split(", ")),
        "mood": rng.choice(moods.split(", ")),
        "rel": rng.choice(RELATIONS[relation]),
        "big": f"{rng.choice(['enormous', 'hefty', 'giant'])} {rng.choice(SYNONYMS[main])}",
        "small": f"{rng.choice(['miniature', 'petite', 'diminutive'])} {rng.choice(SYNONYMS[minor])}",
    }
    return upper(phrase(CAPTIONS, fields, rng))
