"""Rows of fp8: how far an element is from its value, what is exact, what is random."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvideo_comm.kernels import dequantise_, quantise_
from fastvideo_comm.kernels.quantise import CHUNK_ELEMENTS, FORMATS, _random_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An element is within |x| / PART of its value, plus the row's largest magnitude times REST: half a
# step of the format, and half of the smallest step over the largest number.
PART = {torch.float8_e4m3fn: 16, torch.float8_e5m2: 8}
REST = {torch.float8_e4m3fn: 4e-6, torch.float8_e5m2: 2e-10}


def quantised(
    src: Tensor, dtype: torch.dtype, seeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    payload, scales = torch.empty(src.shape, dtype=dtype), torch.empty(*src.shape[:-1], 1)
    quantise_(payload, scales, src, seeds)
    return payload, scales


def there_and_back(src: Tensor, dtype: torch.dtype, seeds: Tensor | None = None) -> Tensor:
    """What arrives of a tensor that travels as fp8."""
    dst = torch.empty_like(src, memory_format=torch.contiguous_format)
    dequantise_(dst, *quantised(src, dtype, seeds))
    return dst


def rows_of_all_magnitudes(seed: int, dtype: torch.dtype, num_columns: int = 48) -> Tensor:
    """Rows whose largest magnitudes span 1e-30 to 1e30, with elements of all sizes in each row."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(61, num_columns, generator=generator)
    rows *= 10.0 ** -(8 * torch.rand(rows.shape, generator=generator))
    rows /= rows.abs().amax(-1, keepdim=True)
    # float16 has numbers of 6e-5 to 65504 with all their bits.
    limits = (-1, 4.8) if dtype is torch.float16 else (-30, 30)
    return (rows * 10.0 ** torch.linspace(*limits, 61)[:, None]).to(dtype)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32), num_columns=st.sampled_from([16, 48, 128, 208]))
def test_every_element_is_within_the_bound_of_its_format(format_, dtype, seed, num_columns):
    src = rows_of_all_magnitudes(seed, dtype, num_columns)
    error = (there_and_back(src, format_).double() - src.double()).abs()
    magnitude = src.double().abs()
    bound = magnitude / PART[format_] + magnitude.amax(-1, keepdim=True) * REST[format_]
    if dtype is torch.float16:  # below its normal numbers the result itself has a step of 2**-24
        bound += 2.0**-25
    assert (error <= bound).all()


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_the_largest_element_of_a_row_arrives_as_it_is(format_):
    src = rows_of_all_magnitudes(0, torch.bfloat16)
    arrived = there_and_back(src, format_)
    assert torch.equal(arrived.abs().amax(-1), src.abs().amax(-1))


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("seeds", [None, torch.arange(3, dtype=torch.int32)[:, None]])
def test_zeros_stay_zeros_with_their_sign_and_rows_of_zeros_have_no_nan(format_, seeds):
    src = torch.zeros(3, 16)
    src[0, 3] = 1e30
    src[1] = -0.0
    arrived = there_and_back(src, format_, seeds)
    assert torch.equal(arrived == 0, src == 0)
    assert torch.equal(arrived.signbit(), src.signbit())


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("seeds", [None, torch.zeros(4, 1, dtype=torch.int32)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans_arrive_as_nan_and_leave_their_row_alone(format_, seeds, dtype):
    src = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    src[:, :16] *= 0.5  # so that the largest of each row is behind
    without = src.clone()
    src[0, 5], src[1, 6], src[2, 7] = torch.inf, -torch.inf, torch.nan
    src[3] = torch.nan
    arrived = there_and_back(src, format_, seeds)
    assert torch.equal(arrived.isnan(), ~src.isfinite())
    without[~src.isfinite()] = 0
    expected = there_and_back(without, format_, seeds)
    assert torch.equal(arrived[src.isfinite()], expected[src.isfinite()])


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_rows_at_the_ends_of_float32_neither_overflow_nor_vanish(format_):
    largest = torch.finfo(torch.float32).max
    for magnitude in (largest, largest / 3, 2.0**-126, 6e-36):
        row = torch.full((1, 16), magnitude)
        arrived = there_and_back(row, format_)
        # Half a step of the format in its worst place; no overflow, and no loss of all bits.
        torch.testing.assert_close(arrived, row, rtol=2.0**-4, atol=0)
    # Below, a row has fewer steps; it does not become anything else.
    tiny = torch.full((1, 16), 1e-45)
    assert not there_and_back(tiny, format_).any()


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_divisions_are_exact(format_):
    """float64 has more than twice the bits of float32, so rounding its quotients is exact."""
    src = rows_of_all_magnitudes(3, torch.float32, 128)
    payload, scales = quantised(src, format_)
    largest = src.double().abs().amax(-1, keepdim=True)
    expected = (largest / torch.finfo(format_).max).float()
    assert torch.equal(scales, expected)
    quotients = (src.double() / scales.double()).float()
    assert torch.equal(payload.float(), quotients.to(format_).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_every_number_of_the_format_times_its_scale_is_rounded_once(format_, dtype):
    numbers = torch.arange(256, dtype=torch.uint8).view(format_)
    is_nan = numbers.float().isnan()
    finite = numbers.view(torch.uint8)[~is_nan].view(format_)
    largest = torch.finfo(torch.float32).max / torch.finfo(format_).max
    for scale in (1.0, 1 / 3, 2.0**-126, 3e-5, largest):
        # NaNs with and without a sign, together and alone.
        for payload in (numbers, finite, numbers[:128], numbers[128:], finite[:0]):
            result = torch.empty(payload.shape, dtype=dtype)
            scales = torch.tensor([scale])
            dequantise_(result, payload, scales)
            # float64 holds the products.
            expected = (payload.double() * scales.double()).float().to(dtype)
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(
                result.signbit() & ~result.isnan(), expected.signbit() & ~expected.isnan()
            )


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_random_rounding_is_right_on_average(format_):
    """By Hoeffding's inequality a right one fails with a probability below 16 * 1e-9.

    Errors of n rows lie in one step of the format, so the mean of n is further than t steps from
    its expectation with a probability of at most 2 * exp(-2 * n * t**2): 1e-9 for this t, which is
    1.3 % of a step.
    """
    num_rows, info = 2**16, torch.finfo(format_)
    tolerance = math.sqrt(math.log(2e9) / (2 * num_rows))
    smallest_step = info.smallest_normal * info.eps
    row = torch.tensor([info.max, *(0.8**i * info.max / 3 for i in range(7))])
    row = torch.cat(
        [row, -row[1:4] * 1e-3, smallest_step * torch.tensor([0.1, 0.5, 1.7, 6.9, -3.3])]
    )
    seeds = torch.randint(
        *(-(2**31), 2**31, (num_rows, 1)),
        dtype=torch.int32,
        generator=torch.Generator().manual_seed(1),
    )
    payload, scales = quantised(row.expand(num_rows, -1), format_, seeds)
    assert (scales == 1).all(), "the row's largest is the format's"
    steps = 2.0 ** row.abs().clamp(min=info.smallest_normal).log2().floor() * info.eps
    errors = (payload.double() - row.double()) / steps.double()
    assert (errors.abs() < 1).all()
    assert (errors.mean(0).abs() < tolerance).all(), errors.mean(0)
    # What is no number of the format goes up in some rows and down in others.
    is_between = payload[0].float() != row
    assert (errors.amax(0)[is_between] > 0).all()
    assert (errors.amin(0)[is_between] < 0).all()


def test_random_bits_are_those_of_murmurhash3():
    def mixed(bits: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            bits = ((bits ^ (bits >> shift)) * factor) % 2**32
        return bits

    seeds = torch.tensor([[0], [1], [-1], [-(2**31)], [2**31 - 1], [123456789]], dtype=torch.int32)
    for num_bits in (20, 21):
        expected = [
            [mixed((seed % 2**32) ^ (column * 0x9E3779B9 % 2**32)) >> (32 - num_bits)
             for column in range(48)]
            for seed in seeds.flatten().tolist()
        ]  # fmt: skip
        assert _random_bits(seeds, 48, num_bits).tolist() == expected


def test_random_rounding_of_neighbours_is_independent():
    """The mean of the products of two columns' errors, by the inequality above."""
    seeds = torch.randint(
        *(-(2**31), 2**31, (2**16, 1)),
        dtype=torch.int32,
        generator=torch.Generator().manual_seed(2),
    )
    row = torch.full((16,), 17.0)  # halfway between 16 and 18
    row[0] = 448.0
    payload, _ = quantised(row.expand(2**16, -1), torch.float8_e4m3fn, seeds)
    errors = payload.float()[:, 1:] - 17
    products = (errors.T @ errors) / 2**16 - torch.eye(15)
    # Products lie in [-1, 1]: twice the step of the inequality.
    assert products.abs().max() < 2 * math.sqrt(math.log(2e9) / (2 * 2**16))


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_seeds_decide_how_rows_are_rounded(format_):
    src = rows_of_all_magnitudes(5, torch.float32)
    seeds = torch.arange(61, dtype=torch.int32)[:, None]
    first = there_and_back(src, format_, seeds)
    assert torch.equal(first, there_and_back(src, format_, seeds))
    assert not torch.equal(first, there_and_back(src, format_, seeds + 1))


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_strides_and_the_number_of_rows_change_nothing(format_):
    """More elements than are worked on at a time, and rows that stand anywhere."""
    src = torch.randn(3, 7, 521, 48, generator=torch.Generator().manual_seed(0))
    assert src.numel() > 2 * CHUNK_ELEMENTS - 48
    seeds = torch.arange(3 * 7 * 521, dtype=torch.int32).view(3, 7, 521, 1)
    expected = torch.stack(
        [there_and_back(each, format_, seed) for each, seed in zip(src[0], seeds[0], strict=True)]
    )
    strided = src.mT.contiguous().mT
    payload = torch.empty(521, 3, 7, 48, dtype=format_).permute(1, 2, 0, 3)
    scales = torch.empty(7, 3, 521, 1).transpose(0, 1)
    quantise_(payload, scales, strided, seeds)
    dst = torch.empty(48, 3, 7, 521).permute(1, 2, 3, 0)
    dequantise_(dst, payload, scales)
    assert torch.equal(dst[0], expected)
    assert torch.equal(dst, there_and_back(src, format_, seeds))


def test_rows_as_long_as_a_chunk_are_rounded_one_by_one():
    src = torch.randn(2, 2, CHUNK_ELEMENTS, generator=torch.Generator().manual_seed(0))
    arrived = there_and_back(src, torch.float8_e4m3fn)
    for index in range(4):
        row = src.view(4, 1, -1)[index]
        assert torch.equal(arrived.view(4, 1, -1)[index], there_and_back(row, torch.float8_e4m3fn))
