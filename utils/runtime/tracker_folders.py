"""Where trackers keep their files: in the run's output folder, unless the environment names another place."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

VARIABLES: Mapping[str, Mapping[str, str]] = {
    "wandb": {"WANDB_DIR": ""},
    "swanlab": {"SWANLAB_LOG_DIR": "swanlog"},
    "mlflow": {"MLFLOW_TRACKING_URI": "mlruns"},
    "trackio": {"TRACKIO_DIR": "trackio"},
    "comet_ml": {"COMET_OFFLINE_DIRECTORY": "comet_ml"},
    "clearml": {"CLEARML_CACHE_DIR": "clearml"},
}
"""By tracker: the environment variable of its folder, and the folder's place in the output folder."""
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "mlflow": {"MLFLOW_ALLOW_FILE_STORE": "true"},
}
"""By tracker: other variables."""
READ_AT_IMPORT = ("trackio",)
"""Packages that read their variable when they are imported, and never again."""


@contextmanager
def kept_within(folder: Path, trackers: Sequence[str]) -> Iterator[None]:
    """Context manager: sets the trackers' environment variables; those that are set already stay as they are.

    Args:
        folder: the output folder.
        trackers: names of the run's trackers.
    """
    wanted = {name: place for tracker in trackers for name, place in VARIABLES.get(tracker, {}).items()}
    settings = {name: value for tracker in trackers for name, value in SETTINGS.get(tracker, {}).items()}
    settings |= {name: _value(name, folder / place) for name, place in wanted.items()}
    added = {name: value for name, value in settings.items() if not os.environ.get(name)}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    for tracker in READ_AT_IMPORT:
        if tracker in trackers and added.keys() & VARIABLES[tracker].keys():
            _forget(tracker)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _forget(package: str) -> None:
    """Lets the next import of a package load it again: an earlier run of this process had another folder."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def _value(name: str, folder: Path) -> str:
    whole = folder.absolute()
    if name != "MLFLOW_TRACKING_URI":
        return str(whole)
    if find_spec("sqlalchemy") is None:  # mlflow-skinny, which has only files
        return whole.as_uri()
    return f"sqlite:///{whole / 'mlflow.db'}"


def start_arguments(folder: Path) -> dict[str, dict[str, object]]:
    """Returns the arguments by which accelerate starts each tracker, for those that don't go by their environment.

    It creates the folder of MLflow's database, if that is within the output folder.

    ClearML would also upload each file that torch saves, and DVCLive write dvc.yaml and a commit into the user's
    repository: both are left out.
    """
    places = {name: os.environ.get(name, "") for variables in VARIABLES.values() for name in variables}
    folder = folder.absolute()
    is_here = str(folder / "mlruns") in places["MLFLOW_TRACKING_URI"]
    if is_here:
        (folder / "mlruns").mkdir(parents=True, exist_ok=True)
    return {
        "mlflow": {"logging_dir": (folder / "mlruns" / "artifacts").as_uri()} if is_here else {},
        "wandb": {"dir": places["WANDB_DIR"] or str(folder)},
        "swanlab": {"logdir": places["SWANLAB_LOG_DIR"] or str(folder / "swanlog")},
        "clearml": {"auto_connect_frameworks": False, "auto_connect_arg_parser": False},
        "dvclive": {"dir": str(folder / "dvclive"), "dvcyaml": None, "save_dvc_exp": False},
    }
