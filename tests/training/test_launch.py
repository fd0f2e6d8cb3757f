"""How users launch: `accelerate config` answered by hand, and two nodes."""

import json
import os
import pty
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dalle2_video.training.log import read_metrics
from tests.helpers.launching import ENVIRONMENT, ROOT, run_launch

ANSWERS = [  # what a user is asked, and answers; the first two are menus
    ("compute environment", "\r"),
    ("type of machine", "4\r"),  # multi-GPU
    ("How many different machines", "1\n"),
    ("distributed operations be checked", "no\n"),
    ("torch dynamo", "no\n"),
    ("use DeepSpeed", "yes\n"),
    ("specify a json file", "yes\n"),
    ("enter the path", "configs/deepspeed_config.json\n"),
    ("deepspeed.zero.Init", "no\n"),
    ("Mixture-of-Experts", "no\n"),
    ("How many GPU", "2\n"),
]


def answer(command: list[str], environment: dict[str, str]) -> str:
    """Run a command on a terminal and type the ANSWERS as they are asked for."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(command[0], command, environment)
    said, waiting, end = "", list(ANSWERS), time.monotonic() + 120
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the program has ended
            break
        said += part.decode(errors="replace")
        if waiting and waiting[0][0] in said:
            time.sleep(0.3)  # a menu is drawn before it listens
            os.write(terminal, waiting.pop(0)[1].encode())
    os.close(terminal)
    os.waitpid(pid, 0)
    assert not waiting, said
    return said


def test_accelerate_config_by_hand_then_launch(tmp_path) -> None:
    """The README's other way: our DeepSpeed file named in the questionnaire, no --config_file."""
    home = {"HOME": str(tmp_path), "TERM": "xterm"}
    built = Path.home() / ".cache/torch_extensions"  # DeepSpeed's: a minute of compiling
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/torch_extensions").symlink_to(built)
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("HF_HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "config"]
    assert "configuration saved" in answer(command, environment | home)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["-m", "tests.helpers.tiny_run", str(tmp_path / "run"), "0", "clips=32"]
    run_launch(launch, environment | home)
    stage = json.loads((tmp_path / "run/checkpoints/000000000032/stage.json").read_text())
    assert stage["layout"] == {"strategy": "zero3", "ranks": 2}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_nodes_are_two_launches(strategy, tmp_path) -> None:
    """docs/training.md's lines, with both nodes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in (0, 1):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", f"configs/accelerate/{strategy}.yaml", "--num_machines", "2"]
        command += ["--num_processes", "2", "--machine_rank", str(rank)]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command += ["-m", "tests.helpers.tiny_run", str(tmp_path / "run"), "0", "clips=32"]
        nodes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    said = [node.communicate(timeout=200)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    stage = json.loads((tmp_path / "run/checkpoints/000000000032/stage.json").read_text())
    assert stage["layout"] == {"strategy": strategy, "ranks": 2}
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["clips"] for line in lines if "loss" in line] == [8, 16, 24, 32]
    assert "clips 32" in said[0] and "clips 32" not in said[1]  # the first rank alone tells
