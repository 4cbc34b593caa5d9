// launch_layout: a parameter struct with every kind of field, whose C++ layout the host must match.
//
// NVRTC has no offsetof; a wrong offset leaves a call of an undefined function, which ptxas refuses.
// From -D   OFFSET_<FIELD> and PARAMS_BYTES, computed on the host
struct alignas(64) TensorMap {
  unsigned long long words[16];
};
struct Inner {
  char tag;
  double value;
};
struct Params {
  char first;
  TensorMap map;
  short pair[3];
  Inner inner;
  int last;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host's dtype differs from Params");

extern "C" __device__ void offset_differs_from_the_host();

__device__ __forceinline__ void expect(const Params& p, const void* field, long long offset) {
  if (static_cast<const char*>(field) - reinterpret_cast<const char*>(&p) != offset) {
    offset_differs_from_the_host();
  }
}

extern "C" __global__ void launch_layout(const __grid_constant__ Params p) {
  expect(p, &p.map, OFFSET_MAP);
  expect(p, &p.pair, OFFSET_PAIR);
  expect(p, &p.inner, OFFSET_INNER);
  expect(p, &p.last, OFFSET_LAST);
}
