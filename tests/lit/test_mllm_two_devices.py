"""Two devices train the MLLM as one does."""

import subprocess
import sys
from pathlib import Path

import torch
from test_diffusion_decoder_module import trainer_for, weights
from test_mllm_stages import build, data, phases, world  # noqa: F401  # a fixture

SCRIPT = """\
import sys
sys.path[:0] = {paths}
from pathlib import Path
import lightning as L
import torch
from callbacks import ResolutionCurriculum
from test_mllm_stages import build, data, phases

if __name__ == "__main__":
    world = Path({world!r})
    run = phases(2, batch=8, micro=2)
    module = build(world, gradient_clip=0.0, optimizer=lambda groups: torch.optim.SGD(groups))
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=2, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[ResolutionCurriculum(run)],
    )
    trainer.fit(module, data(world, "generation", "text", condition_dropout=0.0))
    torch.save(module.state_dict(), {output!r} + str(trainer.global_rank))
"""


def test_two_devices_end_with_the_weights_of_one(world, tmp_path):  # noqa: F811
    alone = build(world, gradient_clip=0.0, optimizer=lambda groups: torch.optim.SGD(groups))
    run = phases(2, batch=8, micro=2)
    trainer_for(tmp_path, run).fit(alone, data(world, "generation", "text", condition_dropout=0.0))
    here = Path(__file__).parent
    script, output = tmp_path / "run.py", str(tmp_path / "rank")
    script.write_text(
        SCRIPT.format(
            paths=[str(here.parents[1]), str(here), str(here.parent)], world=str(world), output=output
        )
    )
    done = subprocess.run([sys.executable, str(script)], timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = torch.load(f"{output}{rank}", weights_only=True)
        for key, value in weights(alone).items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)
