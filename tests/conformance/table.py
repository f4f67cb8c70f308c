"""Checks every causal language model type that transformers knows, and writes the table of supported students.

    python tests/conformance/table.py [type ...]

Verdicts are appended to ``--out``, one JSON line per type; types already in it are not checked again. Each type runs in
its own process with a time limit. The table is written once all types are done.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import check
import models

ROOT = Path(__file__).parents[2]
LIMIT_S = 600
SMALL = 200_000_000  # parameters
MEMORY = 3 << 30  # bytes of a type's process beyond this one's; prevents full-size models


def verdicts(kind: str) -> dict[str, Any]:
    """Verdicts for a type, or why no small model of it can be built."""
    try:
        model = models.build(kind)
        if (size := sum(p.numel() for p in model.parameters())) > SMALL:
            return {"unbuilt": f"{size / 1e6:.0f} million parameters, though asked for a small one"}
        with torch.no_grad():
            logits = model(input_ids=check.samples(models.VOCABULARY)[0][None]).logits
    except Exception as error:
        return {"unbuilt": f"{type(error).__name__}: {error}"[:300]}
    if not bool(logits.isfinite().all()) or float(logits.std()) < 0.01:
        return {"unbuilt": f"logits without a spread: {float(logits.std())}"}
    found = check.check(model, models.VOCABULARY)
    return {name: [verdict.verdict, verdict.reason[:400]] for name, verdict in found.items()}


def in_child(kind: str) -> dict[str, Any]:
    """Runs ``verdicts`` in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(LIMIT_S)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
            os.write(write, json.dumps(verdicts(kind)).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"unbuilt": f"the process ended with status {status}"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "conformance.jsonl")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "students.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import peft  # noqa: F401  (four seconds, once instead of in each child)
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {entry["kind"]: entry for entry in map(json.loads, lines)}
    for kind in options.kinds or models.kinds():
        if kind in done and not options.kinds:
            continue
        start = time.monotonic()
        found = in_child(kind)
        done[kind] = {"kind": kind, "class": models.kinds()[kind], "found": found}
        with options.out.open("a") as file:
            file.write(json.dumps(done[kind]) + "\n")
        short = found.get("unbuilt") or " ".join(f"{name}:{verdict[0]}" for name, verdict in found.items())
        print(f"{kind} {short} ({time.monotonic() - start:.0f} s)", flush=True)
        for name, verdict in found.items():
            if name != "unbuilt" and verdict[0] != "right":
                print(f"    {name}: {verdict[1]}", flush=True)

    if not options.kinds:
        write(options.table, done)


def write(path: Path, done: dict[str, dict[str, Any]]) -> None:
    """Writes the table of supported students, with the reasons for rejections."""
    import transformers

    built = {kind: entry for kind, entry in sorted(done.items()) if "unbuilt" not in entry["found"]}
    verdicts = [[found[0] for found in entry["found"].values()] for entry in built.values()]
    sound = sum(set(of_kind) <= {"right", "refused", "none"} for of_kind in verdicts)
    right = sum(set(of_kind) <= {"right", "none"} for of_kind in verdicts)
    lines = [
        "# Supported students",
        "",
        f"Every causal language model type of transformers {transformers.__version__} for which a small random model",
        f"can be built: {len(built)} of {len(done)}. Of these, {right} are correct in every check and {sound - right}",
        "are rejected by name in at least one.",
        "",
        "Each value is compared with plain autograd on the model's own logits, in float32, one sample at a time.",
        'Samples are scored alone and in a padded batch. "yes": correct. "no": rejected with a ValueError that gives',
        'the reason (below). "-": unsupported by the model or PEFT. LoRA is on every linear layer that PEFT supports.',
        "`make conformance` writes this page.",
        "",
        "| type | class | " + " | ".join(check.TITLES.values()) + " |",
        "|---|---|" + "---|" * len(check.TITLES),
    ]
    words = {"right": "yes", "refused": "no", "none": "-", "wrong": "WRONG", "raw": "RAISES"}
    reasons: dict[str, dict[str, list[str]]] = {}
    for kind, entry in built.items():
        found = entry["found"]
        cells = [words[found[name][0]] if name in found else "-" for name in check.TITLES]
        lines.append(f"| `{kind}` | {entry['class']} | " + " | ".join(cells) + " |")
        for name, (verdict, reason) in found.items():
            if verdict in ("refused", "wrong", "raw"):
                reasons.setdefault(reason.splitlines()[0], {}).setdefault(kind, []).append(check.TITLES[name])
    lines += ["", "## Rejected", ""]
    for reason, kinds in sorted(reasons.items()):
        every = len(check.TITLES)
        named = (f"`{k}` ({'every check' if len(of_k) == every else '; '.join(of_k)})" for k, of_k in kinds.items())
        lines.append(f"- {', '.join(named)}: {reason}")
    lines += ["", "## Not tested", "", "No small model of these can be built, or it needs a missing package:", ""]
    lines += [", ".join(f"`{kind}`" for kind, entry in sorted(done.items()) if "unbuilt" in entry["found"]) + "."]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
