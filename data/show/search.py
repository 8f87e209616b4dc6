"""evaluate.py --search: the pictures under a folder, ranked by a text."""
import numpy as np

from data import benchmarks, cache, files
from data.show import fonts, report
from flame import InputError


def pictures_under(folder):
    pictures = benchmarks.pictures_in(folder, deep=True)
    if not pictures:
        suffixes = " ".join(sorted(benchmarks.IMAGE_SUFFIXES))
        raise InputError(f"{folder}: no pictures, {suffixes}; name another folder")
    return pictures


def search(args, prompts, pictures, towers, encode_images, encode_texts):
    """Prints and draws the ten best; what the image tower says of all of them is kept beside them.

    args: the command line; towers, encode_images, encode_texts: evaluate.py's.
    """
    folder = args.images
    index_path = folder / ".flame-index.npz"
    before = cache.read_index(index_path)
    cached = towers._replace(cached=dict(before))
    image, kept = encode_images(cached, pictures, folder=folder, least=1)
    pictures = [pictures[i] for i in kept]
    index = {}      # without what is gone or has changed
    for picture, vector in zip(pictures, image):
        index[cache.picture_key(towers.image_tower, picture, folder)] = vector.tobytes()
    if index.keys() != before.keys():
        cache.write_index(index_path, index)

    text = encode_texts(towers, [args.search], prompts)
    nothing = np.array([-1])    # is the right answer to what nobody knows
    shown = report.Shown([args.search], text, pictures, image, nothing, np.arange(len(image)), prompts)
    row = report.found_for(shown, 0, best=10)
    for place, tile in enumerate(row["found"], 1):
        print(f"{place:3}  {tile['score']:.4f}  {fonts.printable(pictures[tile['picture']])}")

    path = args.out / "search.png"
    files.write(path, report.draw_sheet([row], pictures, named=True).save)
    print(f"the best of {len(image)} pictures, prompts {prompts}   -> {path}")
