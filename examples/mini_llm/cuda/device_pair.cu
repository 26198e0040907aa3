// One stream, one context and two models: the GPU's side of a session.
#include "device_pair.hpp"

#include <optional>
#include <utility>

#include "device_engine.cuh"
#include "device_llama.cuh"
#include "input_error.hpp"

namespace mini_llm {
namespace {

using device = specattn::cuda;  // ::cuda is the toolkit's
using specattn::detail::check_cuda;

/// Its name. \throws input_error where there is none
std::string find_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    throw input_error(std::string("--device cuda: no usable GPU (") +
                      cudaGetErrorString(status != cudaSuccess ? status : cudaErrorNoDevice) + ")");
  }
  int current = 0;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDevice(&current), "device_pair");
  check_cuda(cudaGetDeviceProperties(&properties, current), "device_pair");
  return properties.name;
}

class owned_stream {
 public:
  owned_stream() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "device_pair"); }
  owned_stream(const owned_stream&) = delete;
  owned_stream& operator=(const owned_stream&) = delete;
  ~owned_stream() { static_cast<void>(cudaStreamDestroy(stream_)); }  // nobody to tell in a destructor
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

struct uploaded_model {
  device_llama model;
  specattn::model_fingerprint fingerprint;

  explicit uploaded_model(const loaded_model& from) : model(from.config, from.files(), max_slots) {
    const specattn::model_shape& shape = model.shape();
    fingerprint = {from.directory.filename().string(),
                   shape.layers,
                   shape.q_heads,
                   shape.kv_heads,
                   shape.head_dim,
                   shape.vocab,
                   model.fingerprint()};
  }
};

class loaded_device_pair final : public device_pair {
 public:
  loaded_device_pair(const loaded_model& target, const loaded_model* draft)
      : name_(find_device()), context_(stream_.get()), target_(target) {
    if (draft != nullptr) draft_.emplace(*draft);
  }

  std::string device_name() const override { return name_; }
  std::size_t weight_bytes() const override {
    return target_.model.weight_bytes() + (draft_ ? draft_->model.weight_bytes() : 0);
  }
  const specattn::model_fingerprint& target_fingerprint() const override { return target_.fingerprint; }
  const specattn::model_fingerprint& draft_fingerprint() const override { return draft_.value().fingerprint; }

  std::unique_ptr<engine> make(kv_type type, const guide_choice& guide,
                               const specattn::decode_options& options) override {
    return make_device_engine(context_, target_.model, draft_ ? &draft_->model : nullptr, type, guide, options);
  }
  specattn::decode_memory engine_bytes(kv_type type, const guide_choice& guide,
                                       const specattn::decode_options& options) const override {
    return device_engine_bytes(target_.model.shape(), draft_ ? draft_->model.shape() : specattn::model_shape{}, type,
                               guide, options);
  }

 private:
  std::string name_;  // found first: nothing else is touched without a GPU
  owned_stream stream_;
  specattn::context<device> context_;
  uploaded_model target_;
  std::optional<uploaded_model> draft_;
};

}  // namespace

std::unique_ptr<device_pair> load_device_pair(const loaded_model& target, const loaded_model* draft) {
  return std::make_unique<loaded_device_pair>(target, draft);
}

}  // namespace mini_llm
