#include "weights/model_library.h"

#include <fmt/format.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/log.h"
#include "base/progress.h"
#include "gguf/format.h"

namespace caravan::weights {
namespace {

namespace fs = std::filesystem;

constexpr auto kLogInterval = std::chrono::seconds(10);
// Records are written when a file is done, and after this many bytes.
constexpr uint64_t kSaveEvery = uint64_t{4} << 30;

// True for the second and later parts of a split model: they are read with the first.
bool is_later_part(const fs::path& path) {
  // "...-00002-of-00003.gguf"
  constexpr size_t kLength = sizeof("-00001-of-00001.gguf") - 1;
  const std::string name = path.filename().string();
  if (name.size() < kLength) return false;
  const std::string end = name.substr(name.size() - kLength);
  const auto digits = [&](size_t at) {
    return std::all_of(end.begin() + static_cast<ptrdiff_t>(at), end.begin() + static_cast<ptrdiff_t>(at) + 5,
                       [](unsigned char c) { return std::isdigit(c) != 0; });
  };
  return end[0] == '-' && digits(1) && end.substr(6, 4) == "-of-" && digits(10) && end.substr(1, 5) != "00001";
}

std::set<std::string> list_models(const fs::path& folder) {
  std::set<std::string> paths;
  std::error_code error;
  fs::recursive_directory_iterator it(folder, fs::directory_options::skip_permission_denied, error);
  if (error) throw SystemError("read the folder '" + folder.string() + "'", error.value());
  for (const fs::recursive_directory_iterator end; !error && it != end; it.increment(error)) {
    std::error_code ignored;
    if (it->path().extension() == ".gguf" && it->is_regular_file(ignored) && !is_later_part(it->path()))
      paths.insert(it->path().string());
  }
  return paths;
}

bool has_changed(const std::vector<FileIdentity>& files) {
  return std::ranges::any_of(files, [](const FileIdentity& file) {
    try {
      return identify(file.path) != file;
    } catch (const SystemError&) {
      return true;
    }
  });
}

}  // namespace

ModelLibrary::ModelLibrary(fs::path folder, HashMemory memory)
    : folder_(std::move(folder)), memory_(std::move(memory)) {
  list_models(folder_);  // throws when there is no such folder
  refresh();
  const ModelLibraryStatus now = status();
  spdlog::info("models-dir '{}': {} model{}, {}, {} to be hashed in the background", folder_.string(), now.n_models,
               now.n_models == 1 ? "" : "s", format_bytes(now.total_bytes),
               format_bytes(now.total_bytes - now.hashed_bytes));
  thread_ = std::jthread([this](std::stop_token stop) { work(stop); });
}

ModelLibrary::~ModelLibrary() { thread_.request_stop(); }

void ModelLibrary::refresh() {
  std::set<std::string> paths;
  try {
    paths = list_models(folder_);
  } catch (const SystemError& error) {
    spdlog::warn("models-dir: {}", error.what());
  }
  std::map<std::string, std::shared_ptr<Book>> known;
  {
    const std::lock_guard lock(mutex_);
    known = books_;
  }
  for (const auto& [path, book] : known)
    if (!paths.contains(path) || has_changed(book->files)) drop(book);
  for (const std::string& path : paths) {
    {
      const std::lock_guard lock(mutex_);
      const auto bad = bad_.find(path);
      if (books_.contains(path) || (bad != bad_.end() && !has_changed({bad->second}))) continue;
    }
    add(path);
  }
  const std::lock_guard lock(mutex_);
  idle_ = false;
  changed_.notify_all();
}

void ModelLibrary::add(const fs::path& path) {
  std::shared_ptr<Book> book;
  try {
    book = std::make_shared<Book>(gguf::Model::open(path), memory_);
    for (const InputFile& file : book->model.files()) book->files.push_back(identify(file.path()));
  } catch (const Error& error) {
    spdlog::warn("models-dir: {}", error.what());
    try {
      const std::lock_guard lock(mutex_);
      bad_[path.string()] = identify(path);
    } catch (const SystemError&) {
    }
    return;
  }
  const std::lock_guard lock(mutex_);
  bad_.erase(path.string());
  books_[path.string()] = book;
  for (const gguf::TensorInfo& tensor : book->model.tensors()) {
    total_bytes_ += tensor.size_bytes;
    by_shape_[{tensor.name, tensor.type, tensor.ne}].push_back({book, &tensor, 0});
    if (const auto hashes = book->hashes.find(tensor)) {
      hashed_bytes_ += tensor.size_bytes;
      index_hashes(book, tensor, *hashes);
    }
  }
}

void ModelLibrary::drop(const std::shared_ptr<Book>& book) {
  const std::lock_guard lock(mutex_);
  std::erase_if(books_, [&](const auto& item) { return item.second == book; });
  std::erase_if(by_digest_, [&](const auto& item) { return item.second.book == book; });
  for (auto& [shape, places] : by_shape_) std::erase_if(places, [&](const Place& p) { return p.book == book; });
  std::erase_if(by_shape_, [](const auto& item) { return item.second.empty(); });
  for (const gguf::TensorInfo& tensor : book->model.tensors()) {
    total_bytes_ -= tensor.size_bytes;
    if (book->hashes.knows(tensor)) hashed_bytes_ -= tensor.size_bytes;
  }
  // What this file was found to hold, another may hold too.
  for (const auto& [path, other] : books_)
    for (const gguf::TensorInfo& tensor : other->model.tensors())
      if (const auto hashes = other->hashes.find(tensor)) index_hashes(other, tensor, *hashes);
}

// Under mutex_.
void ModelLibrary::index_hashes(const std::shared_ptr<Book>& book, const gguf::TensorInfo& tensor,
                                const std::vector<Digest>& hashes) {
  for (uint64_t i = 0; i < hashes.size(); ++i) by_digest_.try_emplace(hashes[i], Place{book, &tensor, i});
}

// A chunk was read and hashed; when it was the last of its tensor, the tensor's hashes are known for good.
void ModelLibrary::note(const Place& place, const Digest& digest) {
  const std::lock_guard lock(mutex_);
  const auto book = books_.find(place.book->model.path());
  if (book == books_.end() || book->second != place.book) return;  // dropped meanwhile
  by_digest_.try_emplace(digest, place);
  if (place.book->hashes.knows(*place.tensor)) return;
  auto& known = place.book->partial[place.tensor];
  known[place.chunk] = digest;
  if (known.size() < n_chunks(place.tensor->size_bytes)) return;
  std::vector<Digest> all;
  for (const auto& [chunk, hash] : known) all.push_back(hash);
  place.book->partial.erase(place.tensor);
  place.book->hashes.learn(*place.tensor, std::move(all));
  hashed_bytes_ += place.tensor->size_bytes;
}

// Chunks of tensors that look like the wanted one and whose hash is not known.
std::vector<ModelLibrary::Place> ModelLibrary::candidates(const ChunkRef& chunk) const {
  std::vector<Place> places;
  const std::lock_guard lock(mutex_);
  const auto found = by_shape_.find({chunk.tensor->name, chunk.tensor->type, chunk.tensor->ne});
  if (found == by_shape_.end()) return places;
  for (const Place& like : found->second) {
    if (like.book->hashes.knows(*like.tensor)) continue;
    const auto partial = like.book->partial.find(like.tensor);
    if (partial != like.book->partial.end() && partial->second.contains(chunk.index)) continue;
    places.push_back({like.book, like.tensor, chunk.index});
  }
  return places;
}

bool ModelLibrary::may_have(const ChunkRef& chunk) const {
  if (chunk.digest() == nullptr) return false;
  {
    const std::lock_guard lock(mutex_);
    if (by_digest_.contains(*chunk.digest())) return true;
  }
  return !candidates(chunk).empty();
}

bool ModelLibrary::contains(const Digest& digest) const {
  const std::lock_guard lock(mutex_);
  return by_digest_.contains(digest);
}

bool ModelLibrary::read_place(const Place& place, std::span<std::byte> out) const {
  if (place.size_bytes() != out.size()) return false;
  try {
    place.book->model.read(*place.tensor, place.chunk * kChunkBytes, out);
    return true;
  } catch (const Error& error) {
    spdlog::warn("models-dir: {}", error.what());
    return false;
  }
}

bool ModelLibrary::read(const ChunkRef& chunk, std::span<std::byte> out) {
  if (chunk.digest() == nullptr) return false;
  std::optional<Place> known;
  {
    const std::lock_guard lock(mutex_);
    const auto found = by_digest_.find(*chunk.digest());
    if (found != by_digest_.end()) known = found->second;
  }
  if (known) return read_place(*known, out);
  for (const Place& place : candidates(chunk)) {
    if (!read_place(place, out)) continue;
    const Digest digest = sha256(out);
    note(place, digest);
    if (digest == *chunk.digest()) return true;
  }
  return false;
}

std::optional<std::vector<std::byte>> ModelLibrary::read(const Digest& digest) {
  Place place;
  {
    const std::lock_guard lock(mutex_);
    const auto found = by_digest_.find(digest);
    if (found == by_digest_.end()) return std::nullopt;
    place = found->second;
  }
  std::vector<std::byte> bytes(static_cast<size_t>(place.size_bytes()));
  if (!read_place(place, bytes)) return std::nullopt;
  return bytes;
}

void ModelLibrary::discard(const Digest& digest) {
  std::shared_ptr<Book> book;
  {
    const std::lock_guard lock(mutex_);
    const auto found = by_digest_.find(digest);
    if (found == by_digest_.end()) return;
    book = found->second.book;
  }
  spdlog::warn("models-dir: '{}' no longer holds what it held; it is hashed again", book->model.path());
  drop(book);
  book->hashes.forget();
  add(book->model.path());
}

ModelLibraryStatus ModelLibrary::status() const {
  const std::lock_guard lock(mutex_);
  return {static_cast<uint32_t>(books_.size()), total_bytes_, hashed_bytes_};
}

void ModelLibrary::wait_until_hashed() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return idle_; });
}

// The first chunk whose hash is not known.
std::optional<ModelLibrary::Place> ModelLibrary::next_unknown() {
  const std::lock_guard lock(mutex_);
  for (const auto& [path, book] : books_) {
    for (const gguf::TensorInfo& tensor : book->model.tensors()) {
      if (tensor.size_bytes == 0 || book->hashes.knows(tensor)) continue;
      const auto partial = book->partial.find(&tensor);
      if (partial == book->partial.end()) return Place{book, &tensor, 0};
      for (uint64_t i = 0; i < n_chunks(tensor.size_bytes); ++i)
        if (!partial->second.contains(i)) return Place{book, &tensor, i};
    }
  }
  return std::nullopt;
}

void ModelLibrary::work(std::stop_token stop) {
  const sched_param parameters{};
  pthread_setschedparam(pthread_self(), SCHED_IDLE, &parameters);  // where the system lets us
  std::shared_ptr<Book> current;
  std::vector<std::byte> bytes;
  uint64_t unsaved = 0;
  auto next_log = std::chrono::steady_clock::now() + kLogInterval;
  const auto save = [&] {
    if (current && unsaved > 0) current->hashes.save();
    unsaved = 0;
  };
  while (!stop.stop_requested()) {
    {
      std::unique_lock lock(mutex_);
      if (!changed_.wait(lock, stop, [&] { return !idle_ && n_resting_ == 0; })) break;
    }
    const std::optional<Place> place = next_unknown();
    if (!place || place->book != current || unsaved >= kSaveEvery) save();
    if (!place) {
      const std::lock_guard lock(mutex_);
      if (current) spdlog::info("models-dir: {} are hashed", format_bytes(hashed_bytes_));
      current.reset();
      idle_ = true;
      changed_.notify_all();
      continue;
    }
    current = place->book;
    bytes.resize(static_cast<size_t>(place->size_bytes()));
    if (!read_place(*place, bytes)) {  // it shrank, or cannot be read any more
      drop(current);
      current.reset();
      continue;
    }
    note(*place, sha256(bytes));
    unsaved += bytes.size();
    if (const auto now = std::chrono::steady_clock::now(); now >= next_log) {
      next_log = now + kLogInterval;
      const ModelLibraryStatus s = status();
      spdlog::info("models-dir: {} of {} hashed", format_bytes(s.hashed_bytes), format_bytes(s.total_bytes));
    }
  }
  save();
}

}  // namespace caravan::weights
