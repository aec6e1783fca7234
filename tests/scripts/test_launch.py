"""The script as a process: plain python, accelerate launch, two processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.comparing import assert_same_bits, losses, weights
from tests.launching import SCRIPT, command, launcher, run, succeed
from tests.repository import ROOT

STEPS = ("--max_train_steps", 4, "--adam_epsilon", 1e-5, "--learning_rate", 1e-3)


@pytest.fixture(scope="module")
def alone(pipelines, images, tmp_path_factory) -> Path:
    """One process, batch 4: what the others must equal."""
    out = tmp_path_factory.mktemp("alone")
    run([sys.executable, *command(pipelines, images, out, *STEPS, "--train_batch_size", 4)])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu.yaml", "single_gpu.yaml"])
def test_accelerate_launch_with_the_configs(pipelines, images, tmp_path, alone, config):
    words = [*launcher("accelerate.commands.launch"), "--config_file", str(ROOT / "accelerate_configs" / config)]
    flags = (*STEPS, "--train_batch_size", 4, "--mixed_precision", "no")
    run([*words, *command(pipelines, images, tmp_path, *flags)])
    assert_same_bits(weights(alone), weights(tmp_path))


def test_two_processes_train_what_one_does(pipelines, images, tmp_path, alone):
    words = [*launcher("torch.distributed.run"), "--nproc_per_node", "2", "--master_port", "29611"]
    flags = (*STEPS, "--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    validation = ("--validation_prompts", "a", "b", "c", "--validation_num_inference_steps", 2)
    run([*words, *command(pipelines, images, tmp_path, *flags, *validation, "--use_ema")])
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(tmp_path / "checkpoint-4")[name], tensor, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(losses(alone), losses(tmp_path), rtol=1e-5, atol=1e-6)
    assert len(list((tmp_path / "samples" / "final").glob("*.png"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "accelerate"])
def test_two_processes_that_diverge_say_so_once_and_end_with_1(pipelines, images, tmp_path, launch):
    """The result is written, and nothing but one line stands between the log and the launcher's own words."""
    words = {
        "torchrun": [*launcher("torch.distributed.run"), "--nproc_per_node", "2"],
        "accelerate": [*launcher("accelerate.commands.launch"), "--multi_gpu", "--num_processes", "2"],
    }[launch]
    words += ["--master_port" if launch == "torchrun" else "--main_process_port", "29619"]
    flags = ("--train_batch_size", 2, "--max_train_steps", 5, "--learning_rate", 1e30, "--max_grad_norm", 0)
    said = run([*words, *command(pipelines, images, tmp_path, *flags)], expect=1)
    assert said.count("the run has diverged") == 1
    outcome = json.loads((tmp_path / "run.json").read_text())["outcome"]
    assert outcome["steps"] == 5
    assert outcome["diverged"]
    assert (tmp_path / "model_index.json").exists()


@pytest.mark.slow
def test_two_processes_resume_bit_by_bit(pipelines, images, tmp_path):
    words = [
        *launcher("accelerate.commands.launch"),
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "29612",
    ]
    flags = ("--train_batch_size", 2, "--adaptation", "lora", "--lora_dropout", 0.2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run([*words, *command(pipelines, images, whole, *flags, "--max_train_steps", 5)])
    run([*words, *command(pipelines, images, parts, *flags, "--max_train_steps", 2)])
    more = ("--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    run([*words, *command(pipelines, images, parts, *flags, *more)])
    assert losses(whole) == losses(parts)


def test_an_error_is_one_line_without_a_traceback(pipelines, images, tmp_path):
    error = run([sys.executable, *command(pipelines, images, tmp_path, "--resolution", 500)], expect=2)
    (line,) = error.splitlines()
    assert line == "error: --resolution must be divisible by 8, got 500; try 496 or 504"


def test_help_names_every_flag_of_the_diffusers_examples():
    shown = succeed([sys.executable, SCRIPT, "--help"])
    flags = (ROOT / "tests" / "diffusers_flags.txt").read_text().split()
    assert not [flag for flag in flags if f" {flag} " not in shown and f" {flag}," not in shown]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(pipelines, images, tmp_path):
    flags = ("--train_batch_size", 2, "--max_train_steps", 400, "--checkpointing_steps", 3, "--use_ema")
    flags += ("--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 2)
    words = [sys.executable, *command(pipelines, images, tmp_path / "killed", *flags)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 10):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps = len(metrics.read_text().splitlines()) + 4
    flags = (*flags, "--max_train_steps", steps)
    run([sys.executable, *command(pipelines, images, tmp_path / "killed", *flags)])
    run([sys.executable, *command(pipelines, images, tmp_path / "peace", *flags)])
    assert losses(tmp_path / "killed") == losses(tmp_path / "peace")
    for name in ("unet", "unet_ema"):
        folder = f"checkpoint-{steps}"
        assert_same_bits(weights(tmp_path / "killed" / folder, name), weights(tmp_path / "peace" / folder, name))


SLURM_COMMANDS = {
    "scontrol": 'case "$1" in show) echo localhost;; requeue) touch "$REQUEUED";; esac',
    # two tasks, each as a node would have it; a signal goes to both
    "srun": """
shift
for rank in 0 1; do SLURM_PROCID=$rank "$@" & tasks="${tasks:-} $!"; done
trap 'kill -TERM $tasks' TERM
for task in $tasks; do wait $task; done
for task in $tasks; do wait $task || status=1; done
exit ${status:-0}
""",
    "accelerate": 'shift; exec "$PYTHON" -m accelerate.commands.launch "$@"',
}


@pytest.mark.nightly
def test_the_slurm_script(pipelines, images, tmp_path):
    """Under stand-ins for Slurm's commands: its notice is passed on, the job begins again, and ends as if alone."""
    for name, body in SLURM_COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    out, requeued = tmp_path / "out", tmp_path / "requeued"
    environment = {"SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_NODELIST": "two", "SLURM_NNODES": 2, "SLURM_JOB_ID": 7}
    environment |= {
        "SLURM_GPUS_ON_NODE": 1,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
    }
    environment = os.environ | {name: str(value) for name, value in (environment | {"REQUEUED": requeued}).items()}
    flags = ("--mixed_precision", "no", "--train_batch_size", 2, "--learning_rate", 1e-3, "--adam_epsilon", 1e-5)
    script = ["bash", str(ROOT / "accelerate_configs" / "slurm.sbatch")]
    words = [*script, *command(pipelines, images, out, *flags, "--max_train_steps", 100_000)[1:]]
    job = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (out / "metrics.jsonl").exists():
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=120)[1]
    assert job.returncode == 0, said[-3000:]
    assert requeued.exists()
    assert "continue with" in said
    steps = len(losses(out))
    assert (out / f"checkpoint-{steps}").is_dir()
    requeued.unlink()
    words = [*script, *command(pipelines, images, out, *flags, "--max_train_steps", steps + 2)[1:]]
    succeed(words, **environment)
    assert not requeued.exists()
    alone = tmp_path / "alone"
    flags = (*flags, "--train_batch_size", 4, "--max_train_steps", steps + 2)
    run([sys.executable, *command(pipelines, images, alone, *flags)])
    torch.testing.assert_close(losses(alone), losses(out), rtol=1e-4, atol=1e-5)


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hub as creating a repository and asking for permission takes."""

    users: ClassVar = {"hf_writes": "me", "hf_reads": None}
    asked: ClassVar[list[str]] = []

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _answer(self, status: int, **content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _respond(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        content = json.loads(self.rfile.read(length) or b"{}")
        if "/models/" in self.path or "/repos/" in self.path:  # the library asks for more, such as its news
            self.asked.append(f"{self.command} {self.path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.users:
            self._answer(401, error="Invalid credentials in Authorization header")
        elif self.path == "/api/repos/create":
            name = f"{content.get('organization') or self.users[token]}/{content['name']}"
            url, status = f"http://{self.headers['Host']}/{name}", 200 if self.users[token] else 403
            self._answer(status, url=url, error="no write permission")
        elif self.path.endswith("/auth-check/write"):
            self._answer(200 if self.users[token] else 403, error="no write permission")
        elif self.path.startswith("/api/models/"):
            self._answer(200, id=self.path.removeprefix("/api/models/").removesuffix("/revision/main"))
        else:
            self._answer(404, error="not found")

    do_GET = do_POST = _respond  # noqa: N815


@pytest.fixture
def hub(monkeypatch):
    """The address of a Hub of this machine, without a proxy between."""
    import huggingface_hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    FakeHub.asked.clear()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield address
    server.shutdown()


PUSH = ("--max_train_steps", 1, "--push_to_hub")


@pytest.mark.parametrize("name", ["sd", "pixels"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "not logged in"),
        (("--hub_token", "hf_wrong"), "401"),
        (("--hub_token", "hf_reads", "--hub_model_id", "others/model"), "403"),
        (("--hub_token", "hf_writes", "--output_dir", "out (2)"), "--hub_model_id"),
    ],
)
def test_an_upload_that_would_fail_is_refused_before_the_training(
    train, hub, monkeypatch, tmp_path, capsys, name, flags, said
):
    monkeypatch.chdir(tmp_path)
    train(name, *PUSH, *flags, expect=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "--push_to_hub" in line
    assert said in line
    assert "hf_w" not in line
    assert "hf_reads" not in line
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_an_upload_offline_is_refused_before_the_training(train, capsys, tmp_path):
    train("sd", *PUSH, "--hub_token", "hf_x", "--hub_model_id", "me/model", expect=2)
    assert "--push_to_hub: me/model can't be written to: " in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_repository_is_created_once_before_the_training(train, hub, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "upload_folder", lambda repo_id, **_: FakeHub.asked.append(f"upload {repo_id}")
    )
    train(
        "sd",
        *PUSH,
        "--hub_token",
        "hf_writes",
        out="my-model",
    )
    assert FakeHub.asked == [
        "POST /api/repos/create",
        "GET /api/models/me/my-model/auth-check/write",
        "upload me/my-model",
    ]
    FakeHub.asked.clear()
    train("sd", *PUSH, "--hub_token", "hf_writes", "--dry_run", out="dry")
    assert not FakeHub.asked
