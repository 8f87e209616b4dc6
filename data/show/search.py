"""evaluate.py --search: the pictures under a folder, ranked by texts or by a picture."""
import os

from data.pictures import Place
from data.show import page, sheet
from data.towers import encode_images, encode_texts
from flame import InputError


def search(args, places, towers):
    """Prints and draws the args.top best of each query in args.search; without any it serves the page.

    args: evaluate.py's command line. places: pictures to search. Raises InputError where there are none, or
    none can be read.
    """
    if not places:
        raise InputError(f"{args.images}: no such folder, or no pictures in it; name another")
    image, kept = encode_images(towers, places)
    places = [places[i] for i in kept]
    if not args.search:
        return page.serve(args, places, image, towers)
    rows = []
    for query in args.search:
        if os.path.isfile(query):   # a text may be too long for a file's name
            vectors, _ = encode_images(towers, [Place(query)])
        else:
            vectors = encode_texts(towers, [query], page.prompts_of(args, query))
        scores, best = sheet.best_of(image, vectors[0], args.top)
        print(f"{sheet.printable(query)}: the best of {len(image)} pictures")
        for number, i in enumerate(best, 1):
            print(f"{number:3}  {scores[i]:.4f}  {sheet.printable(places[i].path)}")
        tiles = [(places[i], sheet.GREY, f"{scores[i]:.3f}  {os.path.basename(places[i].path)[:16]}")
                 for i in best]
        rows.append(sheet.draw_row(f"the best of {len(image)} pictures", query, tiles))
    path = args.out / "search.png"
    sheet.write_rows(rows, path)
    print(f"-> {path}")
