// Progress of long work: a bar on a terminal, a log line every few seconds otherwise.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>

namespace caravan {

// Shows how much of total_bytes is done. update() is cheap and thread-safe; finish() (or the destructor) ends the line.
class Progress {
 public:
  // title: what is going on, e.g. "loading model.gguf".
  Progress(std::string title, uint64_t total_bytes);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // done_bytes counts from 0 to total_bytes.
  void update(uint64_t done_bytes);
  void add(uint64_t bytes);
  void finish();

 private:
  void show(bool last);

  std::string title_;
  uint64_t total_bytes_;
  bool on_terminal_;
  std::mutex mutex_;
  uint64_t done_bytes_ = 0;
  bool finished_ = false;
  bool shown_ = false;
  std::chrono::steady_clock::time_point start_, last_shown_;
};

// "1.4 GiB", "320 MiB", "17 KiB", "12 B".
std::string format_bytes(uint64_t bytes);

}  // namespace caravan
