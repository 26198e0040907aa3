// The oracle of select(), on cases small enough to read.
#include "oracle/select_oracle.hpp"

#include <doctest/doctest.h>

#include <limits>

namespace {
using list = std::vector<int>;

oracle::select_input one_row(std::vector<float> row, float top_p) {
  oracle::select_input in;
  in.length = static_cast<int>(row.size());
  in.rows = {std::move(row)};
  in.top_p = top_p;
  return in;
}
}  // namespace

TEST_CASE("select oracle: keeps the fewest heaviest positions that reach the target") {
  CHECK(oracle::select(one_row({1, 4, 2, 1}, 0.5f)).list == list{1});
  CHECK(oracle::select(one_row({1, 4, 2, 1}, 0.51f)).list == list{1, 2});
  CHECK(oracle::select(one_row({1, 4, 2, 1}, 0.75f)).list == list{1, 2});
  CHECK(oracle::select(one_row({1, 4, 2, 1}, 0.76f)).list == list{0, 1, 2});
  CHECK(oracle::select(one_row({1, 4, 2, 1}, 0.5f)).mass == 0.5f);
}

TEST_CASE("select oracle: ties go to the smaller position, zeros only to p >= 1") {
  CHECK(oracle::select(one_row({1, 1, 1, 1}, 0.5f)).list == list{0, 1});
  CHECK(oracle::select(one_row({0, 1, 0, 1}, 0.999f)).list == list{1, 3});
  CHECK(oracle::select(one_row({0, 1, 0, 1}, 1.0f)).list == list{0, 1, 2, 3});
  CHECK(oracle::select(one_row({0, 1, 0, 1}, 0.0f)).list.empty());
}

TEST_CASE("select oracle: the target is an exact ceiling") {
  CHECK(oracle::select_target(0.5f, 7) == 4);
  CHECK(oracle::select_target(0.5f, 8) == 4);
  CHECK(oracle::select_target(0.25f, (std::uint64_t{1} << 62) + 1) == (std::uint64_t{1} << 60) + 1);
  CHECK(oracle::select_target(std::numeric_limits<float>::denorm_min(), 1) == 1);
  CHECK(oracle::select_target(std::nextafter(1.0f, 0.0f), 3) == 3);
}

TEST_CASE("select oracle: forced positions count towards the mass and come first under the cap") {
  oracle::select_input in = one_row({1, 5, 1, 1, 2}, 0.75f);
  in.sinks = 1;
  in.recent = 1;
  CHECK(oracle::select(in).list == list{0, 1, 4});
  in.max_tokens = 2;
  CHECK(oracle::select(in).list == list{0, 4});
  CHECK(oracle::select(in).capped);
  in.max_tokens = 1;
  CHECK(oracle::select(in).list == list{4});
}

TEST_CASE("select oracle: rows are united, averaged or maximised at unit mass") {
  oracle::select_input in = one_row({8, 0, 0, 0}, 0.5f);
  in.rows.push_back({0, 0.1f, 0.3f, 0});
  CHECK(oracle::select(in).list == list{0, 2});
  in.combine = oracle::select_rows::mean;
  CHECK(oracle::select(in).list == list{0});
  in.top_p = 0.51f;
  CHECK(oracle::select(in).list == list{0, 2});
  in.combine = oracle::select_rows::max;
  in.top_p = 0.9f;
  CHECK(oracle::select(in).list == list{0, 1, 2});
}

TEST_CASE("select oracle: a page weighs the sum of its positions") {
  oracle::select_input in = one_row({1, 1, 3, 0, 2, 2, 1}, 0.39f);
  in.page_size = 2;
  CHECK(oracle::select(in).list == list{4, 5});
  in.emit_pages = true;
  in.top_p = 0.7f;
  CHECK(oracle::select(in).list == list{1, 2});
}

TEST_CASE("select oracle: bisection keeps everything where 1/1024 of the maximum is too coarse") {
  std::vector<float> row(3000, 1.0f);
  row[7] = 2000.0f;
  oracle::select_input in = one_row(row, 0.5f);
  const auto exact = oracle::select(in).list.size();
  in.bisection = true;
  CHECK(exact < 600);
  CHECK(oracle::select(in).list.size() == 3000);
}
