"""Secrets stay out of the files of a run: a setting that looks like one is refused before anything is written.

Settings are written to config.json, results.md, checkpoints and trackers, and any of these may be shared. Refusing is
safer than masking: a masked path is useless, and a secret that a mask misses is published.
"""

import os
import re
from collections.abc import Mapping

# all take a time that grows as the text does: of two parts without bounds, none takes the other's characters
_AWS = (  # 40 characters of all kinds, with one slash at most, as paths have more
    r"(?<![\w/+=.-])(?=[a-z0-9/+]{0,39}[A-Z])(?=[A-Z0-9/+]{0,39}[a-z])(?=[A-Za-z/+]{0,39}\d)"
    r"(?![^/\s]{0,40}/[^/\s]{0,40}/)[A-Za-z0-9/+]{40}(?![\w/+=.-])"
)
_SECRETS = {
    "a password in an address": r"\w://[^/\s@:]*:[^/\s@]+@",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a W&B key": r"\bwandb_v\d+_\w{20,}|(?<![\w/@.-])[0-9a-f]{40}(?![\w/.-])",  # one of 40 digits, no commit in a path
    "a GitHub token": r"\b(gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{20,})",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|" + _AWS,
    "a Google key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}|\bxapp-\d-[\w-]{10,}",
    "an API key": r"\bsk-[\w-]{20,}|\b([sr]k_(live|test)|whsec)_\w{16,}",
    "a package index's token": r"\bnpm_[A-Za-z0-9]{30,}|\bpypi-Ag[\w-]{30,}",
    "a JSON web token": r"(?<![\w-])eyJ[\w-]{10,}\.[\w-]{10,}\.",
    "a private key": r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY",
    "an authorisation": r"(?i)\bbearer\s{1,4}[\w.~+/-]{16,}",
    "a secret": r"(?i)(token|secret|passw(or)?d|pwd|api[_-]?key|signature)=[^\s&/]{6,}|[?&]sig=[\w%+/-]{6,}|"
    r"(?<![a-z])(passw(or)?d|passphrase|pwd|(api|secret|access|private)[_-]?key)[\"']?\s{0,3}[:=]\s{0,3}[\"']?[^\s&/\"']{6,}",
}
_SECRET_VARIABLE = re.compile(r"(?i)(TOKEN|SECRET|PASSWORD|PASSPHRASE|CREDENTIALS?|(^|_)(KEY|PASS|PAT|PASSWD)|_PWD)$")


def find_secret(text: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The kind of secret that `text` contains, None if there is none; a bare key is recognised by the environment."""
    for kind, pattern in _SECRETS.items():
        if re.search(pattern, text):
            return kind
    for name, value in environment.items():
        if len(value) >= 8 and _SECRET_VARIABLE.search(name) and value in text:
            return f"the value of ${name}"
    return None
