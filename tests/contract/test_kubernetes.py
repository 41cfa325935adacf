"""The manifests, as Kustomize builds them: no cluster is here, but all that they say is checked."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.settings import SETTINGS, SettingsError, load
from tests.api.scripted_engine import make, routes
from tests.support.serving import ROOT

FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
VERSIONS = ("1.30", "1.37")  # the oldest that knows all that we use without a feature gate, and the newest
PATH = os.pathsep.join([str(Path(sys.executable).parent), str(ROOT / "build/checkov/bin"), os.environ["PATH"]])
KUBECTL, LINTER = shutil.which("kubectl", path=PATH), shutil.which("checkov", path=PATH)
NOT_OURS = {
    "CKV_K8S_11": "a limit of processors slows the server down that has work, while others are idle",
    "CKV_K8S_15": "when to pull an image is for whoever has the registry to say, and so is",
    "CKV_K8S_43": "its digest",
    "CKV_K8S_21": "`kubectl apply --namespace` says where",
    "CKV2_K8S_6": "who may reach whom is for the cluster's owner to say",
}
pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")


@functools.cache
def built(overlay: str) -> dict[str, dict[str, Any]]:
    """The documents of an overlay, by kind."""
    command = [str(KUBECTL), "kustomize", str(FOLDER / "overlays" / overlay)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    documents = list(yaml.safe_load_all(text))
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents)
    return by_kind


def pod(overlay: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The specification of its pods, and their container."""
    template = built(overlay)["Deployment"]["spec"]["template"]["spec"]
    (container,) = template["containers"]
    return template, container


def image(instruction: str) -> list[str]:
    """What the Dockerfile's last stage has under an instruction."""
    last = (ROOT / "Dockerfile").read_text("utf-8").rpartition("\nFROM ")[2].replace("\\\n", " ")
    return [line.partition(" ")[2] for line in last.splitlines() if line.startswith(instruction + " ")]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_schemas_of_kubernetes_accept_every_document(overlay: str, version: str) -> None:
    documents = dict(built(overlay))
    documents.pop("PodMonitor", None)  # the Prometheus operator's
    assert {"Deployment", "Service", "PodDisruptionBudget", "ConfigMap"} <= set(documents)
    for document in documents.values():
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whatever_selects_pods_selects_these(overlay: str) -> None:
    documents = built(overlay)
    labels = documents["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [found["spec"].get("selector") for found in documents.values() if "selector" in found.get("spec", {})]
    selectors += [spread["labelSelector"] for spread in pod(overlay)[0]["topologySpreadConstraints"]]
    assert len(selectors) >= 4
    for selector in selectors:
        chosen = selector.get("matchLabels", selector).items()
        assert chosen
        assert chosen <= labels


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_takes_its_environment_and_no_variable_of_a_service(
    overlay: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data, (template, container) = built(overlay)["ConfigMap"]["data"], pod(overlay)
    assert container["envFrom"] == [{"configMapRef": {"name": built(overlay)["ConfigMap"]["metadata"]["name"]}}]
    where = data["ENTRGI_API_KEY"].removeprefix("file:")
    assert any(where.startswith(each["mountPath"] + "/") and each.get("readOnly") for each in container["volumeMounts"])
    (tmp_path / "keys").write_text("a-key-of-many-letters\n")
    for name, value in {**data, "ENTRGI_API_KEY": f"file:{tmp_path / 'keys'}"}.items():
        monkeypatch.setenv(name, value)
    settings = load({})
    assert settings.device == overlay.replace("gpu", "cuda")
    assert settings.public_paths == ("/metrics",)
    assert {name for name in data if name.startswith("ENTRGI_")} <= {f"ENTRGI_{name.upper()}" for name in SETTINGS}
    service = built(overlay)["Service"]["metadata"]["name"]
    monkeypatch.setenv(f"{service.upper()}_PORT", "tcp://10.0.0.1:80")  # what Kubernetes would set
    with pytest.raises(SettingsError, match="port"):
        load({})
    assert template["enableServiceLinks"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_what_the_server_answers_and_pods_outlive_their_drain(overlay: str) -> None:
    template, container = pod(overlay)
    asked = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert asked == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert {("GET", path) for path in asked.values()} <= set(routes(make()))
    (port,) = container["ports"]
    assert [f"{port['containerPort']}"] == image("EXPOSE")
    leaves = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    readiness = container["readinessProbe"]
    assert leaves >= readiness["periodSeconds"] * readiness["failureThreshold"]  # no proxy knows later than the probe
    assert template["terminationGracePeriodSeconds"] >= leaves + load({}).drain_seconds + 10


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_run_as_the_images_user_and_write_where_it_says(overlay: str) -> None:
    template, container = pod(overlay)
    assert [str(template["securityContext"]["runAsUser"])] == image("USER")
    assert template["securityContext"]["runAsNonRoot"] is container["securityContext"]["readOnlyRootFilesystem"] is True
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(image("ENV"))))
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {"/tmp", variables["XDG_CACHE_HOME"]} <= set(mounted)
    assert set(mounted.values()) == {volume["name"] for volume in template["volumes"]}
    claims = {volume["name"] for volume in template["volumes"] if "persistentVolumeClaim" in volume}
    kept = {path for path, volume in mounted.items() if volume in claims}
    assert kept == ({variables["HF_HOME"]} if overlay == "gpu" else set())


def test_the_autoscaler_asks_for_what_the_adapter_makes_of_scraped_metrics() -> None:
    documents = built("gpu")
    (metric,) = documents["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = yaml.safe_load((FOLDER / "components/autoscaling/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "replicas" not in documents["Deployment"]["spec"]
    (endpoint,) = documents["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in pod("gpu")[1]["ports"]}
    assert ("GET", endpoint["path"]) in set(routes(make()))


@pytest.mark.slow
@pytest.mark.skipif(LINTER is None, reason="checkov is not installed (make checkov)")
def test_the_linter_finds_nothing(tmp_path: Path) -> None:
    for overlay in OVERLAYS:
        (tmp_path / f"{overlay}.yaml").write_text(yaml.safe_dump_all(built(overlay).values()))
    options = ["--skip-download", "--output=json", "--skip-check", ",".join(NOT_OURS), "--directory", str(tmp_path)]
    found = subprocess.run(
        [str(LINTER), "--framework=kubernetes", *options], capture_output=True, text=True, timeout=300
    )
    summary = json.loads(found.stdout)
    assert summary["summary"]["passed"] > 100
    assert [check["check_name"] for check in summary["results"]["failed_checks"]] == []
