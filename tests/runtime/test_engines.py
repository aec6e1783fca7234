"""The same training however its work is shared out, and processes that end together when one of them does."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from tests import tiny
from tests.comparing import assert_same_bits, losses, weights
from tests.launching import command, launcher, run
from tests.repository import ROOT
from train_text_to_image import Options
from utils.config.options import UserError, parse
from utils.runtime import heartbeat
from utils.runtime.engines import Engine, ShardedEngine, ZeroEngine, check_engine
from utils.runtime.heartbeat import Heartbeat
from utils.training.optimizer_table import OPTIMIZERS

LAUNCHED = str(ROOT / "tests" / "launched.py")
# plain SGD shows gradients as they are, if they are not clipped
STEPS = ("--max_train_steps", 4, "--learning_rate", 0.05, "--max_grad_norm", 1e6, "--checkpointing_steps", 2)


def free_port() -> str:
    with socket.socket() as opened:
        opened.bind(("", 0))
        return str(opened.getsockname()[1])


def spread(processes: int, words: list[str], expect: int = 0, **environment: str) -> str:
    """Runs the script's command line over so many processes, by tests/launched.py; gives its stderr."""
    torchrun = [*launcher("torch.distributed.run"), "--nproc_per_node", str(processes), "--master_port", free_port()]
    return run([*torchrun, LAUNCHED, "train_text_to_image", *words[1:]], expect, **environment)


def assert_close(one: Path, other: Path, name: str = "unet") -> None:
    torch.testing.assert_close(losses(other), losses(one), rtol=1e-5, atol=1e-6)
    for key, tensor in weights(one, name).items():
        torch.testing.assert_close(weights(other, name)[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.fixture
def sgd(monkeypatch) -> None:
    plain = replace(OPTIMIZERS["adamw"], make=lambda groups, options: torch.optim.SGD(groups))
    monkeypatch.setitem(OPTIMIZERS, "adamw", plain)


@pytest.fixture
def data(tmp_path) -> Path:
    return tiny.make_images(tmp_path / "data", 11)


@pytest.mark.parametrize("kind", ["sd", "pixels"])
def test_one_process_in_other_pieces(train, sgd, data, kind):
    whole = train(kind, *STEPS, "--train_batch_size", 8, data=data, out="whole")
    pieces = train(kind, *STEPS, "--train_batch_size", 2, "--gradient_accumulation_steps", 4, data=data, out="pieces")
    assert_close(whole, pieces)


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation"),
    [
        pytest.param(2, 2, 2, marks=pytest.mark.slow),
        pytest.param(4, 2, 1, marks=pytest.mark.nightly),
        pytest.param(4, 1, 2, marks=pytest.mark.nightly),
    ],
)
def test_several_processes_train_what_one_does(train, sgd, data, tmp_path, pipelines, processes, batch, accumulation):
    whole = train("sd", *STEPS, "--train_batch_size", 8, data=data, out="whole")
    pieces = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    spread(processes, command(pipelines, data, tmp_path / "spread", *STEPS, *pieces), TEST_OPTIMIZER="sgd")
    assert_close(whole, tmp_path / "spread")


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_a_model_without_words_as_one_does(train, sgd, data, tmp_path, engine):
    whole = train("pixels", *STEPS, "--train_batch_size", 8, data=data, out="whole")
    out = tmp_path / "spread"
    flags = [*tiny.UNCONDITIONAL["pixels"], *STEPS, "--train_batch_size", 2, "--gradient_accumulation_steps", 2]
    flags += ["--train_data_dir", data, "--resolution", tiny.RESOLUTION, "--output_dir", out, "--lr_warmup_steps", 0]
    words = [str(word) for word in ("train_unconditional", *flags, "--report_to", "none")]
    torchrun = [*launcher("torch.distributed.run"), "--nproc_per_node", "2", "--master_port", free_port()]
    run([*torchrun, LAUNCHED, *words], TEST_OPTIMIZER="sgd", TEST_ENGINE=engine)
    assert_close(whole, out)
    assert (out / "samples" / "final").is_dir()


@pytest.mark.nightly
def test_three_processes_train_what_one_does(train, sgd, data, tmp_path, pipelines):
    whole = train("sd", *STEPS, "--train_batch_size", 6, data=data, out="whole")
    pieces = ("--train_batch_size", 2, "--gradient_accumulation_steps", 1)
    spread(3, command(pipelines, data, tmp_path / "spread", *STEPS, *pieces), TEST_OPTIMIZER="sgd")
    assert_close(whole, tmp_path / "spread")


@pytest.mark.nightly
def test_three_processes_share_eight_samples(train, sgd, data, tmp_path, pipelines):
    """2, 3 and 3, in pieces of at most two; it is a checkpoint of one process that they resume from."""
    whole = train("sd", *STEPS, "--train_batch_size", 8, data=data, out="whole")
    spread_out = train("sd", *STEPS, "--max_train_steps", 2, "--train_batch_size", 8, data=data, out="spread")
    flags = (*STEPS, "--train_batch_size", 2, "--global_batch_size", 8, "--resume_from_checkpoint", "latest")
    spread(3, command(pipelines, data, spread_out, *flags), TEST_OPTIMIZER="sgd")
    assert_close(whole, spread_out)


def test_a_global_batch(refused, train, data, tmp_path):
    refused(["--global_batch_size", 8, "--gradient_accumulation_steps", 2], "give one")
    flags = ["--max_train_steps", 2, "--learning_rate", 1e-3, "--adam_epsilon", 1e-5]
    whole = train("sd", *flags, "--train_batch_size", 5, data=data, out="whole")
    pieces = train("sd", *flags, "--train_batch_size", 2, "--global_batch_size", 5, data=data, out="pieces")
    assert_close(whole, pieces)


@pytest.mark.nightly
def test_a_run_moves_from_one_process_to_two_and_back(train, sgd, data, tmp_path, pipelines):
    whole = train("sd", *STEPS, "--max_train_steps", 6, "--train_batch_size", 4, data=data, out="whole")
    moved = train("sd", *STEPS, "--max_train_steps", 2, "--train_batch_size", 4, data=data, out="moved")
    more = ("--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--resume_from_checkpoint", "latest")
    spread(2, command(pipelines, data, moved, *STEPS, "--max_train_steps", 4, *more), TEST_OPTIMIZER="sgd")
    last = ("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--resume_from_checkpoint", "latest")
    train("sd", *STEPS, "--max_train_steps", 6, *last, data=data, out="moved")
    assert_close(whole, moved)


@pytest.mark.slow
def test_fsdp2_trains_what_one_process_does(train, data, tmp_path, pipelines):
    """Also its averages, samples and held-out losses; one process resumes from its checkpoint."""
    flags = ("--learning_rate", 1e-3, "--adam_epsilon", 1e-5, "--max_train_steps", 4, "--checkpointing_steps", 2)
    flags += ("--use_ema", "--validation_split", 0.2, "--validation_steps", 2, "--validation_num_inference_steps", 2)
    flags += ("--validation_prompts", "a", "b", "c")
    whole = train("sd", *flags, "--train_batch_size", 4, data=data, out="whole")
    pieces = ("--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    out = tmp_path / "spread"
    spread(2, command(pipelines, data, out, *flags, *pieces), TEST_ENGINE="fsdp")
    assert_close(whole, out)
    for key, tensor in weights(whole / "checkpoint-4", "unet_ema").items():
        torch.testing.assert_close(weights(out / "checkpoint-4", "unet_ema")[key], tensor, rtol=1e-4, atol=1e-6)
    assert len(list((out / "samples" / "final").glob("*.png"))) == 3
    shutil.rmtree(out / "checkpoint-4")
    again = train("sd", *flags, "--train_batch_size", 4, "--resume_from_checkpoint", "latest", data=data, out="spread")
    assert_close(whole, again)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_fsdp2_leaves_the_batch_in_float32(monkeypatch, precision):
    """Noise levels, targets and SDXL's sizes of an image; only what autocast casts is in bfloat16."""
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: F401  its plugin asks for it

    class Sizes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trained = torch.nn.ModuleDict({"unet": torch.nn.Linear(2, 2)})

        def forward(self, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return sizes, self.trained["unet"](sizes)

    plugin = SimpleNamespace(activation_checkpointing=False)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision, device=torch.device("cpu")
    )
    monkeypatch.setattr(Engine, "prepare", lambda self, model, optimizer, max_norm: (model, optimizer))
    root = SimpleNamespace(_get_fsdp_state=lambda: SimpleNamespace(_lazy_init=lambda: None))
    monkeypatch.setattr("utils.runtime.engines.sharded_parts", lambda modules: [root])
    objective, _ = ShardedEngine(accelerator).prepare(Sizes(), None, 1.0)
    assert plugin.mixed_precision_policy.cast_forward_inputs is False
    kept, computed = objective(torch.tensor([1023.0, 683.0]))
    assert kept.tolist() == [1023.0, 683.0]
    assert computed.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.nightly
def test_fsdp2_trains_in_bfloat16_what_ddp_does(data, tmp_path, pipelines):
    flags = ("--learning_rate", 1e-3, "--adam_epsilon", 1e-5, "--max_train_steps", 4, "--train_batch_size", 2)
    found = {}
    for engine in ("", "fsdp"):
        out = tmp_path / (engine or "ddp")
        spread(2, command(pipelines, data, out, *flags, "--mixed_precision", "bf16"), TEST_ENGINE=engine)
        found[engine] = torch.tensor(losses(out))
    torch.testing.assert_close(found["fsdp"], found[""], rtol=5e-3, atol=0)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "more",
    [
        ("--adaptation", "lora", "--train_text_encoder", "--lora_dropout", 0.2, "--export_fused"),
        ("--mixed_precision", "bf16", "--gradient_checkpointing", "--async_checkpointing", "--train_text_encoder"),
    ],
)
def test_fsdp2_resumes_bit_by_bit(data, tmp_path, pipelines, more):
    flags = ("--learning_rate", 1e-3, "--train_batch_size", 2, "--checkpointing_steps", 2, "--use_ema", *more)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    spread(2, command(pipelines, data, whole, *flags, "--max_train_steps", 4), TEST_ENGINE="fsdp")
    spread(2, command(pipelines, data, parts, *flags, "--max_train_steps", 2), TEST_ENGINE="fsdp")
    again = ("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    spread(2, command(pipelines, data, parts, *flags, *again), TEST_ENGINE="fsdp")
    assert losses(whole) == losses(parts)
    for file in (whole / "checkpoint-4").rglob("*.safetensors"):
        assert_same_bits(load_file(file), load_file(parts / file.relative_to(whole)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_trains_what_one_process_does(train, data, tmp_path, pipelines):
    flags = ("--learning_rate", 1e-3, "--adam_epsilon", 1e-5, "--checkpointing_steps", 2, "--use_ema")
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "DS_ACCELERATOR": "cpu"}
    whole = train("sd", *flags, "--max_train_steps", 4, "--train_batch_size", 4, data=data, out="whole")
    pieces = ("--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    out = tmp_path / "spread"
    spread(2, command(pipelines, data, out, *flags, *pieces, "--max_train_steps", 2), **environment)
    again = ("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    spread(2, command(pipelines, data, out, *flags, *pieces, *again), **environment)
    assert_close(whole, out)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2 needs GPUs"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "fsdp2.yaml"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "eepspeed"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "eepspeed"),
    ],
)
def test_engines_that_can_not_be_had_here(refused, monkeypatch, environment, named):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused([], named)


def test_engines_without_fp16(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_engine(on_cpu=False, precision="bf16")
    with pytest.raises(UserError, match="--mixed_precision must be bf16 or no"):
        check_engine(on_cpu=False, precision="fp16")


@pytest.mark.parametrize("engine", [ShardedEngine, ZeroEngine])
@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["--pure_bf16"], "pure_bf16"),
        (["--layer_norm_steps=5"], "layer_norm_steps"),
        (["--compile"], "compile"),
        (["--find_batch_size"], "find_batch_size"),
        (["--bf16_weights"], "bf16_weights"),
    ],
)
def test_flags_that_an_engine_can_not_do_are_refused(engine, words, flag, tmp_path):
    needed = [f"--pretrained_model={tmp_path}", f"--train_data_dir={tmp_path}"]
    plain, given = parse(Options, needed, ""), parse(Options, [*needed, *words], "")
    made = engine.__new__(engine)
    made.check_options(plain, "adamw")
    with pytest.raises(UserError, match=f"--{flag} does not work with {engine.name}: "):
        made.check_options(given, "adamw")
    with pytest.raises(UserError, match="--optimizer must be adamw"):
        made.check_options(plain, "muon")
    Engine.__new__(Engine).check_options(given, "muon")


@pytest.mark.nightly
@pytest.mark.parametrize("config", ["fsdp2.yaml", "deepspeed_zero2.yaml", "multi_gpu.yaml"])
def test_the_configs_for_gpus_start_or_say_why_not(pipelines, images, tmp_path, config):
    words = [*launcher("accelerate.commands.launch"), "--config_file", str(ROOT / "accelerate_configs" / config)]
    words += ["--num_processes", "2" if config == "multi_gpu.yaml" else "1", "--main_process_port", free_port()]
    starts = config == "multi_gpu.yaml"
    said = run([*words, *command(pipelines, images, tmp_path, "--max_train_steps", 1)], expect=0 if starts else 1)
    assert starts or "needs GPUs" in said or "install deepspeed" in said


@pytest.mark.slow
def test_a_rank_that_raises_ends_all_with_its_error(pipelines, data, tmp_path):
    flags = ("--max_train_steps", 10_000, "--train_batch_size", 1)
    begun = time.monotonic()
    said = spread(2, command(pipelines, data, tmp_path / "out", *flags), expect=1, TEST_FAILS="1:4")
    assert time.monotonic() - begun < 120
    errors = [line for line in said.splitlines() if "Error: " in line]
    assert "this rank fails" in errors[0]


@pytest.mark.nightly
def test_memory_that_runs_short_as_gradients_are_shared(pipelines, data, tmp_path):
    """The steps before are saved by the process that failed, and a resumed run takes half as many samples at once."""
    flags = ("--train_batch_size", 2, "--learning_rate", 1e-3, "--adam_epsilon", 1e-5, "--max_train_steps", 5)
    said = spread(2, command(pipelines, data, tmp_path / "short", *flags), expect=2, TEST_MEMORY="1:7")
    assert (
        "error: out of memory in step 4, which can't be restarted at this point; the 3 steps before are saved" in said
    )
    assert (tmp_path / "short" / "checkpoint-3").is_dir()
    spread(2, command(pipelines, data, tmp_path / "short", *flags, "--resume_from_checkpoint", "latest"))
    spread(2, command(pipelines, data, tmp_path / "whole", *flags))
    assert_close(tmp_path / "whole", tmp_path / "short")


@pytest.mark.parametrize("call", [pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.nightly)])
def test_memory_that_runs_short_in_one_ranks_forward_pass(pipelines, data, tmp_path, call):
    """In the rehearsal, or in a step: with a text encoder, whose buffers DDP would send in each forward pass."""
    flags = ("--train_batch_size", 2, "--learning_rate", 1e-3, "--adam_epsilon", 1e-5, "--max_train_steps", 4)
    flags += ("--train_text_encoder",)
    short, whole = tmp_path / "short", tmp_path / "whole"
    said = spread(2, command(pipelines, data, short, *flags), TEST_FORWARD_MEMORY=f"1:{call}")
    assert call == 1 or "Traceback" not in said
    spread(2, command(pipelines, data, whole, *flags))
    assert_close(whole, short)


def wait_for(happened: Callable[[], bool]) -> None:
    """Waits up to half a minute."""
    end = time.monotonic() + 30
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    assert happened()


def test_a_process_that_falls_silent_ends_its_peer(monkeypatch, capsys):
    ended, server = [], TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit  # of the thread

    monkeypatch.setattr(heartbeat, "INTERVAL", 0.02)
    monkeypatch.setattr(os, "_exit", end)
    address = ("127.0.0.1", server.port)
    pairs = [[Heartbeat(address, rank, 2, patience=3.0) for rank in range(2)] for _ in range(2)]
    try:
        first, second = pairs[0]
        first.start()
        second.start()
        wait_for(lambda: first._heard[1][0] not in (b"", b"1", b"2"))
        assert not ended
        monkeypatch.setattr(second, "_exchange", lambda *arguments: None)  # silent, without a word
        wait_for(lambda: bool(ended))
        said = capsys.readouterr().err
        assert "has sent no heartbeat for 3 s (--peer_timeout), so process" in said
        stop(pairs[0])
        ended.clear()
        first, second = pairs[1]
        first.start()
        second.start()
        wait_for(lambda: first._heard[1][0] not in (b"", b"1", b"2"))
        second.end()  # it has done its part
        wait_for(lambda: first._heard[1][0] == heartbeat.ENDED)
        time.sleep(3.5)
        assert not ended
    finally:
        for pair in pairs:
            stop(pair)


def stop(pair: list[Heartbeat]) -> None:
    """Ends the threads, which else would end this process when `os._exit` is itself again."""
    for each in pair:
        each._over.set()
    for thread in (thread for each in pair for thread in each._threads if thread.is_alive()):
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture
def nodes() -> Iterator[list[tuple[str, str, str]]]:
    """Two network namespaces on one wire: name, address and device of each."""
    found = [(f"node{number}-{os.getpid()}", f"10.77.0.{number + 1}", f"wire{number}") for number in range(2)]
    commands = [f"ip netns add {name}" for name, _, _ in found]
    (one, _, one_wire), (other, _, other_wire) = found
    commands.append(f"ip link add {one_wire} netns {one} type veth peer name {other_wire} netns {other}")
    for name, address, wire in found:
        commands += [f"ip -n {name} address add {address}/24 dev {wire}", f"ip -n {name} link set {wire} up"]
        commands += [f"ip -n {name} link set lo up"]
    try:
        for words in commands:
            subprocess.run(words.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces can't be made here")
    yield found
    for name, _, _ in found:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def on_nodes(nodes: list[tuple[str, str, str]], words: list[str], folder: Path) -> list[subprocess.Popen]:
    """Starts one process on each node by accelerate launch."""
    started = []
    for rank, (name, _, wire) in enumerate(nodes):
        launch = ["--multi_gpu", "--num_machines", 2, "--num_processes", 2, "--machine_rank", rank]
        launch += ["--main_process_ip", nodes[0][1], "--main_process_port", 29500]
        inside = ["ip", "netns", "exec", name, *launcher("accelerate.commands.launch"), *map(str, launch), *words]
        log = (folder / f"{name}.log").open("w")
        environment = os.environ | {"GLOO_SOCKET_IFNAME": wire}
        started.append(subprocess.Popen(inside, stderr=log, stdout=log, env=environment, start_new_session=True))
    return started


@pytest.mark.nightly
def test_two_nodes_train_what_one_process_does(train, data, pipelines, tmp_path, nodes):
    flags = ("--learning_rate", 1e-3, "--adam_epsilon", 1e-5, "--max_train_steps", 4)
    whole = train("sd", *flags, "--train_batch_size", 4, data=data, out="whole")
    processes = on_nodes(nodes, command(pipelines, data, tmp_path / "out", *flags, "--train_batch_size", 2), tmp_path)
    assert [process.wait(200) for process in processes] == [0, 0]
    assert_close(whole, tmp_path / "out")


@pytest.mark.nightly
def test_a_node_that_is_cut_off_ends_the_run(data, pipelines, tmp_path, nodes):
    flags = ("--max_train_steps", 100_000, "--train_batch_size", 2, "--peer_timeout", 15, "--checkpointing_steps", 5)
    out = tmp_path / "out"
    processes = on_nodes(nodes, command(pipelines, data, out, *flags), tmp_path)
    while not (out / "checkpoint-5").is_dir():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    subprocess.run(["ip", "-n", nodes[1][0], "link", "set", nodes[1][2], "down"], check=True)
    begun = time.monotonic()
    assert all(process.wait(120) != 0 for process in processes)
    assert time.monotonic() - begun < 60
    said = (tmp_path / f"{nodes[0][0]}.log").read_text()
    assert "error: process 1 has sent no heartbeat for 15 s" in said
    flags = ("--max_train_steps", 7, "--train_batch_size", 4, "--resume_from_checkpoint", "checkpoint-5")
    run([sys.executable, *command(pipelines, data, out, *flags)])
