"""Settings: who wins, what is refused and how. Logs: no line that a client wrote."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server import log
from server.api.metrics import FIRST_TOKEN_BUCKETS, LATENCY_BUCKETS, REWARD_BUCKETS, Metrics
from server.cli import engine_config, main, parser
from server.errors import NotReady, ScorerUnavailable
from server.settings import SETTINGS, SettingsError, load, unknown_variables
from server.wire.config import FrontSettings, OutsideScorer, RewardSource, WorkerSettings
from server.wire.stats import SECONDS_BOUNDS
from tests.api.scripted_engine import unloaded


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("ENTRGI_")]:
        monkeypatch.delenv(name)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 1001\nmax-queue: 11\nhost: 0.0.0.0\nreward_model: [a=x, b=y]\n")
    monkeypatch.setenv("ENTRGI_PORT", "1002")
    monkeypatch.setenv("ENTRGI_MAX_QUEUE", "12")
    settings = load({"port": "1003"}, file)
    assert (settings.port, settings.max_queue, settings.host) == (1003, 12, "0.0.0.0")
    assert settings.reward_model == (RewardSource("a", "x"), RewardSource("b", "y"))
    assert settings.max_trajectories == 128
    monkeypatch.setenv("ENTRGI_CONFIG", str(file))
    assert load({}).host == "0.0.0.0"


def test_lists_and_switches_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTRGI_API_KEY", "key-number-one, key-number-two")
    monkeypatch.setenv("ENTRGI_REWARD_MODEL", '["a=x", "org/name"]')
    monkeypatch.setenv("ENTRGI_SERVED_MODEL_NAME", "x, y")
    monkeypatch.setenv("ENTRGI_CORS_ORIGINS", "")
    settings = load({})
    assert settings.api_key == ("key-number-one", "key-number-two")
    assert settings.reward_model == (RewardSource("a", "x"), RewardSource("org/name", "org/name"))
    assert settings.served_model_name == ("x", "y")
    assert settings.cors_origins == ()
    for text, value in (("true", True), ("False", False), ("1", True), ("0", False)):
        monkeypatch.setenv("ENTRGI_SPARE_WORKER", text)
        assert load({}).spare_worker is value
    assert load({"served_model_name": ["a,b", "c", "a"]}).served_model_name == ("a", "b", "c")


def test_a_reward_model_is_a_short_form_or_an_object_in_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"path": "org/six", "label": "2", "output": "log_softmax"}
    expected = RewardSource("org/six", "org/six", "2", "log_softmax"), RewardSource("b", "y", input="pair")
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"reward_model": [told, {"name": "b", "path": "y", "input": "pair"}]}))
    assert load({}, file).reward_model == expected
    told_as_json = json.dumps(told)
    flags = {"reward_model": [told_as_json, "b=y"]}
    assert load(flags).reward_model == (expected[0], RewardSource("b", "y"))
    for text in (told_as_json, f"[{told_as_json}]"):
        monkeypatch.setenv("ENTRGI_REWARD_MODEL", text)
        assert load({}).reward_model == expected[:1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", "http"), ("port", "70000"), ("port", 80.5), ("max_queue", "0"), ("dtype", "int8"), ("device", "tpu"),
        ("drain_seconds", "-1"), ("api_key", ["short"]), ("reward_model", ["=x"]), ("reward_model", ["a=x", "a=y"]),
        ("root_path", "llm"), ("served_model_name", "a b"), ("model", " "), ("vocab_fallback", "mean"),
        ("served_model_name", ["a", "b c"]), ("api_key", ["sha256:0a1b"]), ("otlp_endpoint", "collector:4318"),
        ("log_level", "LOUD"), ("no_such_key", "1"), ("stream_comment_seconds", "nan"), ("public_paths", "/v1/models"),
        ("max_key_requests", "0"), ("max_key_requests", "3"), ("max_key_trajectories", "3"),  # without a key: no effect
        ("spare_worker", "maybe"), ("lora", ["=x"]), ("lora", ["a=x", "a=y"]), ("max_loras", "0"), ("max_lora_rank", 0),
        ("idle_connection_seconds", "inf"), ("reward_model", "[1]"), ("reward_model", "[a"), ("reward_model", "{a"),
        ("reward_model", {"path": "x"}), ("reward_model", [{"name": "a"}]), ("reward_model", ['{"path": 3}']),
        ("reward_model", [{"path": "x", "lable": 1}]), ("reward_model", [{"path": "x", "output": "p"}]),
        ("reward_model", [{"path": "x", "name": "a b"}]), ("reward_model", [{"path": "x"}, "x"]),
        ("reward_model", [{"path": "x", "label": True}]), ("reward_model", [{"path": "x", "input": "prompt"}]),
        ("batch_dir", "/nowhere"), ("batch_file_bytes", "1"), ("batch_expire_seconds", "0"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_key(key: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"^{key}: "):
        load({key: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"allow_runtime_lora": True}, "allow_runtime_lora and lora_dir go together"),
        ({"lora_dir": "/"}, "allow_runtime_lora and lora_dir go together"),
        ({"allow_runtime_lora": True, "lora_dir": "/nowhere"}, "lora_dir: there is no folder /nowhere"),
        ({"lora": ["a=x", "b=y"], "max_loras": 1}, "lora: 2 adapters are more than max_loras = 1"),
    ],
)
def test_settings_of_adapters_that_do_not_fit_together(values: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(values)


def test_every_bad_value_is_told_with_what_the_setting_takes() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"dtype": "int8", "port": "http"})
    assert "got 'int8'" in str(caught.value)
    assert "bfloat16, float16" in str(caught.value)
    assert "port to listen on" in str(caught.value)


def test_bad_values_from_the_environment_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    for text, message in (
        ("prot: 8000\n", "prot: is .* mean port"),
        ("- a\n", "config: "),
        ("a: [\n", "config: "),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=f"^{message}"):
            load({}, file)
    with pytest.raises(SettingsError, match=r"^config: "):
        load({}, tmp_path / "absent.yaml")
    monkeypatch.setenv("ENTRGI_PORT", "http")
    with pytest.raises(SettingsError, match=r"^port: "):
        load({})


def test_secrets_are_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"api_key": ["tiny"]})
    assert "tiny" not in str(caught.value)
    assert "key-number-one" not in repr(load({"api_key": ["key-number-one"]}))


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(b"key-number-three").hexdigest()
    file.write_text(f"# who has it\n\n  key-number-two \nsha256:{digest}\n")
    settings = load({"api_key": ["key-number-one", f"file:{file}"]})
    assert settings.api_key == ("key-number-one", "key-number-two", f"sha256:{digest}")
    for text in ("", "# nothing\n", "short\n", "kéy-number-four\n", "sha256:12\n"):
        file.write_text(text)
        with pytest.raises(SettingsError, match=r"^api_key: ") as caught:
            load({"api_key": f"file:{file}"})
        assert text.strip() == "" or text.strip() not in str(caught.value)
    with pytest.raises(SettingsError, match=r"^api_key: .* cannot be read"):
        load({"api_key": [f"file:{tmp_path / 'absent'}"]})


def test_misspelt_variables_are_noticed() -> None:
    environment = {"ENTRGI_PORT": "1", "ENTRGI_PROT": "1", "ENTRGI_CONFIG": "x", "PATH": "/"}
    assert unknown_variables(environment) == {"ENTRGI_PROT": "; did you mean ENTRGI_PORT?"}


def test_help_says_every_key_and_default() -> None:
    text = " ".join(parser().format_help().split())
    for name, setting in SETTINGS.items():
        assert f"--{name.replace('_', '-')}" in text
        assert setting.description[:20] in text
        if setting.default not in (None, "", ()):
            assert f"(default: {setting.default})" in text


def test_users_need_not_read_too_many_settings() -> None:
    assert len(SETTINGS) <= 55


def test_a_misspelt_flag_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--max-qeue=8"])
    assert capsys.readouterr().err.endswith("there is no --max-qeue; did you mean --max-queue?\n")


def test_command_line_refuses_bad_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "http"]) == 2
    assert capsys.readouterr().err.startswith("error: port: ")


def test_what_a_user_sets_reaches_the_engine_and_its_workers() -> None:
    """Every setting that a process declares arrives with its value, and those under another name as what they mean."""
    given = {
        "device": "cpu", "reward_device": "cpu", "dtype": "float64", "attention_backend": "sdpa", "compile": True,
        "cuda_graphs": False, "kernels": "library", "attention": "block_causal", "block_length": 8, "max_model_len": 99,
        "vocab_fallback": "zero", "threads": 3, "data_parallel": 2,
        "batch_tokens": 99, "batch_trajectories": 5, "memory_fraction": 0.5, "plugins": ("a", "b"),
        "log_level": "ERROR", "log_format": "json", "max_queue": 7, "watchdog_seconds": 9.0, "spare_worker": False,
        "max_loras": 3, "max_lora_rank": 5, "scorers": (OutsideScorer(name="s", target="python:m:f"),),
    }  # fmt: skip
    models = {"model": "org/dlm", "reward_model": ["a=x", "b=y"], "served_model_name": ["mine", "other"]}
    config = engine_config(load({**given, **models}))
    both = asdict(config.worker) | asdict(config)
    declared = {each.name for part in (WorkerSettings, FrontSettings) for each in fields(part)}
    assert given == {name: both[name] for name in declared}
    assert (config.worker.model, config.worker.served_model_name) == ("org/dlm", "mine")
    assert config.worker.reward_models == (RewardSource("a", "x"), RewardSource("b", "y"))
    assert engine_config(load({"model": "org/dlm"})).worker.served_model_name is None
    adapted = engine_config(load({"lora": ["p=/x", "q=/y"], "max_loras": 3}))
    assert (adapted.loras, adapted.worker.adapters) == ({"p": "/x", "q": "/y"}, 2)
    assert engine_config(load({"allow_runtime_lora": True, "lora_dir": "/", "max_loras": 3})).worker.adapters == 4
    bundled = engine_config(load({})).worker
    assert bundled.served_model_name == "entrgi-demo-1.4m"
    assert bundled.reward_models


# -- logs ----------------------------------------------------------------------------------------------------


EVIL = 'x"\n{"level": "INFO", "message": "forged"}\r\x1b[31m\u2028'


def lines_of(formatter: logging.Formatter) -> list[str]:
    """What becomes of a message and of an exception that are a client's."""
    logger, handler = logging.Logger("test.log"), logging.StreamHandler(io.StringIO())
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    token = log.request_id.set("id-1")
    logger.info("got %s", EVIL, extra={"path": EVIL})
    try:
        raise ValueError(EVIL)
    except ValueError:
        logger.exception("broke")
    log.request_id.reset(token)
    text: str = handler.stream.getvalue()
    return text.splitlines()


def test_json_lines_cannot_be_forged() -> None:
    first, second = map(json.loads, lines_of(log.JSONFormatter()))
    assert first["message"] == f"got {EVIL}"
    assert first["path"] == EVIL
    assert first["request_id"] == second["request_id"] == "id-1"
    assert "ValueError" in second["traceback"]


def test_console_lines_cannot_be_forged() -> None:
    first, second, *traceback = lines_of(log.ConsoleFormatter())
    assert "forged" in first
    assert "broke" in second
    for line in (first, second, *traceback):
        assert line.isprintable()
        assert not line.startswith("{")


# -- metrics -------------------------------------------------------------------------------------------------


def test_two_applications_do_not_share_metrics() -> None:
    first, second = (Metrics(unloaded()) for _ in range(2))
    first.introduce("m")
    first.prompt_tokens.labels("m").inc(5)
    assert b'prompt_tokens_total{model_name="m"} 5.0' in first.render()
    assert b"prompt_tokens_total{" not in second.render()


def test_a_scorer_that_is_left_alone_is_no_want_of_the_servers() -> None:
    metrics = Metrics(unloaded())
    metrics.introduce("m")
    metrics.refused(ScorerUnavailable("alone"))
    metrics.refused(NotReady("loading"))
    text = metrics.render().decode()
    assert 'admission_rejections_total{reason="not_ready"} 1.0' in text
    assert "scorer_unavailable" not in text


def test_the_sum_of_final_rewards_is_exported_though_some_are_negative() -> None:
    metrics = Metrics(unloaded())
    for reward in (2.5, -4.0, 0.25):
        metrics.observe_reward("rm", "bon", reward)
    metrics.observe_reward("rm", "entrgi", 1.0)
    found = {
        (sample.name, sample.labels.get("method"), sample.labels.get("sign")): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert found["entrgi:final_reward_count", "bon", None] == 3
    size = "entrgi:final_reward_size_total"
    assert (found[size, "bon", "positive"], found[size, "bon", "negative"]) == (2.75, 4.0)
    assert (found[size, "entrgi", "positive"], found[size, "entrgi", "negative"]) == (1.0, 0.0)  # both exist at once


def test_buckets_hold_vllms_bounds_and_tell_milliseconds_apart() -> None:
    vllm = {0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0}
    assert vllm < set(LATENCY_BUCKETS)
    for buckets in (LATENCY_BUCKETS, FIRST_TOKEN_BUCKETS, SECONDS_BOUNDS, REWARD_BUCKETS):
        assert list(buckets) == sorted(set(buckets))
    for buckets in (LATENCY_BUCKETS, FIRST_TOKEN_BUCKETS, SECONDS_BOUNDS):
        assert buckets[0] <= 0.001
        assert sum(bound < 0.1 for bound in buckets) >= 5
