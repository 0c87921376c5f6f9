"""A tiny folder in the form that onnxruntime-genai's model builder writes, node for node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from adainfer_export.quantise import quantise_blocks

_MS = "com.microsoft"


class _Graph:
    def __init__(self, model: Any, *, quantised: bool) -> None:
        self.weights = {name: t.float().numpy() for name, t in model.state_dict().items()}
        self.config, self.quantised = model.config, quantised
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}

    def op(self, op_type: str, name: str, inputs: list[str], outputs: int = 1, **attributes: Any):
        results = [f"{name}/output_{index}" for index in range(outputs)]
        domain = attributes.pop("domain", "")
        if op_type == "SkipSimplifiedLayerNormalization":
            results[1:3] = ["", ""]
        self.nodes.append(
            helper.make_node(op_type, inputs, results, name=name, domain=domain, **attributes)
        )
        return results if outputs > 1 else results[0]

    def product(self, name: str, value: str, weight: np.ndarray) -> str:
        key = name.strip("/").replace("/", ".")
        if not self.quantised:
            self.initializers[f"{key}.weight"] = np.ascontiguousarray(weight.T)
            return self.op("MatMul", name, [value, f"{key}.weight"])
        made = quantise_blocks(weight, 4, 32)
        self.initializers |= {f"{key}.weight_Q4": made.packed, f"{key}.weight_scales": made.scales}
        rows, columns = weight.shape
        return self.op(
            "MatMulNBits", f"{name}_Q4", [value, f"{key}.weight_Q4", f"{key}.weight_scales"],
            domain=_MS, K=columns, N=rows, bits=4, block_size=32, accuracy_level=0,
        )  # fmt: skip

    def lengths(self) -> tuple[str, str]:
        stem = "/model/attn_mask_reformat/attn_mask_subgraph"
        self.initializers |= {"axis": np.array([1]), "one": np.array([1]), "place": np.array(1)}
        total = self.op("ReduceSum", f"{stem}/ReduceSum", ["attention_mask", "axis"], keepdims=0)
        less = self.op("Sub", f"{stem}/Sub", [total, "one"])
        seqlens = self.op("Cast", f"{stem}/Sub/Cast", [less], to=TensorProto.INT32)
        shape = self.op("Shape", f"{stem}/Shape", ["attention_mask"])
        length = self.op("Gather", f"{stem}/Gather", [shape, "place"], axis=0)
        return seqlens, self.op("Cast", f"{stem}/Gather/Cast", [length], to=TensorProto.INT32)

    def tables(self) -> None:
        config = self.config
        places = np.arange(0, config.head_dim, 2) / config.head_dim
        frequencies = config.rope_parameters["rope_theta"] ** -places
        angles = np.outer(np.arange(config.max_position_embeddings), frequencies)
        self.initializers["cos_cache"] = np.cos(angles).astype(np.float32)
        self.initializers["sin_cache"] = np.sin(angles).astype(np.float32)

    def layer(self, index: int, residual: str, normed: str, lengths: tuple[str, str]):
        """Residual and normed of what comes next."""
        config, stem = self.config, f"/model/layers.{index}"
        part = f"model.layers.{index}"
        query, key, value = (self.weights[f"{part}.self_attn.{kind}_proj.weight"] for kind in "qkv")
        packed = self.product(
            f"{stem}/attn/qkv_proj/MatMul", normed, np.concatenate([query, key, value])
        )
        past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        attention = f"{stem}/attn/GroupQueryAttention/output_0"
        presents = [f"present.{index}.{kind}" for kind in ("key", "value")]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [packed, "", "", *past, *lengths, "cos_cache", "sin_cache"],
                [attention, *presents],
                name=f"{stem}/attn/GroupQueryAttention",
                domain=_MS,
                num_heads=config.num_attention_heads,
                kv_num_heads=config.num_key_value_heads,
                scale=config.head_dim**-0.5,
                do_rotary=1,
                rotary_interleaved=0,
                local_window_size=-1,
                softcap=0.0,
            )
        )
        out = self.product(
            f"{stem}/attn/o_proj/MatMul", attention, self.weights[f"{part}.self_attn.o_proj.weight"]
        )
        residual, normed = self.skip_norm(
            f"{stem}/post_attention_layernorm", residual, out,
            self.weights[f"{part}.post_attention_layernorm.weight"],
        )  # fmt: skip
        gate, up = (
            self.product(
                f"{stem}/mlp/{kind}_proj/MatMul",
                normed,
                self.weights[f"{part}.mlp.{kind}_proj.weight"],
            )
            for kind in ("gate", "up")
        )
        sigmoid = self.op("Sigmoid", f"{stem}/mlp/act_fn/Sigmoid", [gate])
        active = self.op("Mul", f"{stem}/mlp/act_fn/Mul", [gate, sigmoid])
        mixed = self.op("Mul", f"{stem}/mlp/Mul", [active, up])
        down = self.product(
            f"{stem}/mlp/down_proj/MatMul", mixed, self.weights[f"{part}.mlp.down_proj.weight"]
        )
        last = index + 1 == config.num_hidden_layers
        name = "final_norm_layernorm" if last else "input_layernorm"
        weight = "model.norm" if last else f"model.layers.{index + 1}.input_layernorm"
        return self.skip_norm(
            f"/model/layers.{index + 1}/{name}", residual, down, self.weights[f"{weight}.weight"]
        )

    def skip_norm(self, stem: str, residual: str, value: str, weight: np.ndarray):
        key = f"{stem.strip('/').replace('/', '.')}.weight"
        self.initializers[key] = weight
        results = self.op(
            "SkipSimplifiedLayerNormalization", f"{stem}/SkipLayerNorm", [residual, value, key],
            outputs=4, domain=_MS, epsilon=self.config.rms_norm_eps,
        )  # fmt: skip
        return results[3], results[0]


def write_genai_folder(folder: Path, model: Any, *, quantised: bool) -> None:
    """A Llama model of transformers as `model.onnx` with data, and its genai_config.json."""
    config = model.config
    graph = _Graph(model, quantised=quantised)
    lengths = graph.lengths()
    graph.tables()
    graph.initializers["embedding"] = graph.weights["model.embed_tokens.weight"]
    residual = graph.op("Gather", "/model/embed_tokens/Gather", ["embedding", "input_ids"])
    graph.initializers["first_norm"] = graph.weights["model.layers.0.input_layernorm.weight"]
    normed = graph.op(
        "SimplifiedLayerNormalization", "/model/layers.0/input_layernorm/LayerNorm",
        [residual, "first_norm"], axis=-1, epsilon=config.rms_norm_eps, stash_type=1,
    )  # fmt: skip
    for index in range(config.num_hidden_layers):
        residual, normed = graph.layer(index, residual, normed, lengths)
    graph.product("/lm_head/MatMul", normed, graph.weights["lm_head.weight"])
    graph.nodes[-1].output[0] = "logits"
    folder.mkdir()
    onnx.save(
        _model(graph), folder / "model.onnx", save_as_external_data=True,
        location="model.onnx.data", size_threshold=1024,
    )  # fmt: skip
    decoder = {
        "filename": "model.onnx",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
    }
    settings = {
        "type": "llama",
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "eos_token_id": [1],
        "decoder": decoder,
    }
    (folder / "genai_config.json").write_text(json.dumps({"model": settings}))


def _model(graph: _Graph) -> Any:
    config = graph.config

    def tensor(name: str, kind: int, shape: list[int | str]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    cache = ["batch_size", config.num_key_value_heads, "past_length", config.head_dim]
    grown = [*cache[:2], "total_length", config.head_dim]
    inputs = [
        tensor("input_ids", TensorProto.INT64, ["batch_size", "length"]),
        tensor("attention_mask", TensorProto.INT64, ["batch_size", "total_length"]),
    ]
    outputs = [tensor("logits", TensorProto.FLOAT, ["batch_size", "length", config.vocab_size])]
    for index in range(config.num_hidden_layers):
        for kind in ("key", "value"):
            name = f"{index}.{kind}"
            inputs.append(tensor(f"past_key_values.{name}", TensorProto.FLOAT, cache))
            outputs.append(tensor(f"present.{name}", TensorProto.FLOAT, grown))
    initializers = [numpy_helper.from_array(v, n) for n, v in graph.initializers.items()]
    made = helper.make_graph(graph.nodes, "main", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid(_MS, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)
