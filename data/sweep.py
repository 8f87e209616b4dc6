"""An experiment in one command: a list of values is a sweep. Each value is embedded where that is needed,
trained and scored, by embed.py, train.py and evaluate.py; at the end stand a table, a JSON and a plot.

    python data/sweep.py --captions mine.tsv --vary facets 1 3 7       # the paper's ablation, on any store
    python data/sweep.py --bench urban1k --vary loss sigmoid infonce --seeds 3
    python data/sweep.py --bench demo --vary mask decoupled causal     # what is decoupling worth?
    python data/sweep.py --bench demo --vary layer 10 20 29 --train --steps 300

What can vary: facets (the first K questions of the long set alone); layer, llm, mask, prompts-file (these
embed the store's captions anew; the value `store` is the store as it is); every setting of train.py, `true`
or `false` for a switch. What follows --train goes there. What is finished is kept, so the same command goes
on where it was stopped: a store that is whole, a run that has taken all its steps, a result. Texts that are
scored are encoded once for all runs of one LLM.
"""
import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import evaluate
import flame
from data import command, files
from data.show import plots, report, runs
from flame import InputError
from train import SETTINGS, newest_store

OF_EMBED = ("layer", "llm", "mask", "prompts-file")
SWITCHES = [name.replace("_", "-") for name, row in SETTINGS.items() if row[2] is bool]
SHOWN = ("text_to_image", "image_to_text", "top1", "accuracy")  # of a result's figures


def stage(script, *arguments):
    """Runs a stage here; what went wrong it has said itself."""
    line = [str(argument) for argument in arguments]
    print(f"\n$ python {script} {' '.join(line)}", flush=True)
    code = subprocess.run([sys.executable, REPOSITORY / script, *line]).returncode
    if code:
        sys.exit(code)


def flags(**given):
    """name=value -> ["--name", value], where there is a value; a list goes in whole."""
    line = []
    for name, value in given.items():
        if value:
            line += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return line


def embedded(args, value):
    """-> the store to train on: the given one, or of its captions another, made by embed.py."""
    meta = args.store.meta
    llm = meta["llm"]
    mask = {"restart": "decoupled", "causal": "causal"}.get(llm["positions"])
    own = {"layer": str(llm["layer"]), "llm": llm.get("path"), "mask": mask}
    if args.name not in OF_EMBED or value in ("store", own.get(args.name)):
        return args.store.path
    if llm["positions"] != "restart" or llm.get("questions"):
        raise InputError(f"{args.store.path}: made with --compat, --mask or --prompts-file; "
                         "vary another store")
    out = Path("data/embeddings/sweep", f"{args.store.path.name}-{args.name}-{plain(value)}")
    captions = meta["captions"]
    joins = [f"{name}={file}" for name, file in captions.get("joins", {}).items()]
    same = flags(captions=captions["path"], join=joins, prompts=",".join(meta["prompts"]),
                 dtype=meta["dtype"], store=meta["store"])
    stage("embed.py", *same, *flags(**{"llm": own["llm"], args.name: value}, out=out))
    return out


def plain(value):
    """For a file's name."""
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_.") or "none"


def of_training(args, value):
    """-> the flag of train.py that makes the difference."""
    if args.name in OF_EMBED:
        return []
    if args.name == "facets":
        return ["--columns", ",".join(f"long.{k}" for k in range(int(value)))]
    if args.name in SWITCHES:
        return [f"--{args.name}" if value == "true" else f"--no-{args.name}"]
    return [f"--{args.name}", value]


def scored(args, value, seed):
    """Trains and scores one value -> evaluate.py's result, and in it the flags that it answers ("asked")."""
    store = embedded(args, value)
    given = "".join(f"-{plain(flag.lstrip('-'))}" for flag in args.train)  # other flags, other runs
    run = Path("sweep", f"{args.store.path.name}-{args.name}-{plain(value)}{given}-{seed}")
    line = flags(embeddings=store, images=args.images, name=run, seed=str(seed))
    stage("train.py", *line, *of_training(args, value), *args.train)
    weights = Path("out") / run / "model.safetensors"
    llm = None
    if args.name == "llm":  # $FLAME_LLM may be another
        llm = args.store.meta["llm"].get("path") if value == "store" else value
    asked = [str(flag) for flag in args.asked + flags(checkpoint=weights.parent, llm=llm)]
    path = args.out / f"{plain(value)}-{seed}.json"
    result = files.read_marker(path) or {}
    if result.get("asked") != asked or path.stat().st_mtime < weights.stat().st_mtime:
        stage("evaluate.py", *asked, "--out", args.out)
        fresh = args.out / f"{args.bench}.json"
        if fresh.with_suffix(".npz").exists():  # a group has none
            fresh.with_suffix(".npz").replace(path.with_suffix(".npz"))
        result = json.loads(fresh.read_text(encoding="utf-8")) | {"asked": asked}
        files.write_json(path, result)
        fresh.unlink()
    return result


def summary(value, results):
    """Of all seeds of a value -> a row: means, the means of their intervals, the seeds' deviations."""
    def over_seeds(do, of=None):
        every = [runs.compared(result, of) for result in results]
        shown = [what for what in every[0] if what.endswith(SHOWN)]
        return {what: do([found[what] for found in every]) for what in shown}

    return {
        "name": value,
        "seeds": len(results),
        "figures": over_seeds(lambda values: float(np.mean(values))),
        "ci95": over_seeds(lambda values: np.mean(values, axis=0).tolist(), "ci95"),
        "deviation": over_seeds(lambda values: float(np.std(values, ddof=len(values) > 1))),
    }


def table(rows):
    """-> lines: a figure a line, a value a column; ± is the seeds' standard deviation."""
    lines = [f"{'':36}" + "".join(f"{row['name'][:26]:28}" for row in rows)]
    for what in rows[0]["figures"]:
        cells = []
        for row in rows:
            spread = f" ±{row['deviation'][what]:.1f}" if row["seeds"] > 1 else ""
            cells.append(report.cell({**row["figures"], "ci95": row["ci95"]}, what).rstrip() + spread)
        lines.append(f"{runs.named(what):36}" + "".join(f"{cell:28}" for cell in cells))
    return lines


def arguments(argv):
    parser = command.Parser(description="Trains and scores a checkpoint for each of several values.",
                            usage="data/sweep.py --bench NAME | --captions FILE --vary NAME VALUE ...")
    add = parser.add_argument
    add("--vary", nargs="+", required=True, metavar="NAME VALUE",
        help=f"facets, {', '.join(OF_EMBED)} or a setting of train.py, and its values")
    add("--bench", metavar="NAME", help="what to score on, of evaluate.py's")
    add("--captions", type=Path, metavar="FILE", help="score on one's own")
    add("--embeddings", type=Path, metavar="DIR", help="default: the newest finished store")
    add("--images", type=Path, metavar="DIR", help="of the captions, where they don't say")
    add("--data-root", type=Path, metavar="DIR", help="default: data/<bench>")
    add("--split", choices=["test", "val"], help="choose on val")
    add("--seeds", type=command.number(int, 1, 100), default=1, metavar="N", help="runs a value (1)")
    add("--out", type=Path, metavar="DIR", help="default: results/sweep-<NAME>")
    add("--train", nargs=argparse.REMAINDER, default=[], metavar="...",
        help="last: what follows goes to train.py, e.g. --train --steps 300")
    args = parser.parse_args(argv)
    args.name, *args.values = args.vary
    known = ["facets", *OF_EMBED, *(name.replace("_", "-") for name in SETTINGS)]
    wanted = None
    if args.name not in known or not args.values:
        wanted = f"one of {', '.join(known)}, and its values"
    elif args.name == "facets" and not all(re.fullmatch("[1-9][0-9]?", value) for value in args.values):
        wanted = "numbers of facets, as in facets 1 3 7"
    elif args.name in SWITCHES and not {"true", "false"} >= set(args.values):
        wanted = "true and false"
    if wanted:
        raise InputError(f"--vary {' '.join(args.vary)}: give {wanted}")
    images = args.images if args.captions else None
    args.asked = flags(bench=args.bench, captions=args.captions, images=images, data_root=args.data_root,
                       split=args.split)
    # Its mistakes are found now; on the CPU, so that a GPU is left to the stages.
    scoring = evaluate.settings([str(flag) for flag in [*args.asked, "--device", "cpu"]])
    args.bench = scoring.bench
    if args.name == "facets" and set(scoring.asked) != {"long"}:
        raise InputError("--vary facets trains on the long set's questions alone, "
                         f"{args.bench} asks by others; score on captions")
    args.out = args.out or Path("results", f"sweep-{args.name}")
    return args


def main(argv=None):
    def body():
        args = arguments(argv)
        args.store = flame.open_store(args.embeddings or newest_store())
        rows = []
        for value in args.values:
            results = [scored(args, value, seed) for seed in range(args.seeds)]
            rows.append(summary(value, results))
        result = {"bench": args.bench, "vary": args.name, "train": args.train,
                  "store": str(args.store.path), "rows": rows}
        path = args.out.with_name(args.out.name + ".json")
        files.write_json(path, result)
        print("\n" + "\n".join(table(rows)))
        print("-> " + ", ".join([str(path), *plots.draw_sweep(path.with_suffix(".png"), result)]))

    return command.run("data/sweep.py", body, "the same command goes on from what is finished")


if __name__ == "__main__":
    sys.exit(main())
