#include "base/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

#include "base/log.h"

namespace caravan {
namespace {

constexpr auto kBarInterval = std::chrono::milliseconds(100);
constexpr auto kLogInterval = std::chrono::seconds(3);

}  // namespace

Progress::Progress(std::string title, uint64_t total_bytes)
    : title_(std::move(title)),
      total_bytes_(total_bytes),
      on_terminal_(isatty(STDERR_FILENO) == 1),
      start_(std::chrono::steady_clock::now()),
      last_shown_(start_) {}

Progress::~Progress() { finish(); }

void Progress::update(uint64_t done_bytes) {
  const std::lock_guard lock(mutex_);
  done_bytes_ = done_bytes;
  if (std::chrono::steady_clock::now() - last_shown_ >= (on_terminal_ ? kBarInterval : kLogInterval)) show(false);
}

void Progress::add(uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  done_bytes_ += bytes;
  if (std::chrono::steady_clock::now() - last_shown_ >= (on_terminal_ ? kBarInterval : kLogInterval)) show(false);
}

void Progress::finish() {
  const std::lock_guard lock(mutex_);
  if (finished_) return;
  finished_ = true;
  show(true);
}

void Progress::show(bool last) {
  // A bar comes and goes; log lines stay, and are for those who asked for information.
  if (!spdlog::should_log(on_terminal_ ? spdlog::level::warn : spdlog::level::info)) return;
  const auto now = std::chrono::steady_clock::now();
  last_shown_ = now;
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double share = total_bytes_ > 0 ? static_cast<double>(done_bytes_) / static_cast<double>(total_bytes_) : 1.0;
  const double rate = seconds > 0 ? static_cast<double>(done_bytes_) / seconds : 0.0;
  if (on_terminal_ && (!last || shown_)) {
    constexpr int kWidth = 30;
    const int filled = static_cast<int>(share * kWidth);
    fmt::print(stderr, "\r{} [{:#<{}}{:.<{}}] {:3.0f}%  {}/s   {}", title_, "", filled, "", kWidth - filled,
               share * 100, format_bytes(static_cast<uint64_t>(rate)), last ? "\n" : "");
    std::fflush(stderr);
  } else if (!on_terminal_) {
    spdlog::info("{}: {} of {} ({:.0f}%), {}/s", title_, format_bytes(done_bytes_), format_bytes(total_bytes_),
                 share * 100, format_bytes(static_cast<uint64_t>(rate)));
  }
  shown_ = true;
}

std::string format_bytes(uint64_t bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  for (; value >= 1024 && unit < 4; ++unit) value /= 1024;
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.{}f} {}", value, value < 10 ? 1 : 0, kUnits[unit]);
}

}  // namespace caravan
