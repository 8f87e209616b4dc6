"""The page of evaluate.py --search: type a sentence or drop a picture, and see what a gallery has of it.

All that is on it comes from this machine: no font or script of others, and nobody is told. It listens on
127.0.0.1 alone; data/README.md says how to put it behind an address of one's own.
"""
import base64
import functools
import io
import os
import sys
from contextlib import contextmanager
from html import escape
from pathlib import Path

import numpy as np
from PIL import ImageOps

from data.pictures import Place, open_picture
from data.show.plots import facet_names
from data.show.sheet import best_of, printable, thumbnail
from data.show.words import words_of
from data.towers import trained_facets
from flame import InputError, explained

LONG = 15     # words; a longer text is asked the long set's questions
TILES = 24    # pictures shown at once, or --top
SIDE = 240    # pixels of a thumbnail
COLOURS = ("#64748b", "#dc2626", "#ea8a0c", "#2563eb", "#0ea5c6", "#7c3aed", "#059669")    # of facets

# A click says which picture it was on; where its words are out of sight they are scrolled to.
CLICK = """element.addEventListener('click', event => {
    const tile = event.target.closest('button');
    if (tile) trigger('click', {picture: Number(tile.dataset.picture)});
});"""
LOOK = "() => document.getElementById('words').scrollIntoView({behavior: 'smooth', block: 'nearest'})"


def prompts_of(args, query):
    return args.prompts or ("long" if len(query.split()) > LONG else "raw")


def serve(args, places, image, towers, encode_images, encode_texts, wait=True):
    """Serves the page until Ctrl-C; wait=False: -> its gradio Blocks at once, local_url is their address.

    places: the gallery, M of them; image: their unit vectors [M, D]; the rest as in search.search.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"    # read when it is imported
    try:
        import gradio
    except ImportError:
        raise InputError("--search without a text opens a page: pip install gradio") from None
    towers.encoder()    # the LLM is read now, not while somebody waits
    blocks = build(gradio, args, places, image, towers, encode_images, encode_texts)
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    for k, colour in enumerate(COLOURS, 1):
        style += f"#facets label:nth-of-type({k}) {{ --facet: {colour}; }}\n"
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.launch(server_name="127.0.0.1", inbrowser=wait and sys.stdout.isatty(), prevent_thread_lock=True,
                  quiet=True, share=False, ssr_mode=False, run_history=False, footer_links=[],
                  max_file_size="50mb", theme=theme, css=style)
    print(f"{len(image)} pictures to search: {blocks.local_url}   (Ctrl-C ends it)", flush=True)
    if wait:
        blocks.block_thread()
    return blocks


def build(gradio, args, places, image, towers, encode_images, encode_texts):
    """-> the page. "text", "facets", "picture" and "words" are what gradio's client may call, too."""
    ask = functools.lru_cache(256)(functools.partial(ask_facets, towers, encode_texts))
    draw_tile = functools.lru_cache(4096)(lambda i: tile_of(i, places[i]))

    def gallery_of(vector=None, facets=()):
        """What a vector [D] finds, as HTML; with a bar for each of its facets [K, D]."""
        shown = range(len(image))[:max(TILES, args.top)]
        if vector is None:
            drawn = ["<hr><p>" for _ in shown]
        else:
            scores, shown = best_of(image, vector, len(shown))
            bars = image @ np.reshape(facets, (-1, len(vector))).T      # [M, K]: from the mean to the best
            bars = (bars - bars.mean(0)) / np.maximum(1e-6, bars.max(0) - bars.mean(0))
            drawn = [drawn_score(scores[i], scores.max(), bars[i]) for i in shown]
        tiles = [f"{draw_tile(i)}{score}{name_of(places[i])}</button>" for i, score in zip(shown, drawn)]
        return f'<div class="tiles">{"".join(tiles)}</div>'

    def by_text(text, chosen=None):
        """chosen: names of the facets that count; without, all of them."""
        text = " ".join(text.split())
        if not text:
            return gallery_of(), gradio.CheckboxGroup(visible=False), None
        with told(gradio):
            names, facets = ask(text, prompts_of(args, text))
        rows = [k for k, name in enumerate(names) if name in (chosen or names)]
        switches = gradio.CheckboxGroup(names, value=[names[k] for k in rows], visible=len(names) > 1)
        return gallery_of(facets[rows].mean(0), facets), switches, None

    def by_picture(path):
        with told(gradio):
            vectors, _ = encode_images(towers, [Place(path)], least=1)
        return gallery_of(vectors[0]), gradio.CheckboxGroup(visible=False), ""

    def by_click(event: gradio.EventData):
        place = places[int(event.picture)]
        with told(gradio), open_picture(place) as picture:
            grid = words_of(towers.model, towers.encoder().llm_dir, picture)
            return picture_with_words(picture, grid, place)

    with gradio.Blocks(title="FLAME", fill_width=True, delete_cache=(3600, 3600)) as blocks:
        text, picture, facets, words, gallery = lay_out(gradio, args, len(image), gallery_of())
        each = {"show_progress": "minimal", "concurrency_id": "towers"}     # one at a time
        text.submit(by_text, text, [gallery, facets, picture], api_name="text", **each)
        facets.input(by_text, [text, facets], [gallery, facets, picture], api_name="facets", **each)
        picture.upload(by_picture, picture, [gallery, facets, text], api_name="picture", **each)
        picture.clear(lambda: by_text(""), None, [gallery, facets, picture], api_visibility="private")
        if hasattr(towers.model, "mm"):     # open_clip's has no LLM to find words in
            gallery.click(by_click, None, words, api_name="words", **each).then(None, js=LOOK)
    return blocks


def lay_out(gradio, args, count, first):
    """-> the page's parts; the gallery shows `first`."""
    gradio.HTML(f"<b>FLAME</b> {count:,} pictures of {escape(printable(args.images))}", elem_id="head")
    with gradio.Row(elem_id="ask"):
        text = gradio.Textbox(label="a text to search for", lines=1, max_lines=6, container=False, scale=4,
                              placeholder="a fox in the snow, ein Fuchs im Schnee, un renard dans la neige",
                              autofocus=True, submit_btn=True, elem_id="text")
        picture = gradio.Image(type="filepath", sources=["upload"], height=80, scale=1, show_label=False,
                               label="a picture to search for", placeholder="or drop a picture", buttons=[],
                               elem_id="picture")
        # Its own would decode the picture first, and is long-winded where that is damaged.
        picture.preprocess = lambda upload: upload and upload.path
    facets = gradio.CheckboxGroup(label="What each question finds", visible=False, elem_id="facets")
    with gradio.Row(elem_id="answer"):
        words = gradio.HTML(elem_id="words", apply_default_css=False)
        gallery = gradio.HTML(first, elem_id="gallery", js_on_load=CLICK, apply_default_css=False)
    return text, picture, facets, words, gallery


@contextmanager
def told(gradio):
    """Whatever a stranger's text or picture raises is said on the page, which goes on."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, InputError) else explained(error)
        raise gradio.Error(text, print_exception=False) from None


def ask_facets(towers, encode_texts, text, prompts):
    """-> (names of a prompt set's facets that were trained, their unit vectors [K, D])"""
    vectors = encode_texts(towers, [text], prompts, by_facet=True)[0]
    names = [facet_names()[k] for k in trained_facets(towers.model, prompts)]
    return names, vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# ---------------------------------------------------------------- HTML; names of files are strangers'

def data_url(picture):
    """PIL image -> one that HTML can hold"""
    out = io.BytesIO()
    picture.convert("RGB").save(out, format="jpeg", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def name_of(place):
    return f"<small>{escape(printable(os.path.basename(place.path)))}</small></p>"


def tile_of(i, place):
    """Picture i of the gallery, up to its score."""
    return f'<button data-picture="{i}"><img src="{data_url(thumbnail(place, SIDE))}" alt="">'


def drawn_score(score, best, bars):
    drawn = [f'<i style="height: {bar:.0%}; --facet: {colour}"></i>' for bar, colour in zip(bars, COLOURS)]
    several = "".join(drawn) if len(drawn) > 1 else ""
    share = max(0, score / max(1e-6, best))
    return f'<hr style="width: {share:.0%}"><p><b>{score:.3f}</b><span>{several}</span>'


def picture_with_words(picture, grid, place):
    """The middle square of a picture, as the image tower sees it, and over it the words [g][g]."""
    cells = "".join(f'<span style="--letters: {len(word)}">{escape(word)}</span>'
                    for row in grid for word in row)
    url = data_url(ImageOps.fit(picture.convert("RGB"), (512, 512)))
    return (f'<div class="patches" style="--side: {len(grid)}"><img src="{url}" alt=""><p>{cells}</p></div>'
            f"<p>{name_of(place)}<small>What each patch says, in the LLM's own words</small>")
