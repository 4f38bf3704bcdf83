"""Compiled loops that add a stored tensor to weights in one pass, without decoding it first.

Each computes `arithmetic`'s reference bit for bit: product and sum are two roundings of float32
(LLVM contracts nothing here, since numba is not asked for fast mathematics), the result is rounded
once, to nearest and ties to even. bfloat16 goes in and out as its bits, uint16: numba has no such
type. A loop releases Python's lock, and allocates no
more than blocks of 4,096 elements.

numba comes with vLLM, which pins it. Without it, everything is done block by block with PyTorch.
Compiled code is kept beside this file, or in the user's cache folder where this one can't be
written to, or nowhere where neither can.
"""

# numba compiles these: types of arguments are those of the call.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
# ruff: noqa: ANN001, ANN201, ANN202, ARG001, ARG005, PLR0917

from __future__ import annotations

import numpy as np
from llvmlite import ir
from llvmlite.binding import ffi
from numba import njit, types
from numba.extending import intrinsic, overload

__all__ = [
    "add_bitmap",
    "add_dense",
    "add_gaps",
    "add_int8",
    "count_bits",
    "count_steps",
    "place_bitmap",
    "place_gaps",
]

# vLLM 0.32 takes `vars()` of every object in every module when an engine starts. Of this one, whose
# attributes are made as they are asked for, it would get what is no dictionary, and fail: a second
# engine in one process, after a fused load.
if isinstance(functions := getattr(ffi.lib, "_fntab", None), dict):
    functions.setdefault("__dict__", {})

BLOCK = np.uintp(4096)
"""Elements that are computed before they are stored: they stay in the first-level cache."""

VECTOR_BYTES = np.uintp(32)
"""What is stored at a time past the caches."""

ONE = np.uintp(1)
ZERO = np.uintp(0)
WORD = np.uintp(64)
SHIFT = np.uint32(16)
NEGATIVE_ZERO = np.uint16(0x8000)


def _compiled(function):
    """Have a loop compiled at its first call for each combination of types."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba's word for "no folder to keep it in"
        return njit(nogil=True)(function)


@intrinsic
def _float_of(context, bits):
    """Read 32 bits as a float32."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


def _nearest(builder, bits):
    """Round the bits of a float32 to those of bfloat16, to nearest, ties to even.

    Written out, since numba would compute with 64 bits: half as many elements at a time.
    """
    word = ir.IntType(32)
    is_odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    carried = builder.add(builder.add(bits, word(0x7FFF)), is_odd)
    return builder.lshr(carried, word(16))


@intrinsic
def _rounded(context, total):
    """Round float32 to the bits of bfloat16; NaN stays NaN."""

    def generate(_context, builder, _signature, arguments):
        (number,), word = arguments, ir.IntType(32)
        nearest = _nearest(builder, builder.bitcast(number, word))
        is_nan = builder.fcmp_unordered("uno", number, number)
        return builder.trunc(builder.select(is_nan, word(0x7FC0), nearest), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _rounded_from_bits(context, total):
    """Round as `_rounded`, where a NaN can only have come from bfloat16: then it stays one."""

    def generate(_context, builder, _signature, arguments):
        nearest = _nearest(builder, builder.bitcast(arguments[0], ir.IntType(32)))
        return builder.trunc(nearest, ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _lowest_bit(context, word):
    """Number the lowest bit that is set; the word is not zero."""

    def generate(_context, builder, _signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def _bit_count(context, word):
    """Count the bits that are set."""

    def generate(_context, builder, _signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


def _wide(number):
    """Widen a weight to float32; replaced by the overload below."""


@overload(_wide)
def _overload_wide(number):
    if number == types.uint16:
        return lambda number: _float_of(np.uint32(number) << SHIFT)
    return lambda number: number


def _narrow(out, total):
    """Round float32 to what an array holds; replaced by the overload below."""


@overload(_narrow)
def _overload_narrow(out, total):
    if out.dtype == types.uint16:
        return lambda out, total: _rounded(total)
    return lambda out, total: total


def _narrow_sum(out, total, values):
    """Round a sum of weights like `out`'s and values; replaced by the overload below."""


@overload(_narrow_sum)
def _overload_narrow_sum(out, total, values):
    if out.dtype == types.uint16 and values.dtype == types.uint16:
        return lambda out, total, values: _rounded_from_bits(total)
    return lambda out, total, values: _narrow(out, total)


def _plus_zero(weight, zero, is_positive):
    """Add alpha * 0 to a weight; replaced by the overload below."""


@overload(_plus_zero)
def _overload_plus_zero(weight, zero, is_positive):
    if weight == types.uint16:
        # All that a sum with zero changes is -0.0, and only +0.0 does.
        return lambda weight, zero, is_positive: (
            np.uint16(0) if is_positive and weight == NEGATIVE_ZERO else weight
        )
    return lambda weight, zero, is_positive: weight + zero


@intrinsic
def _stream_vector(context, out, at, block, first):
    """Copy `VECTOR_BYTES` from block[first] to out[at], which is aligned, past the caches.

    An ordinary store first reads the line that it is about to overwrite: a third of what moves when
    a tensor is copied.
    """

    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(8), int(VECTOR_BYTES))

        def pointer(array, index):
            data = context.make_array(signature.args[array])(
                context, builder, arguments[array]
            ).data
            place = builder.gep(data, [arguments[index]])
            return builder.bitcast(place, vector.as_pointer())

        load = builder.load(pointer(2, 3))
        load.align = 2
        store = builder.store(load, pointer(0, 1))
        store.align = int(VECTOR_BYTES)
        one = ir.Constant(ir.IntType(32), 1)
        store.set_metadata("nontemporal", builder.module.add_metadata([one]))
        return context.get_dummy_value()

    return types.void(out, types.uintp, block, types.uintp), generate


@intrinsic
def _fence(context):
    """Have all that was stored past the caches seen by other threads before anything later."""

    def generate(context, builder, _signature, _arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@njit
def _store(block, out, first, count):
    """Write a block's first elements to out[first:]."""
    size = np.uintp(out.itemsize)
    each = VECTOR_BYTES // size
    beyond = (np.uintp(out.ctypes.data) + first * size) % VECTOR_BYTES
    head = min(((VECTOR_BYTES - beyond) % VECTOR_BYTES) // size, count)
    for i in range(head):
        out[first + i] = block[i]
    done = head
    while done + each <= count:
        _stream_vector(out, first + done, block, done)
        done += each
    for i in range(done, count):
        out[first + i] = block[i]


@_compiled
def add_dense(theta, out, values, alpha):
    """Write theta + alpha * values, element by element."""
    block = np.empty(BLOCK, out.dtype)
    size = np.uintp(out.size)
    for first in range(ZERO, size, BLOCK):
        count = min(BLOCK, size - first)
        for i in range(count):
            total = _wide(theta[first + i]) + alpha * _wide(values[first + i])
            block[i] = _narrow(block, total)
        _store(block, out, first, count)
    _fence()


@_compiled
def add_int8(theta, out, values, scales, place, window, alpha):
    """Write theta + alpha * (scale * byte) to a window.

    `place`: the window's first element in the whole tensor, and the tensor's row length. `window`:
    rows, columns, and the strides of rows in `values` and theta (both from the window's first
    element), and in `out`.
    """
    block = np.empty(BLOCK, out.dtype)
    start, length = place
    rows, columns, stride, out_stride = window
    for row in range(rows):
        inner = row * stride
        outer = row * out_stride
        left = columns
        while left > ZERO:
            element = start + inner
            scale = scales[element // length]
            count = min(length - element % length, left, BLOCK)
            for i in range(count):
                number = scale * np.float32(np.int32(values[inner + i]))
                block[i] = _narrow(block, _wide(theta[inner + i]) + alpha * number)
            _store(block, out, outer, count)
            inner += count
            outer += count
            left -= count
    _fence()


@_compiled
def count_steps(gaps, sums, values_each):
    """Sum up the elements that each chunk of gaps spans: its zeros and its values."""
    for chunk in range(np.uintp(sums.size)):
        first = chunk * values_each
        last = min(first + values_each, np.uintp(gaps.size))
        total = last - first
        for i in range(first, last):
            total += np.uintp(gaps[i])
        sums[chunk] = total


@_compiled
def count_bits(words, counts, words_each):
    """Count the bits that are set in each chunk of a bitmap."""
    for chunk in range(np.uintp(counts.size)):
        first = chunk * words_each
        last = min(first + words_each, np.uintp(words.size))
        total = ZERO
        for i in range(first, last):
            total += np.uintp(_bit_count(words[i]))
        counts[chunk] = total


@_compiled
def add_gaps(theta, out, gaps, values, place, stretch, alpha):
    """Write theta + alpha * v to a stretch of elements.

    `place`: the first value's number, one past the last one's, and the element at which the first
    one's gap begins. `stretch`: the first element and one past the last; theta and `out` begin with
    the first.
    """
    block = np.empty(BLOCK, out.dtype)
    value, last, position = place
    low, high = stretch
    zero = alpha * np.float32(0)
    is_positive = alpha > 0
    while value < last and position + np.uintp(gaps[value]) < low:
        position += np.uintp(gaps[value]) + ONE
        value += ONE
    for begin in range(low, high, BLOCK):
        size = min(BLOCK, high - begin)
        skipped = begin - low
        for i in range(size):
            block[i] = _plus_zero(theta[skipped + i], zero, is_positive)
        # Counted from the block's first element. Before it is added to a gap it may be less than
        # zero, and then wraps.
        at = position - begin
        while value < last:
            behind = at + np.uintp(gaps[value])
            if behind >= size:
                break
            total = _wide(theta[skipped + behind]) + alpha * _wide(values[value])
            block[behind] = _narrow_sum(block, total, values)
            at = behind + ONE
            value += ONE
        position = at + begin
        _store(block, out, skipped, size)
    _fence()


@_compiled
def place_gaps(out, gaps, values, place, stretch):
    """Write v to a stretch of zeros; the arguments are those of `add_gaps`."""
    value, last, position = place
    low, high = stretch
    for i in range(value, last):
        position += np.uintp(gaps[i])
        if position >= high:
            return
        if position >= low:
            out[position - low] = values[i]
        position += ONE


@_compiled
def add_bitmap(theta, out, words, values, place, stretch, alpha):
    """Write theta + alpha * v to a stretch of elements.

    `place`: the first word's number, and that of its first value. `stretch`: as for `add_gaps`.
    """
    block = np.empty(BLOCK, out.dtype)
    spread = np.empty(BLOCK, values.dtype)
    first, value = place
    low, high = stretch
    for number in range(first, low // WORD):
        value += np.uintp(_bit_count(words[number]))
    begin = low
    while begin < high:
        # Blocks end where words do: so many values are there that most elements have one.
        end = min((begin // BLOCK + ONE) * BLOCK, high)
        count = end - begin
        for i in range(count):
            spread[i] = 0
        for number in range(begin // WORD, (end + WORD - ONE) // WORD):
            word = words[number]
            while word != np.uint64(0):
                at = number * WORD + np.uintp(_lowest_bit(word))
                word &= word - np.uint64(1)
                if at >= begin and at < end:
                    spread[at - begin] = values[value]
                value += ONE
        skipped = begin - low
        for i in range(count):
            total = _wide(theta[skipped + i]) + alpha * _wide(spread[i])
            block[i] = _narrow(block, total)
        _store(block, out, skipped, count)
        begin = end
    _fence()


@_compiled
def place_bitmap(out, words, values, place, stretch):
    """Write v to a stretch of zeros; the arguments are those of `add_bitmap`."""
    first, value = place
    low, high = stretch
    for number in range(first, (high + WORD - ONE) // WORD):
        start = number * WORD
        word = words[number]
        while word != np.uint64(0):
            at = start + np.uintp(_lowest_bit(word))
            word &= word - np.uint64(1)
            if at >= low and at < high:
                out[at - low] = values[value]
            value += ONE
