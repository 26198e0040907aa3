// What attend() promises, one claim a case, for any backend. The including file defines `attend_fixture`:
//   using backend                      cpu or cuda
//   context()                          a context of that backend
//   upload(vector<T>), download(b)     host data to the backend's buffer and back
//   soil_workspace()                   fills the workspace with garbage
//   to_the_bit                         results do not depend on how work is divided
//   tolerance<T>                       of the largest difference from the oracle, T being the cache's storage
#pragma once

#include <doctest/doctest.h>

#include <limits>
#include <string>

#include "attend/problem.hpp"

namespace attend_testing {

using specattn::bf16;
using specattn::fp16;

// ---- against the oracle -------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("attend: dense attention of any prefix length equals the oracle", Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t kv_len : {0, 1, 2, 15, 16, 17, 255, 256, 257, 509, 511, 512, 513, 1031}) {
    CAPTURE(kv_len);
    pass_shape shape;
    shape.kv_lens = {kv_len};
    shape.slots = {3};
    agrees_with_oracle(fixture, random_problem<float>(shape));
    agrees_with_oracle(fixture, random_problem<fp16>(shape));
    agrees_with_oracle(fixture, random_problem<bf16>(shape));
  }
}

TEST_CASE_TEMPLATE("attend: any number of slots equals the oracle", Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t slots : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 45, 300}) {
    CAPTURE(slots);
    pass_shape shape;
    shape.kv_lens = {slots < 20 ? 270 : 31};
    shape.slots = {slots};
    shape.head_dim = slots < 20 ? 64 : 16;
    agrees_with_oracle(fixture, random_problem<fp16>(shape));
  }
}

TEST_CASE_TEMPLATE("attend: any head_dim equals the oracle", Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t head_dim : {1, 7, 16, 31, 32, 64, 80, 96, 128, 130, 256}) {
    for (std::int32_t slots : {1, 4, 9}) {
      CAPTURE(head_dim);
      CAPTURE(slots);
      pass_shape shape;
      shape.kv_lens = {77};
      shape.slots = {slots};
      shape.head_dim = head_dim;
      agrees_with_oracle(fixture, random_problem<float>(shape));
      agrees_with_oracle(fixture, random_problem<fp16>(shape));
      agrees_with_oracle(fixture, random_problem<bf16>(shape));
    }
  }
}

TEST_CASE_TEMPLATE("attend: any group of query heads equals the oracle", Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t group : {1, 2, 4, 7, 8, 71}) {
    for (std::int32_t slots : {1, 5}) {
      CAPTURE(group);
      pass_shape shape;
      shape.kv_heads = 3;
      shape.group = group;
      shape.slots = {slots};
      shape.head_dim = 32;
      agrees_with_oracle(fixture, random_problem<bf16>(shape));
    }
  }
}

TEST_CASE_TEMPLATE("attend: ragged batches, sequences without slots and empty prefixes included, equal the oracle",
                   Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t page_size : {0, 1, 16, 64}) {
    CAPTURE(page_size);
    pass_shape shape;
    shape.kv_lens = {300, 0, 17, 640, 5};
    shape.slots = {3, 2, 0, 1, 40};
    shape.page_size = page_size;
    auto p = random_problem<fp16>(shape);
    p.record = true;
    agrees_with_oracle(fixture, p);
    keep_random(p, 0.3);
    agrees_with_oracle(fixture, p);
  }
}

TEST_CASE_TEMPLATE(
    "attend: lists that are empty, of one, random and full, and keep_all beside them, equal the oracle", Fixture,
    attend_fixture) {
  Fixture fixture;
  for (std::int32_t slots : {1, 5, 9}) {
    pass_shape shape;
    shape.kv_lens = {700, 700};
    shape.slots = {slots, 2};
    shape.kv_heads = 4;
    auto p = random_problem<fp16>(shape);
    p.record = true;
    keep_random(p, 0.22);
    p.kept[0][1] = {};
    p.kept[0][2] = {699};
    p.kept[1][1] = {0};
    p.all = {{false, false, false, true}, {true, false, false, false}};
    agrees_with_oracle(fixture, p);
    keep_random(p, 0.8);
    p.all.clear();
    agrees_with_oracle(fixture, p);
  }
}

TEST_CASE_TEMPLATE("attend: q and out may have any strides", Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t head_dim : {7, 64}) {
    pass_shape shape;
    shape.slots = {5};
    shape.head_dim = head_dim;
    shape.strided = true;
    agrees_with_oracle(fixture, random_problem<fp16>(shape));
  }
}

TEST_CASE_TEMPLATE("attend: a scale given is the scale used", Fixture, attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.scale = 0.37f;
  agrees_with_oracle(fixture, random_problem<float>(shape));
}

TEST_CASE_TEMPLATE("attend: scores far apart and far from zero neither overflow nor lose the largest", Fixture,
                   attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {600};
  shape.slots = {3};
  auto p = random_problem<float>(shape);
  for (float& x : p.q) x *= 20.0f;  // scores of a few hundred
  p.record = true;
  const auto d = compare(p, run(fixture, p));
  CHECK(d.out < 1e-3);
  CHECK(d.weights < 1e-3);
  CHECK(d.sum < 1e-5);
}

// ---- recording ----------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("attend: recorded weights equal the oracle's and sum to one; nothing behind them is touched",
                   Fixture, attend_fixture) {
  Fixture fixture;
  for (auto recorded : {record_slots::newest, record_slots::all}) {
    for (std::int32_t kv_len : {0, 1, 255, 600, 1500}) {
      CAPTURE(kv_len);
      pass_shape shape;
      shape.kv_lens = {kv_len};
      shape.slots = {4};
      shape.head_dim = 32;
      auto p = random_problem<fp16>(shape);
      p.record = true;
      p.recorded = recorded;
      agrees_with_oracle(fixture, p);
      keep_random(p, 0.4);
      agrees_with_oracle(fixture, p);
    }
  }
}

TEST_CASE_TEMPLATE("attend: recording changes no bit of the output", Fixture, attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {1100};
  shape.slots = {5};
  auto p = random_problem<bf16>(shape);
  const auto without = run(fixture, p);
  p.record = true;
  const auto with = run(fixture, p);
  CHECK(without.out == with.out);
  CHECK(without.lse == with.lse);
}

// ---- what a slot must not depend on -------------------------------------------------------------------------

/// Slots [first, first + count) of a dense one-sequence problem as a pass of their own behind a longer prefix.
template <specattn::storage T>
problem<T> part_of(const problem<T>& p, std::int32_t first, std::int32_t count) {
  problem<T> part = p;
  part.shape.kv_lens[0] += first;
  part.shape.slots = {count};
  const std::size_t slot = static_cast<std::size_t>(p.q_heads() * p.shape.head_dim);
  part.q.assign(p.q.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(first) * slot),
                p.q.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(first + count) * slot));
  const auto positions = static_cast<std::size_t>(part.shape.kv_lens[0] + count);
  const std::size_t row = static_cast<std::size_t>(p.shape.kv_heads * p.shape.head_dim);
  part.texts[0].k.resize(positions * row);
  part.texts[0].v.resize(positions * row);
  return part;
}

template <class Fixture, specattn::storage T>
void same_bits_in_parts(Fixture& fixture, const problem<T>& p, std::int32_t chunk) {
  const auto whole = run(fixture, p);
  std::vector<float> out, lse;
  for (std::int32_t first = 0; first < p.slots(); first += chunk) {
    const auto part = run(fixture, part_of(p, first, std::min(chunk, p.slots() - first)));
    out.insert(out.end(), part.out.begin(), part.out.end());
    lse.insert(lse.end(), part.lse.begin(), part.lse.end());
  }
  CHECK(out == whole.out);
  CHECK(lse == whole.lse);
}

TEST_CASE_TEMPLATE("attend: a verify pass gives the bits of single steps", Fixture, attend_fixture) {
  if (!Fixture::to_the_bit) return;
  Fixture fixture;
  for (std::int32_t kv_len : {0, 14, 253, 510, 1031}) {
    for (std::int32_t head_dim : {7, 32, 64, 80, 128}) {
      CAPTURE(kv_len);
      CAPTURE(head_dim);
      pass_shape shape;
      shape.kv_lens = {kv_len};
      shape.slots = {5};
      shape.head_dim = head_dim;
      same_bits_in_parts(fixture, random_problem<float>(shape), 1);
      same_bits_in_parts(fixture, random_problem<fp16>(shape), 1);
      same_bits_in_parts(fixture, random_problem<bf16>(shape), 1);
    }
  }
}

TEST_CASE_TEMPLATE("attend: a prefill gives the bits of its chunks, whatever their size", Fixture, attend_fixture) {
  if (!Fixture::to_the_bit) return;
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {5};
  shape.slots = {270};
  shape.head_dim = 32;
  const auto p = random_problem<fp16>(shape);
  for (std::int32_t chunk : {1, 2, 7, 64, 100, 256}) same_bits_in_parts(fixture, p, chunk);
}

TEST_CASE_TEMPLATE("attend: a list of every position gives the bits of the dense pass", Fixture, attend_fixture) {
  Fixture fixture;
  for (std::int32_t kv_len : {1, 100, 512, 1031}) {
    for (std::int32_t page_size : {0, 32}) {
      pass_shape shape;
      shape.kv_lens = {kv_len};
      shape.slots = {5};
      shape.page_size = page_size;
      auto p = random_problem<fp16>(shape);
      p.record = true;
      const auto dense = run(fixture, p);
      keep_random(p, 2.0);
      const auto listed = run(fixture, p);
      CHECK(dense.out == listed.out);
      CHECK(dense.lse == listed.lse);
      CHECK(dense.weights == listed.weights);
    }
  }
}

TEST_CASE_TEMPLATE("attend: a paged cache gives the bits of a contiguous one", Fixture, attend_fixture) {
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {400, 90};
  shape.slots = {5, 1};
  auto p = random_problem<bf16>(shape);
  const auto contiguous = run(fixture, p);
  p.shape.page_size = 16;
  CHECK(run(fixture, p).out == contiguous.out);
}

TEST_CASE_TEMPLATE("attend: a sequence's bits do not depend on the rest of the batch", Fixture, attend_fixture) {
  if (!Fixture::to_the_bit) return;
  Fixture fixture;
  pass_shape shape;
  shape.kv_lens = {600, 40, 1300};
  shape.slots = {5, 33, 1};
  auto p = random_problem<fp16>(shape);
  keep_random(p, 0.5);
  p.all = {{false, true}, {false, false}, {true, false}};
  const auto batch = run(fixture, p);
  std::vector<float> out;
  std::size_t at = 0;
  for (std::size_t s = 0; s < 3; ++s) {
    problem<fp16> alone;
    alone.shape = p.shape;
    alone.shape.kv_lens = {p.shape.kv_lens[s]};
    alone.shape.slots = {p.shape.slots[s]};
    alone.texts = {p.texts[s]};
    alone.kept = {p.kept[s]};
    alone.all = {p.all[s]};
    const std::size_t size = static_cast<std::size_t>(alone.slots() * alone.q_heads() * shape.head_dim);
    alone.q.assign(p.q.begin() + static_cast<std::ptrdiff_t>(at),
                   p.q.begin() + static_cast<std::ptrdiff_t>(at + size));
    at += size;
    const auto answer_alone = run(fixture, alone);
    out.insert(out.end(), answer_alone.out.begin(), answer_alone.out.end());
  }
  CHECK(out == batch.out);
}

TEST_CASE_TEMPLATE("attend: what later slots hold, infinities included, does not reach earlier ones", Fixture,
                   attend_fixture) {
  Fixture fixture;
  for (std::int32_t slots : {2, 5, 9}) {
    pass_shape shape;
    shape.slots = {slots};
    auto p = random_problem<float>(shape);
    const auto clean = run(fixture, p);
    const std::size_t row = static_cast<std::size_t>(shape.kv_heads * shape.head_dim);
    const std::size_t last = static_cast<std::size_t>(shape.kv_lens[0] + slots - 1) * row;
    for (std::size_t i = last; i < last + row; ++i) {
      p.texts[0].k[i] = std::numeric_limits<float>::quiet_NaN();
      p.texts[0].v[i] = std::numeric_limits<float>::infinity();
    }
    const auto spoiled = run(fixture, p);
    const std::ptrdiff_t earlier = (slots - 1) * p.q_heads() * shape.head_dim;
    CHECK(std::equal(clean.out.begin(), clean.out.begin() + earlier, spoiled.out.begin()));
    CHECK(std::isnan(spoiled.out[static_cast<std::size_t>(earlier)]));
  }
}

// ---- pruned caches ------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("attend: a cache pruned by keep() gives the bits of the selection it was pruned to", Fixture,
                   attend_fixture) {
  Fixture fixture;
  for (std::int32_t page_size : {0, 16}) {
    pass_shape shape;
    shape.kv_lens = {300};
    shape.slots = {1};
    shape.page_size = page_size;
    auto p = random_problem<fp16>(shape);
    keep_random(p, 0.3);
    p.kept[0][1] = p.kept[0][0];
    const auto selected = run(fixture, p);

    auto cache = filled_cache(fixture, p);
    list rows = p.kept[0][0];
    rows.push_back(300);  // the slot's own
    cache.keep(fixture.context(), 0, rows);
    problem<fp16> pruned = p;
    pruned.kept.clear();
    pruned.shape.kv_lens = {static_cast<std::int32_t>(rows.size()) - 1};
    CHECK(run(fixture, pruned, cache).out == selected.out);
  }
}

}  // namespace attend_testing
