"""Runs the tests of one raw operator under libFuzzer, which is guided by the C++ code that inputs reach.

    python tests/fuzz/guided.py OPERATOR [OPTIONS OF LIBFUZZER] [CORPUS]
    python tests/fuzz/guided.py OPERATOR --show INPUT...   prints the call that each makes, and makes it

`make fuzz` (tools/fuzz.py) starts it with what it needs: libFuzzer and the runtime of the sanitizers loaded
before Python, and BIGMODEL_TEST_LIBRARY, the kernels with counters of what they reach.

An input is the bytes from which hypothesis draws a test's choices (`fuzz_one_input`). Its first choice is
between a valid and a spoiled call. What an input lacks is zeros, the first of each choice: so none is too
short, and libFuzzer can begin with nothing and keep inputs small.
"""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 512  # of an input; calls draw from some dozens to some hundreds
TESTS = Path(__file__).resolve().parents[1]

Target = Callable[[bytes], object]


def padded(target: Target) -> Target:
    return lambda data: target(data + bytes(MOST_BYTES - len(data)))


def libfuzzer() -> ctypes.CDLL:
    driver = ctypes.CDLL(None)
    if not hasattr(driver, "LLVMFuzzerRunDriver"):
        raise SystemExit("libFuzzer is not there: `make fuzz` starts this")
    return driver


def fuzz(driver: ctypes.CDLL, target: Target, options: list[str]) -> NoReturn:
    """Ends the process: with 0 when the time is over, with another code after a fault."""

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_uint8), ctypes.c_size_t)
    def run(data: Any, size: int) -> int:
        try:
            drawn = target(ctypes.string_at(data, size))
        except BaseException:  # a test that fails is a fault as much as what a sanitizer sees
            traceback.print_exc()
            sys.stderr.flush()
            os.abort()  # libFuzzer takes the signal, and keeps the input
        if isinstance(drawn, bytes):  # by hypothesis, from the input and the zeros behind it
            driver.LLVMFuzzerBytesDrawn(data, ctypes.c_size_t(size), ctypes.c_size_t(len(drawn)))
        return 0

    arguments = [sys.argv[0], f"-max_len={MOST_BYTES}", "-len_control=0", *options]
    values = (ctypes.c_char_p * (len(arguments) + 1))(*(argument.encode() for argument in arguments), None)
    count = ctypes.c_int(len(arguments))
    pointer = ctypes.cast(values, ctypes.POINTER(ctypes.c_char_p))
    sys.exit(driver.LLVMFuzzerRunDriver(ctypes.byref(count), ctypes.byref(pointer), run))


def described(value: Any) -> str:
    """An argument in one line; tensors by what they look like."""
    import torch

    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if value.layout != torch.strided or value.device.type != "cpu":
            return f"{kind}{list(value.shape)} {value.layout} on {value.device}"
        plain = "" if value.is_contiguous() else f" strides {value.stride()}"
        few = f" = {value.tolist()}" if value.numel() <= 8 else ""
        return f"{kind}{list(value.shape)}{plain}{few}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    return repr(value)[:200]


def show_calls() -> None:
    """From here on each call is printed before it is made."""
    import test_raw_ops

    call = test_raw_ops.call

    def shown(op: str, arguments: dict[str, Any]) -> Any:
        print(f"{op}, by the kernels for {test_raw_ops.native.cpu_isa()}:")
        for name, value in arguments.items():
            print(f"    {name}: {described(value)}")
        sys.stdout.flush()
        return call(op, arguments)

    test_raw_ops.call = shown


def operator_target(op: str) -> Target:
    """The operator's tests of valid and of spoiled calls, as one function of bytes."""
    sys.path.insert(0, str(TESTS))
    import conftest  # noqa: F401  chooses the library, and hypothesis's settings
    import test_raw_ops
    import torch
    from hypothesis import given, settings
    from hypothesis import strategies as st

    torch.set_num_threads(1)

    @settings(database=None)
    @given(spoiled=st.booleans(), data=st.data())
    def either(spoiled: bool, data: st.DataObject) -> None:
        test = test_raw_ops.test_spoiled_calls if spoiled else test_raw_ops.test_valid_calls
        test.hypothesis.inner_test(op, data)

    return padded(either.hypothesis.fuzz_one_input)


def main(arguments: list[str]) -> None:
    op, options = arguments[0], arguments[1:]
    if options[:1] == ["--show"]:
        target = operator_target(op)
        show_calls()
        for file in options[1:]:
            target(Path(file).read_bytes())
    else:
        fuzz(libfuzzer(), operator_target(op), options)


if __name__ == "__main__":
    main(sys.argv[1:])
