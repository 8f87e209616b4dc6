"""Results as lines of text, from the JSON that evaluate.py writes."""
COUNTS = {"n_texts": "texts", "n_images": "pictures", "n_classes": "names", "skipped_texts": "texts left out",
          "skipped_images": "pictures left out", "trained_texts": "texts that training had"}


def heading(name, result):
    """A result's name, and what was counted."""
    counts = [f"{result[key]} {word}" for key, word in COUNTS.items() if result.get(key)]
    counts.append(f"{len(result['benchmarks'])} benchmarks" if "benchmarks" in result else
                  f"chance {result['chance']:.1f}%")
    return f"{name}: {', '.join(counts)}"


def cells(figures, ci95):
    """Percentages and their 95% intervals, of those that have one."""
    return "   ".join("{} {:5.1f} {:14}".format(name, figures[name], "[{:.1f}, {:.1f}]".format(*ends))
                      for name, ends in ci95.items())


def row(result):
    """A result in one line: R@1 both ways, or accuracy."""
    if "text_to_image" not in result:
        return cells(result, result["ci95"])
    return "   ".join(f"{way} {cells(result[way], {'R@1': recalls['R@1']})}"
                      for way, recalls in result["ci95"].items())


def table(name, result):
    """A result, part by part; in a line each the results that it is the mean of, or that some facets give."""
    if "parts" in result:
        lines = [line for part in result["parts"].items() for line in table(*part)]
    elif "text_to_image" in result:
        lines = [f"    {way}   {cells(result[way], recalls)}" for way, recalls in result["ci95"].items()]
        lines.insert(0, heading(name, result))
    else:
        lines = [heading(name, result), f"    {row(result)}"]
    return lines + [f"    {name:26}{row(each)}" for several in ("languages", "benchmarks", "facets")
                    for name, each in result.get(several, {}).items()]
