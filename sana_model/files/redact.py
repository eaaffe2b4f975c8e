"""Hides passwords, keys and tokens in whatever people get to see: messages, logs, runs, manifests, pages."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "***"
SHOWN = r"\g<kept>" + HIDDEN
SHORTEST_SECRET = 8  # letters; shorter values of the environment's secrets are words such as "test"

SECRET_WORDS = frozenset(
    ("password", "passwd", "pwd", "passphrase", "secret", "secrets", "token", "credential", "credentials", "auth", "bearer")
) | {"authorization", "cookie", "signature", "sig", "apikey"}
KEY_WORDS = frozenset(("api", "access", "private", "account", "signing", "encryption", "service", "subscription"))
"""Before the word "key"; other keys name columns and the like."""
MARKER_WORDS = frozenset(
    ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "stop", "special", "image", "start", "end", "max", "min", "num")
)
"""Before the word "token"; such tokens are parts of a vocabulary."""
HARMLESS_ENDS = frozenset(("path", "file", "folder", "variable", "mode", "name", "type", "id", "ids", "url", "uri"))
"""Last words of names whose values tell where a secret is, or what kind it is."""
FOLDER_VARIABLES = frozenset(("PWD", "OLDPWD"))
"""Variables that every shell sets, to the folders where it is and was. All messages are full of these paths."""
NAME = r"[\w.-]*?(?:token|signature|sig|passw(?:or)?d|pwd|secret|credential|api[_-]?key|access[_-]?key(?:[_-]?id)?)"

PASSWORDS = (
    # scheme://user:password@host: up to the last @ of the host's part
    re.compile(r"(?P<kept>\b[a-zA-Z][\w+.-]{0,30}://[^\s/?#:@'\"<>]*:)(?P<secret>[^\s/?#'\"<>]+)(?=@)"),
    # https://token@host
    re.compile(r"(?P<kept>\bhttps?://)(?P<secret>[^\s/?#:@'\"<>]+)(?=@)"),
)
QUERY = re.compile(rf"(?P<kept>[?&;]{NAME}=)[^\s&;#'\"<>]+", re.IGNORECASE)
TEXT_PATTERNS = (
    (re.compile(r"(?P<kept>\bAuthorization\W{1,5}\w+\s+)[\w.~+/=-]+", re.IGNORECASE), SHOWN),
    (re.compile(r"(?P<kept>\bBearer\s+)(?=\S*\d)[\w.~+/=-]{16,}"), SHOWN),
    (re.compile(r"(?P<kept>\bpassw(?:or)?d\s*=\s*)[^\s,;&'\"]+", re.IGNORECASE), SHOWN),
    # Shapes of keys: OpenAI's and others' sk-, Hugging Face's, GitHub's, AWS' ids, Slack's, Google's; JSON Web Tokens
    (
        re.compile(
            r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|A[KS]IA[A-Z0-9]{16}|"
            r"xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
        ),
        HIDDEN,
    ),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Hide, in a text for people, passwords of URIs, secrets in queries, tokens, `secrets`, and those of the environment."""
    for secret in sorted({*secrets, *_environment_secrets()}, key=len, reverse=True):
        if secret:
            text = text.replace(secret, HIDDEN)
    text = redact_link(text)
    for pattern, shown in TEXT_PATTERNS:
        text = pattern.sub(shown, text)
    return text


def redact_uri(text: str) -> str:
    """Hide only passwords before the hosts of URIs: what a table keeps of where a row came from stays exact otherwise."""
    if "@" not in text:
        return text
    for pattern in PASSWORDS:
        text = pattern.sub(SHOWN, text)
    return text


def redact_link(text: str) -> str:
    """Hide passwords and secret parts of queries in the URIs of a text."""
    return QUERY.sub(SHOWN, redact_uri(text)) if "://" in text else text


def redact_values(value: Any, *, wholly: Iterable[str] = ()) -> Any:
    """The values of a configuration (nested dicts and lists) without secrets: passwords of URIs, and texts with secret names.

    The same values give the same result everywhere: it is part of fingerprints.

    Args:
        wholly: names of dicts of which every text is hidden, whatever it is called.
    """
    if isinstance(value, Mapping):
        return {
            redact_link(str(key)): hide(inner)
            if is_secret_name(str(key)) or key in wholly
            else redact_values(inner, wholly=wholly)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_values(inner, wholly=wholly) for inner in value]
    return redact_link(value) if isinstance(value, str) else value


def hide(value: Any) -> Any:
    """The value with every text in it hidden; numbers, truth values and None stay."""
    if isinstance(value, Mapping):
        return {key: hide(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide(inner) for inner in value]
    return HIDDEN if isinstance(value, str) and value else value


def secrets_in(value: Any, *, wholly: Iterable[str] = ()) -> set[str]:
    """The texts that `redact_values` hides in a configuration, and the passwords of its URIs: for `redact`.

    Shorter ones than SHORTEST_SECRET are left out: messages are full of them.
    """
    found: set[str] = set()
    if isinstance(value, Mapping):
        for key, inner in value.items():
            is_secret = is_secret_name(str(key)) or key in wholly
            found |= texts_in(inner) if is_secret else secrets_in(inner, wholly=wholly)
    elif isinstance(value, (list, tuple)):
        found = {secret for inner in value for secret in secrets_in(inner, wholly=wholly)}
    elif isinstance(value, str) and "@" in value:
        found = {match["secret"] for pattern in PASSWORDS for match in pattern.finditer(value)}
    return {secret for secret in found if len(secret) >= SHORTEST_SECRET}


def texts_in(value: Any) -> set[str]:
    """Every text in nested dicts and lists, without their keys."""
    if isinstance(value, Mapping):
        return {text for inner in value.values() for text in texts_in(inner)}
    if isinstance(value, (list, tuple)):
        return {text for inner in value for text in texts_in(inner)}
    return {value} if isinstance(value, str) else set()


def is_secret_name(name: str) -> bool:
    """Whether a setting or variable of this name is likely to hold a secret: api_key, HF_TOKEN, dbPassword; not eos_token."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    if words and words[-1] in HARMLESS_ENDS:
        return False
    for before, word in zip(["", *words], words, strict=False):
        if word == "key" and before in KEY_WORDS:
            return True
        if word in SECRET_WORDS and not (word == "token" and before in MARKER_WORDS):
            return True
    return False


def _environment_secrets() -> set[str]:
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST_SECRET and name not in FOLDER_VARIABLES and is_secret_name(name)
    }
