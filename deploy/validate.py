#!/usr/bin/env python3
"""Renders the kustomizations and checks what would be applied; `./dev test` runs the same checks as tests.

For each kustomization:
  - every object satisfies the OpenAPI schema of its kind, strictly: an unknown field is an error;
  - the objects agree with each other and with attnd's configuration: selectors, ports, references, the drain within
    the termination grace period, the KV cache within the memory, the threads within the CPUs;
  - with --server, that attnd accepts the configuration and serves it.

kubectl and the schemas come with the pinned Python packages (client/requirements-dev.txt); no cluster is asked.
"""

import argparse
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import kubernetes_validate
import yaml

DEPLOY = pathlib.Path(__file__).resolve().parent
KUSTOMIZATIONS = [DEPLOY / "base", *sorted((DEPLOY / "overlays").iterdir())]
KUBERNETES_VERSION = "1.37"
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MEMORY_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
EXIT_SECONDS = 3  # of the grace period, left over after the drain
MEMORY_SHARE = 0.8  # of the memory limit, at most for the KV cache
START_SECONDS = 30


class Invalid(Exception):
    """What is wrong, in words for the one who wrote the file."""


def expect(holds, message):
    if not holds:
        raise Invalid(message)


# -------------------------------------------------------------------------------------------------
# Rendering and schemas

def kubectl():
    """The kubectl of this Python's environment, or else the one on the PATH."""
    own = pathlib.Path(sys.executable).parent / "kubectl"
    found = str(own) if own.exists() else shutil.which("kubectl")
    expect(found, "no kubectl: pip install -r client/requirements-dev.txt")
    return found


def render(folder):
    """The objects of a kustomization, in kubectl's order."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    expect(done.returncode == 0, f"{folder}: {done.stderr.strip()}")
    return list(yaml.safe_load_all(done.stdout))


def check_schemas(objects):
    """Every object against the schema of its kind, unknown fields refused."""
    for thing in objects:
        try:
            kubernetes_validate.validate(thing, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            raise Invalid(f"{thing['kind']} {thing['metadata']['name']}: {path}: {error.message}") from None


# -------------------------------------------------------------------------------------------------
# Agreement of the objects

def only(objects, kind):
    found = [thing for thing in objects if thing["kind"] == kind]
    expect(len(found) == 1, f"{len(found)} objects of kind {kind}, expected one")
    return found[0]


def named(objects, kind):
    return {thing["metadata"]["name"]: thing for thing in objects if thing["kind"] == kind}


def pod_of(objects):
    """(metadata, spec) of the StatefulSet's pods."""
    template = only(objects, "StatefulSet")["spec"]["template"]
    return template["metadata"], template["spec"]


def container_of(objects):
    containers = pod_of(objects)[1]["containers"]
    expect([container["name"] for container in containers] == ["attnd"], "expected one container, attnd")
    return containers[0]


def config_text(objects):
    """attnd.yaml of the ConfigMap that the pods mount, having checked that they mount it."""
    container, (_, pod) = container_of(objects), pod_of(objects)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    expect(set(mounts) == set(volumes), f"volumes {sorted(volumes)} are mounted as {sorted(mounts)}")
    name = volumes["config"]["configMap"]["name"]
    maps = named(objects, "ConfigMap")
    expect(name in maps, f"the pods mount ConfigMap {name}, there are {sorted(maps)}")
    path = container["args"][container["args"].index("--config") + 1]
    folder, file = os.path.split(path)
    expect(folder == mounts["config"], f"--config {path}, but the ConfigMap is mounted at {mounts['config']}")
    expect(file in maps[name]["data"], f"--config {path}, but the ConfigMap has {sorted(maps[name]['data'])}")
    return maps[name]["data"][file]


def check_selectors(objects):
    """Whatever selects pods selects these."""
    labels = pod_of(objects)[0]["labels"]
    selectors = {"StatefulSet": only(objects, "StatefulSet")["spec"]["selector"]["matchLabels"],
                 "PodDisruptionBudget": only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
                 "NetworkPolicy": only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]}
    for name, service in named(objects, "Service").items():
        selectors[f"Service {name}"] = service["spec"]["selector"]
    for owner, selector in selectors.items():
        expect(selector and selector.items() <= labels.items(), f"{owner} selects {selector}, the pods are {labels}")
    service = only(objects, "StatefulSet")["spec"]["serviceName"]
    headless = named(objects, "Service").get(service, {}).get("spec", {}).get("clusterIP")
    expect(headless == "None", f"serviceName {service} is no headless Service")


def check_ports(objects, config):
    """Ports are where attnd listens, and whoever names one finds it."""
    metadata, _ = pod_of(objects)
    container = container_of(objects)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    listening = [int(address.rpartition(":")[2]) for address in config["server"]["listen"]]
    expect(ports["grpc"] in listening, f"port grpc is {ports['grpc']}, attnd listens on {listening}")
    expect(all(not address.startswith(("127.", "localhost")) for address in config["server"]["listen"]),
           "server.listen: loopback cannot be reached from other pods")
    expect(ports["metrics"] == config["metrics"]["port"], "port metrics is not metrics.port")
    expect(metadata["annotations"]["prometheus.io/port"] == str(ports["metrics"]), "prometheus.io/port is another")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        expect(container[probe]["grpc"]["port"] == ports["grpc"], f"{probe} asks another port than grpc")
    used = [port["targetPort"] for service in named(objects, "Service").values() for port in service["spec"]["ports"]]
    used += [port["port"] for rule in only(objects, "NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]]
    expect(set(used) <= set(ports), f"ports {sorted(used)} are used, the container has {sorted(ports)}")


def check_drain(objects, config):
    """Kubernetes kills no sooner than the preStop hook, the drain and the exit have had their time."""
    grace = pod_of(objects)[1]["terminationGracePeriodSeconds"]
    sleep = container_of(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = config["server"]["grace_ms"] / 1000
    expect(grace >= sleep + drain + EXIT_SECONDS,
           f"terminationGracePeriodSeconds {grace} is less than preStop {sleep} + drain {drain:g} + {EXIT_SECONDS}")


def memory_bytes(quantity):
    amount, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)", quantity).groups()
    return int(amount) * MEMORY_UNITS[unit]


def cache_bytes(config):
    """The KV cache of all ranks."""
    geometry, ranks = config["geometry"], config["ranks"]
    widths = geometry["head_dim"] + geometry.get("head_dim_v", geometry["head_dim"])
    page = (geometry["page_size"] * geometry["layers"] * geometry["heads_kv"] * widths
            * DTYPE_BYTES[geometry["dtype"]])
    return ranks["count"] * ranks["pages"] * page


def check_resources(objects, config):
    """The ranks fit what the container gets, and it gets what it asks for."""
    resources = container_of(objects)["resources"]
    expect(resources["requests"] == resources["limits"], "requests differ from limits: not of the Guaranteed class")
    threads = config["ranks"]["count"] * config["ranks"]["threads"]
    expect(threads <= int(resources["limits"]["cpu"]), f"{threads} threads on {resources['limits']['cpu']} CPUs")
    memory = memory_bytes(resources["limits"]["memory"])
    expect(cache_bytes(config) <= MEMORY_SHARE * memory,
           f"the KV cache takes {cache_bytes(config) / 2**30:.1f} GiB of {memory / 2**30:.1f}")
    expect(config["limits"]["max_sequence_tokens"] <= config["ranks"]["pages"] * config["geometry"]["page_size"],
           "limits.max_sequence_tokens: a rank has no pages for it")


def check_security(objects):
    """No root, no writing, no rights; an image without a registry's name, which is the overlay's to give."""
    _, pod = pod_of(objects)
    container = container_of(objects)
    expect(pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0, "runs as root")
    own = container["securityContext"]
    expect(own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"], "may write or escalate")
    expect(own["capabilities"] == {"drop": ["ALL"]}, "has capabilities")
    expect(not pod["automountServiceAccountToken"], "has a service account's token")
    expect("/" not in container["image"] and not container["image"].endswith(":latest"), f"image {container['image']}")


# -------------------------------------------------------------------------------------------------
# The configuration, with the real server

def with_local_tokens(text, folder):
    """The configuration with its token files in `folder`, each with a token in it."""
    def place(match):
        path = pathlib.Path(folder, os.path.basename(match[2]))
        path.write_text(f"a-token-for-{path.name}-of-enough-bytes\n")
        return f"{match[1]}{path}"
    return re.sub(r"(token_file:\s*)(\S+)", place, text)


def check_server_accepts(text, server):
    """Starts attnd with the configuration, on free loopback ports and few pages, and stops it once it serves."""
    with tempfile.TemporaryDirectory(prefix="attnd-validate-") as folder:
        config, ready, log = (pathlib.Path(folder, name) for name in ("attnd.yaml", "ready", "log"))
        config.write_text(with_local_tokens(text, folder))
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [str(server), "--config", str(config), "--listen", "127.0.0.1:0", "--metrics-port", "0",
                 "--metrics-address", "127.0.0.1", "--pages", "64", "--ready-file", str(ready)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + START_SECONDS
            while process.poll() is None and not ready.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            said = log.read_text(errors="replace").strip()
            expect(process.poll() is None, f"attnd refuses the configuration: {said}")
            expect(ready.exists(), f"attnd does not serve the configuration within {START_SECONDS} s: {said}")
            process.send_signal(signal.SIGTERM)
            expect(process.wait(START_SECONDS) == 0, f"attnd ended with status {process.returncode}")
        finally:
            process.kill()
            process.wait()


# -------------------------------------------------------------------------------------------------

def check(folder, server=None):
    """Everything above for one kustomization; the objects. Raises Invalid."""
    objects = render(folder)
    check_schemas(objects)
    check_selectors(objects)
    text = config_text(objects)
    config = yaml.safe_load(text)
    check_ports(objects, config)
    check_drain(objects, config)
    check_resources(objects, config)
    check_security(objects)
    if server is not None:
        check_server_accepts(text, server)
    return objects


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=pathlib.Path, default=KUSTOMIZATIONS, metavar="FOLDER",
                        help="kustomizations (default: base and every overlay)")
    parser.add_argument("--server", type=pathlib.Path, help="the attnd binary to try the configurations with")
    arguments = parser.parse_args()
    failed = 0
    for folder in arguments.folders:
        try:
            objects = check(folder, arguments.server)
            kinds = ", ".join(sorted(thing["kind"] for thing in objects))
            print(f"{os.path.relpath(folder)}: valid: {kinds}")
        except Invalid as problem:
            print(f"{os.path.relpath(folder)}: {problem}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
