"""The reference computes what the published system computes."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch

from avser_fast import reference
from avser_fast.av4ser import load_av4ser
from avser_fast.testing import assert_close

KINDS = {
    "mdscm_w40": "mdscm",
    "mdscm_domain_w40": "avre-mdscm",
    "avre_resnet18_c1": "avre-resnet18",
    "fusion_lstm": "fusion",
}


def test_every_case_is_covered() -> None:
    assert sorted(KINDS) == sorted(golden.cases())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", KINDS)
def test_published_network(name: str, dtype: torch.dtype, tolerance: float) -> None:
    state, inputs, expected = golden.case(name)
    kind, module = load_av4ser(state)
    assert kind == KINDS[name]
    with torch.inference_mode():
        outputs = list(module.to(dtype)(*(torch.from_numpy(x).to(dtype) for x in inputs)))
    if name == "mdscm_domain_w40":  # the published encoder returns probabilities, ours logits whatever the body
        outputs[0] = outputs[0].softmax(-1)
    assert len(outputs) == len(expected)
    for i, (output, truth) in enumerate(zip(outputs, expected)):
        assert output.dtype == dtype
        assert_close(output, truth, tolerance, f"{name} output {i}")


def test_front_end() -> None:
    arrays = golden.front_end()
    lengths = [name.split("/")[1] for name in arrays if name.startswith("wave/")]
    assert lengths
    for n in lengths:
        wave, expected = torch.from_numpy(arrays[f"wave/{n}"]), arrays[f"logfbank/{n}"]
        assert_close(reference.log_mel(wave.double()), expected, 1e-9, f"log_mel of {n} samples, float64")
        assert_close(reference.log_mel(wave), expected, 1e-6, f"log_mel of {n} samples, int16")
        assert_close(reference.log_mel(wave.float()), expected, 1e-6, f"log_mel of {n} samples, float32")


def test_clip_tables() -> None:
    tables = {int(name.split("/")[1]): table for name, table in golden.front_end().items() if name.startswith("clips/")}
    assert tables
    for frames, expected in tables.items():
        table, valid = reference.clip_table(frames, 5, 224, "published")
        np.testing.assert_array_equal(table.numpy(), expected, err_msg=f"{frames} frames")
        assert valid.all()
