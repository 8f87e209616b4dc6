"""Results as lines of text, from the JSON that evaluate.py writes."""
from data.show.plots import facet_names

DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text",
              "both_ways": "average of both"}
ACCURACY = ("top1", "top5", "mean_per_class")
COUNTS = {"n_texts": "texts", "n_images": "pictures", "n_classes": "names"}


def cells(part, keys, direction=None):
    """Figures and their 95% intervals, percent."""
    ci95 = part["ci95"]
    values = part
    if direction:
        values, ci95 = part[direction], ci95[direction]
    return "   ".join("{} {:5.1f} {:14}".format(key, values[key], "[{:.1f}, {:.1f}]".format(*ci95[key]))
                      for key in keys)


def row(part):
    """The first figures of a part, in one line: R@1 both ways, or accuracy."""
    if "text_to_image" in part:
        ways = ("text_to_image", "image_to_text")
        return "   ".join(f"{DIRECTIONS[way]} {cells(part, ['R@1'], way)}" for way in ways)
    return cells(part, [key for key in ACCURACY if key in part])


def table(result):
    """The numbers of a result, part by part."""
    lines = []
    for name, part in (result.get("parts") or {result["bench"]: result}).items():
        counts = [f"{part[key]} {word}" for key, word in COUNTS.items() if key in part]
        languages = part.get("languages", {})
        counts += [f"{len(languages)} languages"] if languages else []
        chance = part.get("chance", 100 / part["n_images"])
        lines.append(f"{name}: {', '.join(counts)}, chance {chance:.1f}")
        for direction, words in DIRECTIONS.items():
            if direction in part:
                lines.append(f"    {words:16}{cells(part, part[direction], direction)}")
        if "top1" in part:
            lines.append(f"    {row(part)}")
        lines += [f"    {language:8}{row(of)}" for language, of in languages.items()]
    return lines


def group_table(result):
    """A line a benchmark, and one for their average."""
    members = result["benchmarks"]
    lines = [f"    {name:16}{row(part)}" for name, part in {**members, "average": result}.items()]
    return [f"{result['bench']}: {len(members)} benchmarks", *lines]


def facet_table(rows):
    """What evaluate.ablation returns."""
    lines = ["R@1 with some facets only, from one set of embeddings (inference only, the checkpoint stays)"]
    for subset in rows:
        facets = ",".join(map(str, subset["facets"]))
        if subset["kind"] == "alone":
            facets += f" {facet_names()[subset['facets'][0] - 1]}"
        lines.append(f"    {subset['kind']:12} {facets:32} {row(subset)}")
    return lines
