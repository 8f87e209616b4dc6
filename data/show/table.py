"""Results as lines of text, from the JSON that evaluate.py writes."""
COUNTS = {"n_texts": "texts", "n_images": "pictures", "n_classes": "names"}


def cells(figures, ci95):
    """Percentages and their 95% intervals, of those that have one."""
    return "   ".join("{} {:5.1f} {:14}".format(name, figures[name], "[{:.1f}, {:.1f}]".format(*ends))
                      for name, ends in ci95.items())


def row(part):
    """A part in one line: R@1 both ways, or accuracy."""
    if "text_to_image" not in part:
        return cells(part, part["ci95"])
    return "   ".join(f"{way.replace('_', ' ')} {cells(part[way], {'R@1': recalls['R@1']})}"
                      for way, recalls in part["ci95"].items())


def table(result):
    """The numbers of a result, part by part."""
    lines = []
    for name, part in (result.get("parts") or {result["bench"]: result}).items():
        counts = [f"{part[key]} {word}" for key, word in COUNTS.items() if key in part]
        chance = part.get("chance", 100 / part["n_images"])
        lines.append(f"{name}: {', '.join(counts)}, chance {chance:.1f}")
        if "text_to_image" in part:
            lines += [f"    {way.replace('_', ' '):16}{cells(part[way], recalls)}"
                      for way, recalls in part["ci95"].items()]
        else:
            lines.append(f"    {row(part)}")
        lines += rows(part.get("languages", {}))
    return lines


def rows(parts):
    return [f"    {name:16}{row(part)}" for name, part in parts.items()]


def group_table(result):
    """A line a benchmark, and one for their average."""
    members = result["benchmarks"]
    return [f"{result['bench']}: {len(members)} benchmarks", *rows(members | {"average": result})]


def facet_table(subsets):
    """What evaluate.ablation returns."""
    lines = ["R@1 with some facets only, from one set of embeddings (inference only, the checkpoint stays)"]
    for subset in subsets:
        facets = ",".join(map(str, subset["facets"]))
        lines.append(f"    {subset['kind']:12} {facets:16}{row(subset)}")
    return lines
