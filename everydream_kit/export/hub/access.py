"""Who may push where: token, role, owner, repository and branch, found out before anything is uploaded.

`check_hub_access` is for the time before a training: an evening's run should not end at a token that may only read.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from everydream_kit.errors import HubError
from everydream_kit.export.hub.connection import HubConnection

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubAccess:
    """What a token may do, found out before anything is uploaded.

    Attributes:
        user: whose token it is.
        repo_id: with its owner.
        url: of the repository.
        private: as the repository is now.
        created: it did not exist before.
    """

    user: str
    repo_id: str
    url: str
    private: bool
    created: bool


def check_hub_access(
    repo_id: str,
    token: str | None = None,
    *,
    private: bool = True,
    api: HfApi | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> HubAccess:
    """Make sure, before training starts, that a later push will be let in: token, role, owner, repository.

    The repository is created if it does not exist.

    Args:
        repo_id: `me/jets`, or `jets` for one of your own.
        token: by default huggingface_hub's login or HF_TOKEN.
        private: of a repository that is created here.
        api: another Hub than the usual one.
        sleep: waits between tries.

    Raises:
        HubError: something is missing; the message says what and how to fix it.
    """
    return open_repo(HubConnection(token, api=api, sleep=sleep), repo_id, private=private)


_REPOSITORY = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?(?=.{1,96}$)[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
"""As the Hub takes it (`huggingface_hub.utils.validate_repo_id`)."""


def check_repo_id(repo_id: str) -> None:
    """Raises HubError where the Hub would not take the name of a repository."""
    if not _REPOSITORY.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
        raise HubError(
            f"{repo_id}: not a repository's name. It is your Hub name, a slash, the model's name, of letters, digits, "
            "`-`, `_` and `.`, such as me/jets."
        )


def open_repo(connection: HubConnection, repo_id: str, *, private: bool, revision: str | None = None) -> HubAccess:
    """Whoami, role, owner, repository, branch, write access, in the order in which they go wrong."""
    check_repo_id(repo_id)
    api = connection.api
    me = connection.step("log in to the Hub", api.whoami)
    user, owners = me["name"], [me["name"], *(org["name"] for org in me.get("orgs", []))]
    full_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(
            f"The token of {user} may only read. Make one with the role `write` at "
            "https://huggingface.co/settings/tokens and log in with it (`hf auth login --force`)."
        )
    if full_id.partition("/")[0] not in owners:
        raise HubError(
            f"{full_id}: the token belongs to {user}, who can create repositories under {', '.join(owners)} only. "
            f"Push to {user}/{full_id.partition('/')[2]}, or open a pull request there (create_pr)."
        )
    there = connection.step(f"look for {full_id}", lambda: api.repo_exists(full_id))
    if not there:
        connection.step(f"create {full_id}", lambda: api.create_repo(full_id, private=private, exist_ok=True))
    connection.step(f"check write access to {full_id}", lambda: api.auth_check(full_id, write=True))
    if revision is not None and revision != "main":
        doing = f"create the branch {revision} of {full_id}"
        connection.step(doing, lambda: api.create_branch(full_id, branch=revision, exist_ok=True))
    info = connection.step(f"look at {full_id}", lambda: api.model_info(full_id))
    return HubAccess(user, full_id, f"{connection.endpoint}/{full_id}", bool(info.private), not there)


def base_license(connection: HubConnection, base: str | None) -> dict[str, str]:
    """License fields from the base model's card; none where it cannot be read, which a push survives."""
    if base is None:
        return {}
    try:
        info = connection.step(f"look up the license of {base}", lambda: connection.api.model_info(base), tries=1)
    except HubError as error:
        logger.warning("%s The card states no license; give one with license.", error)
        return {}
    card: dict[str, Any] = dict(vars(info.card_data)) if info.card_data else {}
    fields = ("license", "license_name", "license_link")
    return {name: str(card[name]) for name in fields if isinstance(card.get(name), str)}
