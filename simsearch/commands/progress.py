"""simsearch progress: shows the live state of a sweep."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from omegaconf import DictConfig
from rich.live import Live

from simsearch import program, terminal
from simsearch.sweeps.progress import is_open, progress_table


@program.command("progress")
def main(config: DictConfig) -> None:
    """Runs the command `simsearch progress`.

    Args:
        config: The config of conf/progress.yaml.

    Raises:
        ValueError: If `watch` is negative.
    """
    folder = Path(config.folder)
    if config.watch < 0:
        raise ValueError(f"watch={config.watch}: give the seconds between updates, or 0 to print once")
    if not config.watch or not sys.stdout.isatty():
        terminal.show(progress_table(folder))
        return
    with Live(progress_table(folder, newest_first=True), refresh_per_second=1) as live:
        while is_open(folder):
            time.sleep(config.watch)
            live.update(progress_table(folder, newest_first=True))
        live.update(progress_table(folder))


if __name__ == "__main__":
    main()
