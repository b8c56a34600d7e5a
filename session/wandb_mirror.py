"""Copy of TensorBoard's content on Weights & Biases: ``--wandb PROJECT``.

A run's folder is one run there, whose id is kept in the folder. wandb's own copy of TensorBoard files would
need the package tensorboard.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runs.files import WANDB_ID
from utils.errors import UserError
from utils.files import atomic_write_text

_log = logging.getLogger(__name__)

_OLDEST = "0.30"  # its login can be asked without a prompt
# How long the end of a run waits for uploads, in seconds: less than a scheduler's grace time. What is left
# stays on the disk (`wandb sync`).
_FINISH_S = 60.0

Table = tuple[list[str], list[list[str]]]  # headers and rows


def check_login() -> None:
    """Check that wandb is new enough, and logged in or offline.

    Raises:
        UserError: it is not.
    """
    import wandb

    if [int(part) for part in wandb.__version__.split(".")[:2]] < [int(part) for part in _OLDEST.split(".")]:
        raise UserError(f"--wandb: wandb {wandb.__version__} is too old; pip install 'wandb>={_OLDEST}'")
    try:
        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        if mode in ("online", "shared", "run") and not wandb.login(prompt=False, verify=False):
            raise wandb.errors.AuthenticationError("not logged in")
    except (wandb.errors.Error, ValueError) as error:  # a key of another form, a setting with a wrong value
        raise _refused(error) from error


class WandbMirror:
    """A run of wandb, made or continued.

    A failure of wandb (network, disk) is a warning, after which the run goes on without it.

    Args:
        project: of wandb.
        folder: of the run; it gets wandb's files and the id.
        anew: do not continue the folder's run of wandb (``--fresh``).

    Raises:
        UserError: wandb refuses the login or the project.
    """

    def __init__(self, project: str, folder: Path, *, anew: bool) -> None:
        import wandb

        path = folder / WANDB_ID
        if anew or not path.is_file():
            atomic_write_text(path, secrets.token_hex(4) + "\n")
        self._run: Any = None
        self._failed = False
        with self._tolerated():
            try:
                self._run = wandb.init(
                    project=project,
                    dir=folder,
                    id=path.read_text(encoding="utf-8").strip(),
                    name=folder.name,
                    resume="allow",
                    settings=wandb.Settings(silent=True, console="off", finish_timeout=_FINISH_S),
                )
            except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
                raise _refused(error) from error
            files = Path(self._run.dir).parent
            _log.info("wandb: %s", self._run.url or f"offline; upload with `wandb sync {files}`")

    def board(self, name: str) -> WandbBoard:
        """The part of the run with a name, as TensorBoard has a folder."""
        return WandbBoard(self, name)

    def log(self, values: Callable[[], dict[str, Any]]) -> None:
        """Send values by their names. They are made here, since images and tables are files of wandb's."""
        with self._tolerated():
            if self._run is not None:
                self._run.log(values())

    def define_axis(self, names: str, axis: str) -> None:
        """Draw the curves of some names (``step_0/*``) over another value."""
        with self._tolerated():
            if self._run is not None:
                self._run.define_metric(names, step_metric=axis)

    def configure(self, options: Mapping[str, Any]) -> None:
        """Set the run's configuration."""
        with self._tolerated():
            if self._run is not None:
                self._run.config.update(dict(options), allow_val_change=True)

    def close(self, *, failed: bool) -> None:
        """Wait, not for ever, until all is uploaded, and end wandb's service."""
        import wandb

        with self._tolerated():
            wandb.teardown(exit_code=int(failed))
        self._run = None

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # whatever wandb raises: its service has ended, no space, no network
            level = logging.DEBUG if self._failed else logging.WARNING
            _log.log(level, "wandb failed (%s); continuing without it", _in_one_line(error))
            self._run, self._failed = None, True


class WandbBoard:
    """A part of a run of wandb; see ``RunLogger``."""

    def __init__(self, mirror: WandbMirror, name: str) -> None:
        self._mirror, self._name = mirror, name
        mirror.define_axis(f"{name}/*", f"{name}/step")

    def _log(self, values: Callable[[], Mapping[str, Any]], step: int) -> None:
        self._mirror.log(
            lambda: {f"{self._name}/{tag}": value for tag, value in {**values(), "step": step}.items()}
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One point of several curves."""
        self._log(lambda: values, step)

    def image(self, tag: str, image: Any, step: int) -> None:
        """An image, H×W×3, uint8."""
        import wandb

        self._log(lambda: {tag: wandb.Image(image)}, step)

    def tables(self, tag: str, tables: Sequence[Table], step: int) -> None:
        """Tables: headers and rows."""
        import wandb

        def made() -> dict[str, Any]:
            return {
                f"{tag}/{number}": wandb.Table(columns=[*headers], data=[*rows])
                for number, (headers, rows) in enumerate(tables)
            }

        self._log(made, step)

    def options(self, options: Mapping[str, Any]) -> None:
        """The options of a run, as its configuration."""
        self._mirror.configure(options)

    def close(self) -> None:
        """The run stays open for other boards."""


def _refused(error: Exception) -> UserError:
    import wandb

    of_login = isinstance(error, wandb.errors.AuthenticationError)
    remedy = "use `wandb login`, or set WANDB_MODE=offline" if of_login else "correct it"
    return UserError(f"--wandb: {_in_one_line(error)}; {remedy}")


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
