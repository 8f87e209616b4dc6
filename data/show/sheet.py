"""stand-in"""
from typing import NamedTuple

import numpy as np

from data import files
from data.show import report
from data.show.report import found_for


class Shown(NamedTuple):
    texts: list
    text: np.ndarray
    pictures: list
    image: np.ndarray
    text_ids: np.ndarray
    image_ids: np.ndarray
    prompts: str


def draw_sheet(shown, ranks, path):
    order = np.random.default_rng(0).permutation(len(ranks))
    rows = [found_for(shown, query, ranks[query]) for query in np.sort(order[:8])]
    files.write(path, report.draw_sheet(rows, shown.pictures).save)
