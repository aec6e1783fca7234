"""The metrics of a run as Prometheus reads them, their server, and the dashboard that shows them."""

import json
import re
import socket
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import pytest
import torch

pytest.importorskip("prometheus_client")
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from utils.config.options import UserError
from utils.evaluation.judging import WORDS
from utils.runtime.prometheus import MetricsServer, RunCounts, StepNumbers, process_registry
from utils.runtime.prometheus_options import PrometheusOptions, check_server

STEP = {"train_loss": 0.5, "learning_rate": 1e-4, "grad_norm": None, "images_per_second": 8.0, "epoch": 0.25}


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Value by name and label values."""
    families = text_string_to_metric_families(text)
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_the_numbers_of_a_run(tmp_path):
    registry, skipped, file = CollectorRegistry(), [0], tmp_path / "verdict.json"
    numbers = StepNumbers(registry, 4)
    counts = RunCounts(100, lambda: skipped[0], lambda: 3, file, WORDS)
    registry.register(counts)
    found = samples(generate_latest(registry).decode())
    assert [found["finetune_verdict", word] for word in WORDS] == [0] * len(WORDS)

    for step in (11, 12):
        numbers.step(STEP, step)
    numbers.values({"validation_loss": 0.4, "validation_loss_at/3": 0.3, "eval/kid": 0.01, "loss_for_a.png": 1.0})
    numbers.values({"epoch_loss_min": 0.2, "checkpoint_seconds": 2.0, "samples_seconds": 1.5, "grad_norm/unet.a": 1.0})
    skipped[0] = 2
    file.write_text(json.dumps({"verdict": "overfitting"}))
    text = generate_latest(registry).decode()
    found = samples(text)
    assert found["finetune_loss",] == 0.5
    assert str(found["finetune_gradient_norm",]) == "nan"
    assert found["finetune_step",] == 12
    assert found["finetune_images_total",] == 8
    assert found["finetune_steps_planned",] == 100
    assert found["finetune_step_duration_seconds_sum",] == pytest.approx(1.0)
    assert found["finetune_validation_loss",] == 0.4
    assert found["finetune_validation_loss_at", "3"] == 0.3
    assert found["finetune_score", "kid"] == 0.01
    assert found["finetune_measurement", "epoch_loss_min"] == 0.2
    assert found["finetune_checkpoint_duration_seconds_sum",] == 2
    assert found["finetune_evaluation_duration_seconds_sum", "samples"] == 1.5
    assert found["finetune_skipped_steps_total",] == 2
    assert found["finetune_unreadable_images_total",] == 3
    assert {word for word in WORDS if found["finetune_verdict", word]} == {"overfitting"}
    assert "unet.a" not in text
    assert "a.png" not in text

    file.write_text("{")  # not whole
    found = samples(generate_latest(registry).decode())
    assert [found["finetune_verdict", word] for word in WORDS] == [0] * len(WORDS)
    file.write_text(json.dumps({"verdict": "learning"}))
    assert samples(generate_latest(registry).decode())["finetune_verdict", "learning"] == 1


def test_a_server_ends_and_frees_its_port():
    options = PrometheusOptions(prometheus_port=free_port())
    for _ in range(2):  # as two runs of a notebook
        server = MetricsServer(options, process_registry(torch.device("cpu"), 0))
        found = samples(read(options.port))
        assert found["finetune_host_memory_resident_bytes",] > 2**20
        assert found["process_cpu_seconds_total",] > 0
        with pytest.raises(UserError, match=f"--prometheus_port {options.port} can't be served on 127.0.0.1"):
            check_server(options)
        server.close()
        check_server(options)


def test_addresses_and_ports_that_can_not_be(monkeypatch):
    for given, said in (
        ({"prometheus_port": 0}, "--prometheus_port must be from 1 to 65535, got 0"),
        ({"prometheus_port": 70000}, "--prometheus_port must be"),
        ({"prometheus_address": "my host"}, "--prometheus_address must be an IP address"),
    ):
        with pytest.raises(UserError, match=said):
            PrometheusOptions(**given)
    with pytest.raises(UserError, match=r"can't be served on 203\.0\.113\.1"):
        check_server(PrometheusOptions(prometheus_port=free_port(), prometheus_address="203.0.113.1"))
    monkeypatch.setattr("utils.runtime.prometheus_options.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install prometheus_client"):
        check_server(PrometheusOptions(prometheus_port=1))
    check_server(PrometheusOptions())


def test_each_process_of_a_machine_has_its_port(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert PrometheusOptions(prometheus_port=9100).port == 9103


@pytest.fixture
def scraped(train, monkeypatch) -> tuple[str, Path]:
    """What a run served after its last step, and its folder."""
    port, texts = free_port(), []
    close = MetricsServer.close
    monkeypatch.setattr(MetricsServer, "close", lambda server: (texts.append(read(port)), close(server)))
    flags = ["--max_train_steps", 4, "--validation_prompt", "a square", "--validation_num_inference_steps", 1]
    flags += ["--validation_steps", 2, "--checkpointing_steps", 2, "--validation_data_dir", train.images]
    out = train("sd", *flags, "--prometheus_port", port)
    assert len(texts) == 1
    with pytest.raises(OSError, match="refused"):
        read(port)
    return texts[0], out


def test_a_run_serves_its_numbers(scraped):
    text, out = scraped
    found = samples(text)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert found["finetune_loss",] == pytest.approx(lines[-1]["train_loss"])
    assert found["finetune_step",] == found["finetune_steps_planned",] == 4
    assert found["finetune_images_total",] == 16
    assert found["finetune_checkpoint_duration_seconds_count",] == 2
    assert found["finetune_evaluation_duration_seconds_count", "validation"] == 2
    assert found["finetune_evaluation_duration_seconds_count", "samples"] == 2  # one before training
    assert found["finetune_validation_loss",] > 0
    assert f'output_dir="{out}"' in text
    # The dashboard shows what is served, all of it, and nothing else; a CPU serves no device memory.
    shown = json.loads((Path(__file__).parents[2] / "examples" / "grafana_dashboard.json").read_text())
    queries = " ".join(target["expr"] for panel in shown["panels"] for target in panel.get("targets", ()))
    asked = set(re.findall(r"\b(?:finetune|process)_\w+", queries))
    families = {family.name: {each.name for each in family.samples} for family in text_string_to_metric_families(text)}
    served = {name for family, names in families.items() for name in (family, *names)}
    assert {name for name in asked - served if "_device_memory_" not in name} == set()
    whole = {"finetune_host_memory_total_bytes"}
    unasked = {name for name, names in families.items() if name.startswith("finetune_") and not asked & {name, *names}}
    assert {name for name in unasked if not name.endswith("_created")} == whole
    if which("promtool"):
        subprocess.run(["promtool", "check", "metrics"], input=text.encode(), check=True)


@pytest.mark.slow
@pytest.mark.skipif(which("prometheus") is None, reason="prometheus is not installed")
def test_a_prometheus_reads_a_run(train, tmp_path):
    """A real server scrapes a run while it trains, and answers queries about it afterwards."""
    port, own = free_port(), free_port()
    config = tmp_path / "prometheus.yml"
    target = {"job_name": "run", "scrape_interval": "200ms", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
    config.write_text(json.dumps({"scrape_configs": [target | {"scrape_timeout": "200ms"}]}))
    words = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    words += [f"--web.listen-address=127.0.0.1:{own}", "--log.level=error"]
    server = subprocess.Popen([which("prometheus"), *words])
    try:
        train("sd", "--max_train_steps", 150, "--prometheus_port", port)

        def ask(query: str) -> float:
            address = f"http://127.0.0.1:{own}/api/v1/query?query={query}"
            with urllib.request.urlopen(address, timeout=10) as answer:
                return float(json.load(answer)["data"]["result"][0]["value"][1])

        assert ask("max_over_time(up[5m])") == 1
        assert 1 <= ask("max_over_time(finetune_step[5m])") <= 150
        assert 0 < ask("max_over_time(finetune_loss[5m])") < 10
        assert ask("max(max_over_time(finetune_verdict[5m]))") == 0
    finally:
        server.terminate()
        server.wait()


def test_scrapes_from_many_threads_while_numbers_change():
    registry = CollectorRegistry()
    numbers = StepNumbers(registry, 4)

    def scrape(_: int) -> None:
        for _ in range(20):
            samples(generate_latest(registry).decode())

    with ThreadPoolExecutor(3) as pool:
        scrapes = pool.map(scrape, range(3))
        for step in range(500):
            numbers.step(STEP, step)
            numbers.values({f"eval/{step % 7}": 1.0})
        list(scrapes)
    assert samples(generate_latest(registry).decode())["finetune_images_total",] == 2000
