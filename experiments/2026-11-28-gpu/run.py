"""Runs this study's parts side by side under one deadline; each leaves what it found in OUT as soon as it has it.

python run.py [--seconds 560] [--small] [--art <table of paintings>]; run.sh sets the paths. OUT: where results go
(outputs/gpu). WORK: where runs lie (a temporary folder). SIMSEARCH_DATA: the folder with cifar10/.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path(os.environ.get("OUT") or "outputs/gpu").resolve()
WORK = Path(os.environ.get("WORK") or tempfile.mkdtemp(prefix="gpu-")).resolve()
START = time.monotonic()
SEEDS = (0, 1, 2)
NETWORKS = [(12, 0), (24, 0), (36, 0), (48, 0), (12, 1), (12, 2)]  # bits and seeds of DSH, in this order
PROTOCOLS = {"release": "dsh-release", "10k-50k": "10k-50k"}
# Quiet and without what a small network waits for: no bar, no checkpoint each epoch, a line each 500 steps.
LEAN = [
    *("logger.mode=disabled", "callbacks.neighbours=null", "callbacks.precision_recall=null", "catalog.write=false"),
    *("callbacks.last=null", "callbacks.learning_rate=null", "+trainer.enable_progress_bar=false"),
    *("trainer.log_every_n_steps=500", "+callbacks.checkpoint.every_n_epochs=100000"),  # the last weights are saved
]
DSH = ["experiment=dsh", "trainer.precision=32-true", "+trainer.benchmark=true"]
HASHING = [
    *("experiment=hashing-cifar", "backbone.width=[128,384,384]", "trainer.max_steps=1455"),  # 15 epochs
    *("trainer.precision=32-true", "+trainer.benchmark=true"),
]
FROZEN = ["data=art", "model=frozen", "pooling=average", "model.whitening.dimension=256", "backbone.size=224"]
ART = [
    *("experiment=art-dir", "sampler.batches=32", "backbone.size=224"),
    "+data.augment={_target_: simsearch.data.transforms.RandomCropFlip, padding: 16, flip: true}",
    *("+trainer.enable_progress_bar=false", "callbacks.last=null"),
]
QUIET = ["logger.mode=disabled", "callbacks.neighbours=null", "callbacks.precision_recall=null", "catalog.write=false"]
SMALL = [
    *("data=rendered", "data.styles=2", "data.artists=2", "data.works=4", "data.photographs=2", "data.size=32"),
    *("protocol=rendered-work", "protocol.validation=null", "callbacks.evaluation.ks=[1,10]"),
    *("trainer.max_steps=3", "trainer.precision=32-true", "sampler.batch_size=8"),
]


class Study:
    """What all parts share: the deadline, the children that run, and what came out."""

    def __init__(self, seconds: float, small: bool) -> None:
        self.seconds, self.small = seconds, small
        self.children: set[subprocess.Popen] = set()
        self.ended: set[str] = set()  # trainings, whose checkpoints nobody writes any more
        self.failed: list[str] = []
        self.lock = threading.Lock()
        self.lines: list[str] = []

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - START)

    def note(self, line: str) -> None:
        """Adds a line to OUT/log.txt and says it."""
        with self.lock:
            line = f"{time.monotonic() - START:6.1f} s  {line}"
            self.lines.append(line)
            (OUT / "log.txt").write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        print(line, flush=True)

    def run(self, name: str, command: list[str], limit: float = 1e9, threads: int = 4) -> bool:
        """Whether a command ended well within `limit` seconds and the deadline; its output is WORK/<name>.log.

        In small only the deadline counts: a machine with other work may take its time.
        """
        limit = self.left if self.small else min(limit, self.left)
        if limit < 1:
            self.note(f"{name}: left out, no time")
            self.failed.append(name)
            return False
        log = WORK / f"{name}.log"
        begun = time.monotonic()
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "WANDB_MODE": "disabled"}
        with log.open("w") as file:
            child = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
            )
            self.children.add(child)
            try:
                status: int | str = child.wait(limit)
            except subprocess.TimeoutExpired:
                status = "stopped by its limit"
                end(child)
        self.children.discard(child)
        told = (
            "" if status == 0 else ": " + " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])[-400:]
        )
        self.note(f"{name}: {'ok' if status == 0 else status} after {time.monotonic() - begun:.1f} s{told}")
        if status != 0:
            self.failed.append(name)
        return status == 0

    def simsearch(self, name: str, command: str, *overrides: str, limit: float = 1e9, threads: int = 4) -> bool:
        return self.run(name, [sys.executable, "-m", "simsearch", command, *overrides], limit, threads)

    def train(self, name: str, *overrides: str, limit: float = 1e9) -> bool:
        """Trains WORK/<name>; in small by a few steps on rendered pictures."""
        given = [*overrides, *LEAN, f"run_dir={WORK / name}", *(SMALL if self.small else ())]
        done = self.simsearch(name, "train", *given, limit=limit)
        self.ended.add(name)
        return done

    def measure(self, name: str, *arguments: str, limit: float = 60) -> bool:
        command = [sys.executable, str(HERE / "measure.py"), *arguments, "--out", str(WORK / f"{name}.json")]
        return self.run(name, [*command, *(["--small"] if self.small else [])], limit, threads=os.cpu_count() or 4)

    def pack(self, archive: str, *names: str, bare: Sequence[str] = ()) -> None:
        """Writes OUT/<archive>.tar.gz of runs, logs and JSON files in WORK, of `bare` runs without checkpoints."""
        temporary = WORK / f"{archive}.tar.gz"
        with self.lock:
            with tarfile.open(temporary, "w:gz", compresslevel=1) as tar:
                for name in names:
                    files = [WORK / f"{name}.{kind}" for kind in ("log", "json", "csv")]
                    files += sorted((WORK / name).rglob("*"))
                    for path in files:
                        weights = path.suffix in (".ckpt", ".new")
                        if path.is_file() and not (weights and (name in bare or name not in self.ended)):
                            add(tar, path)
            shutil.move(temporary, OUT / f"{archive}.tar.gz")
            summary(OUT / "summary.md")


def end(child: subprocess.Popen) -> None:
    """Ends a command and what it started."""
    for signum, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(child.pid, signum)
            child.wait(patience)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def add(tar: tarfile.TarFile, path: Path) -> None:
    """Adds a file of WORK to an archive as it is now, weights in half precision; one that vanishes is left out."""
    try:
        content = path.read_bytes() if path.suffix != ".ckpt" else lean(path)
    except OSError:
        return
    about = tarfile.TarInfo(str(path.relative_to(WORK)))
    about.size, about.mtime = len(content), int(time.time())
    tar.addfile(about, io.BytesIO(content))


def lean(path: Path) -> bytes:
    """A checkpoint without its optimizer, and with weights in float16: a quarter of its size, to fit a transfer."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
        checkpoint.pop(name, None)
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {n: v.half() if v.dtype == torch.float32 else v for n, v in state.items()}
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def summary(path: Path) -> None:
    """A table of all metrics.json in WORK."""
    lines = ["| run | steps | protocol | queries | mAP | [95%] | mAP, index order | P@10 | train s |", "|" + "---|" * 9]
    for file in sorted(WORK.glob("*/metrics.json")):
        stage = json.loads(file.read_text()).get("test")
        if stage is None:
            continue
        metrics, ends = stage["metrics"], stage["intervals"].get("mAP", [float("nan")] * 2)
        about = file.with_name("run.json")
        run = json.loads(about.read_text()) if about.is_file() else {}
        ordered = metrics.get("mAP_index_order")
        cells = [file.parent.name, steps(file.parent.name), stage["protocol"], f"{metrics['queries']:.0f}"]
        cells += [f"{metrics['mAP']:.4f}", f"{ends[0]:.4f}-{ends[1]:.4f}", "-" if ordered is None else f"{ordered:.4f}"]
        cells += [f"{metrics['P@10']:.4f}" if "P@10" in metrics else "-", f"{run.get('train_seconds', 0):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    for file in sorted(WORK.glob("*.json")):
        lines += ["", f"{file.stem}:", "", "```json", file.read_text().strip(), "```"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def steps(name: str) -> str:
    """How many steps the checkpoint of a run, or of a measurement of one, has seen."""
    path = WORK / re.sub("-(release|10k-50k)$", "", name) / "checkpoints" / "best.ckpt"
    return str(torch.load(path, map_location="cpu", weights_only=True)["global_step"]) if path.is_file() else "-"


def duration(seconds: float) -> str:
    """Seconds as trainer.max_time has them."""
    minutes, rest = divmod(int(seconds), 60)
    return f"00:00:{minutes:02d}:{rest:02d}"


def together(*works: Callable[[], None]) -> None:
    """Runs works at the same time and waits for all; one that fails says so and harms no other."""

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            STUDY.failed.append(getattr(work, "__name__", "a part"))
            STUDY.note(f"failed: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ------------------------------------------------------------------------------------------ the parts


def prepare() -> bool:
    """Whether CIFAR-10 is there, decoded once for all."""
    if not STUDY.small:
        code = (
            "import os; from pathlib import Path; from simsearch.data.cifar10 import read_cifar10; "
            "print(read_cifar10(Path(os.environ['SIMSEARCH_DATA'], 'cifar10'), "
            "cache=Path(os.environ['SIMSEARCH_CACHE'], 'images')).fingerprint)"
        )
        return STUDY.run("prepare", [sys.executable, "-c", code], 60)
    return True


def tests() -> None:
    """What of the test suite needs CUDA."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    look = [] if torch.cuda.is_available() else ["--collect-only"]
    options = ["-m", "gpu", "-v", "-p", "no:cacheprovider", *look]
    STUDY.run("tests", [sys.executable, "-m", "pytest", *options, *files], 300)


def dsh(bits: int, seed: int, limit: float) -> None:
    """DSH by graph.py: 12 bits by the whole schedule, longer codes from that; or as far as `limit` seconds go."""
    name, length = f"dsh-{bits}-{seed}", 150_000 if bits == 12 else 30_000
    given = [f"model.network.bits={bits}", f"seed={seed}"]
    if bits != 12:
        given += [
            f"model.start={WORK / 'dsh-12-0'}",
            "model.head_lr=10",
            "optimizer.lr=1e-4",
            "scheduler.step_size=4000",
        ]
    if not STUDY.train(name, *DSH, *given, "trainer.max_steps=1"):
        return
    (WORK / name / "metrics.json").unlink()  # of the first step
    command = [sys.executable, str(HERE / "graph.py"), "--run", str(WORK / name), "--out", str(WORK / f"{name}.json")]
    length = 6 if STUDY.small else length
    seconds = max(min(limit, STUDY.left - 60), 5)
    done = STUDY.run(f"{name}-steps", [*command, "--steps", str(length), "--seconds", str(seconds)], seconds + 60)
    protocols = {"release": "rendered-work", "10k-50k": "rendered-style"} if STUDY.small else PROTOCOLS
    for end_, protocol in protocols.items() if done else ():
        measured = [f"run={WORK / name}", f"protocol={protocol}", f"run_dir={WORK / name}-{end_}"]
        STUDY.simsearch(f"{name}-{end_}", "evaluate", *measured, limit=90)
    names = [f"dsh-{b}-{s}" for b, s in NETWORKS]
    STUDY.pack("dsh", *(f"{one}{end_}" for one in names for end_ in ("", "-steps", "-release", "-10k-50k")))


def hashing(seed: int) -> None:
    name = f"hashing-{seed}"
    classes = ["loss.classes=16"] if STUDY.small else []
    STUDY.train(name, *HASHING, f"seed={seed}", *classes, limit=420)
    names = [f"hashing-{one}" for one in SEEDS]
    STUDY.pack("hashing", *names, bare=names[1:])


def evaluation() -> None:
    """The first hashing net on both devices."""
    if (WORK / "hashing-0" / "checkpoints" / "best.ckpt").is_file():
        STUDY.measure("evaluation", "evaluation", "--run", str(WORK / "hashing-0"), limit=120)
    small_parts()


def small_parts() -> None:
    STUDY.pack("parts", "prepare", "tests", "evaluation", "throughput", "utilisation")


def side_by_side() -> None:
    """What is worth most comes first; what shares the device is told in README.md."""
    seeds = SEEDS[:1] if STUDY.small else SEEDS
    networks = [NETWORKS[0], NETWORKS[1]] if STUDY.small else NETWORKS
    if not prepare():
        STUDY.note("without CIFAR-10 nothing can be done: SIMSEARCH_DATA is the folder that holds cifar10/")
        return
    STUDY.measure("throughput", "throughput", limit=60)
    small_parts()
    together(tests, *(lambda seed=seed: hashing(seed) for seed in seeds))
    small_parts()

    def in_turn() -> None:
        for bits, seed in networks:
            if STUDY.small or STUDY.left > 75:
                dsh(bits, seed, 200)
            else:
                STUDY.note(f"dsh-{bits}-{seed}: left out, {STUDY.left:.0f} s are left")

    together(evaluation, in_turn)


def paintings(source: Path) -> None:
    """DIR with all layers on a collection of paintings, 96 and 384 steps, beside the frozen network, and assessed."""
    art = f"data.source={WORK / 'art'}"
    if not STUDY.simsearch(
        "ingest", "data", "ingest", f"images={source}", f"out={WORK / 'art'}", "workers=12", limit=120, threads=12
    ):
        return
    name = "frozen-lite0-average-256d"
    STUDY.simsearch(name, "train", *FROZEN, art, *QUIET, f"run_dir={WORK / name}", threads=12)  # fills the cache
    runs = [name]

    def row(name: str, steps: int, seed: int) -> None:
        given = [*ART, art, *QUIET, f"seed={seed}"]
        given += [f"trainer.max_steps={3 if STUDY.small else steps}", f"run_dir={WORK / name}"]
        given += ["sampler.triplets=4", "callbacks.mining.pool=50"] if STUDY.small else []
        if STUDY.simsearch(name, "train", *given, limit=max(STUDY.left - 50, 20)):
            runs.append(name)
        STUDY.ended.add(name)
        if seed == 0:
            STUDY.pack(name, name)

    lengths = [(96, 0)] if STUDY.small else [(96, 0), (96, 1), (96, 2), (384, 0)]
    rows = [(f"dir-rmac-lite0-256d-{steps}-{seed}", steps, seed) for steps, seed in lengths]
    together(*(lambda one=one: row(*one) for one in rows))
    listed = ",".join(str(WORK / run) for run in [name, *sorted(runs[1:])])
    STUDY.simsearch("assess", "assess", f"runs=[{listed}]", f"out={WORK / 'assess'}", threads=12)
    STUDY.pack("parts", "ingest", "assess", "utilisation", *runs, bare=runs)


def utilisation() -> subprocess.Popen | None:
    """Writes WORK/utilisation.csv each second in the background."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "timestamp,utilization.gpu,utilization.memory,memory.used,power.draw,clocks.sm"
    with (WORK / "utilisation.csv").open("w") as file:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,nounits", "-l", "1"]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL, start_new_session=True)


def main(art: Path | None) -> None:
    for folder in (OUT, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SIMSEARCH_CACHE", str(WORK / "cache"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: CPU"
    about = f"{device}; torch {torch.__version__}; {os.cpu_count()} cores; work in {WORK}; {STUDY.seconds:.0f} s"
    STUDY.note(f"{time.strftime('%Y/%m/%d %H:%M:%S')}; {about}")
    watch = utilisation()

    def over() -> None:
        STUDY.note("the time is over: what runs is ended")
        for child in list(STUDY.children):
            end(child)

    timer = threading.Timer(max(STUDY.left, 1), over)
    timer.daemon = True
    timer.start()
    try:
        side_by_side() if art is None else paintings(art)
    finally:
        timer.cancel()
        if watch is not None:
            end(watch)
        summary(OUT / "summary.md")
        STUDY.note(f"finished; not ok: {', '.join(STUDY.failed) or 'nothing'}")
    print((OUT / "summary.md").read_text())
    raise SystemExit(1 if STUDY.failed else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=560.0, help="after which everything has ended")
    parser.add_argument("--small", action="store_true", help="a few steps on a few rendered pictures")
    parser.add_argument("--art", type=Path, help="a table of paintings: DIR on them instead of CIFAR-10")
    arguments = parser.parse_args()
    if not (arguments.small or arguments.art or "SIMSEARCH_DATA" in os.environ):
        parser.error("set SIMSEARCH_DATA to the folder that holds cifar10/")
    STUDY = Study(arguments.seconds, arguments.small)
    main(arguments.art)
