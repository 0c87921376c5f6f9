"""GPTQ and AWQ checkpoints, packed here from the formats' definitions, value by value."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adainfer_export import ExportRequest, export
from adainfer_export.errors import CheckpointError, UnsupportedError
from adainfer_export.sources import resolve
from adainfer_runtime import Engine

from .. import checkpoints
from ..checkpoints import edit_config, make_checkpoint
from ..reference import reference_logits

PROMPT = [5, 99, 17, 250, 3, 3, 42, 180]
GROUP = 32


def pack_words(values, bits, order=None):
    """`[n, m]` codes to int32 `[n, m*bits/32]`, one at a time; word's place i holds order[i]."""
    per_word = 32 // bits
    order = order or range(per_word)
    words = np.zeros((values.shape[0], values.shape[1] // per_word), np.uint32)
    for row in range(words.shape[0]):
        for column in range(words.shape[1]):
            word = 0
            for place, source in enumerate(order):
                word |= int(values[row, column * per_word + source]) << (bits * place)
            words[row, column] = word
    return torch.from_numpy(words.view(np.int32))


def quantise(weight, bits, group_of, symmetric):
    """Codes `[out, in]`, zeros and scales `[out, groups]`, and the values that they stand for."""
    groups = int(group_of.max()) + 1
    top = 2**bits - 1
    codes = np.zeros(weight.shape, np.int64)
    zeros = np.zeros((weight.shape[0], groups), np.int64)
    scales = np.zeros((weight.shape[0], groups), np.float16)
    for group in range(groups):
        part = weight[:, group_of == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        scale = np.maximum((high - low) / top, 1e-4).astype(np.float16)
        zero = np.full(len(scale), 2 ** (bits - 1)) if symmetric else np.rint(-low / scale)
        zero = np.clip(zero, 1, top).astype(np.int64)
        codes[:, group_of == group] = np.clip(
            np.rint(part / scale[:, None]) + zero[:, None], 0, top
        )
        zeros[:, group], scales[:, group] = zero, scale
    values = (codes - zeros[:, group_of]) * scales[:, group_of].astype(np.float32)
    return codes, zeros, scales, values.astype(np.float32)


def pack_gptq(stem, weight, bits=4, symmetric=True, act_order=False, offset=1, group=GROUP):
    group_of = np.arange(weight.shape[1]) // group
    if act_order:
        group_of = np.random.default_rng(0).permutation(group_of)
    codes, zeros, scales, values = quantise(weight, bits, group_of, symmetric)
    tensors = {
        f"{stem}.qweight": pack_words(codes, bits).T.contiguous(),
        f"{stem}.qzeros": pack_words((zeros - offset).T, bits),
        f"{stem}.scales": torch.from_numpy(scales.T.copy()),
        f"{stem}.g_idx": torch.from_numpy(group_of.astype(np.int32)),
        f"{stem}.bias": torch.zeros(weight.shape[0], dtype=torch.float16),
    }
    return tensors, values


def pack_awq(stem, weight, group=GROUP):
    group_of = np.arange(weight.shape[1]) // group
    codes, zeros, scales, values = quantise(weight, 4, group_of, symmetric=False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        f"{stem}.qweight": pack_words(codes.T, 4, order),
        f"{stem}.qzeros": pack_words(zeros.T, 4, order),
        f"{stem}.scales": torch.from_numpy(scales.T.copy()),
    }
    return tensors, values


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
       "version": "gemm"}  # fmt: skip
# name: quantization_config, how a layer is packed
FORMS = {
    "gptq": (GPTQ, pack_gptq),
    "gptq-asymmetric": (
        {**GPTQ, "sym": False},
        lambda stem, weight: pack_gptq(stem, weight, symmetric=False),
    ),
    "gptq-v2": (
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        lambda stem, weight: pack_gptq(stem, weight, offset=0),
    ),
    "gptq-8-bits": ({**GPTQ, "bits": 8}, lambda stem, weight: pack_gptq(stem, weight, bits=8)),
    "gptq-act-order": (
        {**GPTQ, "desc_act": True},
        lambda stem, weight: pack_gptq(stem, weight, act_order=True),
    ),
    "gptq-one-group": (
        {**GPTQ, "group_size": -1},
        lambda stem, weight: pack_gptq(stem, weight, group=weight.shape[1]),
    ),
    "awq": (AWQ, pack_awq),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Makes a checkpoint of a form, and the float model of what its codes stand for."""
    made = {}

    def make(form):
        if form in made:
            return made[form]
        settings, pack = FORMS[form]
        folder = tmp_path_factory.mktemp("packed") / form
        checkpoints.VARIANTS["short"] = ("llama", {"num_hidden_layers": 2})
        model = make_checkpoint(folder, "short")
        del checkpoints.VARIANTS["short"]
        for parameter in model.parameters():  # what the checkpoint stores as f16
            parameter.data = parameter.data.half().float()
        state = load_file(folder / "model.safetensors")
        for name in [name for name in state if "_proj" in name]:
            tensors, values = pack(name.removesuffix(".weight"), state.pop(name).numpy())
            state |= tensors
            model.state_dict()[name].copy_(torch.from_numpy(values))
        save_file({name: tensor.half() if tensor.is_floating_point() else tensor
                   for name, tensor in state.items()}, folder / "model.safetensors")  # fmt: skip
        edit_config(folder, quantization_config=settings)
        made[form] = folder, model
        return made[form]

    return make


def check_logits(out, model, tolerance):
    engine = Engine.load(out)
    session = engine.session()
    session.extend(PROMPT)
    session.complete()
    expected = reference_logits(model, PROMPT)
    logits = engine.backend.probe_logits(session.hidden())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
def test_values_are_what_the_codes_stand_for(packed, form):
    folder, model = packed(form)
    checkpoint = resolve(str(folder))
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        assert checkpoint.shape(name) == values.shape
        found = checkpoint.read(name)
        np.testing.assert_allclose(found, values, rtol=1e-6, atol=1e-7)
        some = slice(3, values.shape[0] - 5)
        np.testing.assert_array_equal(checkpoint.read(name, some), found[some])


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("gptq-v2", {**GPTQ, "format": "gptq_v2"}),
        # The older key decides, as in transformers.
        ("gptq-v2", {**GPTQ, "checkpoint_format": "gptq_v2", "format": "gptq"}),
        ("gptq", {**GPTQ, "format": "GPTQ", "bits": "4"}),
    ],
)
def test_other_ways_to_say_the_same(packed, tmp_path, form, settings):
    folder, model = packed(form)
    shutil.copytree(folder, tmp_path / "copy")
    edit_config(tmp_path / "copy", quantization_config=settings)
    name = "model.layers.1.mlp.down_proj.weight"
    found = resolve(str(tmp_path / "copy")).read(name)
    np.testing.assert_allclose(found, model.state_dict()[name].numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["gptq-act-order", "awq"])
def test_dequantised_export(packed, form, tmp_path):
    folder, model = packed(form)
    export(ExportRequest(str(folder), tmp_path / "out", precision="fp32"))
    check_logits(tmp_path / "out", model, 3e-5)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "gptq-act-order"])
def test_kept_export(packed, form, tmp_path):
    folder, model = packed(form)
    export(ExportRequest(str(folder), tmp_path / "out", precision="keep"))
    check_logits(tmp_path / "out", model, 3e-5)
    report = json.loads((tmp_path / "out" / "reports" / "quantisation.json").read_text())
    assert {m["block_size"] for m in report["matrices"]} <= {32, 64}
    assert len(report["matrices"]) == 2 * 4  # qkv, o, gate and up, down


def test_columns_in_an_order_of_their_own_cannot_be_kept(packed, tmp_path):
    folder, _ = packed("gptq-act-order")
    with pytest.raises(UnsupportedError, match=r"act-order.*cannot be kept; export with"):
        export(ExportRequest(str(folder), tmp_path / "out", precision="keep"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised with 'bitsandbytes', which is not supported"),
        ({"quant_method": "compressed-tensors"}, "quantised with 'compressed-tensors'"),
        ({**GPTQ, "bits": 3}, "gptq with 3 bits is not supported"),
        (
            {**AWQ, "version": "gemv"},
            r"awq with version 'gemv' is not supported \(supported: gemm\)",
        ),
        ({**AWQ, "version": None, "format": "gemv"}, "awq with format 'gemv' is not supported"),
        ({**GPTQ, "bits": "three"}, "gptq with three bits is not supported"),
        (
            {**GPTQ, "checkpoint_format": "marlin"},
            r"gptq with checkpoint_format 'marlin' is not supported \(supported: gptq, gptq_v2\)",
        ),
        ({**GPTQ, "format": "bitblas"}, "gptq with format 'bitblas' is not supported"),
    ],
)
def test_other_methods_are_named(checkpoint, tmp_path, settings, message):
    edit_config(checkpoint, quantization_config=settings)
    with pytest.raises(UnsupportedError, match=message) as caught:
        export(ExportRequest(str(checkpoint), tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("g_idx", lambda t: t + 100, "does not name one of 2 groups for each of 64 columns"),
        ("scales", lambda t: t[:, :-1].contiguous(), "the checkpoint is damaged"),
        ("qzeros", lambda t: t.float(), "has dtype F32, expected I32"),
    ],
)
def test_damaged_fields(packed, tmp_path, field, change, message):
    folder, _ = packed("gptq")
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    state = load_file(path)
    name = f"model.layers.1.self_attn.o_proj.{field}"
    state[name] = change(state[name])
    save_file(state, path)
    with pytest.raises(CheckpointError, match=message):
        export(ExportRequest(str(tmp_path / "copy"), tmp_path / "out", precision="keep"))
    assert not (tmp_path / "out").exists()
