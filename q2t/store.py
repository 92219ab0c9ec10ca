"""Where MLflow keeps what it shows: opened from params.yaml, and never what a stage fails by."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from q2t.lockfile import PARAMS, read_yaml

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is away must not hold a stage up
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


@dataclass(frozen=True)
class Store:
    """An open tracking store and the id of the experiment in it."""

    client: Any
    experiment: str

    def create(self, name: str, tags: dict[str, str]) -> str:
        """The id of a new run."""
        return str(self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id)


def init_store(root: Path = Path(".")) -> Store:
    """Open the store that `tracking` in params.yaml names; a SQLite database is created if there is none.

    A relative `sqlite:///` URI lies under DVC_ROOT where DVC sets it: queued experiments run in a folder that
    is deleted afterwards, and have to write into the same database.

    Raises:
        ValueError: the store that `tracking.uri` names can't be used.
    """
    os.environ.update(ENVIRONMENT | os.environ)  # read when mlflow is imported
    import mlflow

    for noisy, level in {"alembic": logging.WARNING, "mlflow": logging.WARNING, "urllib3": logging.ERROR}.items():
        logging.getLogger(noisy).setLevel(level)  # urllib3 warns of every retry
    settings = read_yaml((root / PARAMS).read_text(encoding="utf-8"), PARAMS).get("tracking")
    if not settings:
        raise ValueError(f"{PARAMS} has no section tracking, which names the store")
    uri, name, artifacts = settings["uri"], settings["experiment"], None
    lock: AbstractContextManager[Any] = nullcontext()
    if uri.startswith("sqlite:///"):
        database = Path(os.environ.get("DVC_ROOT", root)).resolve() / uri.removeprefix("sqlite:///")
        database.parent.mkdir(parents=True, exist_ok=True)
        uri, artifacts = f"sqlite:///{database}", (database.parent / "artifacts").as_uri()
        lock = FileLock(database.with_suffix(".lock"))  # two that migrate a fresh database crash each other
    try:
        with lock:
            client = mlflow.MlflowClient(tracking_uri=uri)
            found = client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else client.create_experiment(name, artifacts)
    except mlflow.MlflowException as error:
        away = isinstance(error.__context__, OSError)  # as all errors of requests are
        reason = f"no server answers: start it, or correct {PARAMS}" if away else str(error).splitlines()[0]
        raise ValueError(without_secret(f"tracking.uri {settings['uri']}: {reason}")) from error
    if found and found.lifecycle_stage == "deleted":
        restore = without_secret(f"`MLFLOW_TRACKING_URI={uri} mlflow experiments restore -x {experiment}`")
        raise ValueError(f"tracking.experiment {name!r} was deleted in MLflow: {restore}, or name another")
    return Store(client, experiment)


@contextmanager
def spared(what: str) -> Iterator[None]:
    """A failure of what shows `what` is a warning."""
    try:
        yield
    except Exception as error:
        logger.warning("MLflow does not show %s: %s: %s", what, type(error).__name__, without_secret(error))


def without_secret(said: object) -> str:
    """MLflow's errors repeat the address, which may have a password."""
    return re.sub(r"//\S*@", "//***@", str(said))
