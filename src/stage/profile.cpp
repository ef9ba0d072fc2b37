#include "stage/profile.h"

#include <algorithm>
#include <chrono>
#include <semaphore>
#include <thread>
#include <vector>

#include "base/error.h"
#include "graph/builder.h"

namespace caravan::stage {
namespace {

using tensor::DType;
using Clock = std::chrono::steady_clock;

constexpr int64_t kWidth = 2048;      // values per row of the matrices
constexpr int64_t kManyRows = 128;    // rows of a step that is bound by arithmetic
constexpr int64_t kLayerRows = 2048;  // outputs of a matrix as wide as a layer's
constexpr auto kShortest = std::chrono::milliseconds(40);
constexpr size_t kLeastRuns = 3;

// One matrix of a type on a device, and the product with it.
class Product {
 public:
  Product(device::Device& device, DType type, int64_t n_in, int64_t n_out, int64_t max_rows)
      : n_in_(n_in), n_out_(n_out) {
    const graph::TensorMap tensors = {{"w", {type, {n_in, n_out, 1, 1}}}};
    graph::Builder builder(tensors);
    builder.output("y", builder.mul_mat(builder.matrix("w", {n_in, n_out}), builder.hidden(n_in)));
    const graph::Graph graph = builder.finish();
    const auto weights = device.create_weights(graph.weights);
    const std::vector<std::byte> row = random_row(type, n_in);
    for (int64_t i = 0; i < n_out; ++i) weights->upload(0, static_cast<uint64_t>(i) * row.size(), row);
    weights->finish();
    executable_ = device.compile(graph, weights, nullptr, {max_rows, 1, 0});
  }

  // Seconds of one product with n_rows: the median of several.
  double seconds(int64_t n_rows) {
    return median_seconds(kLeastRuns, kShortest, [&] { run(n_rows); });
  }

  void run(int64_t n_rows) {
    hidden_.resize(static_cast<size_t>(n_in_ * n_rows), 0.5f);
    result_.resize(static_cast<size_t>(n_out_ * n_rows));
    const std::span<float> outputs[] = {result_};
    device::RunInput input;
    input.n_rows = n_rows;
    input.hidden = hidden_;
    input.outputs = outputs;
    executable_->run(input);
  }

 private:
  // Values of an alternating ramp: no scale is zero or subnormal.
  static std::vector<std::byte> random_row(DType type, int64_t n) {
    std::vector<float> values(static_cast<size_t>(n));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i * 37 % 64) / 32 - 1;
    std::vector<std::byte> row(tensor::row_bytes(type, static_cast<uint64_t>(n)));
    const tensor::DTypeInfo& info = tensor::dtype_info(type);
    if (info.quantize != nullptr) {
      info.quantize(values.data(), row.data(), n);
    } else {
      // Some bytes of such blocks are scales: a byte pattern that is a small normal number in every format.
      std::fill(row.begin(), row.end(), std::byte{0x2c});
    }
    return row;
  }

  const int64_t n_in_, n_out_;
  std::unique_ptr<device::Executable> executable_;
  std::vector<float> hidden_, result_;
};

// What a step costs however small, on a device that has waited: a thread of its own is woken, computes, and wakes the
// one that passes the result on.
double handover_seconds(device::Device& device) {
  constexpr size_t kSteps = 9;
  constexpr auto kPause = std::chrono::milliseconds(4);
  Product product(device, DType::f32, 64, 64, 1);
  std::binary_semaphore begin(0), done(0);
  std::jthread stage([&](const std::stop_token& stop) {
    for (begin.acquire(); !stop.stop_requested(); begin.acquire()) {
      product.run(1);
      done.release();
    }
  });
  const auto step = [&] {
    begin.release();
    done.acquire();
  };
  const double seconds = median_seconds(kSteps, {}, step, [&] { std::this_thread::sleep_for(kPause); });
  stage.request_stop();
  begin.release();
  return seconds;
}

// Outputs of a matrix of that type which takes about so many bytes on the device.
int64_t outputs_for(const device::Device& device, DType type, uint64_t bytes) {
  constexpr int64_t kSample = 256;
  const uint64_t sample = device.weight_bytes({"w", type, {kWidth, kSample, 1, 1}, graph::WeightRole::matrix});
  return std::max<int64_t>(1, static_cast<int64_t>(bytes / std::max<uint64_t>(sample, 1))) * kSample;
}

}  // namespace

double median_seconds(size_t least_runs, std::chrono::milliseconds least_time, const std::function<void()>& run,
                      const std::function<void()>& before) {
  constexpr size_t kMostRuns = 200;
  std::vector<double> seconds;
  const auto start = Clock::now();
  while (seconds.size() < least_runs || (Clock::now() - start < least_time && seconds.size() < kMostRuns)) {
    if (before) before();
    const auto begin = Clock::now();
    run();
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
  }
  const auto middle = seconds.begin() + static_cast<ptrdiff_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), middle, seconds.end());
  return std::max(*middle, 1e-9);
}

double LayerTimes::operator()(double rows) const {
  CARAVAN_ASSERT(!n_rows.empty() && n_rows.size() == seconds.size(), "there are points");
  if (n_rows.size() == 1) return seconds[0] * rows / n_rows[0];
  size_t i = 1;
  while (i + 1 < n_rows.size() && rows > n_rows[i]) ++i;
  const double slope = (seconds[i] - seconds[i - 1]) / (n_rows[i] - n_rows[i - 1]);
  return std::max(seconds[i - 1] + slope * (rows - n_rows[i - 1]), 0.0);
}

MatrixRate DeviceProfile::rate(DType type) const {
  if (const auto found = matrices.find(type); found != matrices.end()) return found->second;
  CARAVAN_ASSERT(!matrices.empty(), "a profile holds at least one type");
  MatrixRate slowest = matrices.begin()->second;
  for (const auto& [other, rate] : matrices) {
    slowest.bytes_per_s = std::min(slowest.bytes_per_s, rate.bytes_per_s);
    slowest.ops_per_s = std::min(slowest.ops_per_s, rate.ops_per_s);
  }
  return slowest;
}

void measure_profile(device::Device& device, std::span<const DType> types, uint64_t most_bytes,
                     DeviceProfile& profile) {
  // Room for activations beside the matrix.
  const uint64_t bytes = std::min(kProfileBytes, most_bytes) / 10 * 8;
  for (const DType type : types) {
    if (profile.matrices.contains(type) || !tensor::can_dequantize(type)) continue;
    MatrixRate& rate = profile.matrices[type];
    {
      const int64_t n_out = outputs_for(device, type, bytes);
      Product product(device, type, kWidth, n_out, 1);
      rate.bytes_per_s =
          static_cast<double>(tensor::row_bytes(type, kWidth)) * static_cast<double>(n_out) / product.seconds(1);
    }
    const int64_t n_out = std::min(kLayerRows, outputs_for(device, type, bytes));
    Product product(device, type, kWidth, n_out, kManyRows);
    rate.ops_per_s = 2.0 * kWidth * static_cast<double>(n_out * kManyRows) / product.seconds(kManyRows);
  }
  if (profile.step_seconds == 0) profile.step_seconds = handover_seconds(device);
  for (const auto& [type, rate] : profile.matrices)
    profile.cache_bytes_per_s = std::max(profile.cache_bytes_per_s, rate.bytes_per_s);
}

}  // namespace caravan::stage
