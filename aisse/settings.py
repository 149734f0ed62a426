"""The settings: one frozen object, what each of them may be, and which of them fit together.

`aisse.commands.sources` fills it from a file, the environment and flags.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from yarl import URL

MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}"


def _split(value: object) -> object:
    """Lists may be written `a,b` where the source knows only strings (environment, flags)."""
    if isinstance(value, str):
        return tuple(part for part in re.split(r"[,\s]+", value) if part)
    return value


def _size(value: object) -> object:
    # pydantic alone reads `64KiB, or so` as 64 KiB.
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9.]+\s*[A-Za-z]*\s*", value) is None:
        raise ValueError("must be a size such as 65536, 64KiB or 1.5MiB")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_split)]
Seconds = Annotated[float, Field(ge=0, le=86400 * 7, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, Field(gt=0, le=86400 * 7, allow_inf_nan=False)]
Bytes = Annotated[ByteSize, BeforeValidator(_size), Field(ge=1024, le=1 << 30)]

# The first part of `base_path` must be none of these: a request without the path would look like one with it.
_OWN_PATHS = {"api", "health", "metrics", "v1", "vendor"}
_OWN_FILES = (".js", ".mjs", ".ts", ".css", ".html")

_TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}

LeaseSeconds = Annotated[float, Field(ge=1, le=600, allow_inf_nan=False)]
TickSeconds = Annotated[float, Field(ge=0.001, le=1, allow_inf_nan=False)]
LargeBytes = Annotated[ByteSize, BeforeValidator(_size), Field(ge=1024, le=1 << 50)]


def _field(default: Any, help_text: str, **rules: Any) -> Any:
    return Field(default=default, description=help_text, validate_default=False, **rules)


class Settings(BaseModel):
    """All settings. Seconds end in `_s`, sizes in `_bytes` (plain, or `64KiB`, `16MiB`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = _field(
        "127.0.0.1", "address to listen on; beyond loopback it needs access tokens or --open", min_length=1
    )
    port: int = _field(3000, "TCP port; 0 takes a free one and prints it", ge=0, le=65535)
    open: bool = _field(False, "allow anybody to start streams on an address beyond loopback")
    access_tokens: Secrets = _field((), "bearer tokens that may start streams, comma-separated; none: open to all")
    page: bool = _field(True, "serve the chat page at /; without it only its client, /aisse.js")
    base_path: str = _field(
        "", "path that a proxy has put in front, e.g. /llm: our URLs begin with it; requests may begin with it, or not"
    )
    cors_origins: Names = _field((), "exact origins of other sites whose pages may call, e.g. https://app.example")

    upstream: str = _field(
        "https://api.ezaiapi.com",
        "base URL of an Anthropic-compatible API, with or without /v1, or `simulator` or `local`",
    )
    upstream_key: SecretStr | None = _field(None, "API key for the upstream, whatever its host")
    proxy_from_env: bool = _field(False, "reach the upstream through HTTP_PROXY/HTTPS_PROXY")
    model: str = _field("claude-sonnet-4-20250514", "model where the request names none", pattern=f"^{MODEL_NAME}$")
    models: Names = _field((), "models that requests may name; none: any well-formed name")
    max_tokens: int = _field(4096, "max_tokens where the request has none", ge=1)
    max_tokens_limit: int = _field(64000, "largest max_tokens that a request may ask for", ge=1)
    allow_fields: Names = _field(
        (), "fields that requests may have beside those of aisse/routes/README.md, Asking; passed on unchecked"
    )
    allow_betas: Names = _field((), "values of the header anthropic-beta that requests may pass on; none: none")

    max_streams: int = _field(5000, "streams that may run at once; more get 503", ge=1)
    max_body_bytes: Bytes = _field(ByteSize(32 << 20), "largest request body; photos come in it, as base64")
    bodies_bytes: LargeBytes = _field(
        ByteSize(256 << 20), "memory for all request bodies whose answers have not begun; more get 503"
    )
    max_event_bytes: Bytes = _field(ByteSize(1 << 20), "largest single event of an upstream")
    read_ahead_bytes: Bytes = _field(ByteSize(64 << 10), "how far the upstream is read ahead of the furthest reader")
    write_buffer_bytes: Bytes = _field(ByteSize(16 << 10), "bytes waiting for a reader's socket that count as full")
    send_buffer_bytes: Bytes = _field(ByteSize(32 << 10), "kernel send buffer (SO_SNDBUF) of a reader's socket")
    receive_buffer_bytes: Bytes = _field(
        ByteSize(16 << 10), "kernel receive buffer (SO_RCVBUF) of an upstream connection"
    )
    stream_bytes: LargeBytes = _field(ByteSize(16 << 20), "longest stream; past it a stream ends as `limit`")
    replay_bytes: LargeBytes = _field(ByteSize(512 << 20), "memory for the replay of all streams")

    body_s: PositiveSeconds = _field(30, "time for a request's body to arrive; a second more for each 64 KiB of it")
    keep_alive_s: PositiveSeconds = _field(75, "idle connections and slow request headers are closed after this")
    heartbeat_s: PositiveSeconds = _field(15, "a comment is written after so much silence")
    first_byte_commit_s: Seconds = _field(5, "answer 200 after this even if the upstream has sent nothing")
    connect_s: PositiveSeconds = _field(10, "limit for name look-up, TCP and TLS to the upstream")
    first_byte_s: PositiveSeconds = _field(300, "limit for the upstream's first byte of an answer")
    silence_s: PositiveSeconds = _field(60, "limit between two bytes of the upstream")
    no_content_s: PositiveSeconds = _field(300, "limit between two events of the upstream that are more than a ping")
    stream_s: PositiveSeconds = _field(3600, "limit for a whole stream")
    leave_s: Seconds = _field(10, "how long a stream goes on that nobody reads")
    leave_max_s: Seconds = _field(300, "longest leave time that a request may ask for")
    allow_continue: bool = _field(False, "allow requests to go on without any reader to their end")
    stall_s: PositiveSeconds = _field(
        30, "a reader that takes no byte for so long is cut off; see aisse/routes/README.md, Slow readers"
    )
    retention_s: Seconds = _field(300, "how long a finished stream can be read again")
    drain_s: Seconds = _field(25, "how long running streams may go on at shutdown")
    unready_s: Seconds = _field(
        0, "how long connections are still taken at shutdown, for balancers to see readiness go"
    )
    reconnect_spread_s: Seconds = _field(5, "readers that come back after a shutdown are spread over so long")

    log: SecretStr = _field(
        SecretStr("memory"), "where streams are kept for replay: `memory`, or a URL redis://, rediss:// or unix://"
    )
    lease_s: LeaseSeconds = _field(6, "with a shared log: an instance that is silent for so long has lost its streams")
    log_tick_s: TickSeconds = _field(0.02, "with a shared log: how long events are gathered before they go there")
    log_format: Literal["auto", "json", "console"] = _field("auto", "auto: console on a terminal, else json")
    log_level: Literal["debug", "info", "warning", "error"] = _field("info", "least severe log line that is written")
    log_buffer_bytes: Bytes = _field(
        ByteSize(1 << 20), "log lines that wait while nobody reads standard error; more are dropped and counted"
    )

    @field_validator("base_path")
    @classmethod
    def _base_path(cls, value: str) -> str:
        if value == "":
            return value
        # RFC 3986, section 2.3: the characters that no server or proxy on the way writes differently.
        if re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value) is None:
            raise ValueError(
                "must be empty, or a path such as /llm, without a slash at its end, of A-Z a-z 0-9 . _ ~ - /"
            )
        first, *more = value[1:].split("/")
        if {".", ".."} & {first, *more}:
            raise ValueError("must have no `.` or `..` between its slashes")
        if first in _OWN_PATHS or first.endswith(_OWN_FILES):
            raise ValueError(
                "must not begin as our own paths do: /api, /health, /metrics, /v1, /vendor, the name of a file"
            )
        return value

    @field_validator("upstream_key")
    @classmethod
    def _key(cls, value: SecretStr | None) -> SecretStr | None:
        return value or None  # an empty variable is how a shell says that there is none

    @field_validator("upstream")
    @classmethod
    def _upstream(cls, value: str) -> str:
        if value in {"simulator", "local"}:
            return value
        try:
            url = URL(value)
        except ValueError as error:
            raise ValueError("is no URL") from error
        if url.scheme not in {"http", "https"} or not url.host:
            raise ValueError("must be http://..., https://..., `simulator` or `local`")
        if url.user is not None or url.password is not None:
            raise ValueError("must not carry a user or password; keys come by environment")
        if url.query_string or url.fragment:
            raise ValueError("must have no query and no fragment")
        return value.rstrip("/")

    @field_validator("log")
    @classmethod
    def _shared_log(cls, value: SecretStr) -> SecretStr:
        if value.get_secret_value() == "memory":
            return value
        try:
            url = URL(value.get_secret_value())
        except ValueError as error:
            raise ValueError("is no URL") from error
        if url.scheme not in {"redis", "rediss", "unix"} or not (url.path if url.scheme == "unix" else url.host):
            raise ValueError("must be `memory`, redis://host:port/0, rediss://... or unix:///path")
        if url.scheme != "unix" and re.fullmatch(r"(/[0-9]*)?", url.path) is None:
            raise ValueError("must have the number of a database as its path, or none")
        # Others would change what the code relies on, such as timeouts.
        if any(name not in {"db", "username", "password"} | _TLS_OPTIONS for name in url.query):
            raise ValueError("has an option that is none of db, username, password and those of TLS (ssl_...)")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            url = URL(origin) if "://" in origin else URL()
            if url.scheme not in {"http", "https"} or not url.host or str(url.origin()) != origin:
                raise ValueError("each must be a bare origin such as https://app.example, without a path")
        return value

    @field_validator("models")
    @classmethod
    def _models(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if re.fullmatch(MODEL_NAME, name) is None:
                raise ValueError("each must be a well-formed model name")
        return value

    @field_validator("allow_fields", "allow_betas")
    @classmethod
    def _allowed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name) is None:
                raise ValueError("each must have no more than letters, digits, `.`, `_` and `-`")
        return value

    @field_validator("access_tokens")
    @classmethod
    def _tokens(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for token in value:
            # RFC 6750 section 2.1: what a bearer token may consist of.
            if re.fullmatch(r"[A-Za-z0-9._~+/-]{16,}=*", token.get_secret_value()) is None:
                raise ValueError("each must have 16 or more characters of A-Z a-z 0-9 . _ ~ + / -")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.max_tokens > self.max_tokens_limit:
            raise ValueError("max_tokens: must not exceed max_tokens_limit")
        if self.models and self.model not in self.models:
            raise ValueError("model: must be one of models")
        if self.max_body_bytes > self.bodies_bytes:
            raise ValueError("bodies_bytes: must be at least max_body_bytes")
        if self.leave_s > self.leave_max_s:
            raise ValueError("leave_s: must not exceed leave_max_s")
        if not self.open and not self.access_tokens and not is_loopback(self.host):
            raise ValueError(
                "host: beyond loopback anybody could start streams; set AISSE_ACCESS_TOKENS, or say --open"
            )
        return self


SECRETS = frozenset({"access_tokens", "upstream_key"})
"""They are never shown, and never flags: other users of the machine see those. Of `log` that holds for its password."""


def log_kind(settings: Settings) -> str:
    """What kind of log the streams are kept in, without its address: `memory`, `redis`, `rediss` or `unix`."""
    return settings.log.get_secret_value().partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names other than localhost count as reachable from elsewhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
