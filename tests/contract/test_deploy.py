"""Container files: what a container engine would do is not done here, but everything that they promise is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from server.api.metrics import Metrics
from server.scorers.scorer import Scorer
from server.settings import SETTINGS, Settings
from tests.api.scripted_engine import INFO, ScriptedEngine, at_once
from tests.support.scorers import function
from tests.support.serving import ROOT

DASHBOARD = ROOT / "deploy/grafana/dashboards/entrgi.json"
PROMETHEUS = ROOT / "deploy/prometheus"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
INTERPOLATION = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _compose_command() -> list[str]:
    """Docker Compose 2, as a plugin of docker or by itself, which needs no engine to read its files."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and b" v2" in subprocess.run([*command, "version"], capture_output=True).stdout:
            return command
    return []


COMPOSE = _compose_command()


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def environment_file() -> dict[str, str]:
    lines = (ROOT / ".env").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose(**shell: str) -> dict[str, Any]:
    """docker-compose.yml as `docker compose config` would see it with these variables in the shell."""
    values = {**environment_file(), **shell}
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    document = yaml.safe_load(INTERPOLATION.sub(lambda m: values.get(m[1]) or m[2] or "", text))
    assert isinstance(document, dict)
    return document


def test_compose_file_has_no_dangling_names() -> None:
    document = compose()
    services = document["services"]
    assert set(services) == {"server", "server-cpu", "server-0", "server-1", "proxy", "prometheus", "grafana"}
    sources = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    folders = {source for source in sources if source.startswith("./")}
    assert all((ROOT / folder).exists() for folder in folders), folders
    assert sources - folders == set(document["volumes"])
    assert {other for service in services.values() for other in service.get("depends_on", {})} <= set(services)


def test_every_service_is_checked_and_published_on_the_loopback_only() -> None:
    for name, service in compose()["services"].items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert {"max-size", "max-file"} <= set(service["logging"]["options"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    told = compose(PUBLISH_ADDRESS="0.0.0.0", PORT="80")
    assert told["services"]["server"]["ports"] == ["0.0.0.0:80:8000"]


def test_the_gpu_profile_serves_the_published_models_and_the_cpu_profile_the_bundled_ones() -> None:
    server, cpu = (compose()["services"][name] for name in ("server", "server-cpu"))
    assert (server["profiles"], cpu["profiles"], environment_file()["COMPOSE_PROFILES"]) == (["gpu"], ["cpu"], "gpu")
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert server["environment"]["ENTRGI_MODEL"] == "Dream-org/Dream-v0-Instruct-7B"
    assert "hf-cache:/home/entrgi/.cache/huggingface" in server["volumes"]
    other = compose(ENTRGI_MODEL="/models/mine", HF_CACHE="/data/hf")["services"]["server"]
    assert other["environment"]["ENTRGI_MODEL"] == "/models/mine"
    assert "/data/hf:/home/entrgi/.cache/huggingface" in other["volumes"]
    assert "ENTRGI_MODEL" not in cpu["environment"]
    assert cpu["build"]["args"]["VARIANT"] == "cpu"


def test_each_of_several_gpus_has_a_server_that_the_proxy_finds_and_prometheus_knows() -> None:
    services = compose()["services"]
    several = {name: service for name, service in services.items() if service.get("profiles") == ["gpus"]}
    proxy = several.pop("proxy")
    assert proxy["ports"] == services["server"]["ports"]
    one = services["server"] | {"profiles": ["gpus"]}
    for number, (name, service) in enumerate(several.items()):
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": [str(number)], "capabilities": ["gpu"]}
        assert "ports" not in service
        assert service | {key: one[key] for key in ("ports", "deploy")} == one, name
    template = re.search(r"server-template \S+ (\d+) (\w+):8000", (ROOT / "deploy/haproxy.cfg").read_text("utf-8"))
    assert template is not None
    assert len(several) <= int(template[1])
    assert all(template[2] in service["networks"]["default"]["aliases"] for service in several.values())
    (job,) = load_yaml(PROMETHEUS / "gpus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"{name}:8000" for name in several]}]
    told = compose(PROMETHEUS_CONFIG="gpus.yml")["services"]["prometheus"]["command"]
    assert "--config.file=/etc/prometheus/gpus.yml" in told


@pytest.mark.skipif(not COMPOSE, reason="docker compose is not installed")
@pytest.mark.parametrize("profile", ["gpu", "cpu", "gpus"])
def test_docker_compose_reads_every_profile(profile: str) -> None:
    command = [*COMPOSE, "--profile", profile, "config", "--format", "json"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert found.stderr == ""
    read = json.loads(found.stdout)["services"]
    assert set(read) == {
        name for name, service in compose()["services"].items() if profile in service.get("profiles", [profile])
    }


@pytest.mark.skipif(HADOLINT is None, reason="hadolint has no wheel for this machine")
@pytest.mark.parametrize("path", ["Dockerfile", "deploy/ray/Dockerfile"])
def test_hadolint_finds_nothing_in_the_dockerfile(path: str) -> None:
    found = subprocess.run([str(HADOLINT), str(ROOT / path)], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("name", ["server", "server-cpu", "proxy"])
def test_servers_run_without_privileges_and_longer_than_their_drain(name: str) -> None:
    service = compose()["services"][name]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert int(service["stop_grace_period"].removesuffix("s")) > Settings().drain_seconds


def test_the_variables_are_settings_of_the_server() -> None:
    variables = {name for service in compose()["services"].values() for name in service.get("environment", {})}
    variables |= set(re.findall(r"\bENTRGI_[A-Z_]+", (ROOT / "Dockerfile").read_text("utf-8")))
    ours = {name for name in variables if name.startswith("ENTRGI_")}
    assert len(ours) >= 8
    assert ours <= {f"ENTRGI_{name.upper()}" for name in SETTINGS}


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_image_is_built_in_stages_and_runs_as_nobody_special() -> None:
    found = instructions()
    stages = [rest for word, rest in found if word == "FROM"]
    assert len(stages) == 4
    final = found[max(i for i, (word, _) in enumerate(found) if word == "FROM") :]
    assert [rest for word, rest in final if word == "USER"] == ["10001"]
    assert final[-1] == ("CMD", '["python", "-m", "server"]')
    assert not any("pip install" in rest for word, rest in final if word == "RUN")


def test_image_takes_both_variants_and_only_wheels_of_the_lock() -> None:
    found = instructions()
    assert {("ARG", "VARIANT=cuda"), ("FROM", "venv-${VARIANT} AS venv"), ("ARG", 'TORCH_INDEX=""')} <= set(found)
    installs = [rest for word, rest in found if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert all("-r /build/requirements-otel.lock" in install and "pip check" in install for install in installs)
    assert sum("PIP_ONLY_BINARY=:all:" in rest for word, rest in found if word == "ENV") == 2


def test_everything_that_is_copied_exists_and_gets_past_dockerignore() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")]
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    copied = {source for *sources, _ in copies for source in sources}
    assert copied <= set(allowed)
    assert all((ROOT / source).exists() for source in copied), copied
    modules = [path for folder in ("server", "kernels") for path in (ROOT / folder).rglob("*.py")]
    imported = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    roots = {name for path in modules for name in imported.findall(path.read_text("utf-8")) if (ROOT / name).is_dir()}
    assert roots == {"server", "kernels", "demo"}
    assert roots <= {source.partition("/")[0] for source in copied}


def test_healthcheck_command_is_that_of_compose() -> None:
    (check,) = (json.loads(rest.partition(" CMD ")[2]) for word, rest in instructions() if word == "HEALTHCHECK")
    assert check == compose()["services"]["server"]["healthcheck"]["test"][1:] == ["python", "deploy/healthcheck.py"]


class Answering(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Quiet."""


def test_healthcheck_follows_the_status_and_fails_when_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> int:
        command = [sys.executable, str(ROOT / "deploy/healthcheck.py")]
        return subprocess.run(command, env={"ENTRGI_PORT": str(site.server_port)}, timeout=60).returncode

    with HTTPServer(("127.0.0.1", 0), Answering) as site:
        thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            found = [check()]
            monkeypatch.setattr(Answering, "status", 503)
            found.append(check())
        finally:
            site.shutdown()
            thread.join()
    assert [*found, check()] == [0, 1, 1]


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """The names of all samples that a scrape can hold, each metric having been used once."""
    engine = ScriptedEngine(at_once)
    engine.replicas[0].info, engine.replicas[0].ready = INFO, True
    engine.scorers = {"x": Scorer(function("length"))}
    metrics = Metrics(engine)
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            child: Any = metric.labels(*("x" for _ in metric._labelnames))
            child.observe(1.0) if hasattr(child, "observe") else child.inc()
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name for family in families for sample in family.samples}


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    rules = load_yaml(PROMETHEUS / "alerts.yml")["groups"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])] + [
        rule["expr"] for group in rules for rule in group["rules"]
    ]


def test_every_expression_names_exported_metrics(exported: set[str]) -> None:
    assert {"entrgi:denoising_steps_total", "entrgi:batch_rows_sum", "entrgi:execution_info"} <= exported
    for expression in expressions():
        names = re.findall(r"entrgi:\w+", expression)
        assert names or "up{" in expression, expression
        assert set(names) <= exported, expression


def test_the_autoscaler_counts_exported_metrics(exported: set[str]) -> None:
    text = (ROOT / "deploy/kubernetes/components/autoscaling/prometheus-adapter.yaml").read_text("utf-8")
    counted = {f"entrgi:num_requests_{which}" for which in ("running", "waiting", "parked")}
    assert set(re.findall(r"entrgi:\w+", text)) == counted
    assert set(re.findall(r"entrgi:\w+", text)) <= exported


def adapted(**labels: str) -> str:
    """What prometheus-adapter asks for one pod."""
    path = ROOT / "deploy/kubernetes/components/autoscaling/prometheus-adapter.yaml"
    (rule,) = load_yaml(path)["rules"]["custom"]
    matchers = ",".join(f'{name}="{value}"' for name, value in labels.items())
    query = rule["metricsQuery"].replace("<<.GroupBy>>", ",".join(labels))
    return str(query.replace("<<.LabelMatchers>>", matchers))


def test_series_of_different_labels_meet_only_as_sums() -> None:
    """An operator between two series gives nothing unless their labels are the same."""
    for expression in [*expressions(), adapted(pod="a")]:
        assert not re.search(r"entrgi:\w+(\{[^}]*\})?(\[\w+\])?\s*[-+*/]\s", expression), expression


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus's own checker is not installed")
def test_the_autoscaler_gets_the_prompts_that_are_computed_or_wait(tmp_path: Path) -> None:
    served = "namespace='n',pod='a',model_name='dlm'"
    values = {f"running{{{served}}}": 5, f"waiting{{{served}}}": 3, "parked{namespace='n',pod='a'}": 2}
    series = [{"series": f"entrgi:num_requests_{name}", "values": f"{value} {value}"} for name, value in values.items()]
    wanted = {"labels": '{namespace="n",pod="a"}', "value": 6}
    asked = {"expr": adapted(namespace="n", pod="a"), "eval_time": "1m", "exp_samples": [wanted]}
    path = tmp_path / "test.yml"
    path.write_text(
        yaml.safe_dump({"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [asked]}]})
    )
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_is_on_the_dashboard(exported: set[str]) -> None:
    def metrics(samples: Iterable[str]) -> set[str]:
        return {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples if not name.endswith("_created")}

    assert metrics(exported) <= metrics(name for each in expressions() for name in re.findall(r"entrgi:\w+", each))


def test_labels_of_expressions_exist() -> None:
    known = {"finished_reason", "method", "reward_model", "scorer", "reason", "le"}
    known |= {"worker", "instance", "route", "status"}
    for expression in expressions():
        for labels in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {label.strip() for label in labels.split(",")} <= known, expression


def test_dashboard_is_provisioned() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    (source,) = load_yaml(ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    (provider,) = load_yaml(ROOT / "deploy/grafana/provisioning/dashboards/entrgi.yml")["providers"]
    grafana = compose()["services"]["grafana"]
    assert source["url"] == "http://prometheus:9090"
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].endswith(DASHBOARD.name)
    panels = dashboard["panels"]
    used = [each["datasource"]["uid"] for p in panels for each in (p, *p.get("targets", [])) if "datasource" in each]
    chosen, instance = dashboard["templating"]["list"]
    assert set(used) == {instance["datasource"]["uid"]} == {"${datasource}"}
    assert (chosen["name"], chosen["current"]["value"]) == ("datasource", source["uid"])
    targets = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert all(expr.count('instance=~"$instance"') == len(re.findall(r"entrgi:|\bup\b", expr)) for expr in targets)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_prometheus_scrapes_whichever_server_runs() -> None:
    (job,) = load_yaml(PROMETHEUS / "prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    for service in (compose()["services"][name] for name in ("server", "server-cpu")):
        assert host in service["networks"]["default"]["aliases"]
        assert service["ports"][0].endswith(f":{port}")
        assert service["environment"]["ENTRGI_PUBLIC_PATHS"] == "/metrics"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus's own checker is not installed")
def test_promtool_accepts_configuration_rules_and_dashboard_expressions(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "gpus.yml"):
        subprocess.run(["promtool", "check", "config", str(PROMETHEUS / name)], check=True, timeout=60)
    rules = [
        {"record": f"panel:{i}", "expr": e.replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$", "")}
        for i, e in enumerate(expressions())
    ]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", str(path)], check=True, timeout=60)
