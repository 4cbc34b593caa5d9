// launch_axpy: y[i] += a * x[i], i < n; with PROGRAMMATIC, once the kernel ahead of it is done.
//
// Grid      ceil(n / blockDim.x) blocks. Block any size.
// From -D   PROGRAMMATIC (0, or 1 on sm_90 and later), PARAMS_BYTES (size of the host's dtype)
struct Params {
  float* y;
  const float* x;
  float a;
  int n;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the host's dtype differs from Params");

extern "C" __global__ void launch_axpy(const __grid_constant__ Params p) {
#if PROGRAMMATIC
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) p.y[i] += p.a * p.x[i];
}
