// Faults for the decoding loop's tests: every call of a caller's model or function may throw, one place at a time.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>

#include "specattn/model.hpp"

namespace decode_testing {

struct fault : std::runtime_error {
  fault() : std::runtime_error("a planted fault") {}
};

/// Counts the places at which something of the caller's could throw, and throws at one of them, once.
struct fault_plan {
  std::int64_t at = -1;  ///< negative: nowhere
  std::int64_t seen = 0;

  void pass() {
    if (seen++ == at) throw fault();
  }
  bool struck() const { return at >= 0 && seen > at; }
};

/// A model that may throw before its pass, after each layer's attention, and after its pass.
template <class Model>
class faulty_model {
 public:
  /// \param plan null: it never throws
  faulty_model(Model& model, fault_plan* plan) : model_(&model), plan_(plan) {}

  specattn::model_shape shape() const { return model_->shape(); }

  template <class Context, class Batch, class Attention, class Logits>
  void forward(Context& ctx, const Batch& batch, Attention& attention, Logits logits) {
    pass();
    auto faulty = [&](std::int32_t layer, auto&&... rows) {
      attention(layer, std::forward<decltype(rows)>(rows)...);
      pass();
    };
    model_->forward(ctx, batch, faulty, logits);
    pass();
  }

 private:
  void pass() const {
    if (plan_ != nullptr) plan_->pass();
  }

  Model* model_;
  fault_plan* plan_;
};

/// Calls until it no longer meets a fault.
template <class Call>
auto persist(Call&& call) {
  for (;;) {
    try {
      return call();
    } catch (const fault&) {
    }
  }
}

}  // namespace decode_testing
