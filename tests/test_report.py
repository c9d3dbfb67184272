"""`xpo-fast report`: the page of any run, whole or broken, and of several; and what runs write for it."""

from __future__ import annotations

import functools
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import threading

import pytest

from test_trainer import PEFT_WARNING, make_model, make_rows, make_tokenizer
from xpo_fast import cli
from xpo_fast.report import read_run, render
from xpo_fast.report.samples import differences
from xpo_fast.report.series import Series, curve

pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_WARNING}:FutureWarning")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
OPTIONS = {"model": "tiny", "data": ["rows.jsonl"], "seed": 1}
SCRIPT = "<script>alert('x')</script>"
PARTS = ("outcome", "curves", "rewards", "components", "lengths", "samples", "preflight", "speed", "others",
         "configuration", "again")  # fmt: skip


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def online(folder, steps=60, metrics=()):
    """Writes a run of `xpo-fast rl` with all that it may leave."""
    folder.mkdir(parents=True)
    log = [{"step": 0, "eval_reward": 0.1, "eval_rewards/short/mean": 0.1, "eval_runtime": 3.0}]
    for step in range(1, steps + 1):
        log.append({"step": step, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-5, "reward": step / steps,
                    "reward_std": 0.2, "rewards/short/mean": step / steps, "rewards/short/std": 0.1,
                    "objective/kl": step / 100, "kl_coef": 0.05, "completions/mean_length": 20.0,
                    "completions/clipped_ratio": 0.5, "tokens_per_second": 100.0, "time/rollout_s": 1.0,
                    **{name: math.sin(step) for name in metrics}})  # fmt: skip
    lines(folder / "train_log.jsonl", log)
    samples = [
        {"rollout": r, "step": r, "group": g, "prompt": f"{SCRIPT} {g}", "completion": f"answer {r} {SCRIPT}",
         "tokens": 10 + r, "truncated": r == 0, "reward": r + g / 10, "rewards": {"short": 1.0}}
        for r in range(4) for g in range(3) for _ in range(2)
    ]  # fmt: skip
    lines(folder / "samples.jsonl", samples)
    found = [{"check": "mask", "level": "ok", "text": "fine"}, {"check": "lengths", "level": "doubt", "text": SCRIPT}]
    (folder / "results.json").write_text(json.dumps({
        "command": "rl", "options": {}, "versions": {"torch": "2"}, "commit": "abc", "before": {"eval_reward": 0.1},
        "train": {"train_runtime": 1.0}, "after": {"eval_reward": 0.9, "eval_runtime": 2.0},
        "preflight": {"title": "grpo", "seconds": 1.0, "findings": found, "row": {"where": "a:1", "text": "⟦x⟧"}},
        "throughput": {"tokens": 1000, "seconds": 2.0, "tokens_per_second": 500.0, "positions_computed": 900,
                       "positions_padded": 1200},
        "memory": {"what": "resident", "peak_bytes": 2**30, "owners": {"weights, trained": 2**20, "optimizer": 2**21}},
    }))  # fmt: skip
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps, "max_steps": steps}))
    options = "\n".join(f"{k}: {json.dumps(v)}" for k, v in {**OPTIONS, "method": "grpo", "num-generations": 2}.items())
    (folder / "config.yaml").write_text(f"# Written by xpo-fast.\n# xpo-fast rl --config c.yaml\n{options}\n")
    return folder


def recipe(folder):
    """Writes a run of `xpo-fast recipe` with two iterations."""
    (folder / "start").mkdir(parents=True)
    about = {"recipe": {"name": "rso"}, "model": "tiny", "training": {"learning_rate": 0.1}, "seed": 1}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "result.json").write_text(json.dumps({"model": "m", "best": 2, "reason": "done", "history": [0.0, 0.5]}))
    for k, name in enumerate(("start", "iteration-000", "iteration-001")):
        (folder / name).mkdir(exist_ok=True)
        held = [{"prompt": f"p{i}", "completion": f"the answer {k}", "score": k / 2 + i} for i in range(3)]
        lines(folder / name / "held_out-00000.jsonl", held)
        if k:
            log = [{"step": s, "loss": 1 / s} for s in range(1, 5)]
            (folder / name / "train_log.json").write_text(json.dumps(log))
            (folder / name / "summary.json").write_text(json.dumps({"prompts": 4, "selected": 3}))
    return folder


def part(page, name):
    return page.split(f'<section id="{name}"')[1].split("</section>")[0]


@pytest.fixture(scope="module")
def online_page(tmp_path_factory):
    return render([read_run(online(tmp_path_factory.mktemp("runs") / "run"))])


@pytest.mark.parametrize("kind", ["rl", "recipe", "nothing"])
def test_every_part_has_its_data_or_says_that_there_is_none(tmp_path, kind, online_page):
    folder = tmp_path / "run"
    if kind == "nothing":
        folder.mkdir()
        (folder / "config.yaml").write_text("score: assistant\n")
    elif kind == "recipe":
        recipe(folder)
    page = online_page if kind == "rl" else render([read_run(folder)])
    present = {name for name in PARTS if 'class="absent"' not in part(page, name)}
    assert present == {"rl": {*PARTS} - {"others"}, "recipe": {"outcome", "curves", "rewards", "samples",
                       "configuration"}, "nothing": {"configuration"}}[kind]  # fmt: skip
    if kind == "recipe":
        assert "iteration 2" in part(page, "iterations") and "<del>0</del>" in part(page, "samples")
        assert re.search(r"held-out score</th><td[^>]*>1</td><td[^>]*>2</td><td[^>]*>\+1<", part(page, "outcome"))


def test_of_an_online_run(online_page):
    page = online_page
    assert "0.1 before" in page and re.search(r"reward</th><td[^>]*>0\.1</td><td[^>]*>0\.9</td><td[^>]*>\+0\.8<", page)
    assert "± one standard deviation" in part(page, "components") and "held out" in part(page, "components")
    assert "KL divergence: objective/<wbr>kl" in part(page, "rewards")
    assert re.search(r"<del>0</del>.*<ins>3</ins>", part(page, "samples"), re.DOTALL)
    assert "1 GiB" in part(page, "speed") and "25.0%" in part(page, "speed")  # the positions saved
    assert "xpo-fast rl --config c.yaml" in part(page, "again") and "abc" in part(page, "again")
    assert part(page, "preflight").index("doubt") < part(page, "preflight").index(">ok<")
    assert 'done">finished<' in page
    # Nothing from data is code, and nothing is fetched.
    assert SCRIPT not in page and "&lt;script&gt;" in page and "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)|url\((?!#)|@import""", re.sub(r"xmlns(:\w+)?=\S+", "", page))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len({*ids}) and {x[1:] for x in re.findall(r'href="(#[^"]+)"', page)} <= {*ids}


def test_a_log_that_was_broken_off_and_gone_on_with(tmp_path):
    folder = online(tmp_path / "run", steps=3)
    (folder / "results.json").write_text('{"options": ')
    (folder / "trainer_state.json").unlink()
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9, "max_steps": 90}')
    log = [{"step": s, "loss": float(s)} for s in range(1, 9)]
    again = [{"step": 5, "loss": math.nan, "eval_loss": None}, {"step": "six"}, {"step": 6, "loss": 60.0, "x": [1]}]
    text = "".join(json.dumps(row) + "\n" for row in [*log, {"step": 8, "eval_loss": 1.0}, *again]) + '{"step": 7, "lo'
    (folder / "train_log.jsonl").write_text(text)
    run = read_run(folder)
    assert run.metrics.training["loss"].steps == [1, 2, 3, 4, 5, 6]
    assert run.metrics.training["loss"].values[-1] == 60.0 and math.isnan(run.metrics.training["loss"].values[4])
    assert run.metrics.evaluation["loss"].steps == [5]
    assert len(run.notes) == 2 and "train_log.jsonl: 1 line is broken" in run.notes[1]
    page = render([run])
    assert "not finished at step 9 of 90" in page and "loss: 1 of 6 logs have no finite value" in page
    assert "results.json cannot be read" in page


def test_a_curve_is_means_of_windows_between_the_lowest_and_the_highest():
    series = Series(list(map(float, range(1, 7))), [1.0, 3.0, math.nan, 5.0, math.nan, math.nan])
    found = curve(series, most=3)
    assert found.steps == [1.5, 3.5, 5.5] and found.values[:2] == [2.0, 5.0] and math.isnan(found.values[2])
    assert (found.low[0], found.high[0], found.window) == (1.0, 3.0, 2)
    spread = Series(series.steps, [0.5] * 6)
    assert (curve(series, spread).low[0], curve(series, spread).high[1]) == (0.5, 3.5)


def test_differences_are_of_words():
    left, right = differences("The red fox ran.", "The quick red fox sat.")
    assert left == [(False, "The red fox "), (True, "ran"), (False, ".")]
    assert right == [(False, "The"), (True, " quick"), (False, " red fox "), (True, "sat"), (False, ".")]
    assert differences("same", "same") == ([(False, "same")], [(False, "same")])


def test_two_runs_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = online(tmp_path / "first"), online(tmp_path / "second", steps=30)
    text = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(text.replace("seed: 1", "seed: 2"))
    assert cli.main(["report", str(first), str(second)]) == 0
    assert "comparison.html: " in capsys.readouterr().out
    page = (tmp_path / "comparison.html").read_text()
    assert re.search(r"seed</th><td[^>]*>1</td><td[^>]*>2<", part(page, "configuration"))
    assert "num-generations" not in part(page, "configuration")
    assert re.search(r"steps</th><td[^>]*>60</td><td[^>]*>30<", part(page, "outcome"))
    curves = part(page, "curves")
    assert curves.count("<figure>") > 8 and "first, held out" in curves and "second" in curves


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["absent"], "no such folder"),
        (["empty"], "expected the --output-dir of xpo-fast train"),
        (["run", "run"], "named twice"),
        (["run", "--output", "empty"], "name a file in it"),
        (["run", "--samples", "-1"], "--samples must be at least 0"),
    ],
)
def test_a_mistake_is_said(tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    online(tmp_path / "run", steps=2)
    assert cli.main(["report", *given]) == 2
    assert said in capsys.readouterr().err


def test_what_a_run_writes_for_it(tmp_path, capsys, monkeypatch):
    """Before the first step what is known then, at its end throughput and memory; a failure keeps the former."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    lines(tmp_path / "pairs.jsonl", make_rows(20, "pair"))
    folder = tmp_path / "run"
    command = ["train", "--data", str(tmp_path / "pairs.jsonl"), "--model", str(tmp_path / "model"), "--cpu",
               "--max-steps", "3", "--batch-size", "4", "--logging-steps", "1", "--lora-targets", "q_proj,v_proj",
               "--eval-split", "4", "--output-dir", str(folder)]  # fmt: skip
    from xpo_fast.trainer import XPOTrainer

    with monkeypatch.context() as patch:
        patch.setattr(XPOTrainer, "training_step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(command)
    early = json.loads((folder / "results.json").read_text())
    assert early["preflight"]["findings"] and "before" in early and "train" not in early and "memory" not in early
    assert "not finished" in render([read_run(folder)])

    assert cli.main([*command, "--overwrite"]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["command"] == "train" and results["preflight"]["row"]["text"].count("⟦") >= 1
    total, log = results["throughput"], (folder / "train_log.jsonl").read_text()
    assert total["tokens"] > 0 and total["positions_padded"] >= total["positions_computed"] > 0
    owners = results["memory"]["owners"]
    # Adam has two moments per trained weight, and a step count for each tensor.
    assert owners["gradients"] == owners["weights, trained"] > 0
    assert 0 <= owners["optimizer"] - 2 * owners["weights, trained"] < 1000
    assert results["memory"]["peak_bytes"] > sum(owners.values())
    capsys.readouterr()
    assert cli.main(["report", str(folder)]) == 0 and "report.html: " in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "finished" in page and "xpo-fast chat" in part(page, "samples") and log.count('"loss"') == 3
    answers = [{"prompt": "w1", "before": "w2 w3", "after": "w2 w4"}]
    lines(folder / "answers.jsonl", answers)
    assert "<del>w3</del>" in part(render([read_run(folder)]), "samples")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None: ...


# Loads a page in a frame as wide as a telephone or a screen, and writes what a browser makes of it.
HARNESS = """<!DOCTYPE html><title>h</title><iframe src="PAGE" style="width:WIDTHpx;height:800px;border:0"></iframe>
<pre id="out"></pre><script>
document.querySelector("iframe").onload = (e) => {
  const d = e.target.contentDocument, r = d.documentElement;
  const apart = ".scroll, pre, svg, nav, .hidden"; // which scroll by themselves, or are not seen
  const wide = [...d.querySelectorAll("main *, header *, footer")].filter((x) => !x.closest(apart)
    && x.getBoundingClientRect().right > r.clientWidth + 1).map((x) => x.tagName + "." + x.className);
  const seen = { scroll: r.scrollWidth, client: r.clientWidth, wide, parts: d.querySelectorAll("section").length,
    charts: [...d.querySelectorAll("figure > svg")].filter((x) => x.getBoundingClientRect().height > 50).length };
  document.getElementById("out").textContent = JSON.stringify(seen);
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (chromium, google-chrome): the page is not opened")
def test_it_opens_in_a_browser(tmp_path):
    """Without errors, without anything wider than the screen, and small: many metrics, long words, a long log."""
    folder = online(tmp_path / "run", steps=4000, metrics=[f"metric/{'x' * 60}/{k}" for k in range(20)])
    more = [{"rollout": 9, "group": g, "prompt": "p" * 500, "completion": "c" * 9000, "tokens": 1, "reward": 1e9}
            for g in range(300)]  # fmt: skip
    with (folder / "samples.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    runs = [read_run(folder), read_run(recipe(tmp_path / ("r" * 50)))]
    pages = {"one": render(runs[:1]), "two": render(runs)}
    for name, page in pages.items():
        assert len(page.encode()) < 3_000_000, name
        (tmp_path / f"{name}.html").write_text(page)
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, width in (("one", 390), ("one", 1440), ("two", 390)):
            harness = HARNESS.replace("PAGE", f"{name}.html").replace("WIDTH", str(width))
            (tmp_path / "harness.html").write_text(harness)
            said = subprocess.run(
                [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--hide-scrollbars", "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}",
                 "--window-size=1500,900", "--virtual-time-budget=20000", "--dump-dom",
                 f"http://127.0.0.1:{server.server_port}/harness.html"],
                capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}, check=True,
            )  # fmt: skip
            assert "CONSOLE" not in said.stderr, said.stderr
            found = json.loads(re.search(r'<pre id="out">(.*?)</pre>', said.stdout)[1])
            assert found["scroll"] == found["client"] == width and found["wide"] == [], found
            assert found["charts"] > 20 and found["parts"] >= 4
        server.shutdown()
