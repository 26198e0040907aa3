// A stranger's CUDA file: it needs C++20 in device code and the umbrella header beside it. Compiled and linked, not run.
#include <concepts>
#include <specattn/specattn.hpp>

template <class T>
concept number = std::integral<T> || std::floating_point<T>;

template <number T>
__global__ void scale_kernel(T* data, T factor) {
  data[threadIdx.x] *= factor;
}

int main(int argc, char**) {
  if (argc > 1) scale_kernel<<<1, 32>>>(static_cast<float*>(nullptr), 2.0f);
  return SPECATTN_VERSION_MAJOR < 0;
}
