"""Why the hub gave no file: the reason in words, from whatever chain of errors a library raises."""

from __future__ import annotations

from collections.abc import Iterator

NO_ANSWER = {"TransportError", "Timeout", "ConnectionError", "TimeoutError", "URLError", "gaierror"}
HUB = "https://huggingface.co"


def is_unreachable(error: BaseException) -> bool:
    """Whether an error came from a network that does not answer."""
    from urllib.error import HTTPError

    from huggingface_hub.errors import LocalEntryNotFoundError

    for seen in _chain(error):
        if isinstance(seen, LocalEntryNotFoundError):
            return True
        if not isinstance(seen, HTTPError) and NO_ANSWER & {kind.__name__ for kind in type(seen).__mro__}:
            return True
    return False


def refusal(error: BaseException, repository: str) -> str | None:
    """How the hub refused a repository: not found, gated, or another answer; None where it did not.

    Args:
        error: as it was raised; its causes are looked at, too.
        repository: OWNER/MODEL.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    chain = list(_chain(error))
    gated = f"access to it must be granted: accept its terms at {HUB}/{repository}, then log in with 'hf auth login'"
    if any(isinstance(seen, GatedRepoError) for seen in chain):
        return gated
    if any(isinstance(seen, RevisionNotFoundError) for seen in chain):
        return "it has no such revision"
    absent = "there is no such model on the hub, or it is private (then log in with 'hf auth login')"
    if any(isinstance(seen, RepositoryNotFoundError) for seen in chain):
        return absent
    for seen in chain:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(seen, HfHubHTTPError) and status is not None:
            if status in (401, 403):
                return absent if status == 401 else gated
            if status != 404:  # a file that is missing in a model
                return f"the hub answers with error {status}; try again later"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
