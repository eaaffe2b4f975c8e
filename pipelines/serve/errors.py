"""Errors of the API, in the form of OpenAI's."""

from typing import Any

from pipelines.serve.orders import Refused


class ApiError(Exception):
    """A request is answered with an error.

    Args:
        status: of HTTP.
        message: for a person.
        code, param: as OpenAI's errors have them: which kind of error, and in which parameter.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @classmethod
    def of(cls, refused: Refused) -> "ApiError":
        return cls(refused.status, refused.message, refused.code, refused.param, refused.retry_after)

    @classmethod
    def too_large(cls, kind: str, most: int) -> "ApiError":
        return cls(413, f"the {kind} has more than {most} bytes, this server's limit", "request_too_large")

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})
