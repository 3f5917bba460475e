"""Offline mode for files that transformers fetches itself, such as the configuration of a backbone known by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from lading.errors import FetchError, causes_of
from lading.sources.hub.client import no_requests
from lading.system.settings import Settings


@contextmanager
def offline_holds() -> Iterator[None]:
    """Keep transformers from opening a socket where ``LADING_OFFLINE`` forbids it.

    :raises FetchError: it would have to.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = Settings.from_environment().offline
    try:
        with no_requests() if offline else nullcontext():
            yield
    except Exception as error:
        refused = any(isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError) for cause in causes_of(error))
        if refused and (offline or is_offline_mode()):
            raise FetchError(
                "config.json names a model of another repository as its backbone, whose configuration transformers "
                "asks the hub for, but LADING_OFFLINE or HF_HUB_OFFLINE is set. State it as `backbone_config` in the "
                "card (`model_config`, `hf_config`), or unset the variable."
            ) from error
        raise
