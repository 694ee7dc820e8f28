"""Models from the Hugging Face Hub: which files are needed, their size, whether they fit, and then the download.

huggingface_hub does the transfer: it resumes, keeps what already exists, shows progress, and takes the token from
its own login or environment. Only what the kit reads is fetched: one set of weights, safetensors before pickles.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from everydream_kit.disk_space import free_disk, lack_of_room
from everydream_kit.errors import DiskSpaceError, ModelError
from everydream_kit.models.families import FAMILIES
from everydream_kit.models.model_files import denoiser_folders
from everydream_kit.models.weight_files import SAFETENSORS_SUFFIXES
from everydream_kit.runs.layout import ADAPTER_FILE, LORA_FILE

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SMALL = (".json", ".txt", ".jinja")


def is_hub_id(source: str) -> bool:
    """Whether a name looks like `owner/repository`, with or without `hf://` before it."""
    return bool(_HUB_ID.match(source.removeprefix("hf://")))


def network_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises where the Hub cannot be reached or refuses.

    With huggingface_hub 2 that is an error of httpx2, which is no OSError; RuntimeError is a session that another thread
    closed, and ValueError an answer that is not the Hub's.
    """
    from huggingface_hub.errors import HfHubHTTPError

    http_error = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")  # httpx's, or httpx2's
    return (http_error, OSError, RuntimeError, ValueError)


def fetch_model(
    source: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """Download a model from the Hub, or find it in the Hub's cache.

    Args:
        source: `owner/repository`.
        revision: branch, tag or commit.
        subfolder: folder of the repository that holds the model.
        variant: of the weight files, such as `fp16`.
        token: for private repositories; by default huggingface_hub's own login.
        endpoint, cache_dir: another Hub, another place; by default huggingface_hub's own settings.

    Returns:
        The diffusers folder, or the single file, in the cache.

    Raises:
        ModelError: no such repository or revision, no access, no model in it, or no connection and nothing in the
        cache. DiskSpaceError: not enough space for the download.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repo_id = source.removeprefix("hf://")
    try:
        info = HfApi(endpoint=endpoint).model_info(repo_id, revision=revision, files_metadata=True, token=token)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        wanted = choose_files(repo_id, sizes, subfolder=subfolder, variant=variant)
        _announce(repo_id, wanted, sizes, info.sha, cache_dir)
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,  # not the commit: the cache then knows the branch, too
                allow_patterns=wanted,
                token=token,
                endpoint=endpoint,
                cache_dir=cache_dir,
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{repo_id}: access to this model must be granted first. Open https://huggingface.co/{repo_id}, accept its terms, "
            "and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo_id}: has no revision {revision!r} on the Hub.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo_id}: no such file or folder here, and no such model on the Hub. If it is private, log in with "
            "`hf auth login`."
        ) from error
    except network_errors() as error:
        folder, wanted = _from_cache(repo_id, revision, subfolder, cache_dir, error), []
    return _place(folder, wanted, subfolder)


def _from_cache(
    repo_id: str, revision: str | None, subfolder: str | None, cache_dir: Path | None, cause: Exception
) -> Path:
    """The folder that an earlier download left, when the Hub cannot be reached.

    Not by `snapshot_download(local_files_only=True)`: that asks for the whole repository, and we take a part of it.
    """
    from huggingface_hub import try_to_load_from_cache

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    for marker in [*_denoiser_configs(prefix), prefix + ADAPTER_FILE]:
        found = try_to_load_from_cache(repo_id, marker, cache_dir=cache_dir, revision=revision)
        if isinstance(found, str):
            folder = Path(found.removesuffix(marker))
            logger.warning("%s: the Hub cannot be reached; using what an earlier download left in %s.", repo_id, folder)
            return folder
    raise ModelError(
        f"{repo_id}: the Hub cannot be reached ({type(cause).__name__}), and this model is not in the cache. Check the "
        "connection, or give the path of a local model."
    ) from cause


def choose_files(
    repo_id: str, sizes: dict[str, int], *, subfolder: str | None = None, variant: str | None = None
) -> list[str]:
    """The files of a repository that make one model.

    Args:
        sizes: bytes of every file by its path.

    Raises:
        ModelError: there is no model in it, or there are several single files to choose from.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    inside = [name for name in sizes if name.startswith(prefix)]
    if sizes.keys() & {*_denoiser_configs(prefix), prefix + ADAPTER_FILE}:
        chosen = [name for name in inside if name.removeprefix(prefix).count("/") == 0 and name.endswith(_SMALL)]
        chosen += [name for name in inside if name == prefix + LORA_FILE]
        for part in _parts():
            chosen += _choose_part([name for name in inside if name.startswith(f"{prefix}{part}/")], variant)
        return chosen
    single = [name for name in inside if "/" not in name.removeprefix(prefix) and _is_single(name)]
    if len(single) == 1:
        return single
    if single:
        names = ", ".join(sorted(single)[:8])
        raise ModelError(
            f"{repo_id}: holds several single files ({names}); download the one you want and give its path."
        )
    raise ModelError(
        f"{repo_id}: holds no model that the kit reads (no {prefix}unet/config.json, no single .safetensors)."
    )


def _denoiser_configs(prefix: str) -> list[str]:
    return [f"{prefix}{folder}/config.json" for folder in sorted(denoiser_folders(), reverse=True)]


def _parts() -> list[str]:
    """Folders that a model may have, in one family or another."""
    weights = [component.folder for family in FAMILIES.values() for component in family.components]
    texts = [slot.tokenizer_folder for family in FAMILIES.values() for slot in family.text_encoders]
    return list(dict.fromkeys([*weights, *texts, "scheduler"]))


def _is_single(name: str) -> bool:
    return name.lower().endswith(SAFETENSORS_SUFFIXES)


def _choose_part(names: Sequence[str], variant: str | None) -> list[str]:
    """Of one component: its small files, and one set of weights."""
    chosen = [name for name in names if name.endswith(_SMALL)]
    for suffix in (f".{variant}", "") if variant else ("",):
        for ending in (".safetensors", ".bin"):
            weights = [name for name in names if _is_weight(PurePosixPath(name).name, suffix, ending)]
            if weights:
                return chosen + weights
    return chosen


def _is_weight(name: str, suffix: str, ending: str) -> bool:
    """`model.safetensors`, `model.fp16.safetensors`, `model-00001-of-00002.safetensors`,
    `model.fp16-00001-of-00002...`"""
    stems, shard = "(diffusion_pytorch_model|pytorch_model|model)", r"(-\d+-of-\d+)?"
    own = re.escape(suffix)
    return re.fullmatch(rf"{stems}({own}{shard}|{shard}{own}){re.escape(ending)}", name) is not None


def _announce(
    repo_id: str, wanted: Sequence[str], sizes: dict[str, int], commit: str | None, cache_dir: Path | None
) -> None:
    """Say what comes and whether there is space.

    Raises:
        DiskSpaceError: there is not.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    missing = [
        name
        for name in wanted
        if not isinstance(try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=commit), str)
    ]
    needed = sum(sizes[name] for name in missing)
    if not needed:
        return
    place = Path(cache_dir or constants.HF_HUB_CACHE)
    free = free_disk(place)
    logger.info("%s: %d files, %.2f GB to download; %.1f GB are free.", repo_id, len(missing), needed / 1e9, free / 1e9)
    lack = lack_of_room(place, needed + 64 * 2**20)
    if lack is not None:
        raise DiskSpaceError(
            f"{repo_id}: the download {lack}. Free space, or set HF_HOME to a folder on a larger disk. Nothing was downloaded."
        )


def _place(folder: Path, wanted: Sequence[str], subfolder: str | None) -> Path:
    single = [name for name in wanted if _is_single(name)]
    if len(wanted) == 1 and single:
        return folder / single[0]
    return folder / subfolder if subfolder else folder
