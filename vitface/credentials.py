"""Secrets stay out of the files of a run: a setting that looks like one is refused before anything is written.

Settings are written to config.json, results.md, checkpoints and trackers, and any of these may be shared. Refusing is
safer than masking: a masked path is useless, and a secret that a mask misses is published.
"""

import os
import re
from collections.abc import Mapping

_SECRETS = {
    "a password in an address": r"\w://[^/\s@]*:[^/\s@]+@",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a W&B key": r"\bwandb_v\d+_\w{20,}",
    "a GitHub token": r"\b(gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{20,})",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "an API key": r"\bsk-[\w-]{20,}",
    "a JSON web token": r"\beyJ[\w-]{10,}\.[\w-]{10,}\.",
    "a secret": r"(?i)(token|secret|passw(or)?d|pwd|api[_-]?key|signature)=[^\s&/]{6,}",
}
_SECRET_VARIABLE = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$")


def find_secret(text: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The kind of secret that `text` contains, None if there is none; a bare key is recognised by the environment."""
    for kind, pattern in _SECRETS.items():
        if re.search(pattern, text):
            return kind
    for name, value in environment.items():
        if len(value) >= 16 and _SECRET_VARIABLE.search(name) and value in text:
            return f"the value of ${name}"
    return None
