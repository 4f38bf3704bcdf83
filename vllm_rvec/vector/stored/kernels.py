"""Compiled loops that add a stored tensor to weights in one pass, without decoding it first.

Each computes `arithmetic`'s reference bit for bit: product and sum are two roundings of float32
(LLVM contracts nothing here, since numba is not asked for fast mathematics), the result is rounded
once, to nearest and ties to even. bfloat16 goes in and out as its bits, uint16: numba has no such
type. A loop releases Python's lock, and allocates nothing.

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

BLOCK_VALUES = 2048
"""Values whose neighbourhood is copied, and then added to, while it is in the first-level cache."""

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


@intrinsic
def _bits_of(context, number):
    """Read a float32 as 32 bits."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


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


@njit
def _rounded(total):
    """Round float32 to the bits of bfloat16, to nearest, ties to even; NaN stays NaN."""
    bits = _bits_of(total)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> SHIFT) & np.uint32(1))) >> SHIFT
    return np.uint16(0x7FC0) if total != total else np.uint16(nearest)  # noqa: PLR0124


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


@njit
def _pass_on(theta, out, first, last, zero, is_positive):
    """Write theta + alpha * 0 to a stretch."""
    for i in range(first, last):
        out[i] = _plus_zero(theta[i], zero, is_positive)


@_compiled
def add_dense(theta, out, values, alpha):
    """Write theta + alpha * values, element by element."""
    for i in range(np.uintp(out.size)):
        out[i] = _narrow(out, _wide(theta[i]) + alpha * _wide(values[i]))


@_compiled
def add_int8(theta, out, values, scales, place, window, alpha):
    """Write theta + alpha * (scale * byte) to a window.

    `place`: the window's first element in the whole tensor, the tensor's row length, and the
    window's first row in `scales`' own count. `window`: rows, columns, and the strides of rows in
    `values` and theta (both from the window's first element), and in `out`.
    """
    start, length = place
    rows, columns, stride, out_stride = window
    for row in range(rows):
        inner = row * stride
        outer = row * out_stride
        left = columns
        while left > ZERO:
            element = start + inner
            scale = scales[element // length]
            count = length - element % length
            count = min(count, left)
            for i in range(count):
                number = scale * np.float32(np.int32(values[inner + i]))
                out[outer + i] = _narrow(out, _wide(theta[inner + i]) + alpha * number)
            inner += count
            outer += count
            left -= count


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

    `place`: the first value's number, the last one's, and the element at which the first one's gap
    begins. `stretch`: first and last element, which are 0 and so on in theta and `out`.
    """
    value, last, position = place
    low, high = stretch
    zero = alpha * np.float32(0)
    is_positive = alpha > 0
    done = low
    while value < last and position < high:
        until = min(value + np.uintp(BLOCK_VALUES), last)
        end = position + (until - value)
        for i in range(value, until):
            end += np.uintp(gaps[i])
        stop = min(end, high)
        if stop > done:
            _pass_on(theta, out, done - low, stop - low, zero, is_positive)
            done = stop
        if position >= low and end <= high:
            position -= low
            for i in range(value, until):
                position += np.uintp(gaps[i])
                total = _wide(theta[position]) + alpha * _wide(values[i])
                out[position] = _narrow(out, total)
                position += ONE
        else:
            for i in range(value, until):
                position += np.uintp(gaps[i])
                if position >= low and position < high:
                    at = position - low
                    out[at] = _narrow(out, _wide(theta[at]) + alpha * _wide(values[i]))
                position += ONE
        position = end
        value = until
    if high > done:
        _pass_on(theta, out, done - low, high - low, zero, is_positive)


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

    `place`: the first word's number, the last one's, and the number of the first one's first value.
    `stretch`: as for `add_gaps`.
    """
    first, last, value = place
    low, high = stretch
    zero = alpha * np.float32(0)
    is_positive = alpha > 0
    for number in range(first, last):
        start = number * WORD
        begin = max(start, low)
        end = min(start + WORD, high)
        if end > begin:
            _pass_on(theta, out, begin - low, end - low, zero, is_positive)
        word = words[number]
        while word != np.uint64(0):
            position = start + np.uintp(_lowest_bit(word))
            word &= word - np.uint64(1)
            if position >= low and position < high:
                at = position - low
                out[at] = _narrow(out, _wide(theta[at]) + alpha * _wide(values[value]))
            value += ONE


@_compiled
def place_bitmap(out, words, values, place, stretch):
    """Write v to a stretch of zeros; the arguments are those of `add_bitmap`."""
    first, last, value = place
    low, high = stretch
    for number in range(first, last):
        start = number * WORD
        word = words[number]
        while word != np.uint64(0):
            position = start + np.uintp(_lowest_bit(word))
            word &= word - np.uint64(1)
            if position >= low and position < high:
                out[position - low] = values[value]
            value += ONE
