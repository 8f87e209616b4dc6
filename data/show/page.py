"""The page of evaluate.py --search: type a sentence or drop a picture, and see what a gallery has of it.

All that is on it comes from this machine: no font or script of others, and nobody is told. It listens on
127.0.0.1 alone; data/README.md says how to put it behind an address of one's own.
"""
import base64
import functools
import io
import os
import sys
from html import escape
from pathlib import Path

from data.pictures import Place, open_picture
from data.show.sheet import best_of, printable, thumbnail
from data.show.words import words_of
from data.towers import encode_facets, encode_images, trained_facets
from flame import InputError

# What each of the questions of flame.PROMPTS asks for, in order.
FACETS = ("the whole", "main object", "main trait", "minor object", "minor trait", "action", "atmosphere")
LONG = 15     # words; a longer text is asked the long set's questions
TILES = 24    # pictures shown at once, or --top
SIDE = 240    # pixels of a thumbnail

# A click says which picture it was on; where its words are out of sight they are scrolled to.
CLICK = """element.addEventListener('click', event => {
    const tile = event.target.closest('button');
    if (tile) trigger('click', {picture: Number(tile.dataset.picture)});
});"""
LOOK = "() => document.getElementById('words').scrollIntoView({behavior: 'smooth', block: 'nearest'})"


def prompts_of(args, query):
    return args.prompts or ("long" if len(query.split()) > LONG else "raw")


def serve(args, places, image, towers, left_out=0):
    """Opens the page and goes on -> its gradio Blocks; local_url is their address.

    places: the gallery, M of them; image: their unit vectors [M, D]; left_out: how many cannot be read.
    "text", "facets", "picture" and "words" are what gradio's client may call, too.
    """
    try:
        import gradio
    except ImportError:
        raise InputError("--search without a text opens a page: pip install gradio") from None
    towers.encoder()    # the LLM is read now, not while somebody waits
    by_text, by_picture, by_click = answers(gradio, args, places, image, towers._replace(cache=None))
    about = f"{len(image):,} pictures of {args.images}, {left_out} cannot be read"
    page = {"title": "FLAME", "fill_width": True, "delete_cache": (1800, 1800), "analytics_enabled": False}
    with gradio.Blocks(**page) as blocks:
        gradio.HTML(f"<b>FLAME</b> {escape(printable(about))}", elem_id="head")
        with gradio.Row(elem_id="ask"):
            text = gradio.Textbox(
                label="a text to search for", elem_id="text", max_lines=6, container=False, scale=4,
                placeholder="a fox in the snow, ein Fuchs im Schnee, un renard dans la neige",
                autofocus=True, submit_btn=True)
            picture = gradio.Image(
                label="a picture to search for", elem_id="picture", type="filepath", image_mode=None,
                sources=["upload"], height=80, scale=1, show_label=False, buttons=[],
                placeholder="or drop a picture")
        facets = gradio.CheckboxGroup(label="What each question finds", visible=False, elem_id="facets")
        with gradio.Row(elem_id="answer"):
            words = gradio.HTML(elem_id="words", apply_default_css=False)
            gallery = gradio.HTML(by_text("")[0], elem_id="gallery", js_on_load=CLICK,
                                  apply_default_css=False)
        each = {"show_progress": "minimal", "concurrency_id": "towers"}     # one at a time
        text.submit(by_text, text, [gallery, facets, picture], api_name="text", **each)
        facets.input(by_text, [text, facets], [gallery, facets, picture], api_name="facets", **each)
        picture.upload(by_picture, picture, [gallery, facets, text], api_name="picture", **each)
        if hasattr(towers.model, "mm"):     # open_clip's has no LLM to find words in
            gallery.click(by_click, None, words, api_name="words", **each).then(None, js=LOOK)
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.launch(server_name="127.0.0.1", inbrowser=sys.stdout.isatty(), prevent_thread_lock=True,
                  quiet=True, share=False, show_error=True, ssr_mode=False, run_history=False,
                  footer_links=[], max_file_size="50mb", theme=theme,
                  css_paths=Path(__file__).with_name("page.css"))
    print(f"{len(image)} pictures to search: {blocks.local_url}   (Ctrl-C ends it)", flush=True)
    return blocks


def answers(gradio, args, places, image, towers):
    """-> what answers a text, a picture, and a click on one of the gallery"""
    image_of = functools.lru_cache(4096)(lambda i: drawn(thumbnail(places[i], SIDE)))

    @functools.lru_cache(256)
    def ask(text):
        """-> (names of the facets that were trained, their vectors [K, D])"""
        prompts = prompts_of(args, text)
        names = [FACETS[k] for k in trained_facets(towers.model, prompts)]
        return names, encode_facets(towers, [text], prompts)[0]

    def gallery_of(vector):
        """What a vector [D] finds, as HTML; for zeros the first pictures, without scores."""
        scores, best = best_of(image, vector, max(TILES, args.top))
        shares = scores / max(1e-6, scores.max())
        tiles = [f'<button data-picture="{i}">{image_of(i)}<hr style="width: {shares[i]:.0%}">'
                 f"<p><b>{scores[i]:.3f}</b>{name_of(places[i])}</p></button>" for i in best]
        return f'<div class="tiles{"" if vector.any() else " plain"}">{"".join(tiles)}</div>'

    def by_text(text, chosen=None):
        """chosen: names of the facets that count; without, all of them."""
        text = " ".join(text.split())
        if not text:
            return gallery_of(0 * image[0]), gradio.CheckboxGroup(visible=False), None
        names, facets = ask(text)
        chosen = chosen or names
        rows = [name in chosen for name in names]
        switches = gradio.CheckboxGroup(names, value=chosen, visible=len(names) > 1)
        return gallery_of(facets[rows].mean(0)), switches, None

    def by_picture(path):
        vectors, _ = encode_images(towers, [Place(path)])
        return gallery_of(vectors[0]), gradio.CheckboxGroup(visible=False), ""

    def by_click(event: gradio.EventData):
        place = places[int(event.picture)]
        with open_picture(place) as picture:
            words, strengths = words_of(towers.model, towers.encoder().llm_dir, picture)
        cells = [f'<span style="--letters: {max(4, len(word))}; opacity: {share:.2f}">{escape(word)}</span>'
                 for word, share in zip(words.flat, strengths.flat)]
        return (f'<div class="patches" style="--side: {len(words)}">{drawn(thumbnail(place, 720))}'
                f"{''.join(cells)}</div>{name_of(place)}"
                "<small>Each patch in the LLM's own words; the fainter, the weaker (by cosine)</small>")
    return by_text, by_picture, by_click


def drawn(picture):
    """PIL image, RGB -> HTML that holds it"""
    out = io.BytesIO()
    picture.save(out, format="jpeg", quality=82)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}" alt="">'


def name_of(place):
    return f"<small>{escape(printable(os.path.basename(place.path)))}</small>"
