"""evaluate.py --search: the pictures under a folder, ranked by a text."""
import numpy as np

from data import benchmarks, cache, files
from data.show import fonts, report


def search(text, folder, prompts, towers, encode_images, encode_texts, out):
    """Prints and draws the ten best; what the image tower says of all of them is kept beside them.

    towers, encode_images, encode_texts: evaluate.py's.
    """
    index_path = benchmarks.need(folder) / ".flame-index.npz"
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in benchmarks.IMAGE_SUFFIXES)
    before = cache.read_index(index_path)
    index = dict(before)
    image, kept = encode_images(towers._replace(cached=index), pictures, folder=folder, least=1)
    keys = [cache.picture_key(towers.image_tower, picture, folder) for picture in pictures]
    index = {key: index[key] for key in keys if key in index}      # what is gone or changed is dropped
    if index.keys() != before.keys():
        cache.write_index(index_path, index)
    vector = encode_texts(towers, [text], prompts)[0]
    pictures = [pictures[i] for i in kept]
    row = report.found_for(text, vector, image, found=10)
    for place, tile in enumerate(row["found"], 1):
        print(f"{place:3}  {tile['score']:.4f}  {fonts.printable(pictures[tile['picture']])}")
    files.write(out / "search.png", report.draw_sheet([row], pictures, named=True).save)
    print(f"the best of {len(image)} pictures, prompts {prompts}   -> {out / 'search.png'}")
