"""Passwords, keys and tokens are hidden in texts and configurations; what is none of them stays."""

import pytest

from sana_model.files.redact import is_secret_name, redact, redact_uri, redact_values, secrets_in

TEXTS = {
    "http://user:hunter2@mlflow/x": "http://user:***@mlflow/x",
    "cannot read s3://key:se/cret": "cannot read s3://key:se/cret",
    "postgresql+psycopg2://u:p@ss:w@host/db?x=1": "postgresql+psycopg2://u:***@host/db?x=1",
    "redis://:hunter2@host:6379": "redis://:***@host:6379",
    "http://u:a%2Fb@h and ftp://v:c@i, d": "http://u:***@h and ftp://v:***@i, d",
    "{'base_url': 'http://u:p@h/v1', 'x': 1}": "{'base_url': 'http://u:***@h/v1', 'x': 1}",
    "https://ghp_0123@github.com/x": "https://***@github.com/x",
    "https://h/x?X-Amz-Signature=ab&X-Amz-Credential=A%2F&a=b#c": "https://h/x?X-Amz-Signature=***&X-Amz-Credential=***&a=b#c",
    "<a href='https://h/x?a=b&amp;token=c'>": "<a href='https://h/x?a=b&amp;token=***'>",
    "az://x?sv=2&sig=abc%3D": "az://x?sv=2&sig=***",
    "host=x password=hunter2 user=y": "host=x password=*** user=y",
    "{'Authorization': 'Bearer abc'}": "{'Authorization': 'Bearer ***'}",
    "Bearer abcdefgh12345678": "Bearer ***",
    "Incorrect API key: sk-abcdefghijklmnop1234": "Incorrect API key: ***",
    "hf_abcdefghijklmnopqrst": "***",
}
ORDINARY = (
    "hf://owner/name@0123abc/folder",
    "s3://bucket/a@b/c:d@e",
    "abfs://container@account.dfs.core.windows.net/x",
    "ssh://git@host/x",
    "http://[::1]:8000/x@y",
    "https://h/x?key=1&tokens=3&page=2",
    "user@host: see a://b:c",
    "max_new_tokens: 300, Bearer bonds, Basic instructions, a password",
    "sqlite:////data/mlflow.db",
    "12:30@noon",
)


@pytest.mark.parametrize(("text", "shown"), TEXTS.items())
def test_secrets_in_texts_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown, "nothing is left to hide"


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_stay(text: str) -> None:
    assert redact(text) == redact_uri(text) == text


def test_known_secrets_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "kept in the environment")
    monkeypatch.setenv("MY_API_KEY_FILE", "/run/secrets/key")
    monkeypatch.setenv("SHORT_TOKEN", "test")
    for folder in ("PWD", "OLDPWD"):  # of the shell, no passwords
        monkeypatch.setenv(folder, "/run/secrets")
    told = redact("a test of /run/secrets/key: kept in the environment, given and not given", ["given", "not given", ""])
    assert told == "a test of /run/secrets/key: ***, *** and ***"


def test_of_tables_rows_only_passwords_are_hidden() -> None:
    """Signed URLs that differ only in their queries are different images."""
    assert redact_uri("http://u:p@h/x.png?token=abc#3") == "http://u:***@h/x.png?token=abc#3"


NAMES = {
    True: (
        "api_key",
        "apiKey",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "dbPassword",
        "authorization",
        "token",
        "session_token",
        "sig",
    ),
    False: (
        *(
            "max_new_tokens",
            "eos_token",
            "stop_token_ids",
            "caption_key",
            "key_column",
            "tokenizer",
            "budget_tokenizer",
            "author",
        ),
        *("api_key_variable", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "secret_name", "keyword", "", "key", "design", "sigma"),
    ),
}


@pytest.mark.parametrize(("name", "is_secret"), [(name, is_secret) for is_secret, names in NAMES.items() for name in names])
def test_names_tell_what_holds_a_secret(name: str, is_secret: bool) -> None:
    assert is_secret_name(name) == is_secret


def test_configurations_keep_all_but_their_secrets() -> None:
    config = {
        "uri": "http://u:hunter2hunter2@h",
        "extra": {"api_key": "abc", "top_k": 5, "nested": {"auth": {"user": "me", "tries": 3}}, "mode": "fast"},
        "env": {"LEVEL": "INFO"},
        "inputs": {"http://u:hunter2hunter2@h/latents/x": "fingerprint"},
        "list": ["ftp://u:p@h", 1, None, True],
    }
    shown = redact_values(config)
    assert shown["uri"] == "http://u:***@h" and list(shown["inputs"]) == ["http://u:***@h/latents/x"]
    assert shown["extra"] == {"api_key": "***", "top_k": 5, "nested": {"auth": {"user": "***", "tries": 3}}, "mode": "fast"}
    assert shown["list"] == ["ftp://u:***@h", 1, None, True] and shown["env"] == {"LEVEL": "INFO"}
    assert redact_values(shown) == shown
    wholly = redact_values(config, wholly=("env", "extra"))
    assert wholly["env"] == {"LEVEL": "***"} and wholly["extra"]["mode"] == "***" and wholly["extra"]["top_k"] == 5
    assert secrets_in({**config, "extra": {"api_key": "a long secret", "mode": "quick and long"}}) == {
        "hunter2hunter2",
        "a long secret",
    }
