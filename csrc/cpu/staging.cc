#include "staging.h"

#include <utility>

namespace infinilm::cpu {

namespace {

constexpr int64_t kLeastBytes = 256 << 10;        // smaller ones are cheaper made than looked for
constexpr int64_t kMostWaitingBytes = 128 << 20;  // as much as the host has open at once, at most

}  // namespace

std::shared_ptr<Buffer> Staging::take(int64_t num_bytes) {
  std::unique_ptr<Buffer> buffer = find(num_bytes);
  if (buffer == nullptr) {
    buffer = std::make_unique<Buffer>(num_bytes);
    *held_ += buffer->size();
  }
  return std::shared_ptr<Buffer>(buffer.release(), [self = shared_from_this()](Buffer* freed) {
    self->give_back(std::unique_ptr<Buffer>(freed));
  });
}

// The smallest that waits and is large enough, but not so large that a larger parameter should have it.
std::unique_ptr<Buffer> Staging::find(int64_t num_bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_loading_ = true;
  auto best = waiting_.end();
  for (auto buffer = waiting_.begin(); buffer != waiting_.end(); ++buffer) {
    const int64_t size = (*buffer)->size();
    if (size >= num_bytes && size / 2 <= num_bytes && (best == waiting_.end() || size < (*best)->size())) best = buffer;
  }
  if (best == waiting_.end()) return nullptr;
  std::unique_ptr<Buffer> found = std::move(*best);
  waiting_.erase(best);
  waiting_bytes_ -= found->size();
  return found;
}

void Staging::give_back(std::unique_ptr<Buffer> buffer) {
  const int64_t size = buffer->size();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_loading_ && size >= kLeastBytes && waiting_bytes_ + size <= kMostWaitingBytes) {
      waiting_.push_back(std::move(buffer));
      waiting_bytes_ += size;
      return;
    }
  }
  *held_ -= size;
}

void Staging::end() {
  std::vector<std::unique_ptr<Buffer>> freed;
  const std::lock_guard<std::mutex> lock(mutex_);
  is_loading_ = false;
  waiting_.swap(freed);
  *held_ -= std::exchange(waiting_bytes_, 0);
}

}  // namespace infinilm::cpu
