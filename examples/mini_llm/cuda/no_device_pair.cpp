// What stands for device_pair.cu in a program that is built without CUDA. MINI_LLM_WITHOUT_DEVICE says why it is.
#include "device_pair.hpp"

#include "input_error.hpp"

namespace mini_llm {

std::unique_ptr<device_pair> load_device_pair(const loaded_model&, const loaded_model*) {
  throw input_error("--device cuda: this program was built for the CPU only (" MINI_LLM_WITHOUT_DEVICE ")");
}

}  // namespace mini_llm
