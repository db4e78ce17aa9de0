"""The reference packers of the tests, against words that the packages wrote whose formats these are.

They were given the same numbers, zeros and scales: auto-gptq 0.7.1 `qlinear_cuda_old.QuantLinear.pack`, and autoawq
0.2.7.post3 `WQLinear_GEMM.from_linear`.
"""

from __future__ import annotations

from int4_made import int4


def test_gptq_is_packed_as_auto_gptq_does():
    stored = int4(32, 32, 32, seed=9).gptq()
    assert stored["qweight"][0, :8].tolist() == [
        *(1891825870, 928253068, 1292584398, 613475109),
        *(838952038, -1470748024, 992792603, 408365702),
    ]
    assert stored["qzeros"].tolist() == [[-1987179913, 1739000542, 1313205093, 1387819849]]


def test_awq_is_packed_as_autoawq_does():
    stored = int4(32, 32, 32, seed=9).awq()
    assert stored["qweight"][0].tolist() == [1750906606, 406956909, -871035464, -1381242738]
    assert stored["qzeros"].tolist() == [[-1726435400, 2065598655, 1442313926, 1820670282]]
