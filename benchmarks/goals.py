"""What the benchmarks are to show: how many times as long as ours the fastest peer of the same precision must take.

One place for the numbers: `python -m benchmarks.render` sets them beside what was measured.
"""

from __future__ import annotations

from typing import Any

#: (group, precision, threads, utterances) -> least ratio.  None stands for any value.
GOALS: dict[tuple[str, str | None, int | None, int | None], float] = {
    ("mdscm-published", "float32", 1, 1): 1.05,
    ("mdscm-published", "float32", 2, 1): 1.2,
    ("mdscm-published", "bf16", 1, 1): 1.15,
    ("mdscm-published", "bf16", 2, 1): 1.5,
    ("mdscm-published", "int8", 1, 1): 1.4,
    ("mdscm-published", "int8", 2, 1): 1.7,
    ("mdscm-published", "float32", 1, 16): 1.0,
    ("mdscm-published", "float32", 2, 16): 1.15,
    ("mdscm-published", "bf16", 1, 16): 1.1,
    ("mdscm-published", "bf16", 2, 16): 1.2,
    ("mdscm-published", "int8", 1, 16): 1.3,
    ("mdscm-published", "int8", 2, 16): 1.4,
    ("resnet18", None, 1, None): 1.0,
    ("resnet18", None, 2, None): 1.1,
    ("log-mel", None, None, None): 3.0,
    ("whole way", None, None, None): 3.0,
    ("training-eager", None, 2, None): 1.6,
    ("training-compile", None, 2, None): 1.2,
}
#: Of a fresh process: seconds from the import to the first result of a 3 s file, and peak resident memory.
START_SECONDS, START_MB = 0.6, 200.0
#: Peak memory of a training step, as a share of PyTorch eager's.
TRAINING_MEMORY = 0.6
#: On a GPU, 32 utterances of 5 clips (`benchmarks/gpu_check.sh`): least ratios, and the largest share of memory.
GPU_GOALS = {
    "step over eager AMP": 3.0,
    "step over torch.compile": 1.5,
    "depthwise and pointwise over cuDNN": 3.0,
    "peak memory as a share of eager's": 0.5,
}
#: On a GPU, the published network in bf16: most microseconds, least ratios, least clips a second; its front end.
GPU_ENGINE_GOALS = {
    "one utterance, us": 40.0,
    "one utterance over torch.compile": 3.0,
    "4.5 s of samples on the device, us": 50.0,
    "log-mel over torchaudio": 10.0,
    "1025 clips, clips/s": 1.1e6,
    "1025 clips over torch.compile": 2.0,
    "depthwise and pointwise block over cuDNN": 3.7,
    "depthwise and pointwise block over Inductor": 2.0,
}


def goal(facts: dict[str, Any]) -> float | None:
    """The goal of a case, that of the most specific key; None where there is none."""
    given = tuple(facts.get(name) for name in ("group", "precision", "threads", "utterances"))
    matching = {
        sum(k is not None for k in key): value
        for key, value in GOALS.items()
        if all(k is None or k == g for k, g in zip(key, given))
    }
    return matching[max(matching)] if matching else None
