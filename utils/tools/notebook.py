"""Shows a run's folder in a notebook: its report, or its curves and samples where it has none."""

import html
from pathlib import Path

from utils.config.options import UserError
from utils.config.user_files import read_bytes

LARGEST_REPORT = 64 * 2**20  # bytes: a page this large is opened from its file
MOST_IMAGES = 16


def show_run(folder: str | Path, height: int = 900) -> None:
    """Displays `report.html` of a run in the notebook, in a frame of its own; without one, its curves and samples.

    Args:
        folder: the output folder of a training run, or that of evaluate_pipeline.py.
        height: of the frame, in pixels.

    Raises:
        UserError: if there is nothing to show.
    """
    from IPython.display import HTML, Image, display

    folder = Path(folder)
    report = folder / "report.html"
    if report.is_file() and report.stat().st_size <= LARGEST_REPORT:
        page = html.escape(read_bytes(report, LARGEST_REPORT).decode("utf-8", "replace"), quote=True)
        size = f'width="100%" height="{height:d}" frameborder="0"'
        display(HTML(f'<iframe srcdoc="{page}" sandbox="allow-scripts" {size}></iframe>'))
        return
    pictures = _pictures(folder)
    if not pictures:
        raise UserError(f"{folder} has no report.html and no samples; give the output folder of a run")
    for picture in pictures:
        display(Image(filename=str(picture)))


def _pictures(folder: Path) -> list[Path]:
    """The curves of a run, and its last samples."""
    curves = [
        path for name in ("training_curves", "lr_schedule") if (path := folder / "plots" / f"{name}.png").is_file()
    ]
    grid = folder / "val_imgs_grid.png"
    return [
        *curves,
        *([grid] if grid.is_file() else sorted((folder / "samples" / "final").glob("*.png"))[:MOST_IMAGES]),
    ]
