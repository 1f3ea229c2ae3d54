"""Metrics on the terminal."""

import math


def print_results(results: dict[str, float], constant: dict[str, float], heading: str = "held out") -> None:
    """Print the metrics beside a constant prediction's; single classes and means over images are in the files alone.

    Args:
        results: Metrics by full name.
        constant: The same of a constant prediction; without any, there is no column of it.
        heading: Which samples they are of.
    """
    from rich.console import Console
    from rich.table import Table

    columns = ["metric", heading, *(["constant prediction"] if constant else [])]
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in results.items():
        if "/iou/" not in name and not name.endswith("_image") and math.isfinite(value):
            beside = constant.get(name, math.nan)
            cells = [name, f"{value:.4f}", f"{beside:.4f}" if math.isfinite(beside) else ""]
            table.add_row(*cells[: len(columns)])
    Console().print(table)
