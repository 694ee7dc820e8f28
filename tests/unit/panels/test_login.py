"""Logging in from a panel: what was pasted is cleaned, what is refused is said, and the token is in no message."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_runs import TOKEN
from hub_stand_in import HubStandIn

from everydream_kit.errors import HubError, ModelError
from everydream_kit.models.download import fetch_model
from everydream_kit.panels.login import log_in
from everydream_kit.preflight.skeleton import read_architecture

NOBODY = "http://127.0.0.1:9"
"""The discard port, where nothing listens."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    return tmp_path


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn(home / "hub") as server:
        server.add_user(TOKEN, "me")
        use_hub(monkeypatch, server.url)
        yield server


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.api, "endpoint", url)


def said(error: BaseException) -> str:
    """Everything that a traceback would print."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("around", ["{}", "{}\n", " {} ", "\ufeff{}", "{}\u200b", "\t{}\r\n", "\u00a0{}\x00"])
def test_what_is_pasted_with_a_token_is_taken_off(hub: HubStandIn, home: Path, around: str) -> None:
    assert log_in(around.format(TOKEN)) == "me"
    assert (home / "token").read_text() == TOKEN


@pytest.mark.parametrize("token", ["", " \n", "\u200b"])
def test_an_empty_field_is_said(hub: HubStandIn, token: str) -> None:
    with pytest.raises(HubError, match="Paste an access token first"):
        log_in(token)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_" + "refused" * 5, "does not accept the token"),
        ("hf_" + "refused" * 5 + "\n", "does not accept the token"),
        ("hf_tökentökentöken", "characters that no token has"),
        ("hf_token\U0001f511token", "characters that no token has"),
    ],
)
def test_a_refused_token_is_said_and_in_no_message(hub: HubStandIn, token: str, words: str) -> None:
    with pytest.raises(HubError, match=words) as caught:
        log_in(token)
    assert token.strip() not in said(caught.value)
    assert "cannot be reached" not in said(caught.value)


def test_without_a_network_logging_in_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, NOBODY)
    with pytest.raises(HubError, match=r"the Hub cannot be reached\. Check the internet connection") as caught:
        log_in(TOKEN)
    assert TOKEN not in said(caught.value)


@pytest.mark.parametrize("read", [read_architecture, fetch_model], ids=["planning", "loading"])
def test_without_a_network_a_hub_base_is_one_error(home: Path, read: object) -> None:
    """With huggingface_hub 2 the client's error is httpx2's, which is no OSError."""
    with pytest.raises(ModelError, match=r"somebody/base: .*the Hub"):
        read("somebody/base", endpoint=NOBODY)  # type: ignore[operator]


def test_an_answer_that_is_not_the_hubs_is_one_error(home: Path, hub: HubStandIn) -> None:
    hub.fail("GET", "/api/models/somebody/base", status=500, times=99)
    with pytest.raises(ModelError, match="somebody/base"):
        read_architecture("somebody/base", endpoint=hub.url)
