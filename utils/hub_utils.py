"""Errors of the hub, of the way to it and of its cache in words, and what to do about them."""

from typing import Any

import httpx
from huggingface_hub import constants, errors

from utils.logging_utils import CHOOSE_PLACE, FREE_SPACE, FULL, UserError, causes_of, first_line

UNREACHABLE = (httpx.ConnectError, httpx.TimeoutException, errors.LocalEntryNotFoundError, ConnectionError)


def explain_hub_error(error: BaseException, option: str, revision: str | None, otherwise: str) -> tuple[str, bool]:
    """(what is wrong with the value of `option`, --model or --dataset, and what to do; whether another try may help)

    `otherwise`: for an error that is none of the hub's. A UserError, such as of a lock, is raised as it is.
    """
    if isinstance(error, UserError):
        raise error
    chain, reason = list(causes_of(error)), first_line(error)

    def find(*kinds: type[BaseException]) -> Any:
        return next((link for link in chain if isinstance(link, kinds)), None)

    answer = next((found for link in chain if (found := getattr(link, "response", None)) is not None), None)
    status = answer.status_code if answer is not None else 0
    denial = next((link for link in chain if isinstance(link, OSError) and (link.filename or link.errno in FULL)), None)
    # `datasets` tells a gated repository by the text of an error of its own.
    if find(errors.GatedRepoError) or any("gated dataset" in str(link) for link in chain):
        return f"is gated ({reason}); accept its terms on the hub, and check that HF_TOKEN may read it", False
    if find(errors.RevisionNotFoundError):
        return f"has no revision {revision}; check {option}-revision", False
    if find(errors.RepositoryNotFoundError, errors.HFValidationError) or status in (401, 403, 404):
        return f"is no folder here and not on the hub ({reason}); check the name, and that HF_TOKEN may read it", False
    if answer is not None:
        return f"the hub answers {status} for {answer.url.path}; try again later, or give a folder", True
    if denial is not None:
        where = f"{denial.filename or constants.HF_HOME}: {denial.strerror}"
        move = FREE_SPACE if denial.errno in FULL else CHOOSE_PLACE
        return f"cannot be put in the cache, HF_HOME ({where}); {move}", False
    if constants.is_offline_mode() and find(*UNREACHABLE):
        where = f"at {revision or 'main'} is not whole in the cache, and HF_HUB_OFFLINE is set"
        return f"{where}; unset it, give the {option}-revision of one that is, or a folder", False
    if find(*UNREACHABLE):
        return f"the hub cannot be reached ({reason}); check the network, or give a folder that holds it", True
    return otherwise, True
