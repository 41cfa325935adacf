"""The files of deploy/ray say the same as the code, the lock and each other."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from server.settings import SETTINGS, unknown_variables
from tests.support.serving import ROOT

RAY, KUBERNETES = ROOT / "deploy/ray", ROOT / "deploy/kubernetes"


def manifest() -> dict[str, Any]:
    made = yaml.safe_load((RAY / "rayservice.yaml").read_text("utf-8"))
    assert isinstance(made, dict)
    return made


def kubernetes(name: str) -> Any:
    return yaml.safe_load((KUBERNETES / name).read_text("utf-8"))


def configuration(name: str) -> dict[str, Any]:
    made = manifest()["spec"]["serveConfigV2"] if name == "rayservice.yaml" else (RAY / name).read_text("utf-8")
    return dict(yaml.safe_load(made))


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_what_serve_is_told_is_there(name: str) -> None:
    (app,) = configuration(name)["applications"]
    module, _, builder = app["import_path"].partition(":")
    code = (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")
    assert f"def {builder}(" in code
    assert all(f"class {deployment['name']}:" in code for deployment in app["deployments"])
    assert set(app["args"]) <= set(SETTINGS)
    (scaler,) = kubernetes("components/autoscaling/autoscaler.yaml")["spec"]["metrics"]
    target = app["deployments"][0]["autoscaling_config"]["target_ongoing_requests"]
    assert str(target) == scaler["pods"]["target"]["averageValue"]
    assert (
        f"ENTRGI_MAX_QUEUE={app['args']['max_queue']} " in (KUBERNETES / "overlays/gpu/kustomization.yaml").read_text()
    )


def test_the_cluster_runs_the_locked_ray_and_known_settings_as_nobody_special() -> None:
    cluster = manifest()["spec"]["rayClusterConfig"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert extras["ray"] == [f"ray[serve]=={cluster['rayVersion']}"]
    (app,) = configuration("rayservice.yaml")["applications"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["maxReplicas"] >= app["deployments"][0]["autoscaling_config"]["max_replicas"]
    for group in (cluster["headGroupSpec"], workers):
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsUser"] == 10001
        (container,) = spec["containers"]
        variables = {each["name"]: each.get("value") for each in container["env"]}
        assert not unknown_variables(variables)
        assert variables["ENTRGI_PUBLIC_PATHS"] == "/metrics"
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert spec["enableServiceLinks"] is False
        assert spec["terminationGracePeriodSeconds"] > 2 * SETTINGS["drain_seconds"].default
    plain = kubernetes("overlays/gpu/gpu.yaml")["spec"]["template"]["spec"]
    assert container["resources"]["limits"] == plain["containers"][0]["resources"]["limits"]
    assert spec["tolerations"] == plain["tolerations"]
    claim = kubernetes("overlays/gpu/models.yaml")
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_the_image_copies_what_exists_and_runs_as_the_servers_user() -> None:
    text = (RAY / "Dockerfile").read_text("utf-8")
    allowed = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for source in re.findall(r"^COPY (\S+)", text, re.MULTILINE):
        assert (ROOT / source).exists()
        assert f"!{source}" in allowed
    assert text.rstrip().endswith("USER 10001")
