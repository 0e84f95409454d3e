"""The Hugging Face Hub, from which models and data come that are named by their id."""

from __future__ import annotations

from dataclasses import replace

from understudy.diagnosis.check import Finding, Host, all_of, check, ok, warning

ANSWER_SECONDS = 5.0
LOCAL = "Models and data in local directories work all the same"


@check("hub", seconds=40, lost_is="warning", if_lost=f"{LOCAL}; check the network and the proxy's settings.")
def hub(host: Host) -> Finding:
    from huggingface_hub import constants, get_token

    token, endpoint = get_token(), constants.ENDPOINT
    no_token = "there is no access token, so public models and data only"
    if constants.HF_HUB_OFFLINE:
        which = "there is an access token" if token else no_token
        finding = ok(f"HF_HUB_OFFLINE is set: only what was fetched before is used; {which}")
    else:
        reached = _reached(endpoint)
        if token is None:
            also = ok(no_token)
        elif reached.status == "ok":
            also = _accepted(endpoint, token)
        else:
            also = ok("there is an access token")
        finding = all_of([reached, also])
    about = {"endpoint": endpoint, "token": token is not None, "offline": bool(constants.HF_HUB_OFFLINE)}
    return replace(finding, details={**about, **finding.details})


def _reached(endpoint: str) -> Finding:
    import httpx2

    try:
        httpx2.head(endpoint, timeout=ANSWER_SECONDS)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        words = str(error) or type(error).__name__
        fix = (
            f"{LOCAL}, and so does what was fetched before (set HF_HUB_OFFLINE=1, so that nothing waits). To fetch "
            "more, check the network and the proxy's settings, or name a mirror in HF_ENDPOINT."
        )
        return warning(f"{endpoint} cannot be reached ({words})", fix, reached=False)
    return ok(f"{endpoint} answers", reached=True)


def _accepted(endpoint: str, token: str) -> Finding:
    """A token that is refused makes public models fail too. It goes to the Hub alone, and is not told."""
    import httpx2

    headers = {"authorization": f"Bearer {token}"}
    try:
        answer = httpx2.get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=ANSWER_SECONDS)
    except (httpx2.HTTPError, OSError):
        return ok("there is an access token, but whether it is good was not answered")
    if answer.status_code in (401, 403):
        return warning(
            "the access token is refused, and with it not even public models are given out",
            "Run `hf auth login` with a new one, or `hf auth logout`; unset HF_TOKEN if it is set.",
            token_accepted=False,
        )
    return ok("the access token is accepted", token_accepted=answer.status_code == 200)
