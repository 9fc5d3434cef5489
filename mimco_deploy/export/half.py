"""An fp32 graph → fp16 or bf16, with every type in the graph itself.

Nothing is left to a runtime's own idea of mixed precision: TensorRT 11 has none, and where others guess, a ViT's
softmax and norms overflow. Products and what lies between them are in the half type; softmax, norms and means, and with
the last of them L2, are in fp32 behind Casts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Half = Literal["fp16", "bf16"]
TYPES: dict[Half, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
"""Where an fp32 tensor becomes half: what GPUs have units for."""
IN_FP32 = frozenset(
    {
        *("Softmax", "LayerNormalization", "GroupNormalization", "InstanceNormalization", "LpNormalization"),
        *("ReduceMean", "ReduceSum", "ReduceL2", "GlobalAveragePool"),
    }
)
"""Sums over many terms, and exponentials."""


def to_half(model: onnx.ModelProto, precision: Half) -> onnx.ModelProto:
    """Retype a graph.

    Args:
        model: fp32, as `convert` makes it: inputs and outputs keep their types.
        precision: which half.

    Returns:
        A new graph; every other operator than those of `PRODUCTS` and `IN_FP32` works in the type that reaches it, but
        for inputs that ONNX has in fp32 alone, such as the scales of a Resize.
    """
    typed = _Retyping(onnx.shape_inference.infer_shapes(model), TYPES[precision])
    return typed.run()


def in_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers on hardware without the half type: each operator computes in fp32 and is then rounded.

    Args:
        model: of `to_half`. Weights are those of the file, so damage to it shows.

    Returns:
        A graph for any runtime. It differs from a GPU by the order of sums, which there are in fp32 as well.
    """
    halves = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    inferred = onnx.shape_inference.infer_shapes(model)
    types = _types_of(inferred)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        rounded = [name for name in node.output if types.get(name) in halves]
        for number, name in enumerate(copy.output):
            if name in rounded:
                copy.output[number] = f"{name}.exact"
        for attribute in copy.attribute:
            if attribute.name == "to" and attribute.i in halves:
                attribute.i = TensorProto.FLOAT
        nodes.append(copy)
        for name in rounded:
            nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=types[name]))
            nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    weights = [
        numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        if tensor.data_type in halves
        else tensor
        for tensor in model.graph.initializer
    ]
    return _rebuilt(model, nodes, weights)


@dataclass
class _Retyping:
    """One pass over the nodes, which ONNX keeps in an order in which everything is made before it is used."""

    model: onnx.ModelProto
    half: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, onnx.TensorProto] = field(default_factory=dict)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)
    """Tensor → the type that it has by now."""
    normalising: set[str] = field(default_factory=set)
    """Tensors that come of an L2 norm: what they divide is divided in fp32."""

    def run(self) -> onnx.ModelProto:
        graph = self.model.graph
        before = _types_of(self.model)
        self.constants.update({tensor.name: tensor for tensor in graph.initializer})
        self.now.update(before)
        opset = next(entry.version for entry in self.model.opset_import if entry.domain == "")
        for node in graph.node:
            floats = [name for name in node.input if before.get(name) == TensorProto.FLOAT]
            if node.op_type == "Cast":  # says its own type
                self.nodes.append(node)
                continue
            kind = self._type_for(node, floats, opset)
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for number, name in enumerate(node.input):
                if name in floats:
                    copy.input[number] = self._as(
                        name, kind if _takes(node, number, kind, opset) else TensorProto.FLOAT
                    )
            self.nodes.append(copy)
            self.now.update({name: kind for name in node.output if before.get(name) == TensorProto.FLOAT})
            if node.op_type == "ReduceL2" or self.normalising & set(node.input):
                self.normalising.update(node.output)
        for output in graph.output:
            if self.now[output.name] != TensorProto.FLOAT:
                self._give_out_fp32(output.name)
        used = {name for node in self.nodes for name in node.input}
        weights = [tensor for name, tensor in {**self.constants, **self.weights}.items() if name in used]
        return _rebuilt(self.model, self.nodes, weights)

    def _type_for(self, node: onnx.NodeProto, floats: list[str], opset: int) -> int:
        if (
            not floats
            or node.op_type in IN_FP32
            or not _takes(node, list(node.input).index(floats[0]), self.half, opset)
        ):
            return TensorProto.FLOAT
        if self.normalising & set(floats):
            return TensorProto.FLOAT
        reached = any(self.now[name] == self.half for name in floats if name not in self.constants)
        return self.half if node.op_type in PRODUCTS or reached else TensorProto.FLOAT

    def _as(self, name: str, kind: int) -> str:
        """The name of a tensor in a type; what makes it is added where it is new."""
        if self.now[name] == kind:
            return name
        new = f"{name}.{TensorProto.DataType.Name(kind).lower()}"
        if new not in self.now:
            self.now[new] = kind
            if name in self.constants:
                array = numpy_helper.to_array(self.constants[name])
                with np.errstate(over="ignore"):  # becomes infinite, which no proof lets pass
                    values = array.astype(helper.tensor_dtype_to_np_dtype(kind))
                self.weights[new] = helper.make_tensor(new, kind, array.shape, values.tobytes(), raw=True)
            else:
                self.nodes.append(helper.make_node("Cast", [name], [new], name=f"cast.{new}", to=kind))
        return new

    def _give_out_fp32(self, name: str) -> None:
        inner = f"{name}.half"
        for node in self.nodes:
            for names in (node.input, node.output):
                for number, other in enumerate(names):
                    if other == name:
                        names[number] = inner
        self.nodes.append(helper.make_node("Cast", [inner], [name], to=TensorProto.FLOAT))


def _takes(node: onnx.NodeProto, number: int, kind: int, opset: int) -> bool:
    """Whether ONNX allows a type for an input of an operator; inputs past the last one are more of it."""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    formal = schema.inputs[min(number, len(schema.inputs) - 1)]
    name = f"tensor({TensorProto.DataType.Name(kind).lower()})"
    constraints = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    return name in constraints.get(formal.type_str, ())


def _types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {**types, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def _rebuilt(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], weights: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), model.graph.name, model.graph.input, model.graph.output, list(weights))
    rebuilt = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    onnx.checker.check_model(rebuilt, full_check=True)
    return rebuilt
