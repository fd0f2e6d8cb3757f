"""How a script ends that cannot go on: one line and exit status 2, or the traceback of a bug."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from dalle2_video.errors import UserError

STATUS = 2
INTERRUPTED = 130  # of a shell, for Ctrl+C
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
WAIT = 5.0  # seconds that another rank leaves rank 0 to print the line, and the launcher to end it
NO_SPACE = re.compile(r"No space left on device|errno = 28\b|os error 28\b|\bENOSPC\b")
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory", re.I)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with status 2 and one line, printed once, where the body meets an error that
    a user can mend. Other errors pass, as do all of them under HYDRA_FULL_ERROR=1.
    """
    try:
        yield
    except BrokenPipeError:  # of `| head`: what it wanted is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(STATUS) from None
    except KeyboardInterrupt:
        if WANTS_TRACEBACK:
            raise
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        line = line_of(error)
        if WANTS_TRACEBACK or line is None:
            raise
        _print_once(line)
        raise SystemExit(STATUS) from None


def line_of(error: BaseException) -> str | None:
    """What a user needs to know of an error, in one line; None for a bug of ours."""
    if isinstance(error, UserError):
        return _flat(str(error))
    texts = " ".join(str(cause) for cause in _causes(error))
    if NO_SPACE.search(texts):
        files = [c.filename for c in _causes(error) if isinstance(c, OSError) and c.filename]
        where = files[0] if files else "the disk is full"
        return f"{where}: no space left; make room, then run the same command again"
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(texts)
    ):
        return (
            f"{_flat(str(error)) or 'out of memory'}; take a smaller micro_batch_size (sampling: "
            "batch_size), or activation_checkpointing=true"
        )
    if isinstance(error, MarkedYAMLError):
        return f"not a YAML file: {_flat(str(error))}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        name = "=".join(str(error.missing_cfg_file).rsplit("/", 1))
        return f"{name}: no such option; there are {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read ({_flat(str(error)).split(';')[0]}); quote it"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _flat(str(error))
    if isinstance(error, OSError) and error.filename is not None:
        cause = (error.strerror or os.strerror(error.errno or errno.EIO)).lower()
        return f"{error.filename}: {cause}"
    if isinstance(error, UnicodeDecodeError):
        return f"a text is not {error.encoding.upper()}: {error.reason}; save it as UTF-8"
    if isinstance(error, subprocess.CalledProcessError):
        return f"{shlex.join(map(str, error.cmd))}: ended with status {error.returncode}, see above"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _flat(text: str) -> str:
    return "; ".join(line.strip().rstrip(";") for line in text.splitlines() if line.strip())


def _print_once(line: str) -> None:
    """Rank 0 prints the line. Where it has none to print it does not end either, and the rank that
    failed prints its own; where it has, the launcher ends the others while they wait.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(WAIT)
        line = f"rank {rank}: {line}"
    print(line, file=sys.stderr, flush=True)
