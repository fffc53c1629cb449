"""Every module by the real command, killed at any instant and started again: nothing is different in the end."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from kill_server import Job, Kill, Server
from killed_runs import (
    differences,
    diffusion_decoder,
    dualvitok,
    mllm,
    result,
    vision_encoder,
    write,
)
from test_diffusion_decoder_module import write_tokenizer

from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.shapes_conversations import (
    prepare_shapes_conversations,
    prepare_shapes_tokenizer,
)
from illume_lightning.lit.prepare_tokens import prepare_tokens

HERE = Path(__file__).parent
MODULES = ("vision_encoder", "dualvitok", "diffusion_decoder", "stage1", "stage2", "stage3")
COMMAND = ("fit", "-c", "run.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """Stores of pictures and conversations, a tokenizer, and codes of the images of one task."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "shapes").symlink_to(shapes, target_is_directory=True)
    prepare_shapes_tokenizer(folder / "text_tokenizer")
    write_tokenizer(folder / "dualvitok")
    for task in ("text", "generation", "editing"):
        for split, count in (("train", 12), ("val", 4)):
            prepare_shapes_conversations(
                folder / task / split,
                tokenizer=str(folder / "text_tokenizer"),
                task=task,
                count=count,
                split=split,
                sizes=((32, 32),),
            )
    prepare_tokens(str(folder / "editing" / "train"), folder / "codes", str(folder / "dualvitok"), side=32)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server([HERE, HERE.parent, HERE.parents[1]])
    yield server
    server.close()


def config(name: str, world: Path) -> dict[str, Any]:
    if name.startswith("stage"):
        vocabulary = TextTokenizer(world / "text_tokenizer").vocabulary(64, 96, size_step=16)
        return mllm(world, int(name[-1]), vocabulary)
    return {"vision_encoder": vision_encoder, "dualvitok": dualvitok, "diffusion_decoder": diffusion_decoder}[
        name
    ](world)


@dataclass
class Straight:
    """A run that nobody kills."""

    result: dict[str, Any]
    trace: list[str]
    seconds: float


@pytest.fixture(scope="module")
def straight(world: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes it once for each module."""
    made: dict[str, Straight] = {}

    def make(name: str) -> Straight:
        if name not in made:
            folder = write(config(name, world), tmp_path_factory.mktemp(name) / "straight")
            answer = server.run(Job(str(folder), COMMAND, trace=str(folder / "trace.txt")))
            assert answer["status"] == 0, (folder / "output.txt").read_text()[-3000:]
            trace = (folder / "trace.txt").read_text().splitlines()
            made[name] = Straight(result(folder), trace, answer["seconds"])
        return made[name]

    return make


# -- instants --

KINDS = {
    "a step begins": lambda event: event.startswith("batch ") and event.endswith(".0"),
    "right after a phase boundary": lambda event: event in ("batch 3.0", "forward 3.0", "gradients 3.1"),
    "between micro-batches": lambda event: event.startswith(("batch ", "forward ")) and event.endswith(".1"),
    "between backward and optimizer": lambda event: event.startswith("gradients "),
    "between optimizers": lambda event: event.startswith("between "),
    "between optimizer and schedule": lambda event: event.startswith("stepped "),
    "a checkpoint is written": lambda event: event.startswith("save "),
    "a step is logged": lambda event: event.startswith("logged "),
    "in validation": lambda event: event.startswith(("validation ", "validated ")),
    "at the end": lambda event: event == "end 0",
    "any time": lambda event: False,
}
INSTANTS = st.tuples(
    st.sampled_from(sorted(KINDS)),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([None, None, 0.0, 0.003, 0.02]),
)
Instant = tuple[str, float, float | None]


def draw(number: int, name: str, given_seed: int) -> list[Instant]:
    """Instants for a module, the same ones for a seed."""
    drawn: list[list[Instant]] = []

    # Its first example is always the simplest.
    @seed(1000 * given_seed + MODULES.index(name))
    @settings(max_examples=2, database=None, phases=[Phase.generate], deadline=None)
    @given(st.lists(INSTANTS, min_size=number, max_size=number))
    def collect(instants: list[Instant]) -> None:
        drawn.append(instants)

    collect()
    return drawn[-1]


def kills(instants: list[Instant], whole: Straight) -> list[Kill]:
    """In the order in which a run comes to them, so that each start comes further than the one before."""
    placed = []
    for number, (kind, share, delay) in enumerate(instants):
        places = [place for place, event in enumerate(whole.trace) if KINDS[kind](event)]
        if places:
            place = places[int(share * len(places))]
            placed.append((place, number, Kill(whole.trace[place], delay)))
        else:
            # What is left of the run takes longer than its share of the whole run's time.
            left = (1 - share) * whole.seconds
            placed.append((int(share * len(whole.trace)), number, Kill(None, 997 * share % 1 * left)))
    return [kill for _, _, kill in sorted(placed, key=lambda placed: placed[:2])]


@pytest.fixture
def given_seed(request: pytest.FixtureRequest) -> int:
    """`--hypothesis-seed`, or always the same."""
    text = str(request.config.getoption("hypothesis_seed", None))
    return int(text) if text.isdigit() else 0


def survive(server: Server, folder: Path, chosen: list[Kill], mutation: str | None = None) -> int:
    """Start a run as often as it takes; how often it was killed."""
    num_killed, is_ended = 0, False
    for kill in chosen:
        answer = server.run(Job(str(folder), COMMAND, kill, mutation=mutation))
        assert answer["killed"] or answer["status"] == 0, (folder / "output.txt").read_text()[-3000:]
        num_killed += answer["killed"]
        is_ended = not answer["killed"]
    if not is_ended:
        answer = server.run(Job(str(folder), COMMAND, mutation=mutation))
        assert answer["status"] == 0, (folder / "output.txt").read_text()[-3000:]
    return num_killed


# -- kills --


@pytest.mark.parametrize("name", MODULES)
def test_a_killed_run_ends_as_an_uninterrupted_one(name, straight, server, world, tmp_path, given_seed):
    whole = straight(name)
    folder = write(config(name, world), tmp_path / "killed")
    chosen = kills(draw(3, name, given_seed), whole)
    assert survive(server, folder, chosen) >= sum(kill.event is not None for kill in chosen)
    assert differences(result(folder), whole.result) == [], chosen


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_twenty_kills(name, straight, server, world, tmp_path, given_seed, capsys):
    whole = straight(name)
    num_killed, num_survived = 0, 0
    for number in range(5):
        folder = write(config(name, world), tmp_path / str(number))
        chosen = kills(draw(4, name, 1 + 5 * given_seed + number), whole)
        killed = survive(server, folder, chosen)
        num_killed += killed
        lost = differences(result(folder), whole.result)
        assert lost == [], chosen
        num_survived += killed
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: {num_killed} kills, {num_survived} survived with nothing lost\n")
    assert num_killed >= 16  # those at a time may come when a run has ended


def test_a_run_killed_in_its_last_validation_makes_it(straight, server, world, tmp_path):
    folder = write(config("vision_encoder", world), tmp_path / "killed")
    assert survive(server, folder, [Kill("validation 9.0.0")]) == 1
    assert differences(result(folder), straight("vision_encoder").result) == []


# -- determinism --


@pytest.mark.parametrize("name", ["dualvitok", "stage3"])
def test_a_seed_decides_everything_and_nothing_else_does(name, straight, server, world, tmp_path):
    whole = straight(name)
    of_workers = [["--data.num_workers", "2"]] if name == "dualvitok" else []
    for number, flags in enumerate(([], *of_workers, ["--seed_everything", "2"])):
        folder = write(config(name, world), tmp_path / str(number))
        answer = server.run(Job(str(folder), (*COMMAND, *flags)))
        assert answer["status"] == 0, (folder / "output.txt").read_text()[-3000:]
        found = differences(result(folder), whole.result)
        if flags[:1] == ["--seed_everything"]:
            assert any(line.startswith("/checkpoint/state_dict/") for line in found)
            assert any(line.startswith("/metrics/train/loss/") for line in found)
        else:
            assert found == [], flags


# -- what these tests would not miss --


@pytest.mark.parametrize(
    ("name", "event", "mutation", "lost"),
    [
        ("stage3", "batch 4.0", "generators_are_left", "/checkpoint/state_dict/model.trunk"),
        ("stage1", "batch 4.0", "optimizers_begin_anew", "/checkpoint/optimizer_states/"),
        ("vision_encoder", "validation 3.0.0", "debts_are_left", "/metrics/val/words/"),
        ("dualvitok", "batch 4.0", "averages_begin_anew", "/checkpoint/current_model_state/"),
        ("dualvitok", "batch 4.0", "counts_begin_anew", "/last table/train/pixel_"),
    ],
)
def test_a_run_that_resumes_inexactly_is_found_out(
    name, event, mutation, lost, straight, server, world, tmp_path
):
    whole = straight(name)
    folder = write(config(name, world), tmp_path / "killed")
    assert survive(server, folder, [Kill(event)], mutation=f"killed_runs:{mutation}") == 1
    assert any(line.startswith(lost) for line in differences(result(folder), whole.result))


def test_a_resumed_run_leaves_the_checkpoint_that_it_came_from(server, world, tmp_path):
    """Written again from within the next step it would have half of that step in its statistics."""
    folder = write(config("dualvitok", world), tmp_path / "killed")
    assert server.run(Job(str(folder), COMMAND, Kill("batch 4.0")))["killed"]
    assert server.run(Job(str(folder), COMMAND, trace=str(folder / "trace.txt")))["status"] == 0
    events = (folder / "trace.txt").read_text().splitlines()
    assert events[0] == "validation 3.0.0"
    assert events.index("batch 3.0") < events.index("batch 3.1") < events.index("batch 4.0")
    assert not any(event.startswith("save 3.") for event in events)
    assert server.run(Job(str(folder), COMMAND, trace=str(folder / "trace.txt")))["status"] == 0
    assert (folder / "trace.txt").read_text().split() == ["end", "0"], "a finished run does nothing"
