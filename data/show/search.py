"""evaluate.py --search: the pictures under a folder, ranked by texts or by a picture."""
import os
import sys
from pathlib import Path

import numpy as np

from data import benchmarks, files
from data.show import fonts, report
from flame import InputError

LONG = 15  # words; a longer text is asked the long set's questions


def pictures_under(folder):
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name another")
    pictures = benchmarks.pictures_in(folder, deep=True)
    if not pictures:
        suffixes = " ".join(sorted(benchmarks.IMAGE_SUFFIXES))
        raise InputError(f"{folder}: no pictures, {suffixes}; name another folder")
    return pictures


def prompts_of(args, query):
    return args.prompts or ("long" if len(query.split()) > LONG else "raw")


def typed():
    """Yields what is typed, line by line, until Ctrl-D or an empty line."""
    while True:
        print("search for: ", end="", flush=True)
        query = sys.stdin.readline().strip()
        if not query:
            print()
            return
        yield query


def search(args, pictures, towers, encode_images, encode_texts):
    """Prints and draws the args.top best of each query; without a query in args.search it asks for some.

    args: the command line; towers, encode_images, encode_texts: evaluate.py's.
    """
    image, kept = encode_images(towers, pictures, least=1)
    pictures = [pictures[i] for i in kept]
    path = args.out / "search.png"
    rows = []
    for query in args.search or typed():
        if os.path.isfile(query):   # a text may be too long for a file's name
            vector, _ = encode_images(towers, [Path(query)], least=1)
        else:
            vector = encode_texts(towers, [query], prompts_of(args, query))
        nothing = np.array([-1])    # is the right answer to what nobody knows
        shown = report.Shown([query], vector, pictures, image, nothing, np.arange(len(image)), "")
        rows.append(report.found_for(shown, 0, best=args.top))
        print(f"{fonts.printable(query)}: the best of {len(image)} pictures")
        for place, tile in enumerate(rows[-1]["found"], 1):
            print(f"{place:3}  {tile['score']:.4f}  {fonts.printable(pictures[tile['picture']])}")
        files.write(path, report.draw_sheet(rows, pictures, named=True).save)
    if rows:
        print(f"-> {path}")
