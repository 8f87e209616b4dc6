"""evaluate.py --search and --vectors: pictures under a folder, ranked by texts or a picture, or encoded."""
import os

from data import files
from data.pictures import Place
from data.show import page, sheet
from data.towers import encode_images, encode_texts
from flame import InputError


def search(args, places, towers):
    """Prints and draws the args.top best of each query in args.search; without any it serves the page. With
    args.vectors it writes them there, float32 [M, D], and beside it the M paths.

    args: evaluate.py's command line. places: pictures to search. Raises InputError where there are none, or
    none can be read.
    """
    if not places:
        raise InputError(f"{args.images}: no such folder, or no pictures in it; name another")
    image, kept = encode_images(towers, places)
    left_out = len(places) - len(kept)
    places = [places[i] for i in kept]
    if args.vectors:
        name = str(args.vectors).removesuffix(".npy")
        files.write_array(f"{name}.npy", image)
        files.write_text(f"{name}.txt", "".join(place.path.replace("\n", " ") + "\n" for place in places))
        return print(f"-> {name}.npy: {image.shape}, and the paths as .txt")
    if not args.search:
        return page.serve(args, places, image, towers, left_out).block_thread()
    head = f"the best of {len(image)} pictures"
    rows = []
    for query in args.search:
        if os.path.isfile(query):   # a text may be too long for a file's name
            vectors, _ = encode_images(towers, [Place(query)])
        else:
            text = query.encode("utf-8", "replace").decode()   # the shell may hand over any bytes
            vectors = encode_texts(towers, [text], page.prompts_of(args, text))
        scores, best = sheet.best_of(image, vectors[0], args.top)
        print(f"{sheet.printable(query)}: {head}")
        for number, i in enumerate(best, 1):
            print(f"{number:3}  {scores[i]:.4f}  {sheet.printable(places[i].path)}")
        tiles = [(places[i], f"{scores[i]:.3f}  {os.path.basename(places[i].path)[:16]}", False)
                 for i in best]
        rows.append(sheet.draw_row(head, query, tiles))
    path = args.out / "search.png"
    sheet.write_rows(rows, path)
    print(f"-> {path}")
