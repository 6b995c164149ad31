"""One object, made once; the same names on the command line, in the environment and in the file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings, TenantLimits, operator_key_of

OTHER: dict[str, object] = {
    "host": "localhost",
    "auth": "keys",
    "auth_insecure": True,
    "open_hosts": ("dmn.example.org", "other.example.org"),
    "operator_key": "correct-horse-battery-staple",
    "operator_key_file": "/some/file",
    "image_formats": ("PNG", "GIF"),
    "log_level": "debug",
    "log_format": "text",
    "traces": "otlp",
    "encoder": "ViT-B-16/openai",
    "next_encoder": "ViT-B-16/openai",
    "device": "cpu",
    "devices": ("cuda:0", "cuda:1"),
    "store": "redis://localhost:6379",
    "store_down": "refuse",
    "data_dir": Path("/some/where"),
    "encoder_backend": "openvino",
    "encoder_dtype": "bfloat16",
    "cache_dir": Path("/some/where"),
    "embedded_binary": "redis-server",
    "embedded_fsync": "always",
    "tenant_limits": {"zoo": TenantLimits(tenant_rate=5.0, max_shots=9)},
}
"""A value that is not the default, of those settings that are not plain numbers."""


def other(name: str) -> object:
    """Return another valid value of a setting."""
    default = Settings.model_fields[name].get_default(call_default_factory=True)
    return OTHER[name] if name in OTHER else default + 1


def written(value: object) -> str:
    """Return a value as an environment variable says it."""
    if isinstance(value, dict):
        return json.dumps(_plain(value))
    return (
        ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _plain(limits: dict[str, TenantLimits]) -> dict[str, dict[str, float]]:
    return {tenant: own.model_dump(exclude_none=True) for tenant, own in limits.items()}


def in_toml(value: object) -> str:
    if isinstance(value, dict):
        lines = (f"{tenant}.{name} = {limit}" for tenant, own in _plain(value).items() for name, limit in own.items())
        return f"{{ {', '.join(lines)} }}"
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, Path):
        return repr(str(value))
    return str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("DMN_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that `DMN_CONFIG` names, still empty."""
    path = tmp_path / "dmn.toml"
    path.touch()
    monkeypatch.setenv("DMN_CONFIG", str(path))
    return path


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_is(name: str) -> None:
    description = Settings.model_fields[name].description
    assert description
    assert not description.endswith(".")


@pytest.mark.parametrize("name", Settings.model_fields)
def test_times_and_sizes_say_their_unit(name: str) -> None:
    words = ("delay", "timeout", "wait", "deadline", "ttl", "every")
    if any(word in name for word in words):
        assert name.endswith(("_s", "_ms"))


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_setting_has_one_name_everywhere(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = other(name)
    assert getattr(Settings(**{name: value}), name) == value  # type: ignore[arg-type]
    file.write_text(f"{name} = {in_toml(value)}\n")
    assert getattr(Settings(), name) == value
    file.write_text("")
    monkeypatch.setenv(f"DMN_{name.upper()}", written(value))
    assert getattr(Settings(), name) == value


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_environment_beats_the_file(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default, value = Settings.model_fields[name].get_default(call_default_factory=True), other(name)
    file.write_text(f"{name} = {in_toml(value)}\n")
    monkeypatch.setenv(f"DMN_{name.upper()}", written(default))
    assert getattr(Settings(), name) == default


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name != "tenant_limits"])  # no option
def test_the_command_line_beats_the_environment(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default, value = Settings.model_fields[name].get_default(call_default_factory=True), other(name)
    file.write_text(f"{name} = {in_toml(value)}\n")
    monkeypatch.setenv(f"DMN_{name.upper()}", written(value))
    assert getattr(Settings(**{name: default}), name) == default  # type: ignore[arg-type]


def test_sources_are_joined_setting_by_setting(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("port = 1\nmax_images = 2\nmax_views = 3\n")
    monkeypatch.setenv("DMN_MAX_IMAGES", "20")
    settings = Settings(max_views=30)
    assert (settings.port, settings.max_images, settings.max_views) == (1, 20, 30)


@pytest.mark.parametrize("text", ["colour = 1\n", "[server]\nport = 1\n", "DMN_PORT = 1\n"])
def test_an_unknown_name_in_the_file_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ValidationError):
        Settings()


def test_an_unknown_name_on_the_command_line_is_refused() -> None:
    with pytest.raises(ValidationError):
        Settings(colour=1)  # type: ignore[call-arg]


def test_a_file_that_is_not_there_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMN_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(FileNotFoundError, match=r"DMN_CONFIG names .*none\.toml"):
        Settings()


def test_a_file_that_is_no_toml_is_refused(file: Path) -> None:
    file.write_text("port: 1\n")
    with pytest.raises(ValueError, match="line 1"):
        Settings()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", "", "127.0.0.1.example.org"])
def test_open_doors_are_refused_on_an_address_that_others_reach(host: str) -> None:
    with pytest.raises(ValidationError, match="DMN_AUTH_INSECURE"):
        Settings(host=host)
    assert Settings(host=host, auth_insecure=True).host == host


def test_with_keys_the_doors_may_be_where_others_reach_them() -> None:
    assert Settings(host="0.0.0.0", auth="keys").host == "0.0.0.0"


def test_no_secret_stands_where_settings_are_shown_or_refused() -> None:
    key = "correct-horse-battery-staple"
    assert key not in repr(Settings(operator_key=key))
    with pytest.raises(ValidationError) as error:
        Settings(operator_key=f"{key} ")
    assert key not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_open_doors_are_fine_on_a_loopback_address(host: str) -> None:
    assert Settings(host=host).host == host


@pytest.mark.parametrize("text", ["jpeg,png", " JPEG , PNG,", "JPEG,PNG"])
def test_formats_are_a_list_with_commas_in_any_case(text: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(image_formats=text).image_formats == ("JPEG", "PNG")  # type: ignore[arg-type]
    file.write_text(f'image_formats = "{text}"\n')
    assert Settings().image_formats == ("JPEG", "PNG")
    monkeypatch.setenv("DMN_IMAGE_FORMATS", text)
    assert Settings().image_formats == ("JPEG", "PNG")


def test_devices_are_a_list_with_commas() -> None:
    assert Settings(devices=" cuda:0, cuda:1,").devices == ("cuda:0", "cuda:1")  # type: ignore[arg-type]
    assert Settings(devices="").devices == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_formats": "JPEG,SVG"},
        {"image_formats": ""},
        {"port": 65536},
        {"port": -1},
        {"http_workers": -1},
        {"max_images": 0},
        {"batch_images": 300, "queue_images": 200},
        {"sync_ms": -1},
        {"sync_ms": float("nan")},
        {"deadline_ms": 0},
        {"log_level": "loud"},
        {"store": "memcached"},
        {"store": ""},
        {"store_down": "panic"},
        {"store_timeout_ms": 0},
        {"pending_images": -1},
        {"verify_s": -1},
        {"snapshots": -1},
        {"snapshot_every_s": -1},
        {"max_snapshots": 0},
        {"auth": "none"},
        {"operator_key": "x" * 19},
        {"operator_key": "x" * 513},
        {"operator_key": "x" * 20 + "\n"},
        {"operator_key": "x" * 20, "operator_key_file": "/some/file"},
        {"next_encoder": "ViT-B-16/openai", "http_workers": 1},
    ],
)
def test_a_value_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)  # type: ignore[arg-type]


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_the_defaults_are_the_documented_limits() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.encoder) == ("127.0.0.1", 8000, "lite")
    assert (settings.max_images, settings.max_views) == (64, 64)
    assert (settings.max_image_bytes, settings.max_body_bytes) == (16 * 2**20, 64 * 2**20)
    assert settings.max_image_pixels == 40_000_000
    assert (settings.max_classes, settings.max_prompts, settings.max_text_chars) == (10_000, 128, 256)
    assert (settings.max_shots, settings.max_slots, settings.tenant_max_bytes) == (1000, 256, 512 * 2**20)
    assert (settings.sync_ms, settings.idempotency_ttl_s) == (200.0, 86_400.0)


def test_by_default_memories_are_kept_and_answers_go_on_while_the_store_is_away() -> None:
    settings = Settings()
    assert (settings.store, settings.store_down, settings.pending_images) == ("embedded", "serve", 10_000)
    assert settings.data_dir.name == "dmn"
    assert (settings.snapshots, settings.snapshot_every_s, settings.verify_s) == (10, 86_400.0, 300.0)


@pytest.mark.parametrize(
    ("store", "kind"),
    [
        ("memory", "memory"),
        ("embedded", "embedded"),
        ("redis://user:secret@host:6379/0", "redis"),
        ("rediss+cluster://:secret@host", "rediss+cluster"),
        ("unix:///run/valkey.sock", "unix"),
    ],
)
def test_what_the_store_is_can_be_said_without_its_address(store: str, kind: str) -> None:
    assert Settings(store=store).store_kind == kind


OPERATOR_KEY = "correct-horse-battery-staple"


def test_the_operators_key_comes_from_the_settings_or_from_the_file_that_they_name(tmp_path: Path) -> None:
    assert operator_key_of(Settings()) == ""
    assert operator_key_of(Settings(operator_key=OPERATOR_KEY)) == OPERATOR_KEY
    file = tmp_path / "key"
    file.write_text(f"{OPERATOR_KEY}\n")
    assert operator_key_of(Settings(operator_key_file=str(file))) == OPERATOR_KEY


@pytest.mark.parametrize("held", [None, b"", b"too-short", b"two words that are long enough", b"\xff" * 30])
def test_a_file_that_holds_no_key_is_refused_and_nothing_of_it_is_repeated(tmp_path: Path, held: bytes | None) -> None:
    file = tmp_path / "key"
    if held is not None:
        file.write_bytes(held)
    with pytest.raises(ValueError, match=r"^DMN_OPERATOR_KEY_FILE names ") as error:
        operator_key_of(Settings(operator_key_file=str(file)))
    assert "too-short" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ['{"zoo": {"colour": 1}}', '{"no name": {"tenant_rate": 1}}', '{"zoo": {"tenant_rate": -1}}', '{"zoo": 5}', "zoo"],
)
def test_what_some_tenants_may_is_checked_like_the_rest(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMN_TENANT_LIMITS", text)
    with pytest.raises(ValueError, match="tenant_limits"):
        Settings()


def test_a_tenant_of_which_nothing_is_said_has_the_settings_of_all() -> None:
    settings = Settings(tenant_rate=2.0, tenant_limits={"zoo": TenantLimits(max_shots=3)})
    assert settings.of("farm") is settings
    assert (settings.of("zoo").tenant_rate, settings.of("zoo").max_shots) == (2.0, 3)
