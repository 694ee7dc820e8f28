"""Logging in to the Hub from a notebook without the token ever becoming part of it.

The field sends what was typed as a message and forgets it; huggingface_hub checks the token and keeps it in its own
file, where the training and upload processes find it. It is in no widget state, output, setting or log. Without
anywidget there is a password box, emptied before anything else happens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from everydream_kit.errors import HubError
from everydream_kit.export.hub.connection import HubConnection, clean_token
from everydream_kit.hosts import GoogleColab, Host, detect_host, find_secret
from everydream_kit.panels.page_widgets import make_page_widget


def make_token_field(on_token: Callable[[str], object]) -> widgets.Widget:
    """A field for a token; `on_token` is called with what was typed."""
    field = make_page_widget("token_field")
    if field is None:
        box = widgets.Password(description="Access token", continuous_update=False, style={"description_width": "90px"})

        def take_box(change: dict[str, Any]) -> None:
            typed = change["new"]
            if typed:
                box.value = ""
                on_token(typed)

        box.observe(take_box, "value")
        return box

    def take(widget: Any, content: dict[str, Any], buffers: list[Any]) -> None:
        if content.get("kind") == "token":
            on_token(str(content.get("token", "")).strip())

    field.on_msg(take)
    return field


def log_in(token: str) -> str:
    """Check a token with the Hub and keep it in huggingface_hub's own place.

    Returns:
        The user's name.

    Raises:
        HubError: the Hub refused it or cannot be reached; the message does not hold the token.
    """
    token = clean_token(token)
    if not token:
        raise HubError(
            "Paste an access token first. You make one at huggingface.co/settings/tokens, with the role write."
        )
    import huggingface_hub

    connection = HubConnection(token)
    user = str(connection.step("log in to the Hub", connection.api.whoami, tries=1)["name"])
    login = functools.partial(huggingface_hub.login, token=token, add_to_git_credential=False)
    connection.step("keep the token", login, tries=1)
    return user


def has_token() -> bool:
    """Whether a token is there: huggingface_hub's login, HF_TOKEN, or Colab's secret of that name."""
    import huggingface_hub

    return huggingface_hub.get_token() is not None


def token_environment(host: Host | None = None, bridge: GoogleColab | None = None) -> dict[str, str]:
    """What a child process needs in addition to its environment to find the token: Colab's secrets are readable in the kernel
    only."""
    host = host or detect_host()
    token = find_secret("HF_TOKEN", host, environ={}, bridge=bridge) if host.name == "colab" else None
    return {"HF_TOKEN": token} if token else {}
