"""Formats results as lines of text, from the JSON that evaluate.py writes."""
COUNTS = {"n_texts": "texts", "n_images": "images", "n_classes": "names", "skipped_texts": "texts skipped",
          "skipped_images": "images skipped", "trained_texts": "texts also in training"}


def heading(name, result):
    """Return a result's name and counts."""
    counts = [f"{result[key]} {word}" for key, word in COUNTS.items() if result.get(key)]
    counts.append(f"{len(result['benchmarks'])} benchmarks" if "benchmarks" in result else
                  f"chance {result['chance']:.1f}%")
    return f"{name}: {', '.join(counts)}"


def cells(metrics, ci95):
    """Format percentages and their 95% intervals."""
    return "   ".join("{} {:5.1f} {:14}".format(name, metrics[name], "[{:.1f}, {:.1f}]".format(*ends))
                      for name, ends in ci95.items())


def row(result):
    """Format a result as one line: R@1 both ways, or accuracy."""
    if "text_to_image" not in result:
        return cells(result, result["ci95"])
    return "   ".join(f"{direction} {cells(result[direction], {'R@1': recalls['R@1']})}"
                      for direction, recalls in result["ci95"].items())


def table(name, result, details=("languages", "benchmarks", "facets")):
    """Format a result with its parts, languages, benchmarks or facet subsets, one line each. The languages of
    a part are only in the JSON file.
    """
    lines = [heading(name, result)]
    if "parts" in result:
        lines = [line for part in result["parts"].items() for line in table(*part, details=())]
    elif "text_to_image" in result:
        lines += [f"    {direction}   {cells(result[direction], recalls)}"
                  for direction, recalls in result["ci95"].items()]
    else:
        lines.append(f"    {row(result)}")
    return lines + [f"    {name:26}{row(each)}" for several in details
                    for name, each in result.get(several, {}).items()]
