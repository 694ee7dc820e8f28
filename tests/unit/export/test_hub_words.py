"""Tokens are cut out of text, and errors of the Hub become words."""

from __future__ import annotations

import pytest

from everydream_kit.errors import HubError
from everydream_kit.export.hub import parse_run_reference
from everydream_kit.export.hub.connection import HubConnection, explain, redact
from everydream_kit.export.hub.upload import size_words


def test_tokens_are_cut_out_of_text() -> None:
    assert redact("use hf_AbCdEfGhIjKl now") == "use <token> now"
    assert redact("Authorization: Bearer abc.def-ghi") == "Authorization: Bearer <token>"
    assert redact("my secret is 12345", "12345") == "my secret is <token>"
    assert redact("hf_hub_download and hf_xet stay") == "hf_hub_download and hf_xet stay"


def test_the_cause_is_found_beneath_what_wraps_it() -> None:
    outer = RuntimeError("Error while uploading 'unet' to the Hub.")
    outer.__cause__ = ConnectionError("HTTP status client error (403 Forbidden) for url")
    assert explain(outer).status == 403
    outer.__cause__ = OSError(28, "No space left on device")
    assert "No space left on device" in explain(outer).words
    assert not explain(outer).retryable


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), "the connection broke off"),
        (TimeoutError("timed out"), "did not answer in time"),
        (RuntimeError("Cannot send a request, as the client has been closed."), "the connection broke off"),
        (ConnectionError("status code 503, try later"), "an internal error (503)"),
    ],
)
def test_what_may_pass_is_tried_again(error: Exception, words: str) -> None:
    cause = explain(error)
    assert cause.retryable
    assert words in cause.words


def test_the_wait_that_is_said_is_the_wait_that_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    class Response:
        status_code, headers = 429, {"Retry-After": "100000"}

    error, waits, tries = OSError("slow down"), list[float](), iter((True, False))
    error.response = Response()  # type: ignore[attr-defined]

    def action() -> str:
        if next(tries):
            raise error
        return "done"

    assert HubConnection(token="hf_sOmEtOkEn", sleep=waits.append).step("push", action) == "done"
    assert waits == [300.0]
    assert "Trying again in 300 s." in caplog.text


def test_a_reference_to_a_run_is_taken_apart() -> None:
    assert parse_run_reference("hf://me/jets") == ("me/jets", None)
    assert parse_run_reference("hf://me/jets@refs/pr/1") == ("me/jets", "refs/pr/1")
    for wrong in ("me/jets", "hf://jets", "hf://me/jets/x", "https://me/jets"):
        with pytest.raises(HubError, match="hf://owner/name"):
            parse_run_reference(wrong)


def test_sizes_are_said_in_words() -> None:
    assert [size_words(n) for n in (12, 1_500, 120_000_000, 3_440_000_000)] == ["12 B", "1.5 kB", "120 MB", "3.4 GB"]
