// The product for few rows beside sums in double precision of the same rounded numbers.
#include "cuda/skinny_product.cuh"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cuda_fixture.cuh"
#include "specattn/scalar.hpp"

namespace {

using specattn::bf16;

struct form {
  bool wide = false, normed = false, add = false, active = false, next = false;
};
constexpr form forms[] = {{},
                          {.wide = true},
                          {.normed = true},
                          {.add = true},
                          {.wide = true, .add = true, .next = true},
                          {.normed = true, .active = true},
                          {.add = true, .next = true}};

/// Random weights and sixteen rows, and what is expected of them.
class problem {
 public:
  problem(std::ptrdiff_t outputs, std::ptrdiff_t inputs, form what)
      : outputs_(outputs), inputs_(inputs), what_(what) {
    std::mt19937 random(static_cast<unsigned>(outputs * 31 + inputs));
    std::normal_distribution<float> normal;
    const auto fill = [&](auto& to, std::ptrdiff_t count) {
      for (std::ptrdiff_t i = 0; i < count; ++i)
        to.push_back(specattn::from_float<typename std::decay_t<decltype(to)>::value_type>(normal(random)));
    };
    fill(weights_, outputs * inputs);
    fill(wide_, most_rows * inputs);
    fill(gain_, inputs);
    fill(before_, most_rows * outputs);
    for (std::size_t i = 0; i < wide_.size(); ++i) {
      const float gain = what.normed ? gain_[i % static_cast<std::size_t>(inputs)] : 1.0f;
      rounded_.push_back(specattn::from_float<bf16>(wide_[i] * gain));
      exact_.push_back(static_cast<double>(to_float(rounded_.back())));
    }
    fill(next_gain_, outputs);
    for (const bf16 weight : weights_) exact_weights_.push_back(static_cast<double>(to_float(weight)));
    for (std::ptrdiff_t row = 0; row < most_rows; ++row) {
      double squares = 0.0;
      for (std::ptrdiff_t part = 0; part < inputs / mini_llm::skinny_part; ++part) {
        double of_part = 0.0;
        for (std::ptrdiff_t i = 0; i < mini_llm::skinny_part; ++i) {
          const auto x =
              static_cast<double>(wide_[static_cast<std::size_t>(row * inputs + part * mini_llm::skinny_part + i)]);
          of_part += x * x;
        }
        squares_.push_back(static_cast<float>(of_part));
        squares += of_part;
      }
      const double mean = squares / static_cast<double>(inputs) + static_cast<double>(eps);
      scales_.push_back(what.normed ? 1.0 / std::sqrt(mean) : 1.0);
    }
  }

  /// [rows, results()] as floats.
  std::vector<float> run(cuda_fixture& fixture, std::ptrdiff_t rows) const {
    const auto weights = fixture.upload(weights_);
    const auto wide = fixture.upload(wide_), squares = fixture.upload(squares_), gain = fixture.upload(next_gain_);
    const auto sums = fixture.upload(before_);
    const auto narrow = fixture.upload(rounded_);
    const specattn::buffer<bf16, specattn::cuda> active(static_cast<std::size_t>(most_rows * outputs_));
    mini_llm::skinny_rows x;
    if (what_.wide) x.wide = wide.shaped({rows, inputs_});
    if (!what_.wide) x.rounded = narrow.shaped({rows, inputs_});
    if (what_.normed) {
      x.squares = squares.shaped({rows, inputs_ / mini_llm::skinny_part});
      x.eps = eps;
    }
    mini_llm::skinny_result y{.add = what_.add};
    if (what_.active) y.active = active.shaped({rows, results()});
    if (!what_.active) y.sums = sums.shaped({rows, outputs_});
    const specattn::buffer<bf16, specattn::cuda> next_rows(static_cast<std::size_t>(rows * outputs_));
    const specattn::buffer<float, specattn::cuda> next_squares(
        static_cast<std::size_t>(rows * outputs_ / mini_llm::skinny_part));
    if (what_.next)
      y.next = {gain.data(), next_rows.shaped({rows, outputs_}),
                next_squares.shaped({rows, outputs_ / mini_llm::skinny_part})};
    REQUIRE(mini_llm::is_skinny(fixture.context(), rows, inputs_));
    mini_llm::skinny_product(fixture.context(), x, {weights.data(), outputs_, inputs_}, y);
    std::vector<float> found;
    if (what_.active) {
      for (const bf16 element : fixture.download(active)) found.push_back(to_float(element));
    } else {
      found = fixture.download(sums);
      for (std::size_t i = static_cast<std::size_t>(rows * outputs_); i < found.size(); ++i)
        CHECK(found[i] == before_[i]);
    }
    found.resize(static_cast<std::size_t>(rows * results()));
    if (what_.next) check_next(fixture.download(next_rows), fixture.download(next_squares), found);
    return found;
  }

  /// What is left for the product behind belongs to the sums.
  void check_next(const std::vector<bf16>& rounded, const std::vector<float>& squares,
                  const std::vector<float>& sums) const {
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const bf16 expected = specattn::from_float<bf16>(sums[i] * next_gain_[i % static_cast<std::size_t>(outputs_)]);
      wrong += std::memcmp(&rounded[i], &expected, sizeof(bf16)) != 0;
    }
    constexpr auto part = static_cast<std::size_t>(mini_llm::skinny_part);
    for (std::size_t i = 0; i < squares.size(); ++i) {
      double expected = 0.0;
      for (std::size_t j = 0; j < part; ++j)
        expected += static_cast<double>(sums[i * part + j]) * static_cast<double>(sums[i * part + j]);
      wrong += !(std::abs(static_cast<double>(squares[i]) - expected) <= 1e-6 * expected);
    }
    CHECK(wrong == 0);
  }

  /// The worst error of rows that run() has made, in what is allowed.
  double worst(const std::vector<float>& found) const {
    double most = 0.0;
    for (std::ptrdiff_t i = 0; i < static_cast<std::ptrdiff_t>(found.size()); ++i) {
      const std::ptrdiff_t row = i / results(), output = i % results();
      const sum first = at(row, output);
      double expected = first.value, allowed = 1e-5 * first.size + 1e-6;
      if (what_.add) expected += static_cast<double>(before_[static_cast<std::size_t>(row * outputs_ + output)]);
      if (what_.active) {
        const sum up = at(row, output + results());
        expected = first.value / (1.0 + std::exp(-first.value)) * up.value;
        allowed = 0x1p-8 * std::abs(expected) +
                  1e-5 * (first.size + up.size) * (1.0 + std::abs(first.value) + std::abs(up.value));
      }
      const double off = std::abs(static_cast<double>(found[static_cast<std::size_t>(i)]) - expected);
      most = std::isnan(off) ? INFINITY : (std::max)(most, off / allowed);
    }
    return most;
  }

  std::ptrdiff_t results() const { return what_.active ? outputs_ / 2 : outputs_; }

 private:
  struct sum {
    double value = 0.0, size = 0.0;
  };
  sum at(std::ptrdiff_t row, std::ptrdiff_t output) const {
    const double *const x = &exact_[static_cast<std::size_t>(row * inputs_)],
                        *const w = &exact_weights_[static_cast<std::size_t>(output * inputs_)];
    sum of;
    for (std::ptrdiff_t i = 0; i < inputs_; ++i) {
      of.value += x[i] * w[i];
      of.size += std::abs(x[i] * w[i]);
    }
    const double scale = scales_[static_cast<std::size_t>(row)];
    return {of.value * scale, of.size * scale};
  }

  static constexpr std::ptrdiff_t most_rows = 16;
  static constexpr float eps = 1e-2f;  // large, so that forgetting it is seen
  std::ptrdiff_t outputs_, inputs_;
  form what_;
  std::vector<bf16> weights_, rounded_;
  std::vector<float> wide_, gain_, next_gain_, before_, squares_;
  std::vector<double> exact_, exact_weights_,
      scales_;  // what is multiplied, and what a row's sums are to be scaled by
};

}  // namespace

TEST_CASE("skinny_product: sums, added sums and activations of every number of rows are those of double precision") {
  cuda_fixture fixture;
  for (const form& what : forms) {
    const problem small(176, 384, what);
    for (std::ptrdiff_t rows = 1; rows <= 16; ++rows) {
      CAPTURE(rows);
      CAPTURE(&what - forms);
      CHECK(small.worst(small.run(fixture, rows)) <= 1.0);
    }
  }
}

TEST_CASE("skinny_product: so it is where warps have no inputs, unequal ones or many, and CTAs no outputs or many") {
  struct size {
    std::ptrdiff_t outputs, inputs;
  };
  cuda_fixture fixture;
  for (const form& what : forms) {
    for (const size of : {size{16, 128}, size{32, 1152}, size{4000, 256}, size{2560, 2048}, size{512, 5632}}) {
      const problem one(of.outputs, of.inputs, what);
      for (const std::ptrdiff_t rows : {1, 5, 8}) {
        CAPTURE(rows);
        CAPTURE(of.outputs);
        CAPTURE(of.inputs);
        CAPTURE(&what - forms);
        CHECK(one.worst(one.run(fixture, rows)) <= 1.0);
      }
    }
  }
}

TEST_CASE("skinny_product: outputs need not be a multiple of anything") {
  cuda_fixture fixture;
  for (const std::ptrdiff_t outputs : {1, 7, 9, 1061, 3001}) {
    CAPTURE(outputs);
    const problem one(outputs, 192, {.wide = true});
    CHECK(one.worst(one.run(fixture, 11)) <= 1.0);
  }
}

TEST_CASE("skinny_product: a row's sums are the same bits whatever rows stand beside it") {
  cuda_fixture fixture;
  for (const form& what : forms) {
    const problem one(256, 640, what);
    const std::vector<float> all = one.run(fixture, 16);
    for (std::ptrdiff_t rows = 1; rows < 16; ++rows) {
      const std::vector<float> some = one.run(fixture, rows);
      CHECK(std::equal(some.begin(), some.end(), all.begin()));
    }
  }
}

TEST_CASE(
    "skinny_product: a chain of products, each started while the one before runs, reads what that has written") {
  cuda_fixture fixture;
  constexpr std::ptrdiff_t size = 2048, rows = 6;
  std::vector<bf16> weights(size * size, specattn::from_float<bf16>(0.0f));
  for (std::size_t i = 0; i < size; ++i) weights[i * size + (i + 1) % size] = specattn::from_float<bf16>(1.0f);
  std::vector<float> rows_in(rows * size);
  for (std::size_t i = 0; i < rows_in.size(); ++i) rows_in[i] = static_cast<float>(i % 251);
  const auto matrix = fixture.upload(weights);
  const auto first = fixture.upload(rows_in), second = fixture.upload(std::vector<float>(rows_in.size()));
  constexpr int turns = 200;
  for (int turn = 0; turn < turns; ++turn) {
    const auto& from = turn % 2 == 0 ? first : second;
    const auto& to = turn % 2 == 0 ? second : first;
    mini_llm::skinny_product(fixture.context(), {.wide = from.shaped({rows, size})}, {matrix.data(), size, size},
                             {.sums = to.shaped({rows, size})});
  }
  const std::vector<float> found = fixture.download(first);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const std::size_t row = i / size, column = i % size;
    wrong += found[i] != rows_in[row * size + (column + turns) % size];  // a product shifts by one
  }
  CHECK(wrong == 0);
}

TEST_CASE("skinny_product: is_skinny says what does not fit") {
  cuda_fixture fixture;
  CHECK(mini_llm::is_skinny(fixture.context(), 1, 64));
  CHECK_FALSE(mini_llm::is_skinny(fixture.context(), 1, 96));
  CHECK_FALSE(mini_llm::is_skinny(fixture.context(), 17, 64));
  CHECK_FALSE(mini_llm::is_skinny(fixture.context(), 16, 16384));
}
