"""What the tests of this folder share."""

from __future__ import annotations

from multiprocessing import forkserver, get_context

import pytest


@pytest.fixture(scope="session")
def warm_workers() -> None:
    """Starts the server that workers are forked from with the slow imports done.

    There is one per process. The first pool starts it otherwise, with that pool's modules alone,
    and later workers spend seconds of their time limits on imports.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["dalle2_video.data.preprocess.run", "open_clip.tokenizer"])
    forkserver.ensure_running()
