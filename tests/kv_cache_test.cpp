// kv_cache on the CPU.
#include "specattn/cpu/kv_cache.hpp"

#include "cpu_fixture.hpp"

struct kv_cache_fixture : cpu_fixture {
  template <class T>
  std::vector<std::remove_const_t<T>> read(T* from, std::ptrdiff_t count) {
    return {from, from + count};
  }
};

#include "kv_cache_cases.hpp"

namespace kv_cache_testing {

TEST_CASE("kv_cache: rows appended by a team of threads are the rows appended by one") {
  std::vector<float> rows(700 * 2 * 64);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i % 1999) * 0.37f - 300.0f;
  const specattn::view<const float, 3> view(rows.data(), {700, 2, 64});
  specattn::context<specattn::cpu> team(3);
  specattn::context<specattn::cpu> alone(1);
  const kv_cache_shape shape{1, 1, 2, 64, 700, 16, 0};
  specattn::kv_cache<specattn::bf16> a(shape);
  specattn::kv_cache<specattn::bf16> b(shape);
  a.append(team, 0, 0, view, view);
  for (int i = 0; i < 700; ++i) b.append(alone, 0, 0, view.slice(i, 1), view.slice(i, 1), i);
  int different = 0;
  for (int i = 0; i < 700; ++i)
    for (int head = 0; head < 2; ++head)
      for (int d = 0; d < 64; ++d)
        different += a.layer(0).key(0, i, head)[d].bits != b.layer(0).key(0, i, head)[d].bits ? 1 : 0;
  CHECK(different == 0);
}

}  // namespace kv_cache_testing
