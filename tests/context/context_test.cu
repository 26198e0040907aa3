// context<cuda>, buffer<T, cuda> and launches among other threads, devices and errors.
#include <atomic>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "cuda_fixture.cuh"
#include "specattn/cuda/device/graph.cuh"
#include "specattn/cuda/importance.cuh"
#include "specattn/cuda/round/record.cuh"
#include "specattn/cuda/select.cuh"
#include "specattn/cuda/verify.cuh"

#include <doctest/doctest.h>

namespace {

using specattn::buffer;
using specattn::context;
using device = specattn::cuda;
using specattn::detail::check_cuda;

/// A stream of the device that is current, and rows to select from.
struct selector {
  cudaStream_t stream = nullptr;
  context<device> ctx;
  buffer<float, device> weights;
  specattn::selection<device> kept;
  std::ptrdiff_t groups, length;

  selector(std::ptrdiff_t rows, std::ptrdiff_t n, unsigned flags = cudaStreamNonBlocking)
      : stream(make(flags)),
        ctx(stream),
        weights(static_cast<std::size_t>(rows * n)),
        kept(rows, n),
        groups(rows),
        length(n) {}
  selector(const selector&) = delete;
  selector& operator=(const selector&) = delete;
  ~selector() { cudaStreamDestroy(stream); }

  static cudaStream_t make(unsigned flags) {
    cudaStream_t made = nullptr;
    check_cuda(cudaStreamCreateWithFlags(&made, flags), "test");
    return made;
  }
  void select(const specattn::selection_rule& rule = {.top_p = 0.9f}) {
    specattn::weight_rows<float, device> from;
    from.weights = specattn::view<const float, 3, device>(weights.data(), {groups, 1, length});
    specattn::select(ctx, from, rule, kept.view());
  }
};

__global__ void idle_kernel() {}

/// What a call throws; "" if nothing.
std::string thrown_by(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("launch: a kernel's limit of shared memory is the same after long rows and after short ones") {
  const auto limit_after = [](std::ptrdiff_t length) {
    selector rows(4, length);
    rows.select();
    check_cuda(cudaStreamSynchronize(rows.stream), "test");
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, specattn::detail::select_rows_kernel<float, false>), "test");
    CHECK(attributes.maxDynamicSharedSizeBytes + static_cast<int>(attributes.sharedSizeBytes) <=
          rows.ctx.block_shared_bytes());
    return attributes.maxDynamicSharedSizeBytes;
  };
  const int first = limit_after(16384);
  CHECK(limit_after(256) == first);
  CHECK(limit_after(100000) == first);
}

TEST_CASE("launch: rows of as many tokens as shared memory holds, and of one more, are sampled") {
  selector any(1, 1);
  auto& ctx = any.ctx;
  const auto needs = [&](std::ptrdiff_t vocab) { return specattn::verify_workspace_bytes(ctx, 1, vocab); };
  std::ptrdiff_t low = 1, high = std::ptrdiff_t{1} << 24;  // the first vocabulary whose rows go through memory
  while (low + 1 < high) {
    const std::ptrdiff_t middle = (low + high) / 2;
    (needs(middle) > needs(1) ? high : low) = middle;
  }
  for (const std::ptrdiff_t vocab : {low, high}) {
    CAPTURE(vocab);
    std::vector<float> host(static_cast<std::size_t>(vocab), 0.0f);
    host.back() = 1.0f;
    const auto logits = specattn::detail::to_device(host);
    const auto samplers = specattn::detail::to_device(std::vector<specattn::sampler_options>{{.temperature = 0.0f}});
    const auto positions = specattn::detail::to_device(std::vector<std::int64_t>{3});
    const buffer<std::int32_t, device> tokens(1);
    ctx.reserve_workspace(needs(vocab));
    CHECK(thrown_by([&] {
            specattn::sample<device>(ctx, logits.shaped({1, vocab}), samplers.shaped({1}), positions.shaped({1}),
                                     specattn::random_use::draft, {}, tokens.shaped({1}));
            check_cuda(cudaStreamSynchronize(any.stream), "test");
          }) == "");
    std::int32_t token = -1;
    check_cuda(cudaMemcpy(&token, tokens.data(), sizeof token, cudaMemcpyDeviceToHost), "test");
    CHECK(token == vocab - 1);
  }
}

TEST_CASE("launch: two host threads select from rows of different lengths") {
  std::atomic<int> ready{0}, failures{0};
  std::string messages[2];
  const auto work = [&](std::ptrdiff_t length, std::string& message) {
    message = thrown_by([&] {
      selector rows(1024, length);
      ++ready;
      while (ready < 2) std::this_thread::yield();
      for (int i = 0; i < 20000 && failures == 0; ++i) {
        rows.select();
        if (i % 256 == 0) check_cuda(cudaStreamSynchronize(rows.stream), "test");
      }
      check_cuda(cudaStreamSynchronize(rows.stream), "test");
    });
    if (!message.empty()) ++failures, ready = 2;
  };
  std::thread a([&] { work(16384, messages[0]); }), b([&] { work(256, messages[1]); });
  a.join();
  b.join();
  CHECK(messages[0] == "");
  CHECK(messages[1] == "");
}

TEST_CASE(
    "buffer: threads make and drop buffers, mixtures and contexts while another captures a stream of any kind") {
  std::atomic<bool> stop{false};
  std::string made, captured;
  std::thread other([&] {
    made = thrown_by([&] {
      for (int i = 0; i < 400 && !stop; ++i) {
        const buffer<float, device> one(1000);
        const auto copy = specattn::detail::to_device(std::vector<int>(100, i));
        context<device> ctx(nullptr, 100);
      }
    });
    stop = true;
  });
  captured = thrown_by([&] {
    selector blocking(4, 4096, cudaStreamDefault), free(4, 4096, cudaStreamNonBlocking);
    while (!stop) {
      for (selector* each : {&blocking, &free}) {
        const specattn::detail::captured_graph graph(each->stream, [&] {
          for (int i = 0; i < 20; ++i) each->select();
        });
        graph.launch(each->stream);
        check_cuda(cudaStreamSynchronize(each->stream), "test");
      }
    }
  });
  stop = true;
  other.join();
  CHECK(made == "");
  CHECK(captured == "");
}

TEST_CASE("buffer: a thread may make one while it captures in the mode that forbids the most") {
  selector rows(4, 4096);
  check_cuda(cudaStreamBeginCapture(rows.stream, cudaStreamCaptureModeGlobal), "test");
  const std::string made = thrown_by([] { buffer<float, device> one(1000); });
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(rows.stream, &graph);
  if (graph != nullptr) cudaGraphDestroy(graph);
  CHECK(made == "");
  CHECK(ended == cudaSuccess);
}

TEST_CASE("buffer: it is zero when it is made, whatever the memory held") {
  for (int turn = 0; turn < 8; ++turn) {
    buffer<unsigned char, device> one(1 << 22);
    std::vector<unsigned char> host(one.size(), 1);
    check_cuda(cudaMemcpy(host.data(), one.data(), one.bytes(), cudaMemcpyDeviceToHost), "test");
    CHECK(host == std::vector<unsigned char>(one.size(), 0));
    check_cuda(cudaMemset(one.data(), 0xff, one.bytes()), "test");
  }
}

TEST_CASE(
    "errors: a caught device_error leaves none in the runtime, and one of the program's is neither blamed nor lost") {
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK_THROWS_AS((buffer<float, device>(std::size_t{1} << 45)), specattn::device_error);
  CHECK(cudaGetLastError() == cudaSuccess);
  selector rows(4, 4096);
  const auto left_after = [](const auto& work) {
    CHECK(cudaSetDevice(1 << 20) != cudaSuccess);  // the program's own error
    work();
    return cudaGetLastError();
  };
  // Whether calls that succeed let an earlier error stand is the runtime's affair; the library loses none that they keep.
  const cudaError_t kept = left_after([&] {
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    cudaMalloc(&memory, 1000);
    cudaMemsetAsync(memory, 0, 1000, stream);
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaFuncSetAttribute(idle_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 1024);
    cudaLaunchConfig_t config{};
    config.gridDim = config.blockDim = dim3(1);
    config.stream = stream;
    cudaLaunchKernelEx(&config, idle_kernel);
    cudaStreamSynchronize(stream);
    cudaFree(memory);
    cudaStreamDestroy(stream);
  });
  const cudaError_t left = left_after([&] {
    CHECK(thrown_by([&] {
            buffer<float, device> one(1000);
            rows.select();
            check_cuda(cudaStreamSynchronize(rows.stream), "test");
          }) == "");
  });
  CHECK(left == kept);
  CHECK(cudaGetLastError() == cudaSuccess);
}

TEST_CASE("context: its workspace and its launches are its stream's device's, whichever is current") {
  int devices = 0;
  check_cuda(cudaGetDeviceCount(&devices), "test");
  if (devices < 2) {
    MESSAGE("needs two devices");
    return;
  }
  check_cuda(cudaSetDevice(1), "test");
  {
    selector rows(4, 8192);
    check_cuda(cudaSetDevice(0), "test");
    CHECK(rows.ctx.device() == 1);
    const specattn::selection_rule rule{.top_p = 0.9f, .page_size = 4, .output = specattn::emit::pages};
    rows.ctx.reserve_workspace(specattn::select_workspace_bytes(rows.ctx, 4, 1, 8192, rule));
    cudaPointerAttributes where{};
    check_cuda(cudaPointerGetAttributes(&where, rows.ctx.workspace(1, "test")), "test");
    CHECK(where.device == 1);
    CHECK(thrown_by([&] {
            rows.select(rule);
            rows.select();
            check_cuda(cudaStreamSynchronize(rows.stream), "test");
          }) == "");
    int current = -1;
    check_cuda(cudaGetDevice(&current), "test");
    CHECK(current == 0);
#if CUDART_VERSION >= 12080
    context<device> late(rows.stream, 100);  // made while another device is current
    CHECK(late.device() == 1);
#endif
  }
  check_cuda(cudaSetDevice(0), "test");
}

TEST_CASE("add_heads: more lists than a grid has rows, each the mean of its heads") {
  selector any(1, 1);
  const std::int32_t sequences = 513, layers = 16, kv_heads = 8, groups = sequences * layers * kv_heads;
  std::vector<specattn::fp16> weights(static_cast<std::size_t>(groups) * 8);
  for (std::size_t i = 0; i < weights.size(); ++i)
    weights[i] = specattn::from_float<specattn::fp16>(static_cast<float>(i / 8 % 251 + 1));
  const auto rows = specattn::detail::to_device(weights);
  const auto masses = specattn::detail::to_device(std::vector<float>(static_cast<std::size_t>(groups), 0x1p15f));
  const auto prefix = specattn::detail::to_device(std::vector<std::int32_t>(static_cast<std::size_t>(sequences), 8));
  const buffer<specattn::fp16, device> sums(weights.size());
  specattn::detail::round_arrays round{};
  round.sequences = sequences;
  round.weighed_lens = prefix.data();
  const specattn::detail::add_heads_launch launch{round, rows.data(), masses.data(), sums.data(), 8, 1, kv_heads};
  specattn::detail::start_kernel(any.ctx, specattn::detail::add_heads_kernel, dim3(1, static_cast<unsigned>(groups)),
                                 specattn::detail::record_threads, launch, "test");
  check_cuda(cudaStreamSynchronize(any.stream), "test");
  std::vector<specattn::fp16> got(weights.size());
  check_cuda(cudaMemcpy(got.data(), sums.data(), sums.bytes(), cudaMemcpyDeviceToHost), "test");
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < got.size(); ++i) wrong += got[i].bits != weights[i].bits ? 1 : 0;
  CHECK(wrong == 0);
}

TEST_CASE("launch: a grid that no launch takes is refused with its size") {
  selector any(1, 1);
  specattn::detail::round_arrays round{};
  const specattn::detail::add_heads_launch launch{round, nullptr, nullptr, nullptr, 8, 1, 1};
  CHECK_THROWS_WITH_AS(specattn::detail::start_kernel(any.ctx, specattn::detail::add_heads_kernel, dim3(1, 65537),
                                                      specattn::detail::record_threads, launch, "test"),
                       doctest::Contains("test: 1 by 65537 by 1 CTAs are more than one launch takes"),
                       specattn::contract_error);
}
