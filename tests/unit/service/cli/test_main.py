"""The command line: an answer on stdout, everything else on stderr, and an exit status that tells."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from rich.console import Console

from core.encoders import openclip
from core.errors import EncoderUnavailable
from core.evaluation.stream_orders import KINDS
from service.cli import key_admin, main, options, output, serve
from service.server import single_process
from service.settings import Settings
from service.telemetry import logs
from tests.support.fakes import FakeEncoder, picture
from tests.support.servers import BINARIES, server

COMMANDS = ("serve", "classify", "evaluate", "train", "replay", "memory", "keys", "bench", "encoder", "config")


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def made_command() -> Any:
    """Return the command, made once: typer makes it anew for each call, which takes longer than the call."""
    return typer.main.get_command(main.app)


@pytest.fixture
def run(made_command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Return what runs `dmn` with arguments, in this process, with an encoder that sees colours."""
    for name in list(os.environ):
        if name.upper().startswith("DMN_"):
            monkeypatch.delenv(name)
    root, levels = logging.getLogger(), (logging.getLogger().level, logs.logger.level)
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    monkeypatch.setattr(openclip, "load", lambda *_, **__: FakeEncoder())
    monkeypatch.setattr(output.out, "_width", 300)
    monkeypatch.setattr(main, "app", made_command)

    def dmn(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["dmn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.main()
        told = capsys.readouterr()
        return Ran(int(ended.value.code or 0), told.out, told.err)

    yield dmn
    root.setLevel(levels[0])
    logs.logger.setLevel(levels[1])


def refused(ran: Ran) -> str:
    """Return the one line of a refusal of wrong input."""
    assert ran.status == 2
    assert not ran.out
    (line,) = ran.err.strip().splitlines()
    assert line.startswith("dmn: ")
    return line.removeprefix("dmn: ")


# Help -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert ran.status == 0
    assert f"dmn {command}" in ran.out
    assert not ran.err


def test_an_encoder_is_loaded_and_told_of(run: Run) -> None:
    told = run("encoder", "--json").json
    assert {"encoder": "fake", "fingerprint": "fake-1", "device": "cpu"}.items() <= told.items()
    assert run("encoder").out.splitlines()[:2] == ["encoder: fake", "fingerprint: fake-1"]


def test_dmn_alone_lists_its_commands(run: Run) -> None:
    ran = run()
    assert all(command in ran.out + ran.err for command in COMMANDS)
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("arguments", [("fly",), ("replay",), ("classify", "a.png"), ("config", "--wings")])
def test_a_command_line_that_makes_no_sense_ends_with_2_and_nothing_on_stdout(
    run: Run, arguments: tuple[str, ...]
) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err
    assert "Traceback" not in ran.err


# Settings -------------------------------------------------------------------------------------------------------------


def test_config_prints_every_setting_with_its_value_and_meaning(run: Run) -> None:
    ran = run("config")
    assert ran.status == 0
    for name, field in Settings.model_fields.items():
        assert f"DMN_{name.upper()} " in ran.out
        assert (field.description or "") in ran.out


def test_config_prints_json_for_machines(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMN_PORT", "1234")
    told = run("config", "--json").json
    assert set(told) == set(Settings.model_fields)
    assert (told["port"], told["host"], told["image_formats"]) == (1234, "127.0.0.1", ["JPEG", "PNG", "WEBP"])


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:hunter2@host:6379/0", "redis://********@host:6379/0"),
        ("redis+sentinel://:hunter2@a:1,b:2/main", "redis+sentinel://********@a:1,b:2/main"),
        ("redis://host:6379", "redis://host:6379"),
        ("embedded", "embedded"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert serve._shown("store", url) == shown


def test_config_shows_that_there_is_an_operators_key_and_not_which(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("config", "--json").json["operator_key"] == ""
    key = "correct-horse-battery-staple"
    monkeypatch.setenv("DMN_OPERATOR_KEY", key)
    assert run("config", "--json").json["operator_key"] == "********"
    assert key not in run("config").out


@pytest.mark.parametrize(
    "key", ["too-short", "x" * 19, "x" * 513, "two words that are long enough", "ключ-оператора-длинный"]
)
def test_an_operators_key_that_will_not_do_is_refused_without_being_repeated(
    run: Run, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("DMN_OPERATOR_KEY", key)
    line = refused(run("config"))
    assert line.startswith("DMN_OPERATOR_KEY: ")
    assert key not in line


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("DMN_PORT", "http", "DMN_PORT"),
        ("DMN_MAX_IMAGES", "-3", "DMN_MAX_IMAGES"),
        ("DMN_LOG_LEVEL", "loud", "DMN_LOG_LEVEL"),
        ("DMN_HOST", "0.0.0.0", "DMN_AUTH=open"),
        ("DMN_CONFIG", "nowhere.toml", "DMN_CONFIG names nowhere.toml"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    assert told in refused(run("config"))


@pytest.mark.parametrize("text", ["colour = 1", "port 1"])
def test_a_wrong_file_is_refused_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    file = tmp_path / "dmn.toml"
    file.write_text(text)
    monkeypatch.setenv("DMN_CONFIG", str(file))
    refused(run("config"))


def test_serve_takes_the_settings_of_its_options_over_the_environment(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings] = []

    def pretend(settings: Settings, console: Console) -> int:
        del console
        given.append(settings)
        return 0

    monkeypatch.setattr(single_process, "serve", pretend)
    monkeypatch.setenv("DMN_PORT", "1")
    monkeypatch.setenv("DMN_ENCODER", "other")
    assert run("serve", "--port", 0, "--host", "::1", "--device", "cpu", "--store", "memory").status == 0
    assert (given[0].port, given[0].host, given[0].device, given[0].encoder) == (0, "::1", "cpu", "other")


def test_serve_ends_with_the_servers_status(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_process, "serve", lambda *_: 3)
    assert run("serve").status == 3


def test_serve_refuses_open_doors_to_everybody_in_one_line(run: Run) -> None:
    assert "DMN_AUTH=open" in refused(run("serve", "--host", "0.0.0.0"))


def test_an_encoder_that_cannot_be_had_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unavailable(name: str, **_: object) -> None:
        raise EncoderUnavailable(f"{name} was asked for, but [there] is none.")

    monkeypatch.setattr(openclip, "load", unavailable)
    (tmp_path / "a.png").write_bytes(picture())
    line = refused(run("classify", tmp_path / "a.png", "--classes", "red,green", "--encoder", "X/y"))
    assert line == "X/y was asked for, but [there] is none."


def test_a_device_that_cannot_be_used_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    assert "nonsense" in refused(run("classify", tmp_path / "a.png", "--classes", "red", "--device", "nonsense"))


# Replay ---------------------------------------------------------------------------------------------------------------

N, C, D = 30, 3, 8


def arrays(**changes: object) -> dict[str, Any]:
    """Return a small stream with shots; a change of None leaves an array out."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(C, D)).astype(np.float32)
    labels = rng.integers(0, C, N)
    made = {
        "text": text,
        "features": (text[labels] + rng.normal(size=(N, D))).astype(np.float32),
        "labels": labels,
        "shots": (text[[0, 1, 2, 0]] + rng.normal(size=(4, D))).astype(np.float32),
        "shot_labels": np.array([0, 1, 2, 0]),
        "slots": np.array(3),
        "logit_scale": np.array(10.0),
        **changes,
    }
    return {name: array for name, array in made.items() if array is not None}


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "stream.npz"
    np.savez(path, **arrays())
    return path


def answers(path: Path) -> dict[str, NDArray[np.float32]]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_replay_prints_its_figures_as_json(run: Run, stream: Path) -> None:
    told = run("replay", stream, "--json").json
    assert set(told) == {"n", "classes", "accuracy", "macro_accuracy", "ece", "writes", "images_per_second"}
    assert (told["n"], told["classes"]) == (N, C)
    for name in ("accuracy", "macro_accuracy", "ece"):
        assert set(told[name]) == {"text", "dynamic", "static", "fused"}
        assert all(0.0 <= value <= 100.0 for value in told[name].values())
    assert set(told["writes"]) == {"filled", "replaced", "rejected"}
    assert sum(told["writes"].values()) == N


def test_replay_prints_a_table_for_people(run: Run, stream: Path) -> None:
    ran = run("replay", stream)
    assert ran.status == 0
    assert all(word in ran.out for word in ("text", "dynamic", "static", "fused", f"{N} images, {C} classes"))


def test_replay_writes_every_answer(run: Run, stream: Path, tmp_path: Path) -> None:
    told = run("replay", stream, "--json", "--out", tmp_path / "out.npz").json
    out = answers(tmp_path / "out.npz")
    assert set(out) == {"text", "dynamic", "static", "fused", "slot", "counts", "entropies"}
    for name in ("text", "dynamic", "static", "fused"):
        assert (out[name].shape, out[name].dtype) == ((N, C), np.float32)
    assert (out["slot"].shape, out["counts"].shape, out["entropies"].shape) == ((N,), (C,), (C, 3))
    assert (out["slot"] >= 0).sum() == told["writes"]["filled"] + told["writes"]["replaced"]
    labels = arrays()["labels"]
    assert told["accuracy"]["fused"] == pytest.approx(100 * (out["fused"].argmax(1) == labels).mean(), abs=1e-3)
    np.testing.assert_allclose(out["fused"], (out["text"] + out["dynamic"] + out["static"]) / 3, atol=1e-6)


def test_replay_answers_in_the_files_order_whatever_the_seed(run: Run, stream: Path, tmp_path: Path) -> None:
    outs = []
    for seed in ((), ("--seed", 0), ("--seed", 1)):
        assert run("replay", stream, *seed, "--out", tmp_path / "out.npz").status == 0
        outs.append(answers(tmp_path / "out.npz"))
    for out in outs[1:]:
        np.testing.assert_allclose(out["text"], outs[0]["text"], atol=1e-6)
        np.testing.assert_allclose(out["static"], outs[0]["static"], atol=1e-6)
        np.testing.assert_allclose(np.sort(out["entropies"]), np.sort(outs[0]["entropies"]), atol=1e-6)
    assert not np.allclose(outs[1]["dynamic"], outs[2]["dynamic"])


@pytest.mark.parametrize(("weights", "branch"), [("1,0,0", "text"), ("0,2,0", "dynamic"), ("0, 0, 0.5", "static")])
def test_replay_weighs_the_branches(run: Run, stream: Path, tmp_path: Path, weights: str, branch: str) -> None:
    assert run("replay", stream, "--weights", weights, "--out", tmp_path / "out.npz").status == 0
    out = answers(tmp_path / "out.npz")
    np.testing.assert_allclose(out["fused"], out[branch], atol=1e-7)


def test_replay_without_shots_has_no_static_branch(run: Run, stream: Path, tmp_path: Path) -> None:
    told = run("replay", stream, "--shots", 0, "--json", "--out", tmp_path / "out.npz").json
    assert told["accuracy"]["static"] is None
    assert "static" not in answers(tmp_path / "out.npz")


def test_replay_without_labels_measures_nothing(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays(labels=None))
    told = run("replay", tmp_path / "s.npz", "--json").json
    assert set(told["accuracy"].values()) == {None}
    assert told["n"] == N


def test_replay_that_does_not_learn_stores_nothing(run: Run, stream: Path, tmp_path: Path) -> None:
    told = run("replay", stream, "--no-learn", "--json", "--out", tmp_path / "out.npz").json
    assert set(told["writes"].values()) == {0}
    out = answers(tmp_path / "out.npz")
    assert (out["slot"] == -1).all()
    assert not out["counts"].any()


def test_replays_options_override_the_file(run: Run, stream: Path, tmp_path: Path) -> None:
    assert run("replay", stream, "--slots", 2, "--beta", 0, "--out", tmp_path / "out.npz").status == 0
    out = answers(tmp_path / "out.npz")
    assert out["entropies"].shape == (C, 2)
    assert out["counts"].max() <= 2
    assert run("replay", stream, "--slots", 2, "--out", tmp_path / "other.npz").status == 0
    assert not np.allclose(out["dynamic"], answers(tmp_path / "other.npz")["dynamic"])


WRONG_STREAMS: dict[str, dict[str, object]] = {
    "no text": {"text": None},
    "no features": {"features": None},
    "a value that is not finite": {"features": np.full((N, D), np.nan, np.float32)},
    "an infinite value": {"text": np.full((C, D), np.inf, np.float32)},
    "a zero row": {"features": np.zeros((N, D), np.float32)},
    "another size": {"features": np.ones((N, D + 1), np.float32)},
    "no images": {"features": np.ones((0, D), np.float32)},
    "words": {"features": np.full((N, D), "x")},
    "objects": {"features": np.array([{}], dtype=object)},
    "labels of another number": {"labels": np.zeros(N + 1, np.int64)},
    "labels out of range": {"labels": np.full(N, C)},
    "labels that are no integers": {"labels": np.zeros(N)},
    "shots without labels": {"shot_labels": None},
    "a negative number of slots": {"slots": np.array(-1)},
    "an infinite sharpness": {"beta": np.array(np.inf)},
    "an offset of another shape": {"projection_key": np.zeros((C, D + 1))},
}


@pytest.mark.parametrize("changes", WRONG_STREAMS.values(), ids=WRONG_STREAMS.keys())
def test_a_wrong_stream_ends_with_2_and_no_output(run: Run, tmp_path: Path, changes: dict[str, object]) -> None:
    np.savez(tmp_path / "s.npz", **arrays(**changes))
    refused(run("replay", tmp_path / "s.npz", "--json", "--out", tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_stream_ends_with_2_and_no_output(run: Run, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "s.npz"
    if content is not None:
        path.write_bytes(content)
    assert "s.npz" in refused(run("replay", path, "--json", "--out", tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz").exists()
    gc.collect()  # a file that was left open is told of here


@pytest.mark.parametrize("weights", ["1,1", "1,1,1,1", "a,b,c", "", "0,0,0", "1,-1,1", "nan,1,1", "inf,1,1"])
def test_wrong_weights_end_with_2(run: Run, stream: Path, tmp_path: Path, weights: str) -> None:
    assert "--weights" in refused(run("replay", stream, f"--weights={weights}", "--out", tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    "option", ["--slots=-1", "--slots=x", "--beta=-1", "--beta=nan", "--beta=inf", "--seed=-1", "--shots=-1"]
)
def test_options_out_of_range_end_with_2_and_no_output(run: Run, stream: Path, tmp_path: Path, option: str) -> None:
    ran = run("replay", stream, option, "--json", "--out", tmp_path / "out.npz")
    assert (ran.status, ran.out) == (2, "")
    assert not (tmp_path / "out.npz").exists()
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("command", [("replay", "no.npz"), ("train", "no folder")])
def test_an_output_without_a_place_is_refused_before_anything_is_read(
    run: Run, tmp_path: Path, command: tuple[str, str]
) -> None:
    assert "nowhere" in refused(run(*command, "--json", "--out", tmp_path / "nowhere" / "out"))
    assert "is a folder" in refused(run(*command, "--json", "--out", tmp_path))


def test_weights_are_refused_where_the_method_would_not_heed_them(run: Run, stream: Path) -> None:
    assert "leave them out" in refused(run("replay", stream, "--method", "auto", "--weights", "1,1,1"))


# Replay, over several orders ------------------------------------------------------------------------------------------

BRANCHES = {"text", "dynamic", "static", "fused"}
MEASURES = ("accuracy", "macro_accuracy", "ece")


def test_the_kinds_of_streams_are_those_of_core() -> None:
    assert tuple(options.StreamKind) == KINDS


def test_several_orders_are_the_mean_of_what_each_says_alone(run: Run, stream: Path) -> None:
    alone = [run("replay", stream, "--seed", seed, "--json").json for seed in range(3)]
    told = run("replay", stream, "--orders", 3, "--json").json
    for name in MEASURES:
        for branch in alone[0][name]:
            values = [one[name][branch] for one in alone]
            assert told[name][branch] == pytest.approx(sum(values) / 3, abs=1e-4)
            assert told["worst"][name][branch] == (max if name == "ece" else min)(values)
    for outcome, count in told["writes"].items():
        assert count == pytest.approx(sum(one["writes"][outcome] for one in alone) / 3, abs=1e-4)
    gains = np.array([one["accuracy"]["fused"] - one["accuracy"]["text"] for one in alone])
    assert told["gain"]["mean"] == pytest.approx(gains.mean(), abs=1e-3)
    assert told["gain"]["worst"] == pytest.approx(gains.min(), abs=1e-3)
    assert told["gain"]["standard_error"] == pytest.approx(gains.std(ddof=1) / 3**0.5, abs=1e-3)


def test_several_orders_print_what_one_does_and_more(run: Run, stream: Path) -> None:
    one, told = run("replay", stream, "--json").json, run("replay", stream, "--orders", 2, "--json").json
    assert set(told) == set(one) | {"orders", "stream", "worst", "gain", "first"}
    assert (told["orders"], told["stream"], told["n"], told["classes"]) == (2, "iid", N, C)
    assert set(told["first"]) == {"images", "accuracy"}
    assert told["first"]["images"] == N
    assert told["first"]["accuracy"] == told["accuracy"]
    assert set(told["worst"]) == set(MEASURES)


def test_the_first_hundred_images_of_an_order_are_measured_apart(run: Run, tmp_path: Path) -> None:
    """Images that point at their class come last in the file; shuffled, they are as frequent among the first."""
    rng = np.random.default_rng(1)
    labels, text = rng.integers(0, C, 250), arrays()["text"]
    np.savez(tmp_path / "s.npz", **arrays(features=text[labels], labels=np.r_[(labels[:120] + 1) % C, labels[120:]]))
    told = run("replay", tmp_path / "s.npz", "--orders", 40, "--shots", 0, "--json").json
    assert told["first"]["images"] == 100
    assert told["accuracy"]["text"] == pytest.approx(100 * 130 / 250, abs=1e-3)
    assert told["first"]["accuracy"]["text"] == pytest.approx(told["accuracy"]["text"], abs=3)
    assert told["first"]["accuracy"]["text"] != told["accuracy"]["text"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_any_kind_can_be_replayed(run: Run, stream: Path, kind: str) -> None:
    told = run("replay", stream, "--stream", kind, "--json").json
    assert (told["orders"], told["stream"], told["gain"]["standard_error"]) == (1, kind, None)
    assert (told["n"] < N) == (kind == "zipf")
    assert told["worst"]["accuracy"] == told["accuracy"]
    assert sum(told["writes"].values()) == told["n"]


def test_a_seed_moves_on_the_seeds_of_several_orders(run: Run, stream: Path) -> None:
    told = [run("replay", stream, "--seed", 5, *more, "--json").json for more in ((), ("--orders", 1))]
    assert told[0]["accuracy"] == told[1]["accuracy"]


@pytest.mark.parametrize("kind", ["runs", "zipf", "drift"])
def test_a_kind_that_is_made_by_labels_ends_with_2_without_them(run: Run, tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "s.npz", **arrays(labels=None))
    assert "labels" in refused(run("replay", tmp_path / "s.npz", "--stream", kind, "--json"))


def test_several_orders_without_labels_measure_nothing(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays(labels=None))
    told = run("replay", tmp_path / "s.npz", "--orders", 2, "--json").json
    assert set(told["accuracy"].values()) == set(told["gain"].values()) == {None}
    assert run("replay", tmp_path / "s.npz", "--orders", 2).status == 0


def test_answers_of_several_orders_are_not_written(run: Run, stream: Path, tmp_path: Path) -> None:
    assert "--out" in refused(run("replay", stream, "--orders", 2, "--out", tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz").exists()


def test_several_orders_print_a_table_for_people(run: Run, stream: Path) -> None:
    ran = run("replay", stream, "--orders", 2, "--stream", "runs")
    assert ran.status == 0
    assert all(word in ran.out for word in (*BRANCHES, "2 orders (runs)", "worst", f"first {N}", "gain of fused"))


@pytest.mark.parametrize("option", ["--orders=0", "--orders=x", "--stream=sorted"])
def test_orders_out_of_range_end_with_2(run: Run, stream: Path, option: str) -> None:
    ran = run("replay", stream, option, "--json")
    assert (ran.status, ran.out) == (2, "")


# Classify -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Return a red, a green and a blue picture."""
    paths = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for path in paths:
        path.write_bytes(picture(path.stem))
    return paths


def test_classify_names_the_class_of_each_image_in_order(run: Run, images: list[Path]) -> None:
    told = run("classify", *images, "--classes", " blue, red ,green", "--json", "--top-k", 2).json
    assert [one["image"] for one in told] == [str(path) for path in images]
    assert [one["label"] for one in told] == ["red", "green", "blue"]
    for one in told:
        assert set(one) == {"image", "label", "top", "error"}
        assert one["top"][0]["label"] == one["label"]
        assert [score["score"] for score in one["top"]] == sorted((s["score"] for s in one["top"]), reverse=True)
        assert len(one["top"]) == 2
        assert one["error"] is None


def test_classify_prints_a_table_for_people(run: Run, images: list[Path]) -> None:
    ran = run("classify", *images, "--classes", "red,green,blue")
    assert ran.status == 0
    assert all(path.name in ran.out for path in images)
    assert "%" in ran.out


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_classify_answers_the_others_if_a_file_is_bad_and_ends_with_1(
    run: Run, images: list[Path], tmp_path: Path, as_json: tuple[str, ...]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    given = (images[0], tmp_path / "bad.png", tmp_path / "missing.png", tmp_path, images[1])
    ran = run("classify", *given, "--classes", "red,green", *as_json)
    assert ran.status == 1
    if as_json:
        told = json.loads(ran.out)
        assert [one["label"] for one in told] == ["red", None, None, None, "green"]
        assert [one["error"] is None for one in told] == [True, False, False, False, True]
        assert "missing.png" in told[2]["error"]
    else:
        assert "red.png" in ran.out
        assert "bad.png" in ran.out


@pytest.mark.parametrize("classes", ["", " , ", "red,red", "red, red ", "x" * 300, "re\x1bd,green"])
def test_wrong_classes_end_with_2(run: Run, images: list[Path], classes: str) -> None:
    refused(run("classify", images[0], "--classes", classes, "--json"))


@pytest.mark.parametrize("classes", ["red [warm],green", "red,green[/]", "[red]red[/red],green"])
def test_brackets_in_names_are_shown_as_they_are(run: Run, images: list[Path], classes: str) -> None:
    ran = run("classify", images[0], "--classes", classes)
    assert ran.status == 0
    assert all(name in ran.out for name in classes.split(","))


def test_brackets_in_paths_are_shown_as_they_are(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "[bold]red.png"
    path.write_bytes(picture("red"))
    ran = run("classify", path, "--classes", "red,green")
    assert ran.status == 0
    assert "[bold]red.png" in ran.out


def test_more_images_than_a_call_may_hold_are_classified_all_the_same(
    run: Run, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits of the service's calls are the command's own affair."""
    monkeypatch.setenv("DMN_MAX_IMAGES", "2")
    told = run("classify", *images, "--classes", "red,green,blue", "--json").json
    assert [one["label"] for one in told] == ["red", "green", "blue"]


def test_a_queue_shorter_than_the_list_of_images_is_no_obstacle(
    run: Run, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMN_QUEUE_IMAGES", "2")
    monkeypatch.setenv("DMN_BATCH_IMAGES", "2")
    assert len(run("classify", *images, "--classes", "red,green,blue", "--json").json) == 3


# Evaluate -------------------------------------------------------------------------------------------------------------


def folder(root: Path, **classes: list[str]) -> Path:
    """Make a folder of class folders with a picture for each colour that is listed."""
    seeds = itertools.count()
    for name, colours in classes.items():
        (root / name).mkdir(parents=True)
        for n, colour in enumerate(colours):
            (root / name / f"{n}.png").write_bytes(picture(colour, next(seeds)))
    return root


def test_evaluate_measures_what_a_hand_counts(run: Run, tmp_path: Path) -> None:
    """One of two in `red` is a blue picture, the other seven are right: 8 of 9, and (1/2 + 1 + 1) / 3 a class."""
    root = folder(tmp_path / "data", red=["red", "blue"], green=["green"] * 5, blue=["blue"] * 2)
    told = run("evaluate", root, "--json").json
    assert (told["n"], told["classes"], told["shots"], told["encoder"]) == (9, 3, 0, "fake")
    for branch in ("text", "fused"):
        assert told["accuracy"][branch] == pytest.approx(100 * 8 / 9, abs=1e-3)
        assert told["macro_accuracy"][branch] == pytest.approx(100 * 2.5 / 3, abs=1e-3)
    assert told["accuracy"]["static"] is None
    assert told["writes"] == {"filled": 9}
    assert told["memory"]["slots"] == 3 * 50
    assert told["memory"]["growth"][-1] == 9
    assert told["failed"] == {}


def test_evaluate_takes_shots_out_of_the_stream(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", red=["red"] * 4, green=["green"] * 3, blue=["blue"] * 5)
    told = run("evaluate", root, "--shots", 2, "--json").json
    assert (told["n"], told["shots"]) == (12 - 6, 2)
    assert told["accuracy"] == {"text": 100.0, "dynamic": 100.0, "static": 100.0, "statistics": 100.0, "fused": 100.0}


def test_evaluate_says_the_same_for_the_same_seed(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", red=["red", "blue", "red"], green=["green", "red", "green"])
    first, again = (run("evaluate", root, "--shots", 1, "--seed", 3, "--json").json for _ in range(2))
    for told in (first, again):
        told.pop("images_per_second")
    assert first == again


def test_evaluate_lists_files_that_cannot_be_read_and_measures_the_others(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", red=["red"] * 2, green=["green"] * 2)
    (root / "red" / "bad.jpg").write_bytes(b"no picture")
    (root / "red" / "notes.txt").write_text("no picture either, and nobody says so")
    told = run("evaluate", root, "--json").json
    assert told["n"] == 4
    assert list(told["failed"]) == [str(root / "red" / "bad.jpg")]
    assert told["accuracy"]["text"] == 100.0
    table = run("evaluate", root)
    assert table.status == 0
    assert "1 file" in table.out


def test_evaluate_prints_a_table_for_people(run: Run, tmp_path: Path) -> None:
    ran = run("evaluate", folder(tmp_path / "data", red=["red"] * 2, green=["green"] * 2))
    assert ran.status == 0
    assert all(word in ran.out for word in ("text", "dynamic", "static", "fused", "4 images, 2 classes"))


@pytest.mark.parametrize("make", ["missing", "empty", "file", "no folders", "empty folders", "no pictures"])
def test_a_folder_without_images_ends_with_2(run: Run, tmp_path: Path, make: str) -> None:
    root = tmp_path / "data"
    if make == "file":
        root.write_text("no folder")
    elif make != "missing":
        root.mkdir()
    if make == "no folders":
        (root / "a.png").write_bytes(picture())
    if make in {"empty folders", "no pictures"}:
        (root / "red").mkdir()
    if make == "no pictures":
        (root / "red" / "a.txt").write_text("no picture")
    refused(run("evaluate", root, "--json"))


def test_a_folder_of_which_nothing_can_be_read_ends_with_2(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", red=[])
    (root / "red" / "bad.jpg").write_bytes(b"no picture")
    refused(run("evaluate", root, "--json"))


def test_shots_that_leave_a_class_empty_end_with_2(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", red=["red"] * 3, green=["green"] * 2)
    assert "green" in refused(run("evaluate", root, "--shots", 2, "--json"))


@pytest.mark.parametrize("option", ["--shots=-1", "--views=0", "--seed=-1", "--views=65", "--views=300"])
def test_evaluate_refuses_options_out_of_range(run: Run, tmp_path: Path, option: str) -> None:
    ran = run("evaluate", folder(tmp_path / "data", red=["red"]), option, "--json")
    assert (ran.status, ran.out) == (2, "")


def test_evaluate_streams_several_folders_in_several_orders(run: Run, tmp_path: Path) -> None:
    one = folder(tmp_path / "one", red=["red"] * 4, green=["green"] * 4)
    two = folder(tmp_path / "two", red=["blue"] * 4, green=["blue"] * 4)
    strangers = folder(tmp_path / "none", deep=["white"] * 3)
    given = ("--orders", 2, "--stream", "drift", "--unknown", strangers)
    told = run("evaluate", one, two, *given, "--json").json
    assert (told["n"], told["orders"], told["stream"], told["unknown"]["images"]) == (16, 2, "drift", 3)
    assert {"worst", "worst_tenth", "gain", "first"} <= set(told)
    assert run("evaluate", one, two, *given).status == 0


@pytest.mark.parametrize("option", ["--orders=0", "--stream=sorted"])
def test_evaluate_refuses_orders_out_of_range(run: Run, tmp_path: Path, option: str) -> None:
    ran = run("evaluate", folder(tmp_path / "data", red=["red"]), option, "--json")
    assert (ran.status, ran.out) == (2, "")


def test_evaluate_refuses_strangers_that_are_not_there_and_folders_that_do_not_match(run: Run, tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", red=["red"] * 2), folder(tmp_path / "other", blue=["blue"] * 2)
    assert "nowhere" in refused(run("evaluate", one, "--unknown", tmp_path / "nowhere", "--json"))
    assert "blue" in refused(run("evaluate", one, other, "--json"))


def test_evaluate_reruns_the_papers_table_and_says_what_is_missing(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder(root / "dtd" / "images", red=["red"] * 2, green=["green"] * 2)
    items = [[f"{name}/{n}.png", label, name] for label, name in enumerate(("red", "green")) for n in range(2)]
    (root / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps({"train": items, "test": items}))
    told = run("evaluate", "--paper", root, "--json").json
    assert told["data_sets"]["DTD"]["accuracy"]["text"] == 100.0
    table = run("evaluate", "--paper", root, "--datasets", "dtd,eurosat", "--shots", 1)
    assert table.status == 0
    assert all(word in table.out for word in ("DTD", "average", "100.00"))
    assert "Not found: EuroSAT" in table.out
    assert "UCF101" not in table.out
    machine = run("evaluate", "--paper", root, "--datasets", "dtd,eurosat", "--json")
    assert list(machine.json["missing"]) == ["EuroSAT"]
    assert "Not found: EuroSAT" in machine.err


def test_evaluate_wants_either_folders_or_the_papers_root(run: Run, tmp_path: Path) -> None:
    for given in ((), (tmp_path, "--paper", tmp_path), (tmp_path, "--datasets", "dtd")):
        assert "--paper" in refused(run("evaluate", *given, "--json"))
    assert "Not found" in refused(run("evaluate", "--paper", tmp_path / "nowhere", "--json"))
    assert "cifar" in refused(run("evaluate", "--paper", tmp_path, "--datasets", "cifar", "--json"))


def test_evaluate_trains_on_shots_and_wants_some(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", red=["red"] * 4, green=["green"] * 4)
    told = run("evaluate", root, "--shots", 2, "--train", "--json").json
    assert [one["seed"] for one in told["training"]] == [0]
    assert "--shots" in refused(run("evaluate", root, "--train", "--json"))


def test_evaluate_writes_a_report(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", red=["red"] * 3, green=["green"] * 3)
    ran = run("evaluate", root, "--orders", 2, "--report", tmp_path / "out.md")
    assert ran.status == 0
    told = (tmp_path / "out.md").read_text()
    assert f"    dmn evaluate {root} --orders 2 --report" in told
    assert "6 images, 2 classes, 2 orders (iid)" in told
    assert (tmp_path / "out-1.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_refuses_a_report_without_a_place_at_once(run: Run, tmp_path: Path) -> None:
    root = folder(tmp_path / "data", red=["red"])
    assert "nowhere" in refused(run("evaluate", root, "--report", tmp_path / "nowhere" / "out.md"))


def test_a_broken_split_file_ends_with_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dtd" / "images").mkdir(parents=True)
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_bytes(b"\xff")
    assert "UTF-8" in refused(run("evaluate", "--paper", tmp_path, "--json"))


# Keys -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf() -> Iterator[str]:
    """Return the URL of a store."""
    binary = BINARIES["valkey"]
    if binary is None:
        pytest.skip("no Valkey or Redis server is installed")
    with server(str(binary)) as running:
        yield running.url


@pytest.fixture
def keys(run: Run, shelf: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs `dmn keys` on a store without any."""
    monkeypatch.setenv("DMN_STORE", shelf)
    monkeypatch.setenv("DMN_AUTH", "keys")
    monkeypatch.setenv("DMN_STORE_TIMEOUT_MS", "60000")
    for one in run("keys", "list", "--json").json["keys"]:
        run("keys", "revoke", one["id"])
    return lambda *arguments: run("keys", *arguments)


def test_a_new_key_is_the_only_line_of_the_answer_and_told_this_once(keys: Run) -> None:
    ran = keys("create", "--tenant", "zoo", "--scope", "classify,memory")
    assert ran.status == 0
    (key,) = ran.out.splitlines()
    assert key.startswith("dmn_zoo_")
    assert "only time" in ran.err
    assert "no tenant 'zoo' yet" in ran.err
    assert key not in ran.err
    for told in (keys("list").out, keys("list", "--json").out):
        assert key not in told
        assert key[-8:] not in told
    (one,) = keys("list", "--json").json["keys"]
    assert (one["tenant"], one["scopes"], one["expires"], one["expired"]) == (
        "zoo",
        ["classify", "memory"],
        None,
        False,
    )
    assert one["id"] in key


def test_a_new_key_is_told_as_json_for_machines(keys: Run) -> None:
    ran = keys("create", "--tenant", "zoo", "--scope", " admin , classify,admin", "--expires", "2999-12-31", "--json")
    told = ran.json
    assert set(told) == {"key", "id", "tenant", "scopes", "created", "expires", "expired"}
    assert (told["scopes"], told["expires"]) == (["admin", "classify"], "2999-12-31T00:00:00Z")
    assert told["key"].startswith(f"dmn_{told['id']}_")
    assert keys("list", "--json").json == {"keys": [{name: told[name] for name in told if name != "key"}]}


def test_keys_are_listed_of_one_tenant_or_of_all(keys: Run) -> None:
    for tenant in ("zoo", "shop"):
        for _ in range(2):
            assert keys("create", "--tenant", tenant, "--scope", "classify").status == 0
    assert keys("create", "--scope", "operator").status == 0
    assert keys("create", "--scope", "metrics").status == 0
    assert [one["tenant"] for one in keys("list", "--json").json["keys"]].count(None) == 2
    assert [one["tenant"] for one in keys("list", "--tenant", "shop", "--json").json["keys"]] == ["shop", "shop"]
    assert keys("list").out.count("zoo_") == 2
    assert keys("list", "--tenant", "nobody", "--json").json == {"keys": []}


def test_a_key_is_taken_back_by_its_id_or_by_itself(keys: Run) -> None:
    first = keys("create", "--tenant", "zoo", "--scope", "classify", "--json").json
    second = keys("create", "--tenant", "zoo", "--scope", "classify", "--json").json
    assert first["id"] in keys("revoke", first["id"]).out
    ran = keys("revoke", second["key"], "--json")
    assert ran.json == {"id": second["id"], "revoked": True}
    assert keys("list", "--json").json == {"keys": []}
    assert "There is no key of this id" in refused(keys("revoke", first["id"]))
    assert second["key"] not in refused(keys("revoke", second["key"]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--scope", "classify"), "Say with --tenant"),
        (("--scope", "metrics,classify"), "Say with --tenant"),
        (("--scope", "operator", "--tenant", "zoo"), "belongs to no tenant"),
        (("--scope", "operator,admin"), "name no other scope"),
        (("--scope", "fly", "--tenant", "zoo"), "--scope takes some of classify"),
        (("--scope", ",", "--tenant", "zoo"), "--scope takes some of classify"),
        (("--scope", "classify", "--tenant", "a b"), "A tenant name"),
        (("--scope", "classify", "--tenant", "zoo", "--expires", "soon"), "--expires takes"),
        (("--scope", "classify", "--tenant", "zoo", "--expires", "0d"), "has to be ahead"),
        (("--scope", "classify", "--tenant", "zoo", "--expires", "2001-01-01"), "has to be ahead"),
        (("--scope", "classify", "--tenant", "zoo", "--expires", "999999999w"), "has to be ahead"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused_in_one_line_and_not_made(
    keys: Run, arguments: tuple[str, ...], said: str
) -> None:
    assert said in refused(keys("create", *arguments))
    assert keys("list", "--json").json == {"keys": []}


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "zoo_1"), ("create", "--scope", "operator")])
def test_keys_in_the_memory_of_a_service_are_out_of_reach_and_it_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("DMN_STORE", "memory")
    assert "DMN_OPERATOR_KEY" in refused(run("keys", *arguments))


def test_keys_on_a_store_that_does_not_answer_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMN_STORE", "unix:///no/such/socket")
    assert "its socket does not exist" in refused(run("keys", "list"))


def test_who_makes_keys_where_nobody_asks_for_them_is_told(keys: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMN_AUTH", "open")
    assert "DMN_AUTH=keys" in keys("create", "--scope", "operator").err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("5m", 300),
        ("2h", 7200),
        ("90d", 90 * 86_400),
        ("1w", 604_800),
        ("1970-01-02", 86_400 - 1000),
        ("1970-01-01T01:00", 3600 - 1000),
        ("1970-01-01T01:00+01:00", -1000),
    ],
)
def test_a_key_expires_after_a_while_or_at_a_moment(text: str, seconds: int) -> None:
    if seconds > 0:
        assert key_admin.moment(text, 1000.0) == 1000.0 + seconds
        return
    with pytest.raises(ValueError, match="ahead"):
        key_admin.moment(text, 1000.0)
