"""Stands in for `illume`: it prepares, trains and evaluates with hashes, and continues as the real one does.

Every start and end is noted in the file `journal` of the working folder.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

STEP_SECONDS = 0.02
stopped = []


def note(*words: object) -> None:
    with Path("journal").open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".writing")
    scratch.write_text(json.dumps(content))
    os.replace(scratch, path)


def digest(*values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def prepare(out: str, count: str) -> None:
    if Path(out).exists():
        return
    work = Path(out + ".partial")
    for number in range(int(count)):
        if not (work / f"{number}.json").is_file():
            write(work / f"{number}.json", digest(number))
            time.sleep(STEP_SECONDS)
    write(work / "manifest.json", digest(count))
    os.rename(work, out)


def fit(config: dict, seed: int, fails_at: int | None) -> None:
    folder = Path(config["trainer"]["default_root_dir"].replace("${seed_everything}", str(seed)))
    last = folder / "checkpoints" / "last.ckpt"
    if last.is_file():
        step, value = json.loads(last.read_text())
    else:
        inputs = [Path(name.replace("${seed_everything}", str(seed))) for name in config["inputs"]]
        step, value = 0, digest(seed, [path.read_text() for path in inputs])
    while step < config["steps"] and not stopped:
        step, value = step + 1, digest(value, step, config.get("rate"))
        sys.stdout.write(f"\rphase 1/1:  50%|#####     | {step}/{config['steps']} [9.8it/s, loss=0.1]")
        time.sleep(STEP_SECONDS)
        if step == fails_at:
            raise SystemExit("\n" + "\n".join(f"line {number}" for number in range(30)) + "\nno memory")
        if step % 5 == 0 or step == config["steps"] or stopped:
            write(last, [step, value])


def evaluate(run: str) -> None:
    checkpoint = Path(run, "checkpoints", "last.ckpt").read_text()
    time.sleep(STEP_SECONDS)
    share = int(digest(checkpoint)[:4], 16) / 0xFFFF
    score = {"task": "understanding", "name": "all", "value": share, "unit": "share"}
    settings = {"run_seed": int(run.rpartition("seed")[2])}
    sheet = {"version": 1, "part": "mllm", "step": 25, "settings": settings, "scores": [score], "samples": []}
    write(Path(run, "scores", "scores.json"), sheet)


def report(words: list[str]) -> None:
    if "--out" in words:
        from illume_lightning.report.seed_tables import write_seeds

        text, _ = write_seeds(words[: words.index("--out")], words[-1])
        sys.stdout.write(text)
    else:
        write(Path(words[0]), "all is well")


def main(words: list[str]) -> None:
    note("begin", *words)
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    if words[0] == "prepare":
        prepare(*words[1:])
    elif words[0] == "fit":
        options = dict(zip(words[1::2], words[2::2], strict=True))
        fails_at = int(options["--fails_at"]) if "--fails_at" in options else None
        fit(json.loads(Path(options["-c"]).read_text()), int(options["--seed_everything"]), fails_at)
    elif words[0] == "evaluate":
        evaluate(words[1])
    elif words[0] == "report":
        report(words[1:])
    note("stopped" if stopped else "end", *words)


main(sys.argv[1:])
