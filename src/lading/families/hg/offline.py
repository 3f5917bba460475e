"""Offline mode for files that transformers fetches itself, such as the configuration of a backbone known by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from lading.errors import FetchError
from lading.sources.hub.client import no_requests
from lading.system.settings import Settings


@contextmanager
def offline_holds() -> Iterator[None]:
    """Keep transformers from opening a socket where ``LADING_OFFLINE`` forbids it.

    :raises FetchError: it would have to.
    """
    from huggingface_hub import is_offline_mode

    offline = Settings.from_environment().offline
    try:
        with no_requests() if offline else nullcontext():
            yield
    except Exception as error:
        if (offline or is_offline_mode()) and _is_offline_error(error):
            raise FetchError(
                "config.json names a model of another repository as its backbone, whose configuration transformers "
                "asks the hub for, but LADING_OFFLINE or HF_HUB_OFFLINE is set. State it as `backbone_config` in the "
                "card (`model_config`, `hf_config`), or unset the variable."
            ) from error
        raise


def _is_offline_error(error: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__

    return False
