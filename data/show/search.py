"""evaluate.py --search: rank the images of a folder by texts or an image."""
import os

from data.encoders import encode_images, encode_texts
from data.images import ImageLocation
from data.show import page, sheet
from flame import InputError


def search(args, locations, encoders):
    """Print and draw the args.top best images for each query in args.search; without queries, serve the page.

    args: evaluate.py's command line. Raises InputError if there are no images or none can be read.
    """
    if not locations:
        raise InputError(f"{args.images}: no such folder, or no images in it; give another with --images")
    image, readable = encode_images(encoders, locations)
    unreadable = len(locations) - len(readable)
    locations = [locations[i] for i in readable]
    if not args.search:
        return page.serve(args, locations, image, encoders, unreadable).block_thread()
    head = f"the best of {len(image)} images"
    rows = []
    for query in args.search:
        if os.path.isfile(query):
            vectors, _ = encode_images(encoders, [ImageLocation(query)])
        else:
            text = query.encode("utf-8", "replace").decode()  # the shell may pass any bytes
            vectors = encode_texts(encoders, [text], page.choose_prompts(args, text))
        scores, best = sheet.best_of(image, vectors[0], args.top)
        print(f"{sheet.printable(query)}: {head}")
        for number, i in enumerate(best, 1):
            print(f"{number:3}  {scores[i]:.4f}  {sheet.printable(locations[i].path)}")
        tiles = [(locations[i], f"{scores[i]:.3f}  {os.path.basename(locations[i].path)[:16]}", False)
                 for i in best]
        rows.append(sheet.draw_row(head, query, tiles))
    path = args.out / "search.png"
    sheet.write_rows(rows, path)
    print(f"-> {path}")
