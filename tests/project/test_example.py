"""The example as its user sees it: the table, the figure, the exit status."""

import dataclasses
import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_sequence_parallel.py"
# A demo that is well is done in 15 s; one that hangs ends here, not with the whole session.
TIMEOUT = 120

pytestmark = pytest.mark.timeout(TIMEOUT + 30)


def run_example(folder, *arguments, launcher=(), timeout=TIMEOUT, **variables):
    """Runs the example in `folder`, outside any torchrun that the tests themselves run under."""
    torchrun_variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    environment = {k: v for k, v in os.environ.items() if k not in torchrun_variables}
    environment |= {
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **variables,
    }
    return subprocess.run(
        [sys.executable, *launcher, EXAMPLE, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def read_table(output):
    """The cells of the printed table, by the name of their row."""
    rows = (line.strip("│ ").split("│") for line in output.splitlines() if line.startswith("│"))
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three_steps")
    return folder, run_example(folder, "--steps", "3", "--fused", "--async")


@functools.cache
def example():
    """The example as a module; the benchmarks have modules of the same names."""
    names = [path.stem for path in EXAMPLE.parent.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    with mock.patch.object(sys, "path", [str(EXAMPLE.parent), *sys.path]):
        module = importlib.import_module(EXAMPLE.stem)
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)
    return module


def demo(*arguments):
    """The example as a module, and the options that it reads from these arguments."""
    with mock.patch.object(sys, "argv", [str(EXAMPLE), *arguments]):
        return example(), example().parse_arguments(None)[1]


def small(module, options):
    """The model of these options, for a clip of 162 tokens in the place of 1080."""
    return dataclasses.replace(module.config_of(options), frames=3, height=24, width=36)


def train_as_rank(communicator, *arguments):
    """What a rank of the example does; rank 0 returns its run."""
    module, options = demo(*arguments)
    group, cpu = communicator.cpu_group, torch.device("cpu")
    metered = module.MeteredCommunicator(group, device=cpu, device_group=group, unique_name="sp")
    run = module.train("2 ranks", options, cpu, metered, small(module, options))
    metered.destroy()
    return run.__dict__ if communicator.rank == 0 else None


def run_in_ranks(ranks, folder, *arguments):
    """As `run_example` in ranks that have started, of a small clip and without the figure.

    Returns the exit status, and the bytes that a rank sent in each step.
    """
    arguments = (*arguments, f"--output={folder}")
    run, _ = ranks.run(2, train_as_rank, *arguments, ways=["messages"])
    module, options = demo(*arguments)
    cpu = torch.device("cpu")
    reference = module.train("one process", options, cpu, config=small(module, options))
    with mock.patch.object(module, "save_figure"):
        return module.report(reference, module.Run(**run), options), run["sent_bytes"]


def test_both_runs_learn_the_same(three_steps):
    _, result = three_steps
    assert result.returncode == 0, result.stdout + result.stderr
    table = read_table(result.stdout)
    losses = {
        name: [float(cell) for cell in cells]
        for name, cells in table.items()
        if name.startswith("loss, step")
    }
    assert list(losses) == [f"loss, step {step}" for step in range(1, 4)]
    for one_process, ranks, difference in losses.values():
        # Six digits are printed, and the runs may differ by 1e-3 at most.
        assert ranks == pytest.approx(one_process, rel=1e-3)
        assert difference <= 1e-3
    assert losses["loss, step 3"][0] < 0.8 * losses["loss, step 1"][0]
    # fp32 sums in another order, before training has amplified anything: 1e-6 was measured.
    assert float(table["gradients, first step"][2]) < 1e-5
    assert float(table["gradients, last step"][2]) < 1e-3
    assert "The runs agree within the tolerance of 0.001." in result.stdout


def test_the_table_counts_every_byte_and_the_time(three_steps):
    _, result = three_steps
    table = read_table(result.stdout)
    assert table["sent by a rank each step"][1] == f"{(exchanged(540) + reduced()) / 1e6:.1f} MB"
    milliseconds = [int(re.fullmatch(r"(\d+) ms", cell)[1]) for cell in table["step time"][:2]]
    communication = int(re.fullmatch(r"(\d+) ms", table["of it in communication"][1])[1])
    assert all(milliseconds)
    assert 0 < communication < milliseconds[1]


def test_stages_of_the_fused_projection_send_what_one_exchange_sends(three_steps):
    _, result = three_steps
    assert headings_of_the_ranks(result.stdout) == ["2 ranks", "fused", "async"]


def test_whole_exchanges_learn_the_same(ranks, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, sent_bytes = run_in_ranks(ranks, tmp_path, "--steps", "2")
    assert status == 0
    output = capfd.readouterr().out
    table = read_table(output)
    assert float(table["gradients, first step"][2]) < 1e-5
    assert float(table["gradients, last step"][2]) < 1e-3
    assert headings_of_the_ranks(output) == ["2 ranks"]
    assert sent_bytes == exchanged(81) + reduced()
    assert table["sent by a rank each step"][1] == f"{sent_bytes / 1e6:.1f} MB"


def test_an_exchange_as_fp8_learns_nearly_the_same_with_fewer_bytes(
    ranks, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")
    # What it loses is above the tolerance, which fails and says so.
    arguments = ("--steps", "2", "--fp8", "stochastic")
    status, sent_bytes = run_in_ranks(ranks, tmp_path, *arguments)
    assert status == 1
    output = capfd.readouterr().out
    assert "The runs differ by more than the tolerance of 0.001." in output
    table = read_table(output)
    # Rounding to three bits moves gradients by hundredths, and losses by less.
    assert 1e-3 < float(table["gradients, first step"][2]) < 0.5
    assert float(table["largest of all 2 losses"][2]) < 0.05
    assert headings_of_the_ranks(output) == ["2 ranks", "fp8=stochastic"]
    # A byte for each element, and four for each row of 48.
    assert sent_bytes == exchanged(81, 2, 48, 1 + 4 / 48) + reduced(2, 48)
    assert table["sent by a rank each step"][1] == f"{sent_bytes / 1e6:.1f} MB"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [(), ("--fused", "--async")])
def test_compiled_ranks_learn_what_one_eager_process_does(tmp_path, flags):
    result = run_example(tmp_path, "--steps", "3", *flags, "--compile", timeout=570)
    assert result.returncode == 0, result.stdout + result.stderr
    table = read_table(result.stdout)
    assert float(table["gradients, first step"][2]) < 1e-5
    assert float(table["gradients, last step"][2]) < 1e-3
    names = [flag.removeprefix("--") for flag in flags]
    assert headings_of_the_ranks(result.stdout) == ["2 ranks", *names, "compile"]
    assert "of it in communication" not in table  # nothing inside a compiled graph is counted


def headings_of_the_ranks(output):
    """The second heading of the printed table, line by line."""
    rows = (line.split("┃") for line in output.splitlines() if line.startswith("┃"))
    return [cells[3].strip() for cells in rows if cells[3].strip()]


def exchanged(tokens, heads=6, width=24, element_bytes=4):
    """Per layer q, k, v and the output, forward and backward, fp32; half stays on its rank.

    `tokens` are those of the video on a rank. Of the 7 of the text the output, for both ranks.
    """
    video, text = 4 * (3 * tokens * heads * width), 2 * (3 * 7 * heads * width) / 2
    return 3 * 2 * (video + text) * element_bytes / 2


def reduced(heads=6, width=24):
    """At P = 2 an all_reduce sends its size once: the gradients and twice the scalar loss."""
    return 4 * number_of_parameters(heads, width) + 2 * 4


def number_of_parameters(heads, width):
    hidden, patch = heads * width, 3 * 4 * 4
    block = (hidden + 1) * 6 * hidden  # modulation
    block += 2 * 3 * hidden**2 + 2 * width + (hidden + 1) * hidden  # attention, video and text
    block += (hidden + 1) * 3 * hidden + (3 * hidden + 1) * hidden  # MLP
    ends = (patch + 1) * hidden + (32 + 1) * hidden + 2 * hidden + (hidden + 1) * patch
    ends += 2 * (hidden + 1) * hidden  # the text's output, but for the last block's
    return 3 * block + ends + 2 * (hidden + 1) * hidden


def test_the_figure_is_a_png_and_nothing_else_is_left(three_steps):
    folder, result = three_steps
    (figure,) = folder.rglob("*.*")
    assert figure == folder / "demo_output" / "losses.png"
    assert "Loss curves: demo_output/losses.png" in result.stdout
    data = figure.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB\x60\x82")


@pytest.mark.slow
def test_started_by_torchrun_rank_0_prints_the_table(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
    launcher += ("--nproc-per-node=3",)
    result = run_example(tmp_path, "--steps", "1", launcher=launcher)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 ranks" in result.stdout
    assert result.stdout.count("The runs agree within the tolerance of 0.001.") == 1
    assert (tmp_path / "demo_output" / "losses.png").exists()


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_named_before_any_work(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--nproc", "4"])
    with pytest.raises(SystemExit) as ended:
        example().main()
    assert ended.value.code == 2
    assert "the number of ranks must divide the model's 6 heads, got 4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_ends_the_demo_with_its_error(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch\n"
        "    torch.Tensor.square = None\n"
    )
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    result = run_example(tmp_path, "--steps", "1", PYTHONPATH=path)
    assert result.returncode == 1
    assert "TypeError: 'NoneType' object is not callable" in result.stderr
    assert "The ranks failed (exit status 1); see above." in result.stderr
