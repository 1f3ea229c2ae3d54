"""Metrics on the terminal."""

import math


def print_results(results: dict[str, float], constant: dict[str, float]) -> None:
    """Print the metrics beside a constant prediction's; single classes and means over images are in the files alone."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "held out", "constant prediction", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in results.items():
        if "/iou/" not in name and not name.endswith("_image") and math.isfinite(value):
            beside = constant.get(name, math.nan)
            table.add_row(name, f"{value:.4f}", f"{beside:.4f}" if math.isfinite(beside) else "")
    Console().print(table)
