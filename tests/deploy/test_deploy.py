"""The deployment files: what kustomize renders, what the Dockerfiles install, and that the real server takes both.

The checks themselves are deploy/validate.py's. Here they pass on every kustomization, and each of them is shown to
fail on the mistake that it is there for.
"""

import copy
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
DOCKERFILE_CUDA = ROOT / "deploy/Dockerfile.cuda"
SERVER = pathlib.Path(os.environ.get("ATTND_BINARY", ROOT / "bazel-bin/service/attnd"))


@pytest.fixture(scope="module")
def server():
    assert SERVER.exists(), f"no server binary at {SERVER}: build //service:attnd, or set ATTND_BINARY"
    return SERVER


@pytest.fixture(scope="module")
def rendered():
    return validate.render(validate.DEPLOY / "base")


@pytest.fixture
def objects(rendered):
    return copy.deepcopy(rendered)


@pytest.fixture(scope="module")
def rendered_on_gpus():
    return validate.render(validate.DEPLOY / "overlays/gpu")


@pytest.fixture
def on_gpus(rendered_on_gpus):
    return copy.deepcopy(rendered_on_gpus)


def stateful_set(objects):
    return validate.only(objects, "StatefulSet")["spec"]


def container(objects):
    return validate.container_of(objects)


def config_of(objects):
    return yaml.safe_load(validate.config_text(objects))


@pytest.mark.parametrize("folder", validate.KUSTOMIZATIONS, ids=lambda folder: folder.name)
class TestEveryKustomization:
    def test_renders_to_valid_objects_that_agree(self, folder):
        kinds = {thing["kind"] for thing in validate.check(folder)}
        assert {"StatefulSet", "Service", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"} <= kinds

    def test_configuration_is_accepted_by_the_server(self, folder, server):
        validate.check_server_accepts(validate.config_text(validate.render(folder)), server)


class TestSchemas:
    def test_unknown_field_is_refused(self, objects):
        container(objects)["readynessProbe"] = {"grpc": {"port": 7400}}
        with pytest.raises(validate.Invalid, match=r"StatefulSet attnd.*readynessProbe"):
            validate.check_schemas(objects)

    def test_wrong_type_is_refused(self, objects):
        stateful_set(objects)["replicas"] = "one"
        with pytest.raises(validate.Invalid, match=r"spec\.replicas"):
            validate.check_schemas(objects)


class TestAgreement:
    def test_selector_that_finds_no_pod_is_refused(self, objects):
        validate.only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] = {"app": "attnd"}
        with pytest.raises(validate.Invalid, match="PodDisruptionBudget selects"):
            validate.check_selectors(objects)

    def test_service_name_without_headless_service_is_refused(self, objects):
        stateful_set(objects)["serviceName"] = "attnd"
        with pytest.raises(validate.Invalid, match="no headless Service"):
            validate.check_selectors(objects)

    def test_probe_of_another_port_is_refused(self, objects):
        container(objects)["livenessProbe"]["grpc"]["port"] = 7401
        with pytest.raises(validate.Invalid, match="livenessProbe"):
            validate.check_ports(objects, config_of(objects))

    def test_loopback_address_is_refused(self, objects):
        config = config_of(objects)
        config["server"]["listen"] = ["127.0.0.1:7400"]
        with pytest.raises(validate.Invalid, match="loopback"):
            validate.check_ports(objects, config)

    def test_service_port_that_the_container_lacks_is_refused(self, objects):
        validate.named(objects, "Service")["attnd"]["spec"]["ports"][0]["targetPort"] = "http"
        with pytest.raises(validate.Invalid, match="http"):
            validate.check_ports(objects, config_of(objects))

    def test_drain_longer_than_the_grace_period_is_refused(self, objects):
        config = config_of(objects)
        config["server"]["grace_ms"] = 25000
        with pytest.raises(validate.Invalid, match="terminationGracePeriodSeconds 30"):
            validate.check_drain(objects, config)

    def test_cache_larger_than_the_memory_is_refused(self, objects):
        config = config_of(objects)
        config["ranks"]["pages"] *= 2
        with pytest.raises(validate.Invalid, match=r"KV cache takes 8\.0 GiB of 6\.0"):
            validate.check_resources(objects, config)

    def test_more_threads_than_cpus_are_refused(self, objects):
        config = config_of(objects)
        config["ranks"]["threads"] = 3
        with pytest.raises(validate.Invalid, match="6 threads on 4 CPUs"):
            validate.check_resources(objects, config)

    def test_sequence_longer_than_a_rank_is_refused(self, objects):
        config = config_of(objects)
        config["limits"]["max_sequence_tokens"] *= 2
        with pytest.raises(validate.Invalid, match="max_sequence_tokens"):
            validate.check_resources(objects, config)

    def test_pod_that_mounts_another_config_map_is_refused(self, objects):
        stateful_set(objects)["template"]["spec"]["volumes"][0]["configMap"]["name"] = "attnd-config"
        with pytest.raises(validate.Invalid, match="the pods mount ConfigMap attnd-config"):
            validate.config_text(objects)

    @pytest.mark.parametrize("image", ["somewhere/attnd:0.1.0", "attnd:latest"])
    def test_image_of_a_registry_or_without_version_is_refused(self, objects, image):
        container(objects)["image"] = image
        with pytest.raises(validate.Invalid, match="image"):
            validate.check_security(objects)

    def test_writable_root_file_system_is_refused(self, objects):
        container(objects)["securityContext"]["readOnlyRootFilesystem"] = False
        with pytest.raises(validate.Invalid, match="may write"):
            validate.check_security(objects)


def set_resource(objects, name, value):
    """In the requests and the limits; None takes it away."""
    for kind in container(objects)["resources"].values():
        kind.pop(name)
        if value is not None:
            kind[name] = value


def volume_of_shared_memory(objects):
    volumes = stateful_set(objects)["template"]["spec"]["volumes"]
    return next(volume for volume in volumes if volume["name"] == "shm")


def pod_annotations(objects):
    return stateful_set(objects)["template"]["metadata"]["annotations"]


class TestGpus:
    @pytest.mark.parametrize("count", [1, 3, 4])
    def test_other_ranks_than_gpus_are_refused(self, on_gpus, count):
        config = config_of(on_gpus)
        config["ranks"]["count"] = count
        with pytest.raises(validate.Invalid, match=f"{count} ranks on 2 GPUs"):
            validate.check_resources(on_gpus, config)

    @pytest.mark.parametrize("backend", ["auto", "cpu"])
    def test_backend_that_needs_no_gpu_is_refused(self, on_gpus, backend):
        config = config_of(on_gpus)
        config["ranks"]["backend"] = backend
        with pytest.raises(validate.Invalid, match=f"ranks.backend is {backend}"):
            validate.check_resources(on_gpus, config)

    def test_backend_that_is_left_to_the_server_is_refused(self, on_gpus):
        config = config_of(on_gpus)
        del config["ranks"]["backend"]
        with pytest.raises(validate.Invalid, match="ranks.backend is auto"):
            validate.check_resources(on_gpus, config)

    def test_cuda_without_gpus_is_refused(self, on_gpus):
        set_resource(on_gpus, validate.GPU, None)
        with pytest.raises(validate.Invalid, match=r"asks for no nvidia\.com/gpu"):
            validate.check_resources(on_gpus, config_of(on_gpus))

    def test_requests_that_are_not_the_limits_are_refused(self, on_gpus):
        container(on_gpus)["resources"]["requests"][validate.GPU] = "1"
        with pytest.raises(validate.Invalid, match="requests differ from limits"):
            validate.check_resources(on_gpus, config_of(on_gpus))

    def test_cache_larger_than_a_gpus_memory_is_refused(self, on_gpus):
        config = config_of(on_gpus)
        config["ranks"]["pages"] *= 2
        with pytest.raises(validate.Invalid, match=r"takes 260\.0 GiB of a GPU's 139\.0"):
            validate.check_resources(on_gpus, config)

    def test_cache_that_leaves_nothing_for_staging_is_refused(self, on_gpus):
        config = config_of(on_gpus)
        config["ranks"]["pages"] = 138 * 1024 // 20
        with pytest.raises(validate.Invalid, match=r"4\.0 are for staging"):
            validate.check_resources(on_gpus, config)

    def test_cache_in_fp8_takes_half(self, on_gpus):
        config = config_of(on_gpus)
        config["ranks"]["pages"] *= 2
        config["geometry"]["kv_dtype"] = "fp8_e4m3"
        validate.check_resources(on_gpus, config)

    @pytest.mark.parametrize("dims, stored", [((128, 128), (128, 128)), ((80, 80), (96, 96)), ((192, 128), (192, 128)),
                                              ((64, 160), (192, 192))])
    def test_rows_count_as_they_are_stored(self, on_gpus, dims, stored):
        config = config_of(on_gpus)
        config["geometry"]["head_dim"], config["geometry"]["head_dim_v"] = dims
        assert validate.stored_dims(config) == stored
        config["ranks"]["backend"] = "cpu"
        assert validate.stored_dims(config) == dims

    def test_unknown_gpu_memory_is_refused(self, on_gpus):
        del pod_annotations(on_gpus)[validate.GPU_MEMORY]
        with pytest.raises(validate.Invalid, match=r"no annotation attnd\.dev/gpu-memory"):
            validate.check_resources(on_gpus, config_of(on_gpus))

    def test_gpu_memory_that_is_no_quantity_is_refused(self, on_gpus):
        pod_annotations(on_gpus)[validate.GPU_MEMORY] = "141 GB"
        with pytest.raises(validate.Invalid, match="141 GB is no number of"):
            validate.check_resources(on_gpus, config_of(on_gpus))

    def test_ranks_without_shared_memory_are_refused(self, on_gpus):
        next(mount for mount in container(on_gpus)["volumeMounts"] if mount["name"] == "shm")["mountPath"] = "/shm"
        with pytest.raises(validate.Invalid, match="no memory-backed emptyDir at /dev/shm"):
            validate.check_resources(on_gpus, config_of(on_gpus))

    def test_shared_memory_on_a_disk_is_refused(self, on_gpus):
        del volume_of_shared_memory(on_gpus)["emptyDir"]["medium"]
        with pytest.raises(validate.Invalid, match="no memory-backed emptyDir at /dev/shm"):
            validate.check_resources(on_gpus, config_of(on_gpus))

    def test_shared_memory_without_limit_is_refused(self, on_gpus):
        del volume_of_shared_memory(on_gpus)["emptyDir"]["sizeLimit"]
        with pytest.raises(validate.Invalid, match="no sizeLimit"):
            validate.check_resources(on_gpus, config_of(on_gpus))

    def test_one_rank_needs_no_shared_memory(self, on_gpus):
        config = config_of(on_gpus)
        config["ranks"]["count"] = 1
        set_resource(on_gpus, validate.GPU, "1")
        del container(on_gpus)["volumeMounts"][:]
        validate.check_resources(on_gpus, config)

    def test_too_little_memory_of_the_host_is_refused(self, on_gpus):
        set_resource(on_gpus, "memory", "12Gi")
        with pytest.raises(validate.Invalid, match=r"13\.0 GiB of the host's memory.* has 12\.0"):
            validate.check_resources(on_gpus, config_of(on_gpus))

    def test_more_busy_threads_than_cpus_are_refused(self, on_gpus):
        set_resource(on_gpus, "cpu", "13")
        with pytest.raises(validate.Invalid, match="keep 14 CPUs busy, there are 13"):
            validate.check_resources(on_gpus, config_of(on_gpus))

    def test_threads_by_the_nodes_cores_are_refused(self, on_gpus):
        config = config_of(on_gpus)
        del config["ranks"]["threads"]
        with pytest.raises(validate.Invalid, match=r"ranks\.threads is not given"):
            validate.check_resources(on_gpus, config)


class TestServer:
    def test_configuration_with_unknown_key_is_refused_by_the_server(self, rendered, server):
        text = validate.config_text(rendered).replace("grace_ms:", "grace_msec:")
        with pytest.raises(validate.Invalid, match=r"attnd refuses the configuration: (.|\n)*grace_msec"):
            validate.check_server_accepts(text, server)

    def test_runtime_image_has_every_library_that_the_server_needs(self, server):
        libraries = subprocess.run(["ldd", str(server)], capture_output=True, text=True, check=True).stdout
        paths = [os.path.realpath(path) for path in re.findall(r"=> (/\S+)", libraries)]
        # A sanitizer's run-time library is the test build's affair: the image has a release build.
        paths = [path for path in paths if not re.search(r"lib(asan|ubsan|tsan)", path)]
        assert any("libgrpc" in path for path in paths)
        listed = with_dependencies(runtime_packages())
        missing = {path: package for path, package in packages_of(paths).items() if package not in listed}
        assert not missing


# -------------------------------------------------------------------------------------------------
# The Dockerfiles

def instructions(file):
    """[(INSTRUCTION, rest)] with continued lines joined."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def stages(file):
    """The instructions of each stage."""
    found = []
    for instruction, rest in instructions(file):
        if instruction == "FROM":
            found.append([])
        found[-1].append((instruction, rest))
    return found


def packages(stage):
    """The Debian packages that a stage installs."""
    command = next(rest for instruction, rest in stage if instruction == "RUN" and "apt-get install" in rest)
    install = next(part for part in command.split("&&") if "apt-get install" in part)
    return [word for word in install.split()[2:] if not word.startswith("-")]


def runtime_packages():
    return packages(stages(DOCKERFILE)[-1])


def apt_cache(*arguments):
    return subprocess.run(["apt-cache", *arguments], capture_output=True, text=True, check=True,
                          env=os.environ | {"LC_ALL": "C"}).stdout


def with_dependencies(names):
    """The packages, all that they depend on, and what every Debian image has."""
    options = ["--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks", "--no-replaces",
               "--no-enhances", "--no-pre-depends"]
    found = set(re.findall(r"^(\S+)$", apt_cache("depends", *options, *names), re.MULTILINE)) | set(names)
    return {name.partition(":")[0] for name in found} | {"libc6", "zlib1g"}


def packages_of(paths):
    """{library: the package that it comes from}; Debian's merged /usr may know a library by its other name."""
    names = [name for path in paths for name in (path, path.removeprefix("/usr"))]
    rows = subprocess.run(["dpkg-query", "-S", *names], capture_output=True, text=True, check=False).stdout
    owners = {name: package for package, name in re.findall(r"^([^:\s]+)(?::\w+)?: (\S+)$", rows, re.MULTILINE)}
    return {path: owners.get(path, owners.get(path.removeprefix("/usr"))) for path in paths}


def allowed_by(file):
    """What the Dockerfile's own .dockerignore leaves."""
    lines = file.with_name(f"{file.name}.dockerignore").read_text().splitlines()
    return [line[1:] for line in lines if line.startswith("!")]


@pytest.mark.parametrize("file", [DOCKERFILE, DOCKERFILE_CUDA], ids=lambda file: file.name)
class TestEveryDockerfile:
    def test_linter_finds_nothing(self, file):
        own = pathlib.Path(sys.executable).parent / "hadolint"
        linter = str(own) if own.exists() else shutil.which("hadolint")
        done = subprocess.run([linter, "--no-color", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout

    def test_images_are_debian_without_a_registry(self, file):
        images = [rest.split()[0] for instruction, rest in instructions(file) if instruction == "FROM"]
        assert images == ["debian:bookworm", "debian:bookworm-slim"][-len(images):]

    def test_server_runs_as_the_user_that_the_pods_name(self, file, rendered):
        users = [rest for instruction, rest in stages(file)[-1] if instruction == "USER"]
        context = validate.pod_of(rendered)[1]["securityContext"]
        assert users == [f"{context['runAsUser']}:{context['runAsGroup']}"]

    def test_stops_by_the_signal_that_drains(self, file):
        assert ("STOPSIGNAL", "SIGTERM") in stages(file)[-1]

    def test_exposes_the_ports_of_the_pods(self, file, rendered):
        exposed = [rest for instruction, rest in stages(file)[-1] if instruction == "EXPOSE"]
        ports = [str(port["containerPort"]) for port in container(rendered)["ports"]]
        assert exposed == [" ".join(ports)]


class TestDockerfile:
    def test_every_package_is_in_debian(self):
        names = {name for stage in stages(DOCKERFILE) for name in packages(stage)}
        available = set(re.findall(r"^(\S+):\n.*\n  Candidate: \d", apt_cache("policy", *names), re.MULTILINE))
        assert available == names

    def test_copied_paths_exist(self):
        allowed = allowed_by(DOCKERFILE)
        assert allowed and all((ROOT / path).exists() for path in allowed)


class TestDockerfileForGpus:
    def test_copies_what_a_bundle_has_and_nothing_else_is_sent(self):
        copied = dict(rest.split() for instruction, rest in instructions(DOCKERFILE_CUDA) if instruction == "COPY")
        assert copied == {"bin/attnd": "/opt/attnd/bin/attnd", "lib/*.so*": "/opt/attnd/lib/"}
        assert allowed_by(DOCKERFILE_CUDA) == ["bin/attnd", "lib"]
        bundle = (ROOT / "tools/bundle").read_text()
        assert '"$destination/bin/attnd"' in bundle and '"$destination/lib/"' in bundle

    def test_libraries_are_found_from_where_the_server_is(self):
        (_, entry), = [found for found in instructions(DOCKERFILE_CUDA) if found[0] == "ENTRYPOINT"]
        assert entry == '["/opt/attnd/bin/attnd"]'
        assert "--force-rpath --set-rpath '$ORIGIN/../lib'" in (ROOT / "tools/bundle").read_text()

    def test_asks_the_container_runtime_for_cuda(self):
        (_, variables), = [found for found in instructions(DOCKERFILE_CUDA) if found[0] == "ENV"]
        assert variables.split() == ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]

    def test_is_the_image_of_the_overlay(self, rendered_on_gpus):
        image = container(rendered_on_gpus)["image"]
        assert f"docker build -f deploy/Dockerfile.cuda -t {image} DIR" in DOCKERFILE_CUDA.read_text()
