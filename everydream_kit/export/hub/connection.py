"""Talking to the Hub: an authorised client with timeouts, retries with back-off, and errors in words.

The `huggingface_hub` client retries some requests and not others, waits forever on a silent server by default, and
raises a dozen kinds of errors, some of them only as the cause of another. Here every step of an upload or download
runs through `HubConnection.step`: up to three tries, then one `HubError` that says what happened, and what to do next.
The client is 1.x (on httpx) or 2.x (on httpx2); which, is read off its own session.

Not here: what is uploaded (`repository_contents`) and in which order (`push`).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from everydream_kit import __version__
from everydream_kit.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

NUM_TRIES = 3
WAITS_SECONDS = (2.0, 10.0)
"""Before the second and the third try. The client's own retries within an upload take up to 23 s before that."""
LONGEST_WAIT_SECONDS = 300.0
"""Bound on a `Retry-After` that is obeyed."""
CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 120.0
"""A commit of many large files takes the Hub up to a minute."""
RETRYABLE_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_TOKEN_PATTERN = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=[Bb]earer )\S+")


def clean_token(token: str) -> str:
    """A token as it was pasted, without the blanks and invisible characters that came with it.

    Raises:
        HubError: what is left has characters that no token has; the message does not hold it.
    """
    cleaned = "".join(one for one in token if not one.isspace() and unicodedata.category(one) not in ("Cf", "Cc"))
    if not cleaned.isascii():
        raise HubError(
            "The access token holds characters that no token has. Copy it again from huggingface.co/settings/tokens."
        )
    return cleaned


def redact(text: str, token: str | None = None) -> str:
    """Replace everything that looks like a Hub token, and this token, by `<token>`."""
    if token:
        text = text.replace(token, "<token>")
    return _TOKEN_PATTERN.sub("<token>", text)


@dataclass(frozen=True)
class Cause:
    """What was found by walking an error's causes.

    Attributes:
        status: HTTP status, or None where no answer came.
        retryable: trying again may help.
        retry_after_seconds: how long the Hub asked to wait.
        words: what happened, as a sentence without a full stop.
        cure: what to do.
    """

    status: int | None
    retryable: bool
    retry_after_seconds: float | None
    words: str
    cure: str


class HubConnection:
    """An `HfApi` with a token, and the way every step through it is taken.

    Args:
        token: a token; by default huggingface_hub's own login, or `HF_TOKEN`.
        api: the client; a test gives one that points at its own server.
        sleep: waits between tries.
        needs_token: without one, stop at once and say how to log in.

    Raises:
        HubError: no token was found.
    """

    def __init__(
        self,
        token: str | None = None,
        *,
        api: HfApi | None = None,
        sleep: Callable[[float], None] = time.sleep,
        needs_token: bool = True,
    ) -> None:
        from huggingface_hub import HfApi, get_token

        given = api.token if api is not None and isinstance(api.token, str) else None
        self.token = clean_token(token or given or get_token() or "") or None
        if needs_token and not self.token:
            raise HubError(
                "No Hugging Face token was found. Make one with the role `write` at "
                "https://huggingface.co/settings/tokens, then paste it into the Set-up panel of a notebook, run "
                "`hf auth login`, or set HF_TOKEN (on Colab: a secret of that name, with notebook access on)."
            )
        self.api = HfApi(
            endpoint=api.endpoint if api is not None else None,
            token=self.token or False,
            library_name="everydream-kit",
            library_version=__version__,
        )
        self.sleep = sleep
        _limit_retry_wait()

    @property
    def endpoint(self) -> str:
        return str(self.api.endpoint)

    def step(self, doing: str, action: Callable[[], Result], *, advice: str = "", tries: int = NUM_TRIES) -> Result:
        """Run one step, up to three times.

        Args:
            doing: the step in words: "upload unet/model.safetensors".
            action: runs it; must be safe to run again.
            advice: what to add for the user where nothing better is known: that files are safe, how to continue.
            tries: how often to try.

        Raises:
            HubError: it failed for good. The message carries no token.
        """
        for number in range(1, tries + 1):
            try:
                return action()
            except _hub_errors() as error:
                cause = explain(error)
                if not cause.retryable or number == tries:
                    raise self._give_up(doing, cause, advice, number) from _without_token(error, self.token)
                wait = cause.retry_after_seconds
                wait = WAITS_SECONDS[min(number, len(WAITS_SECONDS)) - 1] if wait is None else wait
                wait = min(wait, LONGEST_WAIT_SECONDS)
                logger.warning(
                    "Could not %s: %s. Trying again in %.0f s.", doing, redact(cause.words, self.token), wait
                )
                self.sleep(wait)
        raise AssertionError("not reached")  # the last try returns or raises

    def _give_up(self, doing: str, cause: Cause, advice: str, tries: int) -> HubError:
        tried = f" (tried {tries} times)" if tries > 1 else ""
        text = " ".join(part for part in (f"Could not {doing}{tried}: {cause.words}.", cause.cure, advice) if part)
        return HubError(redact(text, self.token))


def explain(error: BaseException) -> Cause:
    """An error of the client in words: the first cause in its chain that has any."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain = list(_causes(error))
    answered = next((each for each in chain if getattr(each, "response", None) is not None), None)
    if answered is not None:
        response: Any = answered.response  # type: ignore[attr-defined]
        message = str(getattr(answered, "server_message", None) or answered)
        return _explain_status(response.status_code, response.headers, message)
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return Cause(None, False, None, "offline mode is on", "Unset HF_HUB_OFFLINE and try again.")
    transport = next((each for each in chain if isinstance(each, _http().TransportError) or _is_hung_up(each)), None)
    if transport is not None:
        return _explain_transport(transport)
    text = " / ".join(str(each) for each in chain)
    status = re.search(r"\bstatus\D{0,20}\b([45]\d\d)\b|\b([45]\d\d) [A-Z][a-z]+", text)
    if status:  # Xet has the status in its text only
        return _explain_status(int(status[1] or status[2]), {}, _first_line(text))
    transport = next((each for each in chain if isinstance(each, _transport_errors())), None)
    if transport is not None:
        return _explain_transport(transport)
    lines = dict.fromkeys(_first_line(str(each)) or type(each).__name__ for each in (chain[0], chain[-1]))
    return Cause(None, False, None, ": ".join(lines), "")


def _is_hung_up(error: BaseException) -> bool:
    """Another thread's connection failed, upon which the client closed the session that all threads share."""
    return isinstance(error, RuntimeError) and "client has been closed" in str(error)


def _explain_status(status: int, headers: Any, message: str) -> Cause:
    said = _first_line(message)
    words, cure = {
        401: (
            "the Hub does not accept the token (401)",
            "It may be expired or mistyped: make a new one at https://huggingface.co/settings/tokens and log in again "
            "with `hf auth login --force`. Note that HF_TOKEN wins over a login.",
        ),
        403: (
            f"the token may not do this (403: {said})",
            "It needs the role `write`, or a fine-grained one with write access to this repository's owner.",
        ),
        404: (
            "the Hub does not know this repository or revision, or this token may not see it (404)",
            "Check the spelling of owner, name and revision, and whose token it is.",
        ),
        409: (f"something else is being done there at the same time (409: {said})", "Wait a minute and push again."),
        412: ("somebody else has changed the repository meanwhile (412)", "Push again; it starts from the new state."),
        413: ("the Hub finds it too large (413)", "Push fewer files at a time."),
        429: (
            "the Hub asks to slow down: too many requests from this account (429)",
            "Wait a few minutes and try again.",
        ),
    }.get(status, (f"the Hub failed with an internal error ({status})", "See https://status.huggingface.co."))
    if 400 <= status < 500 and status not in (401, 403, 404, 409, 412, 413, 429):
        words, cure = f"the Hub refused it ({status}: {said})", ""
    retryable = status in RETRYABLE_STATUSES or status == 412 or (status == 409 and "conflict" in message.lower())
    return Cause(status, retryable, _retry_after(headers), words, cure)


def _explain_transport(error: BaseException) -> Cause:
    name = type(error).__name__
    check = "Check the internet connection of this machine."
    if "Timeout" in name:
        return Cause(None, True, None, "the Hub did not answer in time", check)
    if name in ("ConnectError", "ProxyError", "UnsupportedProtocol"):
        return Cause(None, True, None, "the Hub cannot be reached", check)
    if isinstance(error, json.JSONDecodeError):
        return Cause(
            None, True, None, "the answer is not the Hub's (a proxy, or a sign-in page of the network?)", check
        )
    return Cause(None, True, None, "the connection broke off", check)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what caused it, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _retry_after(headers: Any) -> float | None:
    value = headers.get("Retry-After", "") if headers else ""
    return float(value) if str(value).isdigit() else None


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"\s*\(Request ID:[^)]*\)", "", lines[0]).rstrip(".:")[:300] if lines else ""


def _without_token(error: BaseException, token: str | None) -> BaseException:
    """The error as a cause whose text carries no token: tracebacks are printed whole."""
    if token and any(token in str(each) for each in _causes(error)):
        return RuntimeError(redact(str(error), token))
    return error


def _http() -> Any:
    """The HTTP library of the installed client: httpx with huggingface_hub 1.x, httpx2 with 2.x."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(each for each in HfHubHTTPError.__mro__ if each.__module__.startswith("httpx"))
    return importlib.import_module(base.__module__.partition(".")[0])


def _transport_errors() -> tuple[type[BaseException], ...]:
    """Errors without an answer from the Hub. Xet raises the built-in ConnectionError, also for a refusal."""
    return (_http().TransportError, ConnectionError, TimeoutError, json.JSONDecodeError)


def _hub_errors() -> tuple[type[BaseException], ...]:
    """Everything that a call of the client is known to raise for a reason that lies outside the kit.

    RuntimeError wraps a failed LFS upload, and is Xet's; ValueError is an invalid card or id, and broken JSON; OSError
    is HfHubHTTPError's second base, and a local file that cannot be read.
    """
    return (_http().HTTPError, OSError, RuntimeError, ValueError)


def _limit_retry_wait() -> None:
    """Give the client's shared session timeouts, unless the user's own factory did: by default it waits forever."""
    from huggingface_hub import get_session, set_client_factory
    from huggingface_hub.utils import _http as client_module

    if get_session().timeout.read is not None:
        return
    make_client = client_module._GLOBAL_CLIENT_FACTORY
    limits = _http().Timeout(READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS)

    def make_impatient_client() -> Any:
        client = make_client()
        client.timeout = limits
        return client

    set_client_factory(make_impatient_client)


@contextlib.contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's own progress bars out of logs and notebooks; the kit reports progress itself."""
    from huggingface_hub import utils as client

    are_progress_bars_disabled: Any = client.are_progress_bars_disabled  # type: ignore[attr-defined]

    if are_progress_bars_disabled():
        yield
        return
    client.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        client.enable_progress_bars()  # type: ignore[attr-defined]
