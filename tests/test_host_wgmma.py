"""The model of wgmma: what it computes with groups in flight, and what it must notice."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from cumoe.launch import KERNEL_DIR
from tests.host import loader
from tests.host.probes import SEEDS, hopper_probe


@pytest.fixture(autouse=True)
def _compiler() -> None:
    loader.require()


@pytest.fixture
def probe(tmp_path):
    return hopper_probe(tmp_path)


class TestWgmma:
    """Two groups in flight: one product of (64, 128 bytes) by (24, 128 bytes), and two summed."""

    FILL = """
  // Operands by their definition: element (r, k) at row r, chunk (k / per_chunk) ^ (r % 8).
  constexpr int per_row = 128 / sizeof(Element), per_chunk = per_row / 8;
  auto* elements = reinterpret_cast<Element*>(smem);
  for (int e = i; e < 64 * per_row; e += 128) {
    const int r = e / per_row, k = e % per_row;
    const int at = r * per_row + ((k / per_chunk) ^ (r % 8)) * per_chunk + k % per_chunk;
    for (int half = 0; half < 2; ++half) {
      auto* w = elements + half * 8192 / sizeof(Element);
      auto* a = elements + (16384 + half * 3072) / sizeof(Element);
      w[at] = element(r + 3 * k + half);
      if (r < 24) a[at] = element(5 * r + k + half);
    }
  }
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t w0 = wgmma::descriptor(data), w1 = wgmma::descriptor(data + 8192);
  const uint32_t a0 = wgmma::descriptor(data + 16384), a1 = wgmma::descriptor(data + 19456);
  float d[2][12];
  for (int k = 0; k < 24; ++k) d[k / 12][k % 12] = k < 12 ? 1.0f : 2.0f;
"""
    STORE = """
  const int warp = i / 32, lane = i % 32;
  for (int v = 0; v < 24; ++v) {
    const int row = warp * 16 + lane / 4 + 8 * (v / 2 % 2);
    const int column = v % 12 / 4 * 8 + 2 * (lane % 4) + v % 2;
    p.out[v / 12 * 1536 + row * 24 + column] = __float_as_int(d[v / 12][v % 12]);
  }"""
    ELEMENTS = {
        "e4m3": """
  using Element = uint8_t;
  const auto element = [](int x) { return static_cast<uint8_t>((x * 7 % 96) + 8); };
""",
        "bf16": """
  using Element = uint16_t;
  const auto element = [](int x) { return static_cast<uint16_t>((x * 7 % 96) + 0x3f80); };
""",
    }
    # Two sums, the second over both products; the first is read while the second is in flight.
    MULTIPLY = """
  wgmma::fence();
  wgmma::mma_TYPE<24>(d[0], w0, a0, false);
  wgmma::commit();
  wgmma::mma_TYPE<24>(d[1], w0, a0, true);
  wgmma::mma_TYPE<24>(d[1], w1, a1, true);
  wgmma::commit();
  wgmma::wait<1>();
  for (int k = 0; k < 12; ++k) d[0][k] += 1.0f;
  wgmma::wait<0>();
  __syncthreads();
  for (int k = i; k < 22528; k += 128) smem[k] = 0x30;
"""

    def run(self, probe, kind: str, seed: int, multiply: str = MULTIPLY, fill: str = FILL) -> bool:
        """Tell whether both sums are right."""
        body = self.ELEMENTS[kind] + fill + multiply.replace("TYPE", kind) + self.STORE
        got = probe(body, n=3072, smem=16384 + 6144, seed=seed).view(np.float32)
        k = np.arange(128 if kind == "e4m3" else 64)

        def operand(x: np.ndarray) -> np.ndarray:
            if kind == "e4m3":
                codes = (x * 7 % 96 + 8).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
            else:
                codes = (x * 7 % 96 + 0x3F80).astype(np.uint16).view(ml_dtypes.bfloat16)
            return codes.astype(np.float64)

        products = [
            operand(np.arange(64)[:, None] + 3 * k + half)
            @ operand(5 * np.arange(24)[:, None] + k + half).T
            for half in range(2)
        ]
        expected = np.stack([products[0] + 1.0, sum(products) + 2.0])
        return bool(np.allclose(got.reshape(2, 64, 24), expected, rtol=1e-6))

    @pytest.mark.parametrize("kind", ["e4m3", "bf16"])
    def test_product(self, probe, kind):
        assert all(self.run(probe, kind, seed) for seed in SEEDS)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("  wgmma::wait<0>();\n", "", "were not waited for"),
            ("  wgmma::commit();\n  wgmma::wait<1>", "  wgmma::wait<1>", "were not waited for"),
            ("wgmma::wait<0>", "wgmma::wait<1>", "were not waited for"),
            ("wgmma::wait<1>", "wgmma::wait<2>", "were written by lane 0 before this wait"),
            ("  wgmma::wait<1>();\n", "", "were written by lane 0 before this wait"),
            ("  wgmma::fence();\n", "", "probe.cu:2[0-9]: wgmma without a wgmma.fence"),
            ("(d[1], w1", "(d[0], w1", None),
            ("(d[0], w0, a0, false)", "(d[0], w0, a0, true)", None),
            ("(d[1], w0, a0, true)", "(d[1], w0, a0, false)", None),
            ("(d[1], w1, a1, true)", "(d[1], w1, a1, false)", None),
            (
                "mma_TYPE<24>(d[1], w1",
                "mma_TYPE<16>(reinterpret_cast<float(&)[8]>(d[1][4]), w1",
                "n = 16 on registers of one of n = 24 that is in flight",
            ),
            (
                "  wgmma::wait<0>();\n  __syncthreads();\n",
                "  __syncthreads();\n  wgmma::wait<0>();\n",
                None,
            ),
            (
                "  wgmma::wait<0>();\n",
                "  wgmma::wait<0>();\n  wgmma::mma_TYPE<24>(d[0], w0, a0, false);\n"
                "  wgmma::commit();\n  wgmma::wait<0>();\n",
                "wgmma without a wgmma.fence since its accumulators were free",
            ),
            (
                "  wgmma::wait<0>();\n",
                "  const float early = d[1][3];\n  wgmma::wait<0>();\n  d[1][3] = early;\n",
                None,
            ),
            ("wgmma::commit();", "if (i < 96) wgmma::commit();", "were not waited for"),
            (
                "wgmma::mma_TYPE<24>(d[1], w1, a1, true);",
                "if (i >= 32) wgmma::mma_TYPE<24>(d[1], w1, a1, true);",
                "warps 0 and 1 of a warpgroup issued different wgmma",
            ),
            (
                "wgmma::mma_TYPE<24>(d[1], w1, a1, true);",
                "wgmma::mma_TYPE<24>(d[1], w1, i % 32 == 3 ? a0 : a1, true);",
                "lanes 0 and 3 have different descriptors",
            ),
        ],
    )
    def test_faults(self, probe, old, new, message):
        assert old in self.MULTIPLY
        self.caught(probe, message, multiply=self.MULTIPLY.replace(old, new))

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("  __syncthreads();\n  const uint32_t", "  const uint32_t", None),
            ("(k / per_chunk) ^ (r % 8)", "(k / per_chunk)", None),
            ("descriptor(data + 16384)", "descriptor(data + 16512)", "not 1024-byte aligned"),
            ("descriptor(data + 19456)", "descriptor(data + 20480)", "outside the 22528 bytes"),
            ("descriptor(data + 16384)", "descriptor(data + 16384) + 1", "past the swizzled row"),
        ],
    )
    def test_faults_of_operands(self, probe, old, new, message):
        assert old in self.FILL
        self.caught(probe, message, fill=self.FILL.replace(old, new))

    def caught(self, probe, message: str | None, **changed: str) -> None:
        """Assert that most seeds show a fault, by a wrong sum if there is no message."""
        failures = 0
        for seed in SEEDS:
            try:
                failures += not self.run(probe, "e4m3", seed, **changed)
            except loader.HostError as error:
                assert message is not None and re.search(message, str(error)), error
                failures += 1
        assert failures > len(SEEDS) // 2

    @pytest.mark.parametrize(
        ("high", "message"),
        [
            ("wgmma::kDescriptorHigh ^ 1u << 30", "only the 128-byte swizzle has a model"),
            ("wgmma::kDescriptorHigh + 0x3000", "outside the 1024 bytes"),
        ],
    )
    def test_faults_of_the_high_word(self, probe, high, message):
        body = f"""
  float d[8];
  const uint64_t w = uint64_t{{{high}}} << 32 | wgmma::descriptor(data);
  wgmma::fence();
  cumoe_host::wgmma_mma(cumoe_host::kWgmmaE4m3, 16, d, w, w, false, {{"probe.cu", 5}});"""
        with pytest.raises(loader.HostError, match=f"probe.cu:5: .*{message}"):
            probe(body, smem=1024)

    def test_high_word_of_the_original(self):
        """The model's constant is the header's, and that which its products move to a register."""
        original = (KERNEL_DIR / "wgmma.cuh").read_text()
        model = (loader.OVERLAY / "wgmma.cuh").read_text()
        for name in ("kSwizzleAtomBytes", "kDescriptorHigh"):
            line = re.compile(rf"^constexpr .* {name} = [^;]*;", re.MULTILINE)
            assert len(line.findall(original)) == 1
            assert line.findall(model)[:1] == line.findall(original)
        words = re.findall(r"mov\.u32 h, (0x\w+);", original)
        assert [int(word, 16) for word in words] == [8 * 128 >> 4 | 1 << 30]

    def test_too_few_warps(self, probe):
        body = """
  float d[4];
  wgmma::fence();
  wgmma::mma_e4m3<8>(d, wgmma::descriptor(data), wgmma::descriptor(data), false);"""
        with pytest.raises(loader.HostError, match="probe.cu:4: .*less than four warps"):
            probe(body, block=224)
