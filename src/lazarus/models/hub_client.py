"""The limits of waiting for the Hub, for as long as a command runs."""

from __future__ import annotations

from typing import Any

from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory, hf_raise_for_status

from lazarus.models.hub import LONGEST_WAIT, seconds_to_wait


def bound_waits() -> None:
    """Have no request to the Hub wait for ever.

    huggingface_hub gives some requests no limit, waits a minute for others, and sleeps for as long as the Hub
    says when it is asked too often, which may be an hour. A process of someone else keeps its own settings.
    """
    set_client_factory(_client)


def _client() -> Any:
    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks.get("request", ()), _within_time],
        "response": [*hooks.get("response", ()), _told_at_once],
    }
    return client


def _within_time(request: Any) -> None:
    most = float(max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT))
    limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
    request.extensions["timeout"] = {
        what: most if seconds is None else min(seconds, most) for what, seconds in limits.items()
    }


def _told_at_once(response: Any) -> None:
    """Raise what the Hub answers, where it asks to wait for longer than anyone would without being told."""
    if response.is_error and (seconds_to_wait(response) or 0) > LONGEST_WAIT:
        hf_raise_for_status(response)
