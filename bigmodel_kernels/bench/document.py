"""The shape of a benchmark document, in the vocabulary of JSON Schema, and the check of a document against
it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigmodel_kernels import files

_NUMBER = {"type": "number"}
_STRING = {"type": "string"}
_MAYBE_NUMBER = {"type": ["number", "null"]}
_MAYBE_STRING = {"type": ["string", "null"]}


def _object(optional: dict[str, Any] | None = None, /, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": list(properties),
        "additionalProperties": False,
    }


def _map(values: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


_TIMING = _object(
    median_s=_NUMBER,
    min_s=_NUMBER,
    q1_s=_NUMBER,
    q3_s=_NUMBER,
    samples={"type": "integer"},
    calls={"type": "integer"},
)
_CALIBRATION = _object(gemm_flops=_map(_NUMBER), gemm=_map(_TIMING), copy_bytes=_NUMBER, copy=_TIMING)

SCHEMA: dict[str, Any] = _object(
    {
        "interrupted": {"type": "boolean"},  # before all cases were measured
        "peers": {"type": "boolean"},  # with other runtimes (peers.py)
    },
    schema={"type": "integer", "enum": [1]},
    created=_STRING,
    quick={"type": "boolean"},
    budget_s=_NUMBER,
    machine=_object(
        {"runtimes": _map(_MAYBE_STRING)},  # versions of the other runtimes
        device=_STRING,
        cpu=_STRING,
        architecture=_STRING,
        cores={"type": "integer"},
        threads={"type": "integer"},
        isa=_MAYBE_STRING,
        torch_isa=_STRING,
        gpu={
            "type": ["object", "null"],
            "properties": {
                "name": _STRING,
                "memory_bytes": {"type": "integer"},
                "compute_capability": _STRING,
                "cuda": _MAYBE_STRING,
            },
            "required": ["name", "memory_bytes", "compute_capability", "cuda"],
            "additionalProperties": False,
        },
        system=_STRING,
        python=_STRING,
        torch=_STRING,
        transformers=_MAYBE_STRING,
        triton=_MAYBE_STRING,
        bigmodel_kernels=_STRING,
        commit=_MAYBE_STRING,
        load_at_start=_MAYBE_NUMBER,
        other_load=_MAYBE_NUMBER,
    ),
    calibration=_object(start=_CALIBRATION, end=_CALIBRATION),
    trust=_object(trusted={"type": "boolean"}, reasons={"type": "array", "items": _STRING}),
    rows={
        "type": "array",
        "items": _object(
            {
                "peak_bytes": _map(_NUMBER),  # of a call, over what was held before it (memory.py)
                "clock": {"type": "string", "enum": ["calls", "graph"]},  # what the times are of (timing.py)
                "of_peak": _map(_NUMBER),  # operations in a second, as a part of the product's
                "differences": _map(_NUMBER),  # of each from the peer's result
                "disagree": {"type": "array", "items": _STRING},  # too different for their time to count
            },
            suite=_STRING,
            case=_STRING,
            dtype={"type": "string", "enum": ["float32", "bfloat16", "float16"]},
            sizes=_map({}),
            peer=_STRING,
            times=_map(_TIMING),
            speedup=_map(_NUMBER),
            flops=_NUMBER,
            bytes=_NUMBER,
            floor_s=_NUMBER,
            floor_by={"type": "string", "enum": ["compute", "memory"]},
            to_floor=_map(_NUMBER),
            unit=_MAYBE_STRING,
            throughput=_map(_NUMBER),
            max_difference=_MAYBE_NUMBER,
            noisy={"type": "boolean"},
            left_out=_map(_STRING),
        ),
    },
)

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def check(value: Any, schema: dict[str, Any] = SCHEMA, where: str = "document") -> None:
    """Raises ValueError that names the first place where `value` is not as the schema has it."""
    if "type" in schema:
        allowed = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        fits = any(
            isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
            for name in allowed
        )
        if not fits:
            raise ValueError(f"{where} is {value!r}; allowed is {' or '.join(allowed)}")
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"{where} is {value!r}; allowed are {', '.join(map(repr, schema['enum']))}")
    if isinstance(value, dict):
        missing = [name for name in schema.get("required", ()) if name not in value]
        if missing:
            raise ValueError(f"{where} has no {missing[0]!r}; required are {', '.join(schema['required'])}")
        rest = schema.get("additionalProperties", {})
        for name, part in value.items():
            inner = schema.get("properties", {}).get(name, rest)
            if inner is False:
                raise ValueError(f"{where} has {name!r}; allowed are {', '.join(schema['properties'])}")
            check(part, inner, f"{where}.{name}")
    if isinstance(value, list) and "items" in schema:
        for i, part in enumerate(value):
            check(part, schema["items"], f"{where}[{i}]")


def read(path: Path) -> dict[str, Any]:
    """A document from a file, checked."""
    value = json.loads(path.read_text(encoding="utf-8"))
    check(value)
    return value  # type: ignore[no-any-return]


def write(value: dict[str, Any], path: Path) -> None:
    """A document to a file, checked."""
    check(value)
    files.write_json(path, value)
