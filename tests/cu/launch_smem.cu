// launch_smem: out[i] = in[n - 1 - i], i < n, one block, the whole array held in shared memory.
//
// smem      n ints, dynamic; 16 ints static, so that both kinds count
struct Params {
  int* out;
  const int* in;
  int n;
};

extern "C" __global__ void launch_smem(const __grid_constant__ Params p) {
  extern __shared__ int values[];
  __shared__ int tail[16];
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) values[i] = p.in[i];
  if (threadIdx.x < 16) tail[threadIdx.x] = threadIdx.x;
  __syncthreads();
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    p.out[i] = values[p.n - 1 - i] + tail[i % 16] - i % 16;
  }
}
