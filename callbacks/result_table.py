"""The last word of a run: its validation results as a table, and where everything lies."""

import sys
from pathlib import Path

import lightning as L

from callbacks.reconstruction_grid import ReconstructionGrid


class ResultTable(L.Callback):
    """Print ``val/<data>/<metric>`` as a table when a fit or validation ends, and write it to ``results.md``."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print after training."""
        self._report(trainer, f"Held-out results after training step {trainer.global_step}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print after ``validate``."""
        if stage == "validate":
            self._report(trainer, f"Held-out results of {trainer.ckpt_path}")

    def _report(self, trainer: L.Trainer, title: str) -> None:
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        table = markdown(metrics)
        if not table:
            return
        folder = Path(trainer.default_root_dir)
        (folder / "results.md").write_text(f"{title}\n\n{table}\n")
        lines = [f"\n{title}:\n", table, ""]
        for callback in trainer.callbacks:
            if isinstance(callback, ReconstructionGrid):
                lines += [f"pictures: {path}" for path in callback.latest]
        lines += [f"run:      {folder}"]
        sys.stdout.write("\n".join(lines) + "\n")


def markdown(metrics: dict[str, float]) -> str:
    """A Markdown table with a row per data set and a column per metric, from ``val/<data>/<metric>`` values."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "val":
            rows.setdefault(parts[1], {})[parts[2]] = value
    if not rows:
        return ""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| data | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for size, row in rows.items():
        cells = [f"{row[column]:.4g}" if column in row else "" for column in columns]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
