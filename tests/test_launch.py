"""examples/launch/: what accelerate and bash read of it."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "examples" / "launch"
CONFIGS = sorted(path.name for path in LAUNCH.glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_file_and_knows_all_of_it(name):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(LAUNCH / name))  # raises for keys it does not know
    assert config.mixed_precision == "bf16"
    parallel = {k.removeprefix("parallelism_config_"): v for k, v in config.parallelism_config.items()}
    sizes = [parallel.get(f"{k}_size", 1) for k in ("dp_replicate", "dp_shard", "tp", "cp", "sp")]
    assert math.prod(sizes) == (config.num_processes if parallel else 1)
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    else:
        assert config.deepspeed_config["zero_stage"] == 3
    assert config.num_processes == 8 * config.num_machines


def test_options_of_the_files_are_options_of_the_launcher():
    launch = pytest.importorskip("accelerate.commands.launch")
    known = {o.lstrip("-") for action in launch.launch_command_parser()._actions for o in action.option_strings}
    for name in CONFIGS:
        nested = set(re.findall(r"^  (\w+):", (LAUNCH / name).read_text("utf-8"), re.MULTILINE))
        assert {n for n in nested if n.startswith(("fsdp_", "parallelism_config_"))} <= known, name


def test_the_script_is_one_that_bash_reads():
    script = LAUNCH / "slurm.sh"
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    text = script.read_text("utf-8")
    assert "--resume auto" in text and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text
    assert (LAUNCH / re.search(r"/(\w+\.yaml)$", text, re.MULTILINE)[1]).is_file()
